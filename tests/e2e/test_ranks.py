"""Several processes convert as one does, but for rounding; stopped, they go on as they would."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_examples import MIXTURES
from safetensors.torch import load_file
from torch import Tensor

from rilq.converter.ranks import Ranks, join
from rilq.formats.packing import unpack

GPTQ = ("--quantizer", "gptq", "--loss", "mse+ce+kl")
KILLED = -signal.SIGKILL
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def made() -> dict[Any, Path]:
    """Conversions that tests of this file share, made by the first one that needs each."""
    return {}


@pytest.fixture
def converted(
    made: dict[Any, Path],
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Any,
    together: Any,
    run_cli: Any,
    arguments: Any,
) -> Callable[..., Path]:
    """`converted(count, *options)`: the output of an unbroken conversion by so many processes.

    With `mixture`, of a random mixture of 16 experts, of which some see few tokens.
    """

    def make(count: int, *options: object, mixture: bool = False) -> Path:
        key = (count, options, mixture)
        if mixture and "source" not in made:
            many = {**MIXTURES["qwen3_moe"], "num_experts": 16}
            source = tmp_path_factory.mktemp("mixture") / "source"
            made["source"] = make_model(source, "qwen3_moe", **many)
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            more = {"model": made["source"]} if mixture else {}
            words = arguments(folder, *options, **more)
            ended = [run_cli(*words)] if count == 1 else together(count, words)
            assert [each.code for each in ended] == [0] * count, [each.err for each in ended]
            made[key] = folder / "out"
        return made[key]

    return make


def tensors(output: Path) -> dict[str, Tensor]:
    return {
        n: t for path in sorted(output.glob("*.safetensors")) for n, t in load_file(path).items()
    }


def agree(one: Path, other: Path, rel: float = 5e-3) -> None:
    """That two checkpoints are the same but for rounding, of the first layer as good as exactly.

    Args:
        rel: of errors and losses. A sum that rounds differently turns a code here and there, and
            Adam makes a whole step of a gradient that is zero but for rounding: what is trained
            layer by layer drifts apart as it does with another --micro-batch.
    """
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    same = total = 0
    for name, tensor in first.items():
        if tensor.dtype == torch.int32:
            codes, others = (unpack(w, 2, w.shape[1] * 16) for w in (tensor, second[name]))
            same, total = same + int((codes == others).sum()), total + codes.numel()
        else:
            apart = (tensor.float() - second[name].float()).norm() / tensor.float().norm()
            assert apart < 0.05, name
    assert total
    assert same / total > 1 - rel
    figures = [json.loads((each / "rilq.json").read_text())["quality"] for each in (one, other)]
    for name in ("validation_loss_before", "validation_loss", "validation_loss_merged"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=rel), name
    errors = [each["layer_errors"] for each in figures]
    assert errors[1] == pytest.approx(errors[0], rel=rel)
    assert errors[1][0] == pytest.approx(errors[0][0], rel=1e-4)
    for term, losses in figures[0]["validation_parts"].items():
        assert figures[1]["validation_parts"][term] == pytest.approx(losses, rel=rel)


@pytest.mark.parametrize(("options", "rel"), [((), 2e-2), (GPTQ, 5e-3)], ids=["blockap", "gptq"])
def test_two_processes_make_what_one_does(
    converted: Any, options: tuple[str, ...], rel: float
) -> None:
    agree(converted(1, *options), converted(2, *options), rel)


@pytest.mark.parametrize(
    ("options", "rel"),
    [
        (("--adapter-targets", "all", "--batch-size", 2), 2e-2),
        pytest.param((*GPTQ, "--adapter-targets", "all"), 1e-2, marks=SLOW),
        pytest.param((*GPTQ, "--expert-memory", "1kB"), 1e-2, marks=SLOW),
    ],
    ids=["blockap", "gptq", "gptq, experts one by one"],
)
def test_two_processes_make_of_a_mixture_what_one_does(
    converted: Any, options: tuple[str, ...], rel: float
) -> None:
    """Experts are known by the tokens of all processes, and so are those that saw too few."""
    one, two = (converted(count, *options, mixture=True) for count in (1, 2))
    agree(one, two, rel)
    seen = []
    for output in (one, two):
        quality = json.loads((output / "rilq.json").read_text())["quality"]
        few = {n: c for n, c in quality["experts_without_data"].items() if ".layers.0." in n}
        seen.append((quality["expert_tokens"][0], few))
    assert seen[0] == seen[1]
    assert seen[0][1]


@SLOW
def test_a_process_without_rows_of_an_update_or_for_validation_works_along(converted: Any) -> None:
    few = (*GPTQ, "--batch-size", 1, "--val-ratio", 0.05)
    agree(converted(1, *few), converted(2, *few))


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("layers:written", marks=SLOW),
        "layers:committed",
        pytest.param("train:committed", marks=SLOW),
    ],
)
def test_killed_two_processes_go_on_to_the_same_bytes(
    converted: Any, together: Any, arguments: Any, hashes: Any, tmp_path: Path, point: str
) -> None:
    words = arguments(tmp_path, *GPTQ)
    first, other = together(2, words, at=(point, 2))
    assert first.code == KILLED
    assert other.code == 1, other.err
    assert not other.err  # the launcher tells of a killed process
    again = together(2, words)
    assert [each.code for each in again] == [0, 0], again
    assert "continuing after" in again[0].err
    assert hashes(tmp_path / "out") == hashes(converted(2, *GPTQ))


@pytest.mark.parametrize(
    ("begun", "after", "point"),
    [
        (2, 1, "layers:committed"),
        pytest.param(2, 1, "train:committed", marks=SLOW),
        pytest.param(1, 2, "layers:committed", marks=SLOW),
        pytest.param(1, 2, "train:committed", marks=SLOW),
        pytest.param(2, 3, "layers:committed", marks=SLOW),
        pytest.param(2, 3, "train:committed", marks=SLOW),
    ],
)
def test_another_number_of_processes_goes_on_to_the_same_but_for_rounding(
    converted: Any,
    together: Any,
    arguments: Any,
    tmp_path: Path,
    begun: int,
    after: int,
    point: str,
) -> None:
    words = arguments(tmp_path, *GPTQ)
    assert together(begun, words, at=(point, 2))[0].code == KILLED
    ended = together(after, words)
    assert [each.code for each in ended] == [0] * after, ended
    assert f"begun with {begun} processes, going on with {after}" in ended[0].err
    agree(converted(1, *GPTQ), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "rilq.json").read_text())
    assert manifest["processes"] == sorted({begun, after})


def test_what_fails_in_one_process_ends_all_and_is_said_once(
    together: Any, arguments: Any, tmp_path: Path
) -> None:
    full = (8_000, resource.RLIM_INFINITY)  # bytes, fewer than a file of hidden states
    words = arguments(tmp_path, *GPTQ)
    first, other = together(
        2, words, act=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, full), who=1
    )
    assert (first.code, other.code) == (1, 2), (first.err, other.err)
    assert other.err.startswith("rilq: ")
    assert "teacher-0000.from6.bin" in other.err
    assert "another process of this run ended" in first.err
    assert "Traceback" not in first.err + other.err
    assert [each.code for each in together(2, words)] == [0, 0]


@SLOW
def test_only_the_first_process_prints_and_records(
    converted: Any, together: Any, arguments: Any, tmp_path: Path
) -> None:
    first, other = together(2, arguments(tmp_path, *GPTQ, "--json", "--db", tmp_path / "db"))
    assert (first.code, other.code) == (0, 0)
    assert json.loads(first.out)["output"] == str(tmp_path / "out")
    assert "recorded as run 1 " in first.err
    assert (other.out, other.err) == ("", "")


@SLOW
def test_processes_with_different_options_are_refused(
    together: Any, arguments: Any, tmp_path: Path
) -> None:
    words = arguments(tmp_path, *GPTQ)
    _, other = together(2, words, act=lambda: sys.argv.extend(["--steps", "3"]), who=1)
    assert other.code == 2
    assert "--steps: 4 there, 3 here" in other.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        pytest.param(("--nsamples", 2), "2 rows for 3 processes", marks=SLOW),
        pytest.param(("--evict",), "--evict, --max-disk: not with 3 processes", marks=SLOW),
        (("--device", "cpu:0"), "every process of a launcher takes a GPU of its own"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    together: Any, arguments: Any, tmp_path: Path, more: tuple[object, ...], said: str
) -> None:
    first, *others = together(3, arguments(tmp_path, *GPTQ, *more))
    assert first.code == 2
    assert said in first.err
    for other in others:  # the first may be gone before it has met them, which they do not tell
        assert other.code == 2 or (other.code, other.err) == (1, ""), other.err


@pytest.mark.parametrize("rows", [3, 7, 8])
def test_everybody_gets_the_rows_that_each_made_of_its_share(processes: Any, rows: int) -> None:
    """Bytes as they were, of the dtypes that a quantized linear has."""

    def body() -> None:
        ranks = join("cpu")
        made = []
        codes = torch.arange(rows * 5, dtype=torch.uint8).view(rows, 5) + 200
        scale = torch.linspace(-1, 1, rows * 2, dtype=torch.float16).view(rows, 2)

        def make(part: slice) -> tuple[Tensor, ...]:
            made.append(part)
            return codes[part], scale[part]

        found = ranks.by_rows(rows, make)
        same = all(torch.equal(*each) for each in zip(found, (codes, scale), strict=True))
        print(json.dumps({"same": same, "rows": [made[0].start, made[0].stop], "calls": len(made)}))

    ended = [json.loads(each.out) for each in processes(3, body)]
    assert all(each["same"] for each in ended)
    assert [each["calls"] for each in ended] == [1, 1, 1]
    starts = Ranks(0, 3).starts(rows)
    assert [each["rows"] for each in ended] == list(map(list, pairwise((*starts, rows))))


def test_other_commands_are_refused(together: Any, tiny_llama: Path) -> None:
    ended = together(2, ["eval", str(tiny_llama)])
    assert [each.code for each in ended] == [2, 2]
    assert ended[0].err.startswith("rilq: eval runs in one process")
    assert not ended[1].err


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc-per-node", "2"),
    # Without --multi_gpu, accelerate starts one process where there is no GPU.
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
}


@pytest.fixture
def launched(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`launched(name, arguments)`: a real launcher with two processes, just started."""

    def start(name: str, arguments: list[str]) -> subprocess.Popen[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [*LAUNCHERS[name], f"--main_process_port={port}" if name == "accelerate" else
                 f"--master-port={port}", "-m", "rilq", *arguments]  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", *words], cwd=tmp_path, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return start


@SLOW
@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_start_it(
    launched: Any, converted: Any, arguments: Any, hashes: Any, tmp_path: Path, name: str
) -> None:
    running = launched(name, arguments(tmp_path, *GPTQ, "--json"))
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert json.loads(out)["already_done"] is False
    assert hashes(tmp_path / "out") == hashes(converted(2, *GPTQ))


@SLOW
def test_under_a_launcher_bad_input_is_said_once(
    launched: Any, arguments: Any, tmp_path: Path
) -> None:
    running = launched("torchrun", arguments(tmp_path, "--bits", "5"))
    _, err = running.communicate(timeout=300)
    assert running.returncode
    assert err.count("rilq: ") == 1


@SLOW
def test_ctrl_c_stops_all_and_the_same_command_continues(
    launched: Any, converted: Any, arguments: Any, hashes: Any, tmp_path: Path
) -> None:
    words = arguments(tmp_path, *GPTQ)
    running = launched("torchrun", words)
    journal = tmp_path / "out.rilq-work" / "journal.jsonl"
    limit = time.monotonic() + 240
    while not (journal.exists() and b"layer 0" in journal.read_bytes()):
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, err = running.communicate(timeout=120)
    assert running.returncode
    assert err.count("rilq: stopped by SIGINT") == 1, err
    again = launched("torchrun", words)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert hashes(tmp_path / "out") == hashes(converted(2, *GPTQ))
