"""Whole ResQ models in transformers: loaded, run, and generating with their quantized cache."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from resq_examples import HADAMARD, Example, orthogonal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from rilq.converter.layers import StreamedModel
from rilq.errors import CheckpointError
from rilq.evaluation.lora import find_adapter
from rilq.formats.checkpoint import SOURCE_DTYPES, Checkpoint
from rilq.formats.lora import ADAPTER_FOLDER, write_peft_adapter
from rilq.formats.resq.cache import ResqCache
from rilq.formats.resq.config import ResqConfig
from rilq.formats.resq.hadamard import kronecker_apply
from rilq.formats.resq.install import ARCHITECTURES, full_precision, install
from rilq.formats.resq.linear import ResqLinear
from rilq.formats.source import LocalFolder
from rilq.progress import SilentReporter

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TOKENS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(0))
# Where one value is rounded to another code, all that follows differs. Two ways to compute the same
# value see that happen in float32, in float64 hardly ever.
IN_WIDE = torch.float64
WINDOW = dict(sliding_window=8, max_window_layers=0, use_sliding_window=True)


@pytest.fixture(scope="module")
def model(example: Example) -> PreTrainedModel:
    return load(example.folder)


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: nn.Module, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


def token_by_token(model: nn.Module) -> Tensor:
    """Logits of `TOKENS`, each token but the first five in a call of its own."""
    out = model(TOKENS[:, :5], use_cache=True)
    found, cache = [out.logits], out.past_key_values
    for token in TOKENS[:, 5:].split(1, 1):
        out = model(token, past_key_values=cache, use_cache=True)
        found.append(out.logits)
    assert isinstance(out.past_key_values, ResqCache) and out.past_key_values.nbytes > 0
    return torch.cat(found, 1)


# -- exactness -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_without_quantizers_a_model_computes_what_it_did(
    model_type: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_model(tmp_path / "source", model_type)
    plain, generator = load(source), torch.Generator().manual_seed(0)
    factors = [orthogonal(size, generator) for size in HADAMARD]
    skeleton = load(source)
    for name in install(skeleton, ResqConfig(hadamard=HADAMARD)):
        skeleton.set_submodule(name, skeleton.get_submodule(name).dense(torch.float32))
    tensors = dict(plain.state_dict())
    for name, tensor in skeleton.state_dict().items():
        if name.endswith("down_proj.weight"):
            tensors[name] = kronecker_apply(tensors[name], factors)
        elif "hadamard_" in name:
            tensors[name] = factors[int(name[-1])]
        elif name.endswith("key_rotation.weight"):
            tensors[name] = orthogonal(len(tensor), generator)
    skeleton.load_state_dict(tensors, assign=True)
    quantized = logits(skeleton)
    with full_precision(skeleton):
        torch.testing.assert_close(
            logits(skeleton, use_cache=False), logits(plain), rtol=0, atol=1e-5
        )
    assert (quantized - logits(plain)).abs().max() > 1e-2
    assert torch.equal(logits(skeleton), quantized)  # the switch is back


def test_codes_stand_for_the_weights_of_a_plain_model(
    example: Example, model: PreTrainedModel
) -> None:
    with full_precision(model):
        found = logits(model, use_cache=False)
    torch.testing.assert_close(found, logits(example.dense), rtol=0, atol=1e-5)


# -- the cache in a model --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", {}), ("mistral", WINDOW), ("qwen2", WINDOW), ("qwen3", {"head_dim": 32})],
)
@torch.no_grad()
def test_with_a_cache_a_model_computes_what_it_does_without(
    model_type: str, sizes: dict[str, Any], make_example: Callable[..., Example]
) -> None:
    model = load(make_example(model_type, **sizes).folder, dtype=IN_WIDE)
    without = logits(model, use_cache=False)
    torch.testing.assert_close(token_by_token(model), without, rtol=0, atol=1e-6)
    if "sliding_window" in sizes:  # and the window matters
        far = TOKENS.clone()
        far[:, 0] = 5
        assert torch.equal(logits(model, far, use_cache=False)[:, -1], without[:, -1])


@pytest.mark.parametrize(("head_dim", "most"), [(128, 0.32), (32, 0.42)])
@torch.no_grad()
def test_a_cache_takes_a_third_of_the_memory_of_sixteen_bits(
    head_dim: int, most: float, make_example: Callable[..., Example]
) -> None:
    sizes = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048)
    example = make_example(head_dim=head_dim, num_hidden_layers=1, **sizes)
    tokens = torch.randint(3, 320, (1, 2048), generator=torch.Generator().manual_seed(0))
    cache = load(example.folder)(tokens, use_cache=True).past_key_values
    plain = example.dense(tokens, use_cache=True).past_key_values
    sixteen_bits = sum(t.numel() * 2 for each in plain.layers for t in (each.keys, each.values))
    assert cache.nbytes / sixteen_bits <= most
    # Nothing else is kept, such as a larger tensor behind a view.
    kept = [t for layer in cache.codes for s in layer.packed for t in s.tensors()]
    assert sum(t.untyped_storage().nbytes() for t in kept) == cache.nbytes


@pytest.mark.parametrize("rotations", ["AB", "ABC", "ABD"])
@torch.no_grad()
def test_any_rotation_can_be_left_out(rotations: str, make_example: Callable[..., Example]) -> None:
    sizes = HADAMARD if "D" in rotations else ()
    example = make_example(config=ResqConfig(rotations=rotations, hadamard=sizes))
    model = load(example.folder, dtype=IN_WIDE)
    torch.testing.assert_close(token_by_token(model), logits(model), rtol=0, atol=1e-6)
    with full_precision(model):
        found = logits(model, use_cache=False)
    torch.testing.assert_close(found.float(), logits(example.dense), rtol=0, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_the_cache_is_that_without(model: PreTrainedModel, beams: int) -> None:
    mask = torch.ones_like(TOKENS[:, :6])
    mask[0, :2] = 0  # padding on the left
    options = dict(
        attention_mask=mask, max_new_tokens=12, num_beams=beams, do_sample=False, eos_token_id=None
    )
    found = model.generate(TOKENS[:, :6], **options)
    assert found.shape == (2, 18)
    assert torch.equal(found, model.generate(TOKENS[:, :6], use_cache=False, **options))


def test_generation_goes_on_from_an_earlier_cache(model: PreTrainedModel) -> None:
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    prompt, mask = TOKENS[:1, :6], torch.ones(1, 6, dtype=torch.long)
    first = model.generate(prompt, attention_mask=mask, return_dict_in_generate=True, **options)
    assert isinstance(first.past_key_values, ResqCache)
    mask = torch.ones_like(first.sequences)
    again = model.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **options
    )
    whole = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), **{**options, "max_new_tokens": 10}
    )
    assert torch.equal(again, whole)


@pytest.mark.parametrize("sized", [False, True])
@torch.no_grad()
def test_an_empty_cache_of_transformers_becomes_ours_for_whoever_passed_it(
    model: PreTrainedModel, sized: bool
) -> None:
    wide = copy.deepcopy(model).to(IN_WIDE)
    cache = DynamicCache(config=model.config) if sized else DynamicCache()
    parts = [wide(part, past_key_values=cache).logits for part in TOKENS.split(9, 1)]
    assert isinstance(cache, ResqCache) and cache.get_seq_length() == TOKENS.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), logits(wide), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["filled", "static", "offloaded"])
def test_a_cache_of_another_kind_is_refused(model: PreTrainedModel, kind: str) -> None:
    cache: Any = DynamicCache()
    if kind == "filled":
        for layer in range(2):
            cache.update(torch.ones(2, 2, 3, 16), torch.ones(2, 2, 3, 16), layer)
    elif kind == "static":
        cache = StaticCache(model.config, max_cache_len=40)
    else:
        cache.offloading = True  # what DynamicCache(offloading=True) sets, which asks for a GPU
    with pytest.raises(ValueError, match=f"{type(cache).__name__}, but this model keeps keys"):
        model(TOKENS, past_key_values=cache, use_cache=True)


# -- loading ---------------------------------------------------------------------------------------


def test_a_model_saved_again_is_the_same(
    example: Example, model: PreTrainedModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "again")
    before = load_file(example.folder / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_in_sixteen_bits_codes_scales_and_rotations_stay_as_they_are(
    example: Example, model: PreTrainedModel
) -> None:
    narrow = load(example.folder, dtype=torch.bfloat16)
    wide, kept = model.state_dict(), 0
    for name, tensor in narrow.state_dict().items():
        if name.endswith(("proj.weight", "weight_scale", "key_rotation.weight", "hadamard_0")):
            assert torch.equal(tensor, wide[name]), name
            kept += 1
    assert kept == 2 * (7 + 7 + 1 + 1)
    assert logits(narrow).dtype == torch.bfloat16


def test_a_bare_decoder_loads_too(example: Example, model: PreTrainedModel) -> None:
    decoder = AutoModel.from_pretrained(example.folder).eval()
    with torch.no_grad():
        found, whole = decoder(TOKENS), model.model(TOKENS)
    assert torch.equal(found.last_hidden_state, whole.last_hidden_state)
    assert isinstance(found.past_key_values, ResqCache)


def test_layers_may_wait_on_disk(example: Example, model: PreTrainedModel, tmp_path: Path) -> None:
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb")}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    try:
        apart = load(
            example.folder, dtype=torch.float32, device_map=places, offload_folder=tmp_path
        )
    except ValueError as err:
        pytest.skip(f"refused, as it must be with this transformers: {err}")
    assert apart.model.layers[1].mlp.down_proj.weight.is_meta
    assert torch.equal(logits(apart), logits(model))


@pytest.fixture
def another(example: Example, tmp_path: Path) -> Path:
    """A copy of the example, to be damaged."""
    return Path(shutil.copytree(example.folder, tmp_path / "another"))


def change_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= entries
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.1.self_attn.key_rotation.weight",
        "model.layers.1.mlp.down_proj.hadamard_1",
    ],
)
def test_a_missing_tensor_is_named(another: Path, name: str) -> None:
    tensors = load_file(another / "model.safetensors")
    del tensors[name]
    save_file(tensors, another / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"tensors missing from the checkpoint \(1\): {name}"):
        load(another)
    with pytest.raises(CheckpointError, match=f"missing from the checkpoint: {name}"):
        streamed(another)


def test_tensors_of_another_configuration_are_refused(another: Path) -> None:
    change_config(another, bits=[2, 8])
    # Newer versions of transformers say it themselves.
    said = "mismatch|of other shapes than quantization_config asks for"
    with pytest.raises((RuntimeError, ValueError), match=said):
        load(another)
    with pytest.raises(CheckpointError, match=r"shape \[\d+, \d+\], but config.json asks for"):
        streamed(another)


def test_a_configuration_that_cannot_be_read_is_refused(another: Path) -> None:
    change_config(another, format_version=9)
    with pytest.raises(ValueError, match="format_version 9, this rilq reads 1"):
        load(another)
    with pytest.raises(CheckpointError, match="config.json: .*format_version 9"):
        streamed(another)


def test_an_architecture_without_support_is_refused() -> None:
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, head_dim=16)
    config = AutoConfig.for_model("gemma2", num_attention_heads=4, vocab_size=320, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="rilq-resq of model_type 'gemma2', expected one of llama"):
        install(model, ResqConfig(hadamard=HADAMARD))


# -- layer by layer, and gradients -----------------------------------------------------------------


def streamed(folder: Path) -> StreamedModel:
    dtypes = SOURCE_DTYPES | {torch.int32}
    checkpoint = Checkpoint.open(LocalFolder(folder), dtypes=dtypes)
    return StreamedModel(checkpoint, dtype=torch.float32, device=torch.device("cpu"))


@torch.no_grad()
def test_layer_by_layer_a_model_computes_what_it_does_in_memory(
    example: Example, model: PreTrainedModel
) -> None:
    layers = streamed(example.folder)
    layers.load_outer(layers.checkpoint.read(layers.outer_names()))
    layers.prepare(TOKENS.shape[1])
    hidden = layers.embed(TOKENS)
    for index in range(2):
        with layers.loaded(index, layers.read_layer(index)):
            hidden = layers.run(index, hidden)
        assert all(t.is_meta for t in layers.layers[index].state_dict().values())
    assert torch.equal(layers.logits(hidden), logits(model))


def test_gradients_reach_the_first_layer_through_all_quantizers(model: PreTrainedModel) -> None:
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False).logits.square().mean().backward()
    assert embedded.grad is not None and bool(torch.isfinite(embedded.grad).all())
    assert bool((embedded.grad.abs().sum(-1) > 0).all())
    linears = [m for m in model.modules() if isinstance(m, ResqLinear)]
    assert len(linears) == 14 and all(linear.weight.grad is None for linear in linears)


# -- an adapter beside it --------------------------------------------------------------------------


@pytest.fixture
def adapted(another: Path) -> Path:
    """The example with a LoRA on all of its linears, as a conversion leaves it."""
    generator, factors = torch.Generator().manual_seed(3), {}
    for name, module in load(another).named_modules():
        if isinstance(module, ResqLinear):
            factors[f"{name}.a"] = torch.randn(3, module.in_features, generator=generator) / 4
            factors[f"{name}.b"] = torch.randn(module.out_features, 3, generator=generator) / 4
    write_peft_adapter(another, factors, rank=3, alpha=6.0)
    return another


@torch.no_grad()
def test_an_adapter_is_loaded_by_peft_and_applied_layer_by_layer(
    adapted: Path, model: PreTrainedModel
) -> None:
    beside = PeftModel.from_pretrained(load(adapted), adapted / ADAPTER_FOLDER)
    found = logits(beside)
    assert (found - logits(model)).abs().max() > 0.1
    layers = streamed(adapted)
    adapter = find_adapter(layers, SilentReporter())
    assert adapter is not None
    layers.load_outer(layers.checkpoint.read(layers.outer_names()))
    layers.prepare(TOKENS.shape[1])
    hidden = layers.embed(TOKENS)
    for index in range(2):
        with layers.loaded(index, layers.read_layer(index)), adapter.applied(layers, index):
            hidden = layers.run(index, hidden)
    torch.testing.assert_close(layers.logits(hidden), found, rtol=0, atol=1e-4)


def test_an_adapter_cannot_be_merged_into_codes(adapted: Path) -> None:
    beside = PeftModel.from_pretrained(load(adapted), adapted / ADAPTER_FOLDER)
    with pytest.raises(ValueError, match="and 13 more: an adapter cannot be merged into packed"):
        beside.merge_and_unload()


def test_an_adapter_of_peft_is_trained_through_all_quantizers(another: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"])
    trained = get_peft_model(load(another), config)
    trained(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    gradients = {n: p.grad for n, p in trained.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 3 * 2 and all("lora_" in name for name in gradients)
    assert all(bool((g != 0).any()) for n, g in gradients.items() if "lora_B" in n)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_model_computes_and_generates_as_on_a_cpu(
    example: Example, model: PreTrainedModel
) -> None:
    there = load(example.folder).cuda()
    expected = logits(model)
    apart = (logits(there, TOKENS.cuda()).cpu() - expected).abs().mean()
    assert apart < 0.05 * expected.std()  # a value now and then gets another code
    mask = torch.ones_like(TOKENS).cuda()
    found = there.generate(
        TOKENS.cuda(), attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True
    )
    cache = found.past_key_values
    assert isinstance(cache, ResqCache) and cache.codes[0].packed[0].codes.is_cuda
