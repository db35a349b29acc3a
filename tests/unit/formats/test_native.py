"""The native format: its tensors, its module, and what transformers and PEFT do with it."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from rilq.errors import CheckpointError
from rilq.formats.native import (
    FORMAT_VERSION,
    RilqConfig,
    RilqHfQuantizer,
    RilqLinear,
    native_layout,
    native_tensors,
    packed_linear,
    quantized_linear_from,
    register,
    replace_linears,
)
from rilq.formats.spec import QuantizedLinear, QuantSpec
from rilq.formats.writer import write_config

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

SKIPPED = "model.layers.0.mlp.up_proj"
FOUR_BITS = "model.layers.1.mlp.down_proj"
TOKENS = torch.arange(3, 43).view(2, 20)


def min_max(weight: Tensor, spec: QuantSpec) -> QuantizedLinear:
    """Plain rounding between each group's extremes; good enough to have codes of every value."""
    groups = weight.float().unflatten(1, (-1, spec.group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / spec.max_code).half()
    zero = (-low / scale.float()).half()
    codes = (groups / scale.float()[..., None] + zero.float()[..., None]).round()
    codes = codes.clamp(0, spec.max_code).to(torch.uint8).flatten(1)
    return QuantizedLinear(codes, scale, zero, spec)


def obvious_weight(linear: QuantizedLinear) -> Tensor:
    """`scale * (code - zero_point)`, element by element in float32."""
    size = linear.spec.group_size
    scale, zero = (t.float().repeat_interleave(size, 1) for t in (linear.scale, linear.zero_point))
    return scale * (linear.codes.float() - zero)


@dataclass(frozen=True)
class Checkpoint:
    """A native checkpoint, and the float32 logits of the dense model with the same codes."""

    folder: Path
    logits: Tensor
    quantized: tuple[str, ...]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Checkpoint:
    """A tied Llama with biases; one linear in 16 bits and one in 4."""
    root = tmp_path_factory.mktemp("native")
    source = make_model(root / "source", tie_word_embeddings=True, attention_bias=True)
    folder = root / "native"
    folder.mkdir()
    config = RilqConfig(2, 32, modules_to_not_convert=["lm_head", SKIPPED], bits_for={FOUR_BITS: 4})
    dense = AutoModelForCausalLM.from_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    quantized = []
    for name, module in dense.named_modules():
        spec = config.linear_spec(name)
        if isinstance(module, nn.Linear) and spec is not None:
            linear = min_max(module.weight.detach(), spec)
            tensors |= native_tensors(name, linear)
            module.weight.data = obvious_weight(linear)
            quantized.append(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, json.loads((source / "config.json").read_text()), config, torch.float32)
    with torch.no_grad():
        return Checkpoint(folder, dense.eval()(TOKENS).logits, tuple(quantized))


@pytest.fixture(scope="module")
def loaded(native: Checkpoint) -> Any:
    """The checkpoint as transformers loads it; tests must not change it."""
    return AutoModelForCausalLM.from_pretrained(native.folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(TOKENS).logits
    return result


# -- config ------------------------------------------------------------------------------------


def test_config_survives_its_json() -> None:
    config = RilqConfig(3, 128, modules_to_not_convert=["a"], bits_for={"b": 4}, recipe={"r": [1]})
    again = RilqConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.quant_method == "rilq" and again.format_version == FORMAT_VERSION


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 99}, "upgrade rilq"),
        ({"format_version": "1"}, "upgrade rilq"),
        ({"bits": 5}, "one of"),
        ({"bits_for": {"model.layers.0.x": 1}}, "model.layers.0.x"),
        ({"group_size": 48}, "group_size 48"),
    ],
)
def test_config_of_another_kind_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RilqConfig(**fields)


@pytest.mark.parametrize(
    ("pattern", "skips"),
    [
        ("model.layers.1.mlp.gate", True),
        ("mlp.gate", True),
        ("gate", True),
        ("model.layers.1", True),
        ("*.mlp.*", True),
        ("ate", False),
        ("model.layers.1.mlp.gate_proj", False),
        ("layers.1.mlp", False),
        ("model.layers.10", False),
    ],
)
def test_modules_are_skipped_by_name_end_parent_or_pattern(pattern: str, skips: bool) -> None:
    config = RilqConfig(modules_to_not_convert=[pattern])
    assert (config.linear_spec("model.layers.1.mlp.gate") is None) == skips


