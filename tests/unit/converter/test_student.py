"""Adapters, the student's two tiers, and merging, against dense references."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rilq.converter import loss as loss_module
from rilq.converter import student as student_module
from rilq.converter.adapters import Adapter, AdapterSpec, learning_rate
from rilq.converter.loss import Loss, discrepancy
from rilq.converter.merge import merged_codes, merged_grid
from rilq.converter.options import Train
from rilq.converter.quantizers import build_quantizer
from rilq.converter.student import AdaptedLinear, Student
from rilq.formats.native import RilqConfig, native_tensors
from rilq.formats.packing import pack, unpack
from rilq.formats.spec import QuantizedLinear, QuantSpec

CPU = torch.device("cpu")
SPEC = QuantSpec(2, 32)
POOLED = AdapterSpec("pooled", 4, 8.0, seed=1)


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> nn.Module:
    """The full-precision model in memory."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def quantized(dense: nn.Module) -> dict[str, QuantizedLinear]:
    """Every decoder linear, rounded to 2 bits."""
    rtn = build_quantizer("rtn")
    return {
        name: rtn.quantize(module.weight.detach(), SPEC)
        for name, module in dense.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


@pytest.fixture(scope="module")
def make_student(dense: nn.Module, quantized: dict[str, QuantizedLinear]) -> Callable[..., Student]:
    """`make_student(tier, adapters, linears=..., train=...)`: over the quantized linears."""

    def make(
        tier: str,
        adapters: AdapterSpec | None,
        linears: dict[str, QuantizedLinear] = quantized,
        train: Train | None = None,
    ) -> Student:
        state = {n: t.detach() for n, t in dense.state_dict().items()}
        natives = {
            k: t for n, linear in linears.items() for k, t in native_tensors(n, linear).items()
        }

        def read_layer(index: int) -> dict[str, Tensor]:
            start = f"model.layers.{index}."
            kept = {n: t for n, t in state.items() if n.startswith(start) and n not in natives}
            return kept | {n: t for n, t in natives.items() if n.startswith(start)}

        return Student(
            dense.config,
            RilqConfig(2, 32),
            read_layer=read_layer,
            outer={n: t for n, t in state.items() if ".layers." not in n},
            train=train or ("adapters" if adapters else "none"),
            adapters=adapters,
            tier=tier,  # type: ignore[arg-type]
            dtype=torch.float32,
            device=CPU,
        )

    return make


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Token rows `[2, 16]` and targets `[2, 16, 64]`."""
    draw = torch.Generator().manual_seed(3)
    return torch.randint(320, (2, 16), generator=draw), torch.randn(2, 16, 64, generator=draw)


def adapters_of(student: Student) -> dict[str, Adapter]:
    """Every adapter by the name of its linear."""
    found = {n: m for n, m in student.model.named_modules() if isinstance(m, Adapter)}
    return {name.removesuffix(".adapter"): adapter for name, adapter in found.items()}


def stir(student: Student) -> None:
    """Give all that is trained random values that do something of the size of the weights."""
    draw = torch.Generator().manual_seed(9)
    for _, adapter in sorted(adapters_of(student).items()):
        size = 0.02 / (adapter.a.std() * adapter.spec.alpha / adapter.spec.rank**0.5)
        adapter.b.data.copy_(size * torch.randn(adapter.b.shape, generator=draw))
    for name, parameter in sorted(student.trained.items()):
        if not name.endswith((".a", ".b")):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=draw))


def gradients(student: Student, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    tokens, target = batch
    discrepancy(student, tokens, target, Loss()).backward()
    return {name: parameter.grad.clone() for name, parameter in student.trained.items()}


class Written(nn.Module):
    """One linear of a dense reference: its weight written out from leaves, in plain operations."""

    def __init__(self, linear: QuantizedLinear, leaves: dict[str, Tensor], spec: AdapterSpec):
        super().__init__()
        self.linear, self.leaves, self.spec = linear, leaves, spec

    def forward(self, x: Tensor) -> Tensor:
        size, leaves = SPEC.group_size, self.leaves
        groups = x.shape[-1] // size
        spread = torch.kron(torch.eye(groups), torch.ones(1, size))  # [groups, in]
        scale, zero = (t.float() @ spread for t in (self.linear.scale, self.linear.zero_point))
        factor, moved = torch.ones_like(scale), torch.zeros_like(scale)
        if "log_scale" in leaves:
            factor = leaves["log_scale"].exp() @ spread
        if "offset" in leaves:
            moved = scale * (leaves["offset"] @ spread)
        if "a" in leaves:
            pool = spread if self.spec.kind == "pooled" else torch.eye(x.shape[-1])
            moved = moved + self.spec.scaling * leaves["b"] @ leaves["a"] @ pool
        codes = self.linear.codes.float()
        if "code_shift" in leaves:  # rounded, with the gradient of what is not
            codes = (codes + leaves["code_shift"]).clamp(0, 3)
            codes = codes + (codes.round() - codes).detach()
        return x @ (scale * factor * (codes - zero) + moved).T


def reference_gradients(
    dense: nn.Module,
    quantized: dict[str, QuantizedLinear],
    student: Student,
    spec: AdapterSpec,
    batch: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """The same loss over linears that are each written out as one dense matrix."""
    model = copy.deepcopy(dense)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in student.trained.items()}
    for name, linear in quantized.items():
        own = {n.rpartition(".")[2]: t for n, t in leaves.items() if n.startswith(f"{name}.")}
        model.set_submodule(name, Written(linear, own, spec))
    tokens, target = batch
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    ce = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    (0.5 * (hidden - target).square().mean() + 0.5 * ce).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


WAYS: list[tuple[str, Train, int]] = [  # kind of adapter, what is trained, parts per linear
    ("pooled", "adapters", 2),
    ("lora", "adapters", 2),
    ("pooled", "scales", 1),
    ("pooled", "adapters+scales", 3),
    ("pooled", "all", 2),
    ("pooled", "all+codes", 3),
]


@pytest.mark.parametrize(
    ("tier", "kind", "train", "parts"),
    [(tier, *way) for tier in ("dense", "packed") for way in WAYS]
    + [("offload", *way) for way in WAYS if way[1] != "all+codes"],  # which is refused there
)
def test_gradients_equal_those_of_a_dense_reference(
    tier: str,
    kind: str,
    train: Train,
    parts: int,
    dense: nn.Module,
    quantized: dict[str, QuantizedLinear],
    make_student: Callable[..., Student],
    batch: tuple[Tensor, Tensor],
) -> None:
    spec = AdapterSpec(kind, 4, 8.0, seed=1)  # type: ignore[arg-type]
    student = make_student(tier, spec, train=train)
    stir(student)
    found = gradients(student, batch)
    expected = reference_gradients(dense, quantized, student, spec, batch)
    assert found.keys() == expected.keys() and len(found) == parts * 14
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=5e-4, atol=2e-6, msg=name)
        assert value.abs().max() > 0, f"{name}: no gradient"


def test_a_fresh_adapter_changes_nothing(
    make_student: Callable[..., Student], batch: tuple[Tensor, Tensor]
) -> None:
    plain, adapted = make_student("dense", None), make_student("dense", POOLED)
    with torch.no_grad():
        assert torch.equal(plain(batch[0]), adapted(batch[0]))


@pytest.mark.parametrize("train", ["adapters", "scales", "adapters+scales", "all", "all+codes"])
@pytest.mark.parametrize("rank", [1, 2, 16], ids=["rank 1", "rank of the groups", "above it"])
def test_merged_logits_equal_unmerged_ones_to_float16_rounding(
    rank: int,
    train: Train,
    quantized: dict[str, QuantizedLinear],
    make_student: Callable[..., Student],
    batch: tuple[Tensor, Tensor],
) -> None:
    spec = AdapterSpec("pooled", rank, 16.0, seed=1)
    student = make_student("dense", spec, train=train)
    stir(student)
    merged = {}
    for name, linear in quantized.items():
        start = f"{name}."
        trained = {
            n.removeprefix(start): p.data for n, p in student.trained.items() if n.startswith(start)
        }
        grid = merged_grid(linear.scale, linear.zero_point, trained, spec)
        codes = linear.codes
        if "code_shift" in trained:
            words = merged_codes(pack(codes, 2), trained["code_shift"])
            codes = unpack(words, 2, codes.shape[1])
            assert 0 < (codes != linear.codes).float().mean() < 0.1
        merged[name] = QuantizedLinear(codes, *grid, linear.spec)
    with torch.no_grad():
        before, base, after = (
            model(batch[0])
            for model in (student, make_student("dense", None), make_student("dense", None, merged))
        )
    change = (before - base).abs().max()
    assert change > 0.1, "what is trained does too little for a test"
    assert (after - before).abs().max() < 0.01 * change


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_merged_codes_are_the_nearest_to_the_moved_ones(bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (4, 64), generator=draw).to(torch.uint8)
    shift = 2 * torch.randn(4, 64, generator=draw)
    found = unpack(merged_codes(pack(codes, bits), shift), bits, 64)
    for code, by, new in zip(*(t.flatten().tolist() for t in (codes, shift, found)), strict=True):
        assert new == min(range(2**bits), key=lambda n: abs(n - (code + by)))


def test_merging_stays_finite_and_positive() -> None:
    scale, zero, one = torch.tensor([[1e-7]]).half(), torch.zeros(1, 1).half(), torch.ones(1, 1)
    spec = AdapterSpec("pooled", 1, 1.0, seed=0)
    for log_scale in (-1e4 * one, 80 * one):
        trained = {"a": one, "b": one, "log_scale": log_scale}
        merged_scale, merged_zero = merged_grid(scale, zero, trained, spec)
        assert torch.isfinite(merged_scale).all() and merged_scale.item() > 0
        assert torch.isfinite(merged_zero).all()


@pytest.mark.parametrize("bits", [2, 8])
def test_an_integer_zero_point_stays_that_integer_where_only_scales_were_trained(bits: int) -> None:
    zero = torch.arange(2**bits).half()[None]
    draw = torch.Generator().manual_seed(bits)
    scale = torch.rand(zero.shape, generator=draw).half()
    log_scale = torch.randn(zero.shape, generator=draw)
    new_scale, new_zero = merged_grid(scale, zero, {"log_scale": log_scale}, None)
    assert torch.equal(new_zero, zero)
    torch.testing.assert_close(new_scale.float(), scale * log_scale.exp(), rtol=1e-3, atol=1e-6)


def test_a_plain_lora_is_refused_by_merging() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(AssertionError, match="LoRA"):
        merged_grid(one, one, {"a": one, "b": one}, AdapterSpec("lora", 1, 1.0, seed=0))


def test_initial_adapters_depend_on_seed_and_name_only() -> None:
    def start(seed: int, name: str) -> Tensor:
        spec = AdapterSpec("pooled", 4, 8.0, seed)
        return Adapter(
            spec, name, out_features=8, in_features=64, group_size=32, device=CPU
        ).a.detach()

    torch.manual_seed(0)
    first = start(1, "x")
    torch.manual_seed(1)
    assert torch.equal(first, start(1, "x"))
    assert not torch.equal(first, start(2, "x"))
    assert not torch.equal(first, start(1, "y"))


def test_adapters_are_float32_whatever_the_model_computes_in() -> None:
    adapter = Adapter(POOLED, "x", out_features=8, in_features=64, group_size=32, device=CPU)
    out = adapter(torch.randn(2, 64, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert adapter.a.dtype == adapter.b.dtype == torch.float32


def test_every_linear_of_every_layer_has_an_adapter(make_student: Callable[..., Student]) -> None:
    student = make_student("packed", POOLED)
    adapted = [m for m in student.model.modules() if isinstance(m, AdaptedLinear)]
    assert len(adapted) == len(adapters_of(student)) == 2 * 7


@pytest.mark.parametrize("train", ["adapters", "scales", "adapters+scales", "all", "all+codes"])
def test_nothing_else_is_trained(train: Train, make_student: Callable[..., Student]) -> None:
    student = make_student("dense", POOLED, train=train)
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    assert trained == {id(p) for p in student.trained.values()}
    assert all(p.dtype == torch.float32 for p in student.trained.values())


def test_logits_in_chunks_give_the_loss_and_gradients_of_all_at_once(
    make_student: Callable[..., Student],
    batch: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for logits in (2**24, 320 * 5):  # positions of a vocabulary of 320: all, and five
        monkeypatch.setattr(loss_module, "LOGITS", logits)
        student = make_student("packed", POOLED, train="adapters+scales")
        stir(student)
        value = discrepancy(student, *batch, Loss(mse=0.2, ce=0.3, kl=0.5))
        value.backward()
        results.append((value.item(), {n: p.grad for n, p in student.trained.items()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-4, atol=1e-7, msg=name)


def graph_nodes(value: Tensor) -> int:
    """Nodes of the graph behind `value`."""
    seen, ahead = set(), [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [behind for behind, _ in node.next_functions]
    return len(seen)


def test_recomputed_layers_have_no_graph_on_a_cpu_and_the_same_gradients(
    make_student: Callable[..., Student],
    batch: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts, losses, gradients = [], [], []
    for way in (
        student_module.recomputed,
        lambda forward, *_: student_module.recomputed_with_graph(forward),
    ):
        monkeypatch.setattr(student_module, "recomputed", way)
        student = make_student("packed", POOLED, train="adapters+scales")
        stir(student)
        value = discrepancy(student, *batch, Loss(mse=0.2, ce=0.3, kl=0.5))
        counts.append(graph_nodes(value))
        losses.append(value.item())
        value.backward()
        gradients.append({n: p.grad for n, p in student.trained.items()})
    assert counts[0] < 40 < 100 < counts[1]
    assert losses[0] == losses[1]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_passes_before_one_backward_pass_have_their_own_inputs(
    make_student: Callable[..., Student], batch: tuple[Tensor, Tensor]
) -> None:
    tokens, target = batch
    gradients = []
    for together in (False, True):
        student = make_student("packed", POOLED, train="adapters+scales")
        stir(student)
        values = []
        for row in range(2):  # the inputs of the second are kept while those of the first are
            values.append(discrepancy(student, tokens[row:][:1], target[row:][:1], Loss()))
            if not together:
                values.pop().backward()
        for value in reversed(values):
            value.backward()
        gradients.append({n: p.grad for n, p in student.trained.items()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)


def test_inputs_are_kept_in_the_same_block_in_every_pass() -> None:
    kept = student_module.KeptInputs(2)

    def passed(rows: int, index: int = 1) -> Tensor:
        hidden = torch.rand(rows, 4, 8, requires_grad=True)
        layer = student_module.recomputed(torch.sin, CPU, kept.of(index))
        out: Tensor = layer(hidden).sum()
        (saved,) = out.grad_fn.next_functions[0][0].saved_tensors
        assert torch.equal(saved, hidden) and saved.data_ptr() != hidden.data_ptr()
        out.backward()
        torch.testing.assert_close(hidden.grad, hidden.cos())
        return saved

    first = passed(3)
    place = first.data_ptr()
    assert passed(3, index=0).data_ptr() == place - first.nbytes
    del first
    assert passed(3).data_ptr() == place and passed(2).data_ptr() == place


def test_large_inputs_are_not_copied() -> None:
    hidden = torch.rand(1, 512, 512, requires_grad=True)  # 1 MiB
    out = student_module.recomputed(torch.sin, CPU, student_module.KeptInputs(1).of(0))(hidden)
    assert out.grad_fn.saved_tensors[0].data_ptr() == hidden.data_ptr()


def test_learning_rate_is_the_papers_at_its_width_and_inverse_to_width() -> None:
    assert learning_rate(4096) == pytest.approx(1e-4)  # RILQ's reference code, LLaMA-2-7B
    assert learning_rate(2048) == pytest.approx(2 * learning_rate(4096))
    assert learning_rate(8) == 1e-2
