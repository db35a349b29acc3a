"""The work folder of several processes: the first one holds and writes it, all know what it holds.

Every process must see the folder under the same path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rilq.converter.ranks import Ranks
from rilq.converter.workdir import Record, WorkDir


class SharedWorkDir(WorkDir):
    """A work folder whose units are finished by all processes together.

    Args:
        path, job, records: of the open folder, as the first process knows them.
        ranks: this process among the others.
    """

    shared = True

    def __init__(
        self, path: Path, job: dict[str, Any], records: list[Record], ranks: Ranks
    ) -> None:
        super().__init__(path, job, records)
        self._ranks = ranks

    def commit(
        self,
        stage: str,
        unit: str,
        facts: Mapping[str, Any],
        *,
        files: Mapping[Path, str] | None = None,
        passing: Mapping[Path, str] | None = None,
    ) -> Record:
        """As `WorkDir.commit`, called by all processes; facts are the first one's, files all's."""
        made = self._ranks.gather((dict(files or {}), dict(passing or {})))
        record = None
        if self._ranks.first:
            stay = {path: digest for each, _ in made for path, digest in each.items()}
            pass_on = {path: digest for _, each in made for path, digest in each.items()}
            record = super().commit(stage, unit, facts, files=stay, passing=pass_on)
        record = self._ranks.of_first(record)
        assert record is not None, "the first process has made it"
        if not self._ranks.first:
            self.records.append(record)
        return record

    def own(self) -> WorkDir:
        """See `WorkDir.own`."""
        return WorkDir(self.path, self.job, self.records)
