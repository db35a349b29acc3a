"""Offloaded decoder layers: what they compute, when they are copied, and the memory they take."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from student_examples import batch, loss_and_gradients, make_student, read_layers, write_layers
from torch import Tensor, nn

from rilq.calib.activations import ActivationStore, ActivationWriter
from rilq.converter import student as student_module
from rilq.converter.offload import HostLayers, MappedLayers, in_host_memory
from rilq.converter.options import Tier, Train
from rilq.converter.student import Student
from rilq.converter.train import Trainer, TrainOptions
from rilq.progress import SilentReporter

CPU = torch.device("cpu")
LAYERS = 4
TRAINS: list[Train] = ["adapters", "scales", "adapters+scales", "all"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path_factory.mktemp("deep") / "llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[[int], Path]:
    """The folder of the model's layers in so many bits."""
    made: dict[int, Path] = {}

    def folder(bits: int) -> Path:
        if bits not in made:
            made[bits] = tmp_path_factory.mktemp(f"{bits}-bits")
            write_layers(model, made[bits], bits)
        return made[bits]

    return folder


@pytest.fixture
def through_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload as on a GPU: through two slots, which are in the CPU's memory here."""
    monkeypatch.setattr(student_module, "elsewhere", in_host_memory)
    with_graph = student_module.recomputed_with_graph
    monkeypatch.setattr(student_module, "recomputed", lambda forward, *_: with_graph(forward))


@pytest.mark.parametrize(
    ("bits", "train"),
    [*((2, train) for train in TRAINS), *((bits, "adapters+scales") for bits in (3, 4, 8))],
)
def test_all_tiers_have_the_same_loss_and_gradients(
    bits: int, train: Train, model: Path, quantized: Callable[[int], Path], request: Any
) -> None:
    tiers: list[Tier] = ["packed", "dense", "offload"]
    found = [
        loss_and_gradients(make_student(model, quantized(bits), t, train, bits)) for t in tiers
    ]
    request.getfixturevalue("through_slots")
    found.append(loss_and_gradients(make_student(model, quantized(bits), "offload", train, bits)))
    (loss, grads), *others = found
    for other_loss, other_grads in others:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_grads.keys() == grads.keys()
        for name, grad in other_grads.items():
            torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-7, msg=name)
            assert grad.abs().max() > 0, name


def test_plain_loras_too(
    model: Path, quantized: Callable[[int], Path], through_slots: None
) -> None:
    (loss, grads), (other_loss, other_grads) = (
        loss_and_gradients(make_student(model, quantized(2), tier, "adapters", kind="lora"))
        for tier in ("packed", "offload")
    )
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, grad in other_grads.items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.fixture
def targets(tmp_path: Path) -> Iterator[ActivationStore]:
    shape = (10, 16, 64)
    with ActivationWriter(tmp_path / "t.bin", shape, torch.float32, label="test") as writer:
        writer.append(batch(rows=10)[1])
    yield ActivationStore(tmp_path / "t.bin", shape, torch.float32)


def trained(student: Student, targets: ActivationStore, *, stop: int | None = None) -> Trainer:
    """A training of 4 updates of two micro-batches; with `stop`, its state restored there."""

    def trainer() -> Trainer:
        options = TrainOptions(1e-2, 4, batch_size=4, micro_batch=2, val_every=2)
        return Trainer(student, batch(rows=10)[0], targets, validation=2, options=options)

    train = trainer()
    states: dict[int, Any] = {}

    def commit() -> None:
        kept = {name: value.clone() for name, value in train.tensors().items()}
        states[train.progress.step] = (kept, train.progress.as_facts())

    train.run(commit, SilentReporter())
    if stop is not None:
        train = trainer()
        train.restore(*states[stop])
        train.run(lambda: None, SilentReporter())
    return train


@pytest.mark.parametrize("train", ["adapters", "adapters+scales", "all"])
def test_training_offloaded_gives_what_training_packed_gives(
    train: Train,
    model: Path,
    quantized: Callable[[int], Path],
    targets: ActivationStore,
    through_slots: None,
) -> None:
    packed = trained(make_student(model, quantized(2), "packed", train), targets)
    offload = trained(make_student(model, quantized(2), "offload", train), targets)
    for (_, found), (_, expected) in zip(
        offload.progress.history, packed.progress.history, strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-4)
    before = make_student(model, quantized(2), "packed", train)
    for name, value in offload.parameters.items():
        torch.testing.assert_close(value, packed.parameters[name], rtol=1e-2, atol=1e-4, msg=name)
        assert not torch.equal(value, before.trained[name]), name


def test_a_restored_training_goes_on_to_the_same_bytes(
    model: Path, quantized: Callable[[int], Path], targets: ActivationStore, through_slots: None
) -> None:
    whole, resumed = (
        trained(make_student(model, quantized(2), "offload", "all"), targets, stop=stop)
        for stop in (None, 2)
    )
    for name, value in whole.parameters.items():
        assert torch.equal(value, resumed.parameters[name]), name


def test_codes_are_not_trained_offloaded(model: Path, quantized: Callable[[int], Path]) -> None:
    with pytest.raises(AssertionError, match="cannot be offloaded"):
        make_student(model, quantized(2), "offload", "all+codes")


