"""The jobs of a batch file: defaults, matrices, and every mistake in them at once.

A job is a command line of `rilq convert`, written as a mapping: so every option of that command can
be given, and is checked by its own code.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash
import yaml

from rilq.converter.options import ConvertOptions
from rilq.errors import InputError, OptionError, printable

# Keys of a job that are no options of `rilq convert`.
OWN = ("name", "model", "matrix")


@dataclass(frozen=True)
class Option:
    """How one option is written on the command line of `rilq convert`.

    Attributes:
        flag: it takes no value.
        repeatable: it may be given several times.
        off: the flag's opposite, such as `--no-keep-work`; None if there is none.
    """

    flag: bool
    repeatable: bool
    off: str | None = None


@dataclass(frozen=True)
class ConvertCommand:
    """The command line of `rilq convert`.

    Attributes:
        options: long names without their dashes, such as `group-size`.
        read: words after `rilq convert` to values; raises OptionError, naming the first wrong one.
        make: what `read` gave to options; raises OptionError.
    """

    options: Mapping[str, Option]
    read: Callable[[Sequence[str]], dict[str, Any]]
    make: Callable[[Mapping[str, Any]], ConvertOptions]


@dataclass(frozen=True)
class BatchJob:
    """One conversion.

    Attributes:
        name: unique in the batch, and fit for a file's name.
        arguments: words after `rilq convert`.
        options: what they mean.
    """

    name: str
    arguments: tuple[str, ...]
    options: ConvertOptions

    @property
    def key(self) -> str:
        """Hash of the arguments."""
        return str(xxhash.xxh3_128_hexdigest("\0".join(self.arguments).encode()))


def read_jobs(path: Path, command: ConvertCommand) -> list[BatchJob]:
    """Every job of a batch file, matrices written out, in order.

    Relative paths in it are meant from the current folder, which should be the file's.

    Raises:
        InputError: the file cannot be read; or mistakes, all of them.
    """
    content = _load(path)
    problems = _Problems()
    defaults = content.get("defaults") or {}
    written = content.get("jobs")
    for key in content.keys() - {"defaults", "jobs"}:
        problems.add("the file", f"{key}: expected defaults and jobs, and nothing else")
    if not isinstance(defaults, dict):
        problems.add("defaults", "expected a mapping of options")
        defaults = {}
    if not isinstance(written, list) or not written:
        problems.add("jobs", "expected a list with one mapping for each job")
        written = []
    for key in {"name", "matrix"} & defaults.keys():
        problems.add("defaults", f"{key}: belongs to a job")
        del defaults[key]
    jobs = []
    for number, mapping in enumerate(written, start=1):
        for name, options in _expanded(defaults, mapping, f"job {number}", problems):
            job = _job(name, options, command, problems)
            jobs += [job] if job is not None else []
    _check_apart(jobs, problems)
    if problems.found:
        raise InputError(f"{path}: nothing was started\n{problems}")
    return jobs


def select(jobs: Sequence[BatchJob], patterns: Sequence[str]) -> list[BatchJob]:
    """The jobs whose names fit one of the shell patterns; all, if there is no pattern.

    Raises:
        OptionError: a pattern that fits no job.
    """
    for pattern in patterns:
        if not any(fnmatchcase(job.name, pattern) for job in jobs):
            raise OptionError(
                f"--only {pattern}: fits no job; there are {_names([job.name for job in jobs], 20)}"
            )
    return [j for j in jobs if not patterns or any(fnmatchcase(j.name, p) for p in patterns)]


class _Problems:
    """Mistakes, the same ones of several jobs in one line."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, where: str, message: str) -> None:
        self.found.setdefault(message, []).append(where)

    def __str__(self) -> str:
        lines = (f"{_names(where, 3)}: {message}" for message, where in self.found.items())
        return "\n".join("  " + line.replace("\n", "\n    ") for line in lines)


