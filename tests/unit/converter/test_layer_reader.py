"""The thread that reads layers ahead: how far, what it raises and when, and that it ends."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rilq.converter.layer_reader import LayerReader, reading_ahead
from rilq.errors import NonFiniteError
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder

LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path_factory.mktemp("reader") / "m", num_hidden_layers=LAYERS)


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint.open(LocalFolder(folder))


def layers(checkpoint: Checkpoint) -> list[list[str]]:
    starts = [f"model.layers.{index}." for index in range(LAYERS)]
    return [[n for n in checkpoint.tensors if n.startswith(start)] for start in starts]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "rilq-layer-reader"]


def read_so_far(checkpoint: Checkpoint, expected: int) -> int:
    """Layers read once nothing more is read; `expected` are waited for."""
    size = checkpoint.nbytes(layers(checkpoint)[0])
    until = time.monotonic() + 10
    while checkpoint.bytes_read < expected * size and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)  # another one would show by now
    return checkpoint.bytes_read // size


def test_every_layer_comes_once_in_order_with_its_tensors(
    folder: Path, checkpoint: Checkpoint
) -> None:
    stored, steps = load_file(folder / "model.safetensors"), layers(checkpoint)
    with reading_ahead(checkpoint, steps, budget=1, pinned=False) as reader:
        reader.start(steps)
        for names in steps:
            tensors = reader.take()
            assert list(tensors) == names
            assert all(torch.equal(tensors[name], stored[name]) for name in names)
            reader.advance()
    assert checkpoint.bytes_read == sum(map(checkpoint.nbytes, steps)) and not threads()


@pytest.mark.parametrize(("layers_in_budget", "ahead"), [(0.1, 1), (1, 1), (1.9, 1), (3, 3)])
def test_no_more_is_read_ahead_than_the_budget_or_a_single_layer(
    layers_in_budget: float, ahead: int, checkpoint: Checkpoint
) -> None:
    steps = layers(checkpoint)
    budget = int(layers_in_budget * checkpoint.nbytes(steps[0]))
    with reading_ahead(checkpoint, steps, budget=budget, pinned=False) as reader:
        reader.start(steps)
        assert read_so_far(checkpoint, ahead) == ahead
        reader.take()
        assert read_so_far(checkpoint, ahead + 1) == ahead + 1
    assert not threads()


def test_what_is_wrong_with_a_layer_is_raised_in_its_turn_with_the_tensors_name(
    folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name][1, 1] = torch.nan
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    damaged = Checkpoint.open(LocalFolder(tmp_path))
    steps = layers(damaged)
    with (
        pytest.raises(NonFiniteError, match=name),
        reading_ahead(damaged, steps, budget=1 << 30, pinned=False) as reader,
    ):
        reader.start(steps)
        assert read_so_far(damaged, 3) == 3
        reader.take()
        reader.take()
        reader.take()
    assert not threads()


class Held(Checkpoint):
    """A checkpoint whose third read begins and does not go on until it is told to stop."""

    reads = 0

    def read(self, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        self.reads += 1
        if self.reads == 3:
            assert self.stop.wait(10)
        return super().read(*args, **kwargs)


def test_leaving_stops_a_read_in_its_middle_and_the_checkpoint_can_be_read_again(
    folder: Path,
) -> None:
    held = Held.open(LocalFolder(folder))
    steps = layers(held)
    size = held.nbytes(steps[0])
    with (
        pytest.raises(KeyboardInterrupt),
        reading_ahead(held, steps, budget=1 << 30, pinned=False) as reader,
    ):
        reader.start(steps)
        reader.take()
        while held.reads < 3:
            time.sleep(0.001)
        raise KeyboardInterrupt
    assert held.bytes_read == 2 * size and not threads()
    assert held.read(steps[5]) and held.bytes_read == 3 * size


def test_a_reader_that_was_never_started_is_left_as_it_is(checkpoint: Checkpoint) -> None:
    with reading_ahead(checkpoint, [], budget=0, pinned=False) as reader:
        assert isinstance(reader, LayerReader)
    assert not threads()
