"""Experts: each by its own tokens, one at a time in memory, gradients through frozen ones."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from mixture_examples import MIXTURES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rilq.converter import experts as experts_module
from rilq.converter import student as student_module
from rilq.converter.adapters import Adapter, AdapterSpec
from rilq.converter.experts import (
    DATA_FREE,
    ExpertTokens,
    InputGroup,
    expert_groups,
    expert_quality,
    quantizer_for,
)
from rilq.converter.layers import StreamedModel, module_inputs
from rilq.converter.offload import in_host_memory
from rilq.converter.options import ConvertOptions, is_router, is_target
from rilq.converter.quantizers import build_quantizer
from rilq.converter.ranks import ALONE
from rilq.converter.student import AdaptedLinear, Student
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.experts import Expert, Experts, separate_experts
from rilq.formats.native import RilqConfig, native_tensors
from rilq.formats.packing import dequantize
from rilq.formats.source import LocalFolder
from rilq.formats.spec import EXPERTS, QuantSpec

CPU = torch.device("cpu")
ROWS = torch.randint(320, (4, 24), generator=torch.Generator().manual_seed(0))
SPEC = QuantSpec(2, 32)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """A random Mixtral; tests must not change it."""
    return make_model(tmp_path_factory.mktemp("x") / "mixtral", "mixtral", **MIXTURES["mixtral"])


@pytest.fixture
def streamed(mixtral: Path) -> StreamedModel:
    """It, ready to run decoder layers."""
    checkpoint = Checkpoint.open(LocalFolder(mixtral))
    model = StreamedModel(checkpoint, dtype=torch.float32, device=CPU)
    model.load_outer(checkpoint.read(model.outer_names()))
    model.prepare(ROWS.shape[1])
    return model


@torch.no_grad()
def routed_inputs(folder: Path) -> dict[str, Tensor]:
    """What each expert's linear of layer 0 reads, by transformers' fused experts in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    block = model.model.layers[0].mlp
    seen: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    model(ROWS)
    hidden = seen[0]
    _, _, chosen = block.gate(hidden)
    found: dict[str, Tensor] = {}
    for number in range(4):
        mine = hidden[(chosen == number).any(1)]
        gate, up = (mine @ block.experts.gate_up_proj[number].T).chunk(2, dim=1)
        place = f"model.layers.0.block_sparse_moe.experts.{number}"
        found |= {f"{place}.w1": mine, f"{place}.w3": mine}
        found[f"{place}.w2"] = nn.functional.silu(gate) * up
    return found


