"""Conversions in child processes: made to be killed, limited or spoilt, and compared by hash.

Children are forked from the test process, so that each costs no imports. They run on one thread,
and without fsync: what a killed process has written stays in the page cache, so syncing would only
cost time here (its order is a matter of power loss, which no test makes).
"""

import ctypes
import hashlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from accelerate import PartialState
from typer.testing import CliRunner

from rilq import cli
from rilq.cli import session
from rilq.converter import pipeline, workdir
from rilq.converter.options import ConvertOptions
from rilq.errors import RilqError
from rilq.evaluation import export as _export  # noqa: F401 - once, and not in each child
from rilq.evaluation import push as _push  # noqa: F401
from rilq.progress import LogReporter

CliRunner().invoke(cli.app, ["verify", "nowhere"])  # what typer imports with its first command

LONGEST = 120  # seconds; a child that takes longer hangs
BROKEN = 70  # exit code of a child that raised something unexpected


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (or minus the signal that killed it) and what it wrote."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Child:
    """A running child; `folder` is its current folder and holds its output."""

    pid: int
    folder: Path

    def wait(self) -> Ended:
        """Wait for its end."""
        _, status = os.waitpid(self.pid, 0)
        texts = ((self.folder / name).read_text(errors="replace") for name in ("out", "err"))
        return Ended(os.waitstatus_to_exitcode(status), *texts)


def _child(function: Callable[[], None], folder: Path) -> NoReturn:
    """What a forked child does; it never returns to the test runner."""
    code = BROKEN
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", errors="backslashreplace")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        os.fsync = lambda fd: None
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # Ignored where the tests run in the background of a script.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(LONGEST)
        torch.set_num_threads(1)
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except RilqError as err:
        print(f"rilq: {err}", file=sys.stderr)
        code = err.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


@pytest.fixture
def start_child(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Callable[[], None]], Child]]:
    """A function that starts another one in a forked child."""
    children: list[Child] = []

    def start(function: Callable[[], None]) -> Child:
        folder = tmp_path_factory.mktemp("child")
        with warnings.catch_warnings():
            # Python 3.12 warns if there are threads; those of torch and tokenizers are idle here.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _child(function, folder)
        children.append(Child(pid, folder))
        return children[-1]

    yield start
    for child in children:
        with suppress(ProcessLookupError, ChildProcessError):  # the test has waited for it
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
        strays = {path.name for path in child.folder.iterdir()} - {"out", "err"}
        assert not strays, f"written to the current folder: {strays}"


@pytest.fixture
def in_child(
    start_child: Callable[[Callable[[], None]], Child],
) -> Callable[[Callable[[], None]], Ended]:
    """A function that runs another one in a forked child, to its end."""
    return lambda function: start_child(function).wait()


def _convert(options: ConvertOptions) -> None:
    report = LogReporter(sys.stderr)
    pipeline.convert(pipeline.prepare(options, report), report)


def _at(call: int, act: Callable[[], None]) -> None:
    """Have `act` called at the `call`-th commit point (from 1) of this child."""
    calls = itertools.count(1)

    def reached(point: str) -> None:
        if next(calls) == call:
            act()

    workdir.reached = reached


@pytest.fixture
def processes(start_child: Any) -> Callable[..., list[Any]]:
    """`processes(count, body)`: how so many ended that a launcher seems to start."""

    def run(count: int, body: Callable[[], None]) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def launched(index: int) -> None:
            os.environ |= {
                "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            PartialState._reset_state()  # what an earlier test left in the process forked here
            body()

        children = [start_child(partial(launched, index)) for index in range(count)]
        return [child.wait() for child in children]

    return run


@pytest.fixture
def together(processes: Any) -> Callable[..., list[Any]]:
    """`together(count, arguments, at=None, act=None, who=None)`: how so many processes ended.

    With `at`, the first one kills itself when it is at that point so often; with `act`, process
    `who`, or every one, calls it at its start.
    """

    def run(
        count: int,
        arguments: list[str],
        at: tuple[str, int] | None = None,
        act: Callable[[], None] | None = None,
        who: int | None = None,
    ) -> list[Any]:
        def body() -> None:
            index = int(os.environ["RANK"])
            sys.argv = ["rilq", *arguments]
            session.ALIKE = 0.0  # there is no launcher to wait for
            if index == 0 and at is not None:
                _kill_at(*at)
            if act is not None and who in (None, index):
                act()
            cli.main()

        return list(processes(count, body))

    return run


def _kill_at(point: str, times: int) -> None:
    seen: list[str] = []

    def reached(now: str) -> None:
        seen.append(now)
        if seen.count(point) == times:
            os.kill(os.getpid(), signal.SIGKILL)

    workdir.reached = reached


@pytest.fixture
def convert(in_child: Callable[[Callable[[], None]], Ended]) -> Callable[..., Ended]:
    """`convert(options, at=None, act=kill -9)`: a conversion in a child, and how it ended.

    With `at`, the child calls `act` at the commit point of that number, counted from 1.
    """

    def run(
        options: ConvertOptions, at: int | None = None, act: Callable[[], None] = kill_self
    ) -> Ended:
        def body() -> None:
            if at is not None:
                _at(at, act)
            _convert(options)

        return in_child(body)

    return run


def kill_self() -> None:
    """kill -9 of the calling process."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def run_cli(in_child: Callable[[Callable[[], None]], Ended]) -> Callable[..., Ended]:
    """`run_cli(*arguments, first=None)`: the command in a child, where `first` is called before."""

    def run(*arguments: object, first: Callable[[], None] | None = None) -> Ended:
        def body() -> None:
            if first is not None:
                first()
            sys.argv = ["rilq", *map(str, arguments)]
            cli.main()

        return in_child(body)

    return run


@pytest.fixture(scope="session")
def run_script() -> Callable[..., Ended]:
    """`run_script(source, *arguments)`: Python source in a fresh interpreter, to its end."""

    def run(source: str, *arguments: object) -> Ended:
        command = [sys.executable, "-c", source, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


def _mount_tmpfs(place: Path, options: str) -> None:
    """Mount one that only this process sees; exit code 77 where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, private = 0x10000000, 0x00020000, (1 << 18) | (1 << 14)
    user, group = os.getuid(), os.getgid()
    place.mkdir()
    if libc.unshare(new_user | new_mounts):
        raise SystemExit(77)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"),
                       ("gid_map", f"{group} {group} 1")):  # fmt: skip
        Path("/proc/self", name).write_text(text)
    failed = libc.mount(b"none", b"/", None, private, None) or libc.mount(
        b"tmpfs", bytes(place), b"tmpfs", 0, options.encode()
    )
    if failed:
        raise SystemExit(77)