def _names(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML without the silence about a key that comes twice."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key.value, str)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} comes twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_bytes(), _Loader)
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err.strerror or err}") from err
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        mark = getattr(err, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(
            f"{path}: is not valid YAML: {where}{getattr(err, 'problem', None) or err}"
        ) from err
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping with defaults and jobs")
    return {str(key): value for key, value in content.items()}


def _expanded(
    defaults: Mapping[Any, Any], mapping: Any, where: str, problems: _Problems
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each combination of a job's matrix: its name, and all its options with the model."""
    if not isinstance(mapping, dict):
        problems.add(where, "expected a mapping of options")
        return
    own = {str(key): value for key, value in {**defaults, **mapping}.items()}
    matrix, given = own.pop("matrix", None) or {}, own.pop("name", None)
    if not isinstance(matrix, dict) or not all(isinstance(v, list) and v for v in matrix.values()):
        problems.add(where, "matrix: expected a list of values for each option in it")
        return
    for values in itertools.product(*matrix.values()):
        chosen = dict(zip(map(str, matrix), values, strict=True))
        options = {**own, **chosen}
        if not isinstance(options.get("model"), str):
            problems.add(where, "model: expected a folder, or owner/name on the Hub")
            return
        model = Path(options["model"]).name
        base = model if given is None else str(given)
        varied = [model] if given is not None and "model" in chosen else []
        varied += [f"{key}{_word(value)}" for key, value in chosen.items() if key != "model"]
        yield _fit_for_file("-".join([base, *varied])), options


def _word(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key}={each}" for key, each in value.items()]
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _fit_for_file(name: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", name).lstrip(".-")[:150] or "job"


def _job(
    name: str, options: Mapping[str, Any], command: ConvertCommand, problems: _Problems
) -> BatchJob | None:
    """The job of one mapping; None, with its mistakes told, if it has any."""
    model = str(options["model"])
    written = {str(key).replace("_", "-"): value for key, value in options.items()}
    given = {"output-dir": "{name}", **{k: v for k, v in written.items() if k not in OWN}}
    arguments: list[str] = []
    wrong: list[str] = []
    last = ("--", model)  # a name with a dash in front is no option
    for key, value in given.items():
        try:
            words = [word.replace("{name}", name) for word in _words(key, value, command.options)]
            command.read([*words, *last])
            arguments += words
        except OptionError as err:
            wrong.append(str(err))
    arguments += last
    try:
        made = command.make(command.read(arguments))
    except OptionError as err:
        wrong += re.split(r"\n(?! )", str(err))  # a line that is not indented is another mistake
    for message in wrong:
        problems.add(name, message)
    return None if wrong else BatchJob(name, tuple(arguments), made)


def _words(key: str, value: Any, options: Mapping[str, Option]) -> list[str]:
    """One option of a job as words of a command line.

    Raises:
        OptionError: there is no such option, or it takes no such value.
    """
    option = options.get(key)
    if option is None:
        near = difflib.get_close_matches(key, [*options, *OWN], n=1)
        raise OptionError(
            f"{printable(key)}: no option of rilq convert"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    if value is None:
        return []  # takes back what the defaults say
    if option.flag:
        if not isinstance(value, bool):
            raise OptionError(f"{key}: expected true or false")
        return [f"--{key}"] if value else [option.off] if option.off else []
    values = [value]
    if option.repeatable and isinstance(value, list):
        values = value
    elif option.repeatable and isinstance(value, dict):
        values = [f"{name}={each}" for name, each in value.items()]
    if not all(isinstance(each, str | int | float) for each in values):
        raise OptionError(f"{key}: expected {'values' if option.repeatable else 'one value'}")
    if not all(str(each).isprintable() for each in values):
        raise OptionError(f"{key}: holds characters that cannot be printed")
    return [f"--{key}={each}" for each in values]


def _check_apart(jobs: Iterable[BatchJob], problems: _Problems) -> None:
    """No two jobs may have one name, or write to the same place."""
    places: dict[Path, str] = {}
    for job in jobs:
        if job.name in places.values():
            problems.add(job.name, "the name of two jobs; give one of them a name")
            continue
        own = (job.options.output.resolve(), job.options.work.resolve())
        for place in own:
            near = (p for p in places if p in (place, *place.parents) or place in p.parents)
            if (other := next(near, None)) is not None:
                problems.add(
                    job.name,
                    f"writes to {place}, and job {places[other]} to {other}\n"
                    "give each job a folder of its own, for example output-dir: out/{name}",
                )
                break
        places |= dict.fromkeys(own, job.name)