@pytest.mark.parametrize("together", [4, 1])
@torch.no_grad()
def test_each_expert_is_known_by_the_tokens_that_the_router_gave_it(
    together: int, streamed: StreamedModel, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many experts' Hessians the memory holds at once."""
    monkeypatch.setattr(experts_module, "HESSIANS", together * 4 * 128**2)
    expected = routed_inputs(mixtral)
    passes: list[int] = []
    found = streamed.experts(0)
    assert found is not None

    def inputs() -> Iterator[tuple[Tensor, Tensor]]:
        passes.append(1)
        for part in ROWS.split(2):
            yield module_inputs(streamed, 0, found[1], streamed.embed(part))[:2]

    with streamed.loaded(0, streamed.read_layer(0)):
        groups = list(
            expert_groups(*found, expected, inputs, hessians=True, device=CPU, added=ALONE.added)
        )
    assert len(passes) == 2 * 4 // together
    assert sorted(name for group in groups for name in group.names) == sorted(expected)
    assert sum(group.tokens or 0 for group in groups if len(group.names) == 1) == 2 * ROWS.numel()
    for group in groups:
        for name in group.names:
            x = expected[name]
            assert group.tokens == len(x)
            torch.testing.assert_close(group.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_tokens_of_experts_are_told_by_decoder_layer() -> None:
    """Of a DeepSeek the first layers are dense."""
    tokens = ExpertTokens()
    for number, seen in enumerate((7, 90, 40)):
        tokens.count(InputGroup([f"x.experts.{number}.w1"], tokens=seen), used=seen > 8)
    dense = {"error": 0.1}
    assert expert_quality([dense, dense | tokens.facts()]) == {
        "expert_tokens": [None, [7, 40, 90]],
        "experts_without_data": {"x.experts.0.w1": 7},
    }
    assert expert_quality([dense, dense]) == {}


@torch.no_grad()
def test_processes_know_experts_by_the_tokens_of_all_of_them(
    streamed: StreamedModel, mixtral: Path
) -> None:
    """The second one's tensors are kept, to be added to the first one's."""
    expected = routed_inputs(mixtral)
    found = streamed.experts(0)
    assert found is not None
    second: list[Tensor] = []

    def groups(rows: Tensor, added: Callable[[Tensor], Tensor]) -> list[InputGroup]:
        def inputs() -> Iterator[tuple[Tensor, Tensor]]:
            yield module_inputs(streamed, 0, found[1], streamed.embed(rows))[:2]

        return list(expert_groups(*found, expected, inputs, hessians=True, device=CPU, added=added))

    def kept(tensor: Tensor) -> Tensor:
        second.append(tensor.clone())
        return tensor

    with streamed.loaded(0, streamed.read_layer(0)):
        groups(ROWS[1:], kept)
        together = groups(ROWS[:1], lambda tensor: tensor + second.pop(0))
    assert not second
    for group in together:
        for name in group.names:
            x = expected[name]
            assert group.tokens == len(x)
            torch.testing.assert_close(group.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_data_is_looked_at_where_none_is_needed(streamed: StreamedModel) -> None:
    found = streamed.experts(1)
    assert found is not None
    names = [name for name in streamed.linears(1) if EXPERTS in name]
    groups = list(expert_groups(*found, names, _never, hessians=False, device=CPU, added=_never))
    assert [len(group.names) for group in groups] == [2] * 4 + [1] * 4
    assert all(group.hessian is None and group.tokens is None for group in groups)


def _never() -> Iterator[tuple[Tensor, Tensor]]:
    raise AssertionError("data was asked for")


@pytest.mark.parametrize(
    ("name", "tokens", "data_free"),
    [("gptq", 63, True), ("gptq", 64, False), ("gptq", None, False), ("lsq", 31, True),
     ("lsq", 32, False)],
)  # fmt: skip
def test_few_tokens_are_worse_than_none(name: str, tokens: int | None, data_free: bool) -> None:
    quantizer = build_quantizer(name)
    chosen = quantizer_for(quantizer, InputGroup(["x"], tokens=tokens), 64)  # type: ignore[arg-type]
    assert (chosen is DATA_FREE) == data_free


@torch.no_grad()
def test_experts_apart_are_in_memory_one_at_a_time_and_run_the_same(
    streamed: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = streamed.embed(ROWS)
    with streamed.loaded(0, streamed.read_layer(0)):
        together = streamed.run(0, hidden)
    streamed.experts_apart = True
    present: list[int] = []

    def inner(expert: Expert, x: Tensor) -> Tensor:
        found = streamed.experts(0)
        assert found is not None
        weights = [p for p in found[1].parameters() if not p.is_meta]
        present.append(len(weights))
        return original(expert, x)

    original = Expert.inner
    monkeypatch.setattr(Expert, "inner", inner)
    reads: list[int] = []
    read = streamed.checkpoint.read

    def counted(names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        reads.append(sum(EXPERTS in name for name in wanted))
        return read(wanted)

    monkeypatch.setattr(streamed.checkpoint, "read", counted)
    with streamed.loaded(0, streamed.read_layer(0)):
        torch.testing.assert_close(streamed.run(0, hidden), together, rtol=0, atol=0)
    assert present == [3] * 4
    assert reads == [0] + [1] * 12  # never two experts' tensors
    assert all(p.is_meta for p in streamed.layers[0].parameters())


@torch.no_grad()
def test_packed_experts_stand_in_for_those_apart_until_the_layer_is_left(
    streamed: StreamedModel,
) -> None:
    streamed.experts_apart = True
    hidden = streamed.embed(ROWS)
    names = [name for name in streamed.linears(0) if EXPERTS in name]
    before = streamed.linears(0)
    rtn = build_quantizer("rtn")
    tensors = streamed.read_layer(0)
    quantized = {n: rtn.quantize(tensors[f"{n}.weight"], SPEC) for n in names}
    weights = {n: dequantize(q.codes, q.scale, q.zero_point) for n, q in quantized.items()}
    with streamed.loaded(0, tensors):
        for name, linear in quantized.items():
            streamed.pack_linear(name, native_tensors(name, linear), SPEC)
        packed = streamed.run(0, hidden)
    assert streamed.linears(0) == before
    streamed.experts_apart = False
    with streamed.loaded(0, streamed.read_layer(0)):
        expected = streamed.run(0, hidden, weights)
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=1e-6)


def test_an_expert_that_fails_is_taken_away_too(
    streamed: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed.experts_apart = True

    def fail(*_: object) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(Expert, "inner", fail)
    found = streamed.experts(0)
    assert found is not None
    with pytest.raises(MemoryError), streamed.loaded(0, streamed.read_layer(0)):
        try:
            streamed.run(0, streamed.embed(ROWS))
        finally:
            assert all(p.is_meta for p in found[1].parameters())
    assert not any(expert._forward_hooks for expert in found[1].children())


@pytest.mark.parametrize("tier", ["dense", "packed", "offload", "offload as beside a GPU"])
def test_gradients_through_frozen_experts_are_those_of_the_fused_model(
    tier: str, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every linear quantized, adapters on attention alone; transformers in memory as reference."""
    tier, _, beside = tier.partition(" ")
    if beside:
        monkeypatch.setattr(student_module, "elsewhere", in_host_memory)
    rtn, state = build_quantizer("rtn"), load_file(mixtral / "model.safetensors")
    natives: dict[str, Tensor] = {}
    for key, weight in state.items():
        name = key.removesuffix(".weight")
        if ".layers." in key and weight.dim() == 2 and not is_router(name):
            quantized = rtn.quantize(weight, SPEC)
            natives |= native_tensors(name, quantized)
            state[key] = dequantize(quantized.codes, quantized.scale, quantized.zero_point)
    (tmp_path / "config.json").write_bytes((mixtral / "config.json").read_bytes())
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    reference.requires_grad_(False)
    spec = AdapterSpec("lora", 4, 8.0, seed=1, targets=("attention",))
    student = Student(
        reference.config,
        RilqConfig(2, 32, modules_to_not_convert=["lm_head"], format_version=3),
        read_layer=lambda index: {
            n: t for n, t in (state | natives).items() if n.startswith(f"model.layers.{index}.")
        },
        outer={n: t for n, t in state.items() if ".layers." not in n},
        train="adapters",
        adapters=spec,
        tier=tier,  # type: ignore[arg-type]
        dtype=torch.float32,
        device=CPU,
    )
    linears = {name.rpartition(".")[0] for name in student.trained}
    assert linears == {
        f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in ("q", "k", "v", "o")
    }
    draw = torch.Generator().manual_seed(5)
    leaves: dict[str, Tensor] = {}
    for name in sorted(linears):
        linear = reference.get_submodule(name)
        adapter = Adapter(spec, name, out_features=linear.out_features,
                          in_features=linear.in_features, group_size=32, device=CPU)  # fmt: skip
        adapter.b.data.copy_(torch.randn(adapter.b.shape, generator=draw))
        student.trained[f"{name}.b"].data.copy_(adapter.b)
        leaves |= {f"{name}.a": adapter.a, f"{name}.b": adapter.b}
        reference.set_submodule(name, AdaptedLinear(linear, adapter))
    student(ROWS).square().mean().backward()
    reference(ROWS, use_cache=False).logits.square().mean().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.abs().max() > 0
        torch.testing.assert_close(student.trained[name].grad, leaf.grad, rtol=1e-4, atol=1e-6)


def test_layers_that_guess_further_tokens_are_left_out(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    """Published DeepSeek-V3 has one; transformers ignores it too."""
    folder = make_model(tmp_path / "v3", "deepseek_v3", **MIXTURES["deepseek_v3"])
    state = load_file(folder / "model.safetensors")
    state["model.layers.61.eh_proj.weight"] = torch.ones(64, 128)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(LocalFolder(folder))
    streamed = StreamedModel(checkpoint, dtype=torch.bfloat16, device=CPU)
    read = {name for step in streamed.reading_steps() for name in step}
    assert checkpoint.tensors.keys() - read == {"model.layers.61.eh_proj.weight"}
    # Rounded to 16 bits, a router's bias would choose other experts.
    bias = streamed.model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    assert bias.dtype == torch.float32


def test_a_mixture_keeps_its_stored_names_and_its_code_its_own(mixtral: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    assert separate_experts(model)
    layer = model.model.layers[0]
    assert layer.mlp is layer.block_sparse_moe
    assert isinstance(layer.mlp.experts, Experts)
    assert model.state_dict().keys() == load_file(mixtral / "model.safetensors").keys()
    assert not separate_experts(model)


def test_targets_of_adapters_part_the_linears() -> None:
    kinds = {
        "model.layers.0.self_attn.q_proj": "attention",
        "model.layers.0.mlp.gate_proj": "mlp",
        "model.layers.0.mlp.shared_expert.up_proj": "mlp",
        "model.layers.0.mlp.experts.3.up_proj": "experts",
        "model.layers.0.block_sparse_moe.experts.3.w1": "experts",
    }
    for name, kind in kinds.items():
        assert [t for t in ("attention", "mlp", "experts") if is_target(t, name)] == [kind]
        assert is_target("all", name) and not is_router(name)
    assert is_target("up_proj", "model.layers.0.mlp.experts.3.up_proj")
    assert ConvertOptions("x").adapter_targets == ("attention", "mlp")