def _skip_without_mounts(ended: Ended) -> None:
    if ended.code == 77:
        pytest.skip("this system lets nobody mount a tmpfs")


@pytest.fixture(scope="session")
def mount_tmpfs() -> Callable[[Path, str], None]:
    """`mount_tmpfs(place, options)`, to be called in a child."""
    return _mount_tmpfs


@pytest.fixture(scope="session")
def skip_without_mounts() -> Callable[[Ended], None]:
    """Skips the test if a child could not mount."""
    return _skip_without_mounts


@pytest.fixture(scope="session")
def natives() -> dict[object, Path]:
    """Native checkpoints that an earlier test has made."""
    return {}


@pytest.fixture
def native(
    natives: dict[object, Path],
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Any],
    run_cli: Callable[..., Any],
    calib: Path,
) -> Callable[..., Path]:
    """`native(model_type, overrides, *options)`: a converted random model, not to be changed."""

    def convert(model_type: str, overrides: dict[str, Any], *options: object) -> Path:
        key = (model_type, str(overrides), options)
        if key not in natives:
            folder = tmp_path_factory.mktemp("native")
            source = make_model(folder / "source", model_type, **overrides)
            (source / "chat_template.jinja").write_text("{{ messages }}")
            ended = run_cli(
                *("convert", source, "--dataset", calib, "--group-size", 32, "--nsamples", 10),
                *("--seqlen", 24, "--quantizer", "rtn", "--rank", 0, "--device", "cpu"),
                *("--max-shard-size", "60kB", "--no-report", "-o", folder / "out", *options),
            )
            assert ended.code == 0, ended.err
            natives[key] = folder / "out"
        return natives[key]

    return convert


@pytest.fixture
def export(run_cli: Callable[..., Any]) -> Callable[..., Any]:
    """`export(folder, out, *kinds, more=())`: the command, on the CPU."""

    def run(folder: Path, out: Path, *kinds: str, more: tuple[object, ...] = ()) -> Any:
        wanted = [word for kind in kinds for word in ("--to", kind)]
        return run_cli("export", folder, *wanted, "-o", out, "--device", "cpu", *more)

    return run


@pytest.fixture(scope="session")
def calib(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A calibration text of 6 kB."""
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(text[:6000])
    return path


@pytest.fixture(scope="session")
def quick(tiny_llama: Path, calib: Path) -> Callable[..., ConvertOptions]:
    """`quick(folder, **overrides)`: options of a conversion of tiny_llama to `folder/out`.

    Two decoder layers, three training checkpoints, three output shards; the settings are such that
    training gains, so that the output depends on it.
    """
    base = ConvertOptions(
        model=str(tiny_llama),
        dataset=(str(calib),),
        group_size=32,
        layer_steps=3,
        nsamples=12,
        seqlen=32,
        learning_rate=1e-3,
        steps=4,
        batch_size=8,
        val_every=2,
        max_shard_size="40kB",
        device="cpu",  # CUDA does not survive a fork
    )

    def options(folder: Path, **overrides: Any) -> ConvertOptions:
        return replace(base, **{"output_dir": folder / "out", **overrides})

    return options


@pytest.fixture(scope="session")
def arguments(tiny_llama: Path, calib: Path) -> Callable[..., list[str]]:
    """`arguments(folder, *more)`: the command line of a `quick` conversion to `folder/out`.

    Of an option that comes twice the last one wins. No report is written.
    """

    def make(
        folder: Path,
        *more: object,
        command: str = "convert",
        model: Path = tiny_llama,
        dataset: Path = calib,
    ) -> list[str]:
        quick = (
            "--group-size 32 --layer-steps 3 --nsamples 12 --seqlen 32 --lr 1e-3 --steps 4 "
            "--batch-size 8 --val-every 2 --max-shard-size 40kB --device cpu"
        )
        places = ["--dataset", str(dataset), "--output-dir", str(folder / "out")]
        places += ["--no-report"] if command == "convert" else []
        return [command, str(model), *quick.split(), *places, *map(str, more)]

    return make


@pytest.fixture(scope="session")
def hashes() -> Callable[[Path], dict[str, str]]:
    """A function that gives every file under a folder, hidden ones too, with its sha256."""

    def measure(folder: Path) -> dict[str, str]:
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return measure


@pytest.fixture(autouse=True)
def sources_stay_as_they_are(
    tiny_llama: Path, calib: Path, hashes: Callable[[Path], dict[str, str]]
) -> Iterator[None]:
    """No test in this folder may change the shared checkpoint or the calibration text."""
    before = hashes(tiny_llama), hashes(calib.parent)
    yield
    assert (hashes(tiny_llama), hashes(calib.parent)) == before, "a source folder was written to"