def test_bits_for_overrides_exactly_the_named_module() -> None:
    config = RilqConfig(2, 64, bits_for={"a.b": 4})
    assert config.linear_spec("a.b") == QuantSpec(4, 64)
    assert config.linear_spec("x.a.b") == QuantSpec(2, 64)


# -- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tensors_match_their_layout_and_give_the_linear_back(bits: int) -> None:
    spec = QuantSpec(bits, 32)
    linear = min_max(torch.randn(6, 64, generator=torch.Generator().manual_seed(bits)), spec)
    tensors = native_tensors("x", linear)
    layout = native_layout("x", 6, 64, spec)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        n: (declared.dtype, declared.shape) for n, declared in layout.items()
    }
    back = quantized_linear_from(tensors, "x", spec)
    assert torch.equal(back.codes, linear.codes) and back.spec == spec
    assert torch.equal(back.scale, linear.scale)
    assert torch.equal(back.zero_point, linear.zero_point)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("x.weight"), r"x\.weight: missing"),
        (lambda t: t.pop("x.zero_point"), r"x\.zero_point: missing"),
        (lambda t: t.update({"x.zero_point": torch.ones(6, 3).half()}), r"x\.zero_point: .*\[6, 2"),
        (lambda t: t.update({"x.weight_scale": torch.ones(6, 2)}), r"x\.weight_scale: .*float32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(damage: Any, message: str) -> None:
    spec = QuantSpec(2, 32)
    tensors = native_tensors("x", min_max(torch.randn(6, 64), spec))
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        quantized_linear_from(tensors, "x", spec)


# -- the module --------------------------------------------------------------------------------


def _filled(bits: int = 2, bias: bool = True) -> tuple[RilqLinear, Tensor]:
    """A module with random codes, and its weight in float32."""
    draw = torch.Generator().manual_seed(bits)
    spec = QuantSpec(bits, 32)
    linear = min_max(torch.randn(6, 64, generator=draw), spec)
    module = RilqLinear(64, 6, spec, bias=bias)
    tensors = {n.removeprefix("x."): t for n, t in native_tensors("x", linear).items()}
    if bias:
        tensors["bias"] = torch.randn(6, generator=draw)
    module.load_state_dict(tensors)
    return module, obvious_weight(linear)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_forward_is_that_of_a_dense_linear(bits: int) -> None:
    module, weight = _filled(bits)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(module(x), F.linear(x, weight, module.bias))


def test_gradients_are_those_of_a_dense_linear() -> None:
    module, _ = _filled()
    codes = quantized_linear_from(
        {f"x.{n}": t for n, t in module.state_dict().items()}, "x", QuantSpec(2, 32)
    ).codes.float()
    inputs = (
        torch.randn(2, 3, 64),
        module.weight_scale.float(),
        module.zero_point.float(),
        module.bias.detach().clone(),
    )
    x, scale, zero, bias = (t.requires_grad_() for t in inputs)
    dense = (scale[..., None] * (codes.view(6, 2, 32) - zero[..., None])).view(6, 64)
    expected = torch.autograd.grad(F.linear(x, dense, bias).sin().sum(), (x, scale, zero, bias))
    packed = packed_linear(x, module.weight, scale, zero, bias, 2)
    found = torch.autograd.grad(packed.sin().sum(), (x, scale, zero, bias))
    torch.testing.assert_close(found, expected)


def test_backward_keeps_nothing_dense() -> None:
    module, weight = _filled(bias=False)
    kept: list[int] = []
    x = torch.randn(1, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        module(x)
    assert kept and max(kept) < weight.numel()


def test_autocast_computes_in_its_dtype_and_gives_gradients() -> None:
    module, weight = _filled()
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.float, nn.Module.double]
)
def test_casting_changes_neither_codes_nor_scales(cast: Callable[[nn.Module], nn.Module]) -> None:
    module, _ = _filled()
    before = {n: t.clone() for n, t in module.state_dict().items() if n != "bias"}
    wrapped = nn.Sequential(module)
    cast(wrapped)
    after = module.state_dict()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)
    assert list(after) == ["weight", "bias", "weight_scale", "zero_point"]


