"""Memory of the device runs out: half the rows at once, said and journaled; the same bytes."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from rilq.converter import workdir
from rilq.converter.fewer_rows import STAGE

MOST = 4  # rows that fit
KILLED = -9


def run_out_of_memory(most: int) -> None:
    """The second decoder layer has no memory for more than `most` rows; nor has any to train."""
    forward = LlamaDecoderLayer.forward

    def limited(self: LlamaDecoderLayer, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        wide = len(hidden) > most
        if wide and (self.self_attn.layer_idx == 1 or torch.is_grad_enabled()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(self, hidden, *args, **kwargs)

    LlamaDecoderLayer.forward = limited


@pytest.fixture
def limited(run_cli: Callable[..., Any], arguments: Callable[..., list[str]]) -> Callable[..., Any]:
    """`limited(folder, at=None, most=4)`: a conversion where memory is short; maybe killed."""

    def run(folder: Path, at: tuple[str, int] | None = None, most: int = MOST) -> Any:
        def first() -> None:
            run_out_of_memory(most)
            seen: list[str] = []

            def reached(point: str) -> None:
                seen.append(point)
                if at is not None and at == (point, seen.count(point)):
                    os.kill(os.getpid(), signal.SIGKILL)

            workdir.reached = reached

        folder.mkdir(exist_ok=True)
        return run_cli(
            *arguments(folder, "--micro-batch", 8, "--quantizer", "lsq", "--keep-work"), first=first
        )

    return run


def test_half_the_rows_are_tried_once_and_a_stopped_run_goes_on_with_them(
    tmp_path: Path, limited: Callable[..., Any], hashes: Callable[[Path], dict[str, str]]
) -> None:
    ended = limited(tmp_path / "whole")
    assert ended.code == 0, ended.err
    assert "memory ran out in the decoder layers" in ended.err
    assert "(4 instead of 8 through a layer" in ended.err
    assert "memory ran out in the training" in ended.err
    expected = hashes(tmp_path / "whole" / "out")
    for at in [
        (f"{STAGE}:written", 1),  # not journaled yet: it runs out again
        ("layers:written", 3),
        ("train:written", 2),
    ]:
        folder = tmp_path / f"{at[0]}-{at[1]}"
        assert limited(folder, at).code == KILLED
        again = limited(folder)
        assert again.code == 0, again.err
        assert hashes(folder / "out") == expected, at


def test_a_second_time_is_an_error_that_says_what_to_lower(
    tmp_path: Path, limited: Callable[..., Any]
) -> None:
    ended = limited(tmp_path / "out", most=3)
    assert ended.code == 1 and "Traceback" not in ended.err
    assert ended.err.count("trying again") == 1
    assert "memory ran out after 'fewer rows in the decoder layers'" in ended.err
    assert "--micro-batch" in ended.err


def test_one_row_cannot_be_halved(
    tmp_path: Path, run_cli: Callable[..., Any], arguments: Callable[..., list[str]]
) -> None:
    ended = run_cli(*arguments(tmp_path, "--micro-batch", 1), first=lambda: run_out_of_memory(0))
    assert ended.code == 1 and "trying again" not in ended.err


def test_the_plan_shows_the_rows_that_were_asked_for(
    tmp_path: Path, run_cli: Callable[..., Any], arguments: Callable[..., list[str]]
) -> None:
    for given, batch_rows, micro_batch in [("auto", 32, 8), ("3", 3, 3), ("64", 64, 8)]:
        ended = run_cli(*arguments(tmp_path, "--micro-batch", given, "--json", command="plan"))
        choices = json.loads(ended.out)["choices"]
        assert (choices["batch_rows"], choices["micro_batch"]) == (batch_rows, micro_batch)


@pytest.mark.parametrize("given", ["0", "-1", "many"])
def test_an_impossible_number_of_rows_is_refused(
    given: str, tmp_path: Path, run_cli: Callable[..., Any], arguments: Callable[..., list[str]]
) -> None:
    ended = run_cli(*arguments(tmp_path, "--micro-batch", given))
    assert ended.code == 2 and f"--micro-batch {given}" in ended.err
