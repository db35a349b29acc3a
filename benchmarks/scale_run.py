"""One `rilq convert` in a process of its own, watched from outside."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LOOK = 0.005  # seconds between two looks at a process's memory


@dataclass(frozen=True)
class Watched:
    """What a process took, and what it said.

    Attributes:
        cpu_seconds: user and system time of all its threads.
        private_bytes: the highest of its private resident memory (RssAnon) that was seen.
        resident_bytes: of all its resident memory (VmHWM), mapped files among it.
        data_bytes: of its private writable address space (VmData), which RLIMIT_DATA limits.
        disk_bytes: the most that files of its work folder and output had.
    """

    code: int
    cpu_seconds: float
    wall_seconds: float
    private_bytes: int
    resident_bytes: int
    data_bytes: int
    out: str
    err: str
    disk_bytes: int = 0

    @property
    def told(self) -> dict[str, Any]:
        """What `--json` printed."""
        assert self.code == 0, f"exit code {self.code}: {self.err[-2000:]}"
        return dict(json.loads(self.out))


def convert(
    model: Path,
    out: Path,
    *options: object,
    rows: int,
    seqlen: int,
    data_limit: int | None = None,
    private_limit: int | None = None,
) -> Watched:
    """Convert a checkpoint of `scale_checkpoint.py` on the CPU with one thread.

    Args:
        out: a folder that does not exist; its work folder is beside it.
        data_limit, private_limit: see `watch`.
    """
    work, disk = out.with_name(f"{out.name}.rilq-work"), out.with_name("disk.json")
    command = [
        *(sys.executable, str(Path(__file__).with_name("scale_disk.py"))),
        *(str(disk), str(out), str(work), "--", "convert", str(model)),
        *("--dataset", str(model / "text.txt"), "--nsamples", str(rows), "--seqlen", str(seqlen)),
        *("--device", "cpu", "-o", str(out), "--db", "none", "--resume", "never"),
        *("--quiet", "--json", *map(str, options)),
    ]
    watched = watch(command, data_limit, private_limit)
    return replace(watched, disk_bytes=json.loads(disk.read_text()) if disk.exists() else 0)


def watch(
    command: list[str],
    data_limit: int | None = None,
    private_limit: int | None = None,
) -> Watched:
    """Run a command to its end and look at it meanwhile.

    Args:
        data_limit: RLIMIT_DATA of the process.
        private_limit: private resident memory at which it is killed, where it is seen.
    """

    def limited() -> None:
        if data_limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))

    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    private = resident = data = 0
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            command, stdout=out, stderr=err, env=os.environ | threads, preexec_fn=limited
        )
        while True:
            done, status, usage = os.wait4(child.pid, os.WNOHANG)
            if done:
                break
            seen = _memory(child.pid)
            private, data = max(private, seen["RssAnon"]), max(data, seen["VmData"])
            resident = max(resident, seen["VmHWM"])
            if private_limit is not None and private > private_limit:
                child.kill()
            time.sleep(LOOK)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        return Watched(
            child.returncode,
            usage.ru_utime + usage.ru_stime,
            time.perf_counter() - begun,
            private,
            resident,
            data,
            out.read(),
            err.read(),
        )


def _memory(pid: int) -> dict[str, int]:
    """Bytes of a process's memory; zeros while it begins or ends."""
    found = {"RssAnon": 0, "VmHWM": 0, "VmData": 0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError):
        pass
    return found
