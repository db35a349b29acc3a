"""The streaming pass: what runs at once, and what is said about which linear."""

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_examples import MIXTURES

from rilq.converter import workdir
from rilq.converter.layers import StreamedModel
from rilq.converter.quantizers import Quantizer, build_quantizer
from rilq.converter.quantizers.gptq import GptqQuantizer
from rilq.converter.stream import StreamingPass
from rilq.converter.stream_options import StreamOptions
from rilq.converter.workdir import open_workdir
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder
from rilq.formats.spec import QuantSpec
from rilq.progress import LogReporter, SilentReporter

ROWS, SEQLEN = 4, 16


class Watched(Checkpoint):
    """A checkpoint that says when a layer is about to be read."""

    reading: dict[str, threading.Event] = {}

    def read(self, names: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        names = list(names)
        for part, event in self.reading.items():
            if any(part in name for name in names):
                event.set()
        return super().read(names, **kwargs)


@pytest.fixture
def stream(tiny_llama: Path, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """`stream(quantizer, report=...)`: the pass over tiny_llama, on random tokens."""

    def run(quantizer: Quantizer, report: Any = None, after_layer: Any = None) -> None:
        report = report or SilentReporter()
        checkpoint = Watched.open(LocalFolder(tiny_llama))
        streamed = StreamedModel(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
        tokens = torch.randint(320, (ROWS, SEQLEN), generator=torch.Generator().manual_seed(0))
        options = StreamOptions(
            quantizer,
            lambda name: QuantSpec(2, 32),
            batch_rows=2,
            train_rows=ROWS,
            after_layer=after_layer,
        )
        with open_workdir(tmp_path / "work", {}, {}, resume="auto", report=report) as work:
            StreamingPass(checkpoint, streamed, tokens, work, options, report).run(targets=True)

    Watched.reading = {}
    yield run
    Watched.reading = {}


def test_a_layer_is_read_while_the_one_before_it_is_not_committed_yet(
    stream: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    Watched.reading = {"layers.1.": threading.Event()}
    waited = []

    def reached(point: str) -> None:
        # The first unit is the embedding, the second is layer 0.
        waited.append(point)
        if waited.count("layers:written") == 2 and point == "layers:written":
            assert Watched.reading["layers.1."].wait(10), "nothing is read meanwhile"

    monkeypatch.setattr(workdir, "reached", reached)
    stream(build_quantizer("rtn"))
    assert waited.count("layers:committed") == 4


def test_experts_that_come_one_by_one_are_never_read_ahead(
    tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is journaled has the hash of each of them."""
    readers: dict[str, set[str]] = {}
    real = Checkpoint.read

    def read(self: Checkpoint, names: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        names = list(names)
        for name in names:
            readers.setdefault(name, set()).add(threading.current_thread().name)
        return real(self, names, **kwargs)

    monkeypatch.setattr(Checkpoint, "read", read)
    source = make_model(tmp_path / "source", "qwen3_moe", **MIXTURES["qwen3_moe"])
    checkpoint = Checkpoint.open(LocalFolder(source))
    streamed = StreamedModel(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    streamed.experts_apart = True
    tokens = torch.randint(320, (ROWS, SEQLEN), generator=torch.Generator().manual_seed(0))
    options = StreamOptions(
        build_quantizer("rtn"), lambda name: QuantSpec(2, 32), batch_rows=2, train_rows=ROWS
    )
    report = SilentReporter()
    with open_workdir(tmp_path / "work", {}, {}, resume="auto", report=report) as work:
        StreamingPass(checkpoint, streamed, tokens, work, options, report).run(targets=True)
        journaled = [record.facts.get("source", {}) for record in work.stage("layers")]
    layers = {n for n in checkpoint.tensors if ".layers." in n}
    for name in layers:
        assert (readers[name] == {"rilq-layer-reader"}) == (".experts." not in name), name
        assert ".experts." not in name or "rilq-layer-reader" not in readers[name]
    hashes = {name: found for facts in journaled for name, found in facts.items()}
    assert hashes == {name: checkpoint.hashes[name] for name in layers}


def test_a_stop_in_a_layer_ends_every_thread(stream: Callable[..., None]) -> None:
    def stop(_layer: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(build_quantizer("rtn"), after_layer=stop)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("rilq-")]


def test_a_damping_that_had_to_be_raised_is_said_of_each_linear(
    stream: Callable[..., None],
) -> None:
    # 64 tokens are fewer than the 128 inputs of down_proj: its Hessian is singular.
    told = io.StringIO()
    stream(GptqQuantizer(damping=1e-12), LogReporter(told))
    warnings = [line for line in told.getvalue().splitlines() if "not positive definite" in line]
    for layer in (0, 1):
        [line] = [w for w in warnings if f"model.layers.{layer}.mlp.down_proj: the Hessian" in w]
        assert "with 1e-12 of its mean diagonal added" in line and "was used" in line