def test_module_moves_to_meta_and_is_emptied_again() -> None:
    module, _ = _filled()
    module.to("meta")
    assert {t.device.type for t in module.state_dict().values()} == {"meta"}
    module.to_empty(device="cpu")
    assert {t.device.type for t in module.state_dict().values()} == {"cpu"}
    assert module.weight_scale.dtype == torch.float16


def test_replacing_linears_of_one_layer_uses_its_full_names() -> None:
    layer = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(64, 8), "n": nn.LayerNorm(8)})
    config = RilqConfig(2, 64, modules_to_not_convert=["m.0.b"], bits_for={"m.0.a": 3})
    assert replace_linears(layer, config, "m.0") == ["m.0.a"]
    assert isinstance(layer["a"], RilqLinear) and layer["a"].bits == 3
    assert {t.device.type for t in layer["a"].state_dict().values()} == {"meta"}
    assert type(layer["b"]) is nn.Linear


def test_replacing_names_the_linear_that_the_group_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"m\.odd: in_features 65"):
        replace_linears(nn.ModuleDict({"odd": nn.Linear(65, 8)}), RilqConfig(2, 32), "m")


# -- transformers ------------------------------------------------------------------------------


def test_registering_twice_is_harmless() -> None:
    register()
    assert AUTO_QUANTIZER_MAPPING["rilq"] is RilqHfQuantizer


def test_loaded_model_computes_what_the_codes_say(native: Checkpoint, loaded: Any) -> None:
    packed = [n for n, m in loaded.named_modules() if isinstance(m, RilqLinear)]
    assert tuple(packed) == native.quantized and SKIPPED not in packed
    assert loaded.get_submodule(FOUR_BITS).bits == 4
    torch.testing.assert_close(logits(loaded), native.logits, rtol=0, atol=1e-5)


