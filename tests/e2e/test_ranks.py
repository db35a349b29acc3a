"""Several processes convert as one does, but for rounding; stopped, they go on to the same bytes."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rilq import cli
from rilq.converter import workdir
from rilq.formats.packing import unpack

GPTQ = ("--quantizer", "gptq", "--loss", "mse+ce+kl")
KILLED = -signal.SIGKILL


@pytest.fixture
def together(start_child: Any) -> Callable[..., list[Any]]:
    """`together(count, arguments, at=None, act=kill -9, who=0)`: how so many processes ended.

    With `at`, process `who` calls `act` at the commit point of that number, counted from 1; where
    there is none, at its start.
    """

    def run(
        count: int,
        arguments: list[str],
        at: int | None = None,
        act: Callable[[], None] | None = None,
        who: int = 0,
    ) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def body(index: int) -> None:
            os.environ |= {
                "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            if index == who and at is not None:
                calls = iter(range(1, 1000))
                workdir.reached = lambda point: (
                    os.kill(os.getpid(), signal.SIGKILL) if next(calls) == at else None
                )
            elif index == who and act is not None:
                act()
            sys.argv = ["rilq", *arguments]
            cli.main()

        children = [start_child(lambda index=index: body(index)) for index in range(count)]
        return [child.wait() for child in children]

    return run


@pytest.fixture(scope="module")
def made() -> dict[Any, Path]:
    """Conversions that tests of this file share, made by the first one that needs each."""
    return {}


@pytest.fixture
def converted(
    made: dict[Any, Path],
    tmp_path_factory: pytest.TempPathFactory,
    together: Any,
    run_cli: Any,
    arguments: Any,
) -> Callable[..., Path]:
    """`converted(count, *options)`: the output of an unbroken conversion by so many processes."""

    def make(count: int, *options: object) -> Path:
        if (count, options) not in made:
            folder = tmp_path_factory.mktemp("whole")
            words = arguments(folder, *options)
            ended = [run_cli(*words)] if count == 1 else together(count, words)
            assert [each.code for each in ended] == [0] * count, [each.err for each in ended]
            made[count, options] = folder / "out"
        return made[count, options]

    return make


def tensors(output: Path) -> dict[str, Tensor]:
    return {n: t for path in sorted(output.glob("*.safetensors")) for n, t in load_file(path).items()}


def agree(one: Path, other: Path) -> None:
    """That two checkpoints are the same but for rounding."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    same = total = 0
    for name, tensor in first.items():
        if tensor.dtype == torch.int32:
            codes, others = (unpack(w, 2, w.shape[1] * 16) for w in (tensor, second[name]))
            same, total = same + int((codes == others).sum()), total + codes.numel()
        else:
            apart = (tensor.float() - second[name].float()).norm() / tensor.float().norm()
            assert apart < 0.02, name
    assert total
    assert same / total > 0.995
    figures = [json.loads((each / "rilq.json").read_text())["quality"] for each in (one, other)]
    for name in ("validation_loss_before", "validation_loss", "validation_loss_merged"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=2e-3), name
    assert figures[1]["layer_errors"] == pytest.approx(figures[0]["layer_errors"], rel=2e-3)
    for term, losses in figures[0]["validation_parts"].items():
        assert figures[1]["validation_parts"][term] == pytest.approx(losses, rel=2e-3)


@pytest.mark.parametrize("options", [(), GPTQ], ids=["blockap", "gptq"])
def test_two_processes_make_what_one_does(converted: Any, options: tuple[str, ...]) -> None:
    agree(converted(1, *options), converted(2, *options))


def test_a_process_without_rows_of_an_update_or_for_validation_works_along(converted: Any) -> None:
    few = ("--batch-size", 1, "--val-ratio", 0.05)
    agree(converted(1, *few), converted(2, *few))
