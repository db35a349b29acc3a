"""Adapters, the student's two tiers, and merging, against dense references."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rilq.converter.adapters import Adapter, AdapterSpec, learning_rate
from rilq.converter.merge import merged_zero_point
from rilq.converter.quantizers import build_quantizer
from rilq.converter.student import AdaptedLinear, Student
from rilq.converter.train import rilq_loss
from rilq.formats.native import RilqConfig, native_tensors
from rilq.formats.packing import dequantize
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
    """`make_student(tier, adapters, linears=...)`: a student over the quantized linears."""

    def make(
        tier: str, adapters: AdapterSpec | None, linears: dict[str, QuantizedLinear] = quantized
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


def stir(student: Student) -> None:
    """Give every B random values, so that adapters do something of the size of the weights."""
    draw = torch.Generator().manual_seed(9)
    for name in sorted(student.adapters):
        adapter = student.adapters[name]
        size = 0.02 / (adapter.a.std() * adapter.spec.alpha / adapter.spec.rank**0.5)
        adapter.b.data.copy_(size * torch.randn(adapter.b.shape, generator=draw))


def gradients(student: Student, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    tokens, target = batch
    hidden, logits = student(tokens)
    rilq_loss(hidden, logits, target, tokens).backward()
    return {
        f"{name}.{part}": getattr(adapter, part).grad.clone()
        for name, adapter in student.adapters.items()
        for part in ("a", "b")
    }


def reference_gradients(
    dense: nn.Module,
    quantized: dict[str, QuantizedLinear],
    adapters: dict[str, Adapter],
    batch: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """The same loss, with the whole of W + c B A P written out as one dense matrix per linear."""
    model = copy.deepcopy(dense)
    leaves: dict[str, Tensor] = {}

    class Written(nn.Module):
        def __init__(self, weight: Tensor, a: Tensor, b: Tensor, pool: Tensor, c: float) -> None:
            super().__init__()
            self.weight, self.a, self.b, self.pool, self.c = weight, a, b, pool, c

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight + self.c * self.b @ self.a @ self.pool).T

    for name, linear in quantized.items():
        adapter = adapters[name]
        a, b = (p.detach().clone().requires_grad_() for p in (adapter.a, adapter.b))
        leaves |= {f"{name}.a": a, f"{name}.b": b}
        size = linear.codes.shape[1]
        pool = torch.eye(size)
        if adapter.spec.kind == "pooled":
            pool = torch.kron(torch.eye(size // SPEC.group_size), torch.ones(1, SPEC.group_size))
        weight = dequantize(linear.codes, linear.scale, linear.zero_point)
        model.set_submodule(name, Written(weight, a, b, pool, adapter.spec.scaling))
    tokens, target = batch
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    rilq_loss(hidden, model.lm_head(hidden), target, tokens).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("kind", ["pooled", "lora"])
@pytest.mark.parametrize("tier", ["dense", "packed"])
def test_gradients_equal_those_of_a_dense_reference(
    kind: str,
    tier: str,
    dense: nn.Module,
    quantized: dict[str, QuantizedLinear],
    make_student: Callable[..., Student],
    batch: tuple[Tensor, Tensor],
) -> None:
    student = make_student(tier, AdapterSpec(kind, 4, 8.0, seed=1))  # type: ignore[arg-type]
    stir(student)
    found = gradients(student, batch)
    expected = reference_gradients(dense, quantized, student.adapters, batch)
    assert found.keys() == expected.keys() and len(found) == 2 * 14
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=1e-6, msg=name)
        assert value.abs().max() > 0, f"{name}: no gradient"


def test_a_fresh_adapter_changes_nothing(
    make_student: Callable[..., Student], batch: tuple[Tensor, Tensor]
) -> None:
    plain, adapted = make_student("dense", None), make_student("dense", POOLED)
    with torch.no_grad():
        assert torch.equal(plain(batch[0])[1], adapted(batch[0])[1])


@pytest.mark.parametrize("rank", [1, 2, 16], ids=["rank 1", "rank of the groups", "above it"])
def test_merged_logits_equal_unmerged_ones_to_float16_rounding(
    rank: int,
    quantized: dict[str, QuantizedLinear],
    make_student: Callable[..., Student],
    batch: tuple[Tensor, Tensor],
) -> None:
    spec = AdapterSpec("pooled", rank, 16.0, seed=1)
    student = make_student("dense", spec)
    stir(student)
    merged = {}
    for name, linear in quantized.items():
        adapter = student.adapters[name]
        zero = merged_zero_point(
            linear.scale, linear.zero_point, adapter.a.data, adapter.b.data, spec
        )
        merged[name] = QuantizedLinear(linear.codes, linear.scale, zero, linear.spec)
    with torch.no_grad():
        before, base, after = (
            model(batch[0])[1]
            for model in (student, make_student("dense", None), make_student("dense", None, merged))
        )
    change = (before - base).abs().max()
    assert change > 0.1, "the adapters do too little for a test"
    assert (after - before).abs().max() < 0.01 * change


def test_merging_keeps_codes_and_scales_and_stays_finite() -> None:
    scale = torch.tensor([[1e-7]]).half()
    spec = AdapterSpec("pooled", 1, 1.0, seed=0)
    zero = merged_zero_point(
        scale, torch.zeros(1, 1).half(), torch.ones(1, 1), torch.ones(1, 1), spec
    )
    assert torch.isfinite(zero).all()


def test_a_plain_lora_is_refused_by_merging() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(AssertionError, match="LoRA"):
        merged_zero_point(one, one, one, one, AdapterSpec("lora", 1, 1.0, seed=0))


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
    assert len(adapted) == len(student.adapters) == 2 * 7


def test_only_adapters_are_trained(make_student: Callable[..., Student]) -> None:
    student = make_student("dense", POOLED)
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith((".adapter.a", ".adapter.b")) for name in trained)


def test_learning_rate_is_the_papers_at_its_width_and_inverse_to_width() -> None:
    assert learning_rate(4096) == pytest.approx(1e-4)  # RILQ's reference code, LLaMA-2-7B
    assert learning_rate(2048) == pytest.approx(2 * learning_rate(4096))
    assert learning_rate(8) == 1e-2