def test_loaded_model_keeps_its_head_tied(loaded: Any) -> None:
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_dtype_auto_and_device_map_auto_load_the_same(native: Checkpoint, loaded: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(native.folder, dtype="auto", device_map="auto")
    assert torch.equal(logits(model).cpu(), logits(loaded))


def test_bfloat16_model_keeps_float16_scales_and_generates(native: Checkpoint, loaded: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        native.folder, dtype=torch.bfloat16, device_map="cpu"
    )
    for name in native.quantized:
        mine, reference = model.get_submodule(name), loaded.get_submodule(name)
        assert torch.equal(mine.weight_scale, reference.weight_scale)
        assert torch.equal(mine.zero_point, reference.zero_point)
        assert mine.zero_point.dtype == torch.float16
    out = model.generate(TOKENS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (2, 24)
    # bfloat16 has 8 bits of precision; the logits here reach about 1.
    torch.testing.assert_close(logits(model).float(), native.logits, rtol=0.1, atol=0.1)


def test_saved_and_reloaded_model_is_identical(loaded: Any, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(loaded))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_bare_decoder_loads_too(native: Checkpoint, loaded: Any) -> None:
    decoder = AutoModel.from_pretrained(native.folder, dtype=torch.float32)
    with torch.no_grad():
        expected = loaded.model(TOKENS).last_hidden_state
        assert torch.equal(decoder(TOKENS).last_hidden_state, expected)


@pytest.mark.parametrize("part", ["weight", "weight_scale", "zero_point", "bias", ""])
def test_missing_tensor_is_an_error_not_random_weights(
    native: Checkpoint, tmp_path: Path, part: str
) -> None:
    lacking = f"model.layers.0.self_attn.q_proj.{part}"  # "": all four tensors
    tensors = load_file(native.folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if n != lacking and (part or lacking not in n)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((native.folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=re.escape(lacking)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_layer_on_disk_computes_the_same(native: Checkpoint, loaded: Any, tmp_path: Path) -> None:
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb")}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            native.folder, dtype=torch.float32, device_map=places, offload_folder=tmp_path
        )
    except ValueError as err:
        pytest.skip(f"refused, as it must be with this transformers: {err}")
    assert model.get_submodule(FOUR_BITS).weight.device.type == "meta"
    assert torch.equal(logits(model), logits(loaded))


def test_codes_that_come_back_from_disk_as_floats_are_refused() -> None:
    # What transformers 5.5 makes accelerate do; the installed version may have been corrected.
    module, _ = _filled(bias=False)
    stored = {name: tensor.float() for name, tensor in module.state_dict().items()}
    add_hook_to_module(module, AlignDevicesHook(offload=True, weights_map=stored))
    quantizer = RilqHfQuantizer(RilqConfig(2, 32))
    with pytest.raises(ValueError, match=r"0\.weight: (.|\n)* upgrade transformers"):
        quantizer._process_model_after_weight_loading(nn.Sequential(module.to("meta")))


def test_quantizing_a_dense_model_while_loading_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=RilqConfig(2, 32))


def test_dequantized_model_is_dense_and_equal(native: Checkpoint, loaded: Any) -> None:
    dense = copy.deepcopy(loaded).dequantize(torch.float32)
    assert not any(isinstance(module, RilqLinear) for module in dense.modules())
    torch.testing.assert_close(logits(dense), native.logits, rtol=0, atol=1e-5)


# -- PEFT --------------------------------------------------------------------------------------


@pytest.fixture
def adapted(loaded: Any) -> PeftModel:
    """A copy of the model with a stock PEFT LoRA whose effect is not zero."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(copy.deepcopy(loaded), config)


def test_stock_peft_trains_only_its_adapters(adapted: PeftModel) -> None:
    adapted.train()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    frozen = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    losses = []
    for _ in range(3):
        loss = adapted(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.named_parameters() if n in frozen)


def test_stock_peft_adapter_saves_and_reloads(
    adapted: PeftModel, loaded: Any, tmp_path: Path
) -> None:
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(loaded), tmp_path)
    assert torch.equal(logits(again), logits(adapted))
    assert not torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_pefts_own_merge_is_refused_with_the_remedy(
    adapted: PeftModel, method: str, safe: bool
) -> None:
    before = logits(adapted)
    with pytest.raises(ValueError, match=r"model\.dequantize\(\)"):
        getattr(adapted, method)(safe_merge=safe)
    assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_one_layer_directly_fails_and_changes_nothing(
    adapted: PeftModel, safe: bool
) -> None:
    layer = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    before = logits(adapted)
    with pytest.raises(RuntimeError):
        layer.merge(safe_merge=safe)
    assert torch.equal(logits(adapted), before)


def test_merging_an_adapter_of_a_16_bit_linear_is_still_allowed(loaded: Any) -> None:
    config = LoraConfig(r=4, target_modules=[SKIPPED], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(loaded), config)
    expected = logits(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected)


def test_remedy_of_the_refused_merge_works(loaded: Any) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(loaded).dequantize(torch.float32), config)
    expected = logits(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected)


# -- registration, each in a process of its own ------------------------------------------------


def run_python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_importing_rilq_does_not_import_torch_or_transformers() -> None:
    script = "import rilq, sys; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    result = run_python(script)
    assert result.returncode == 0, result.stderr


def test_transformers_first_fails_without_rilq_and_loads_with_it(native: Checkpoint) -> None:
    script = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as err:
    assert "ismatch" in str(err), err
else:
    sys.exit("a model of random weights was returned")
assert "rilq" not in sys.modules
import rilq
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].self_attn.q_proj).__name__ == "RilqLinear"
"""
    result = run_python(script, native.folder)
    assert result.returncode == 0, result.stderr


def test_rilq_first_loads_and_guards_peft(native: Checkpoint) -> None:
    script = """
import sys
import rilq
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
try:
    adapted.merge_and_unload()
except ValueError as err:
    assert "packed codes" in str(err), err
else:
    sys.exit("merged into packed codes")
"""
    result = run_python(script, native.folder)
    assert result.returncode == 0, result.stderr


def test_format_module_can_be_imported_before_transformers() -> None:
    # Importing it makes transformers import the module after which it is to be imported.
    result = run_python("from rilq.formats.native import RilqConfig, RilqHfQuantizer")
    assert result.returncode == 0, result.stderr