# -- copies ----------------------------------------------------------------------------------------


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch, through_slots: None) -> list[tuple[str, int]]:
    """What happens, in order: `("use", layer)` and `("copy", layer)`."""
    events: list[tuple[str, int]] = []
    fetch, copy = HostLayers.fetch, HostLayers._copy

    def watched_fetch(self: HostLayers, index: int) -> dict[str, Tensor]:
        tensors = fetch(self, index)
        events.append(("use", index))
        return tensors

    def watched_copy(self: HostLayers, index: int) -> None:
        if self._slots[index % 2].holds != index:
            events.append(("copy", index))
        copy(self, index)

    monkeypatch.setattr(HostLayers, "fetch", watched_fetch)
    monkeypatch.setattr(HostLayers, "_copy", watched_copy)
    return events


def test_each_layer_is_copied_while_its_neighbour_computes_in_both_directions(
    model: Path, quantized: Callable[[int], Path], copied: list[tuple[str, int]]
) -> None:
    student = make_student(model, quantized(2), "offload", "adapters")
    tokens = batch()[0]
    student.states(tokens)[1].sum().backward()
    forward = [("copy", 0), ("copy", 1), ("use", 0), ("copy", 2), ("use", 1), ("copy", 3),
               ("use", 2), ("use", 3)]  # fmt: skip
    # Layers 2 and 3 are in the slots still.
    backward = [("use", 3), ("copy", 1), ("use", 2), ("copy", 0), ("use", 1), ("use", 0)]
    assert copied == forward + backward
    copied.clear()
    with torch.no_grad():
        student.states(tokens)
    assert copied == forward


def test_layers_on_the_device_are_two_slots_of_the_largest(
    model: Path, quantized: Callable[[int], Path], through_slots: None
) -> None:
    student = make_student(model, quantized(2), "offload", "adapters")
    student.states(batch()[0])
    host = student._elsewhere
    assert isinstance(host, HostLayers)
    stored = sum(t.nbytes for t in read_layers(quantized(2))(0).values())
    for slot in host._slots:
        assert stored <= slot.memory.nbytes < stored + 256 * 200  # one linear has seven tensors
    of_layers = [p for n, p in student.model.named_parameters() if ".layers." in n]
    assert all(p.is_meta or p.requires_grad for p in of_layers)


def test_a_layer_on_a_cpu_is_let_go_of_after_its_call(
    model: Path, quantized: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[set[int]] = []
    held: dict[int, weakref.ref[Tensor]] = {}
    fetch = MappedLayers.fetch

    def watched(self: MappedLayers, index: int) -> dict[str, Tensor]:
        tensors = fetch(self, index)
        held[index] = weakref.ref(tensors["self_attn.q_proj.base.weight"])
        alive.append({i for i, ref in held.items() if ref() is not None})
        return tensors

    monkeypatch.setattr(MappedLayers, "fetch", watched)
    student = make_student(model, quantized(2), "offload", "adapters")
    student.states(batch()[0])[1].sum().backward()
    assert alive[:LAYERS] == [{index} for index in range(LAYERS)]
    assert len(alive) == 2 * LAYERS and max(map(len, alive)) <= 2


@pytest.mark.parametrize("tier", ["dense", "packed", "offload"])
def test_a_student_that_is_let_go_of_frees_its_memory_at_once(
    tier: Tier, model: Path, quantized: Callable[[int], Path], through_slots: None
) -> None:
    student = make_student(model, quantized(2), tier, "adapters+scales")
    loss_and_gradients(student)
    held = [weakref.ref(p) for p in student.parameters()]
    if isinstance(student._elsewhere, HostLayers):
        held.append(weakref.ref(student._elsewhere._slots[0].memory))
    gc.disable()
    try:
        del student
        assert not [ref for ref in held if ref() is not None]
    finally:
        gc.enable()


DTYPES = (torch.int32, torch.float16, torch.float32, torch.uint8, torch.bfloat16)
SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=5), st.sampled_from([512, 4096]), st.data())
def test_slots_hold_what_was_stored(
    layers: list[list[tuple[int, int]]], piece: int, data: st.DataObject
) -> None:
    draw = torch.Generator().manual_seed(0)
    host, stored = HostLayers(CPU, piece=piece), []
    for shapes in layers:
        frozen = {
            str(n): torch.randint(100, shape, generator=draw).to(data.draw(st.sampled_from(DTYPES)))
            for n, shape in enumerate(shapes)
        }
        trained = {"t": nn.Parameter(torch.randn(3, 5, generator=draw))}
        host.add(frozen, trained)
        stored.append({**frozen, **trained})
    for index in data.draw(st.permutations([*range(len(layers))] * 2)):
        for name, value in host.fetch(index).items():
            assert value.dtype == stored[index][name].dtype
            assert torch.equal(value, stored[index][name])


def test_what_was_trained_since_is_copied_after_a_restart() -> None:
    host, parameter = HostLayers(CPU), nn.Parameter(torch.zeros(2, 2))
    host.add({}, {"t": parameter})
    host.fetch(0)
    with torch.no_grad():
        parameter.add_(1)
    host.restart()
    assert torch.equal(host.fetch(0)["t"], torch.ones(2, 2))
