"""No command ever holds the logits of all positions of a batch; watched at every torch operation.

With a vocabulary of 128,000 and rows of 2048 tokens those would be a gigabyte for each row.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rilq.converter import loss
from rilq.evaluation import forward

VOCABULARY, ROWS, SEQLEN = 320, 2, 64  # of the tiny Llama, whose width is 64
CHUNK = 40  # positions
ENOUGH = 10**9


class _Watch(TorchDispatchMode):
    """Ends the process's work at the first tensor that holds logits of a whole batch."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and VOCABULARY in value.shape:
                assert value.numel() < ROWS * SEQLEN * VOCABULARY, f"{function}: {value.shape}"
        return out


def watched(positions: int, folder: Path) -> Callable[[], None]:
    """Watch a child, in which logits of so many positions may exist at once."""

    def begin() -> None:
        os.chdir(folder)  # where a command that is ended may leave what it has done
        loss.LOGITS = forward.LOGITS = positions * VOCABULARY
        _Watch().__enter__()

    return begin


@pytest.fixture
def command(
    tmp_path: Path, arguments: Callable[..., list[str]], tiny_llama: Path, calib: Path
) -> Any:
    """The words of a command on the tiny Llama."""

    def words(name: str, *more: object) -> list[object]:
        if name == "convert":
            return [*arguments(tmp_path, "--seqlen", SEQLEN, "--batch-size", ROWS), *more]
        if name == "analyze":
            options = "--group-size 32 --ranks 2 --nsamples 10 --steps 1 --windows 4 --seqlen 64"
            places = ("--dataset", calib, "--text", calib, "-o", tmp_path / "found")
            return ["analyze", tiny_llama, *options.split(), *places, "--device", "cpu", *more]
        places = ("--text", calib, "--against", tiny_llama, "--device", "cpu")
        return ["eval", tiny_llama, *places, "--seqlen", SEQLEN, *more]

    return words


COMMANDS = {
    "convert": ("convert", "--loss", "mse+ce+kl"),
    "convert, loss of logits": ("convert", "--loss", "mse", "--target", "logits"),
    "convert, adapter kept": ("convert", "--zero-point", "integer", "--keep-adapter"),
    "analyze": ("analyze",),
    "eval": ("eval",),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_no_tensor_holds_the_logits_of_a_whole_batch(
    case: str, command: Any, run_cli: Any, tmp_path: Path
) -> None:
    ended = run_cli(*command(*COMMANDS[case]), first=watched(CHUNK, tmp_path))
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("case", ["convert", "eval"])
def test_the_watch_sees_logits_of_a_whole_batch(
    case: str, command: Any, run_cli: Any, tmp_path: Path
) -> None:
    ended = run_cli(*command(*COMMANDS[case]), first=watched(ENOUGH, tmp_path))
    assert ended.code != 0 and "AssertionError" in ended.err
