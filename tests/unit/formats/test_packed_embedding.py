"""Packed embeddings and heads: what they compute, and what transformers and PEFT do with them."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

from rilq.converter.quantizers.rtn import RtnQuantizer
from rilq.formats.native import RilqConfig, RilqEmbedding, RilqLinear, native_tensors
from rilq.formats.packed_embedding import TiedRilqLinear
from rilq.formats.spec import QuantizedLinear, QuantSpec
from rilq.formats.writer import write_config

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TOKENS = torch.arange(3, 43).view(2, 20)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

# Every supported architecture, with the head tied where that is its habit.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {},
    "phi3": {},
    "olmo2": {},
}


def obvious_weight(linear: QuantizedLinear) -> Tensor:
    """`scale * (code - zero_point)`, element by element in float32."""
    size = linear.spec.group_size
    scale, zero = (t.float().repeat_interleave(size, 1) for t in (linear.scale, linear.zero_point))
    return scale * (linear.codes.float() - zero)


def filled(bits: int, dense: nn.Embedding | None = None) -> tuple[RilqEmbedding, Tensor]:
    """A packed embedding `[50, 64]` with codes of every value, and its weight in float32."""
    spec = QuantSpec(bits, 32)
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(bits))
    linear = RtnQuantizer().quantize(weight, spec)
    module = RilqEmbedding(dense or nn.Embedding(50, 64), spec)
    module.load_state_dict({n[2:]: t for n, t in native_tensors("x", linear).items()})
    return module, obvious_weight(linear)


# -- the module --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(2, 7), (5,), (), (0,), (3, 0)])
def test_rows_are_exactly_those_of_the_dequantized_weight(
    bits: int, shape: tuple[int, ...]
) -> None:
    module, weight = filled(bits)
    ids = torch.randint(50, shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(module(ids), F.embedding(ids, weight))
    assert torch.equal(module.dense_weight(torch.float32), weight)


def test_the_padding_row_is_looked_up_like_any_other() -> None:
    module, weight = filled(4, nn.Embedding(50, 64, padding_idx=3))
    assert module.padding_idx == 3
    assert torch.equal(module(torch.tensor([3])), weight[3:4])


@pytest.mark.parametrize("ids", [[50], [-1]])
def test_a_token_outside_the_vocabulary_is_an_error_as_in_the_dense_module(ids: list[int]) -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        filled(4)[0](torch.tensor(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_cast_changes_the_dtype_of_rows_and_no_stored_tensor(dtype: torch.dtype) -> None:
    module, weight = filled(4)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    nn.Sequential(module).to(dtype)
    ids = torch.arange(50)
    assert torch.equal(module(ids), weight.to(dtype)) and module(ids).dtype == dtype
    after = module.state_dict()
    assert list(after) == ["weight", "weight_scale", "zero_point"]
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())


def test_only_the_rows_that_are_asked_for_are_dequantized(monkeypatch: Any) -> None:
    from rilq.formats import packed_embedding

    sizes = []
    real = packed_embedding.dequantize_packed

    def spy(words: Tensor, *more: Any, **named: Any) -> Tensor:
        sizes.append(len(words))
        return real(words, *more, **named)

    monkeypatch.setattr(packed_embedding, "dequantize_packed", spy)
    filled(4)[0](torch.tensor([[1, 2, 3]]))
    assert sizes == [3]


def test_the_dense_weight_made_in_parts_is_the_same(monkeypatch: Any) -> None:
    module, weight = filled(4)
    monkeypatch.setattr("rilq.formats.packed_linear.CHUNK", 7 * 64)  # seven rows at a time
    assert torch.equal(module.dense_weight(torch.float32), weight)


class Shifted(nn.Embedding):
    """An embedding that does something of its own."""


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (Shifted(8, 64), "class Shifted cannot be quantized"),
        (nn.Embedding(8, 64, max_norm=1.0), "max_norm 1.0"),
        (nn.Embedding(8, 65), "in_features 65 is not a multiple"),
    ],
)
def test_an_embedding_that_cannot_be_quantized_is_refused_by_name(
    dense: nn.Embedding, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RilqEmbedding(dense, QuantSpec(4, 32))


# -- config ------------------------------------------------------------------------------------


def test_format_version_rises_only_where_embedding_or_head_is_quantized() -> None:
    assert RilqConfig().format_version == 1
    assert RilqConfig(embed_bits=8).format_version == 2
    assert RilqConfig(head_bits=4).format_version == 2


def test_config_with_quantized_embedding_survives_its_json() -> None:
    config = RilqConfig(2, 64, embed_bits=4, head_bits=8)
    again = RilqConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert (again.embedding_spec, again.head_spec) == (QuantSpec(4, 64), QuantSpec(8, 64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_bits": 3}, "'embed_bits': 3"),
        ({"head_bits": 2}, "'head_bits': 2"),
        ({"format_version": 1, "embed_bits": 8}, r"embed_bits': 8.*format_version 1"),
        ({"format_version": 99, "embed_bits": 8}, "upgrade rilq"),
    ],
)
def test_config_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RilqConfig(**fields)


# -- transformers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Native:
    """A checkpoint of quantized embedding, head and linears, and the dense model of that weight."""

    folder: Path
    dense: Any

    def load(self, **more: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, **{"dtype": torch.float32, **more})


@pytest.fixture(scope="module")
def native(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> Callable[..., Native]:
    """`native(model_type, embed_bits, head_bits)`: made once for each."""
    made: dict[Any, Native] = {}

    def make(model_type: str, embed_bits: int = 4, head_bits: int = 4, **more: Any) -> Native:
        key = (model_type, embed_bits, head_bits, *more.items())
        if key not in made:
            root = tmp_path_factory.mktemp("native")
            config = RilqConfig(4, 32, embed_bits=embed_bits, head_bits=head_bits)
            source = make_model(root / "source", model_type, **ARCHITECTURES[model_type], **more)
            made[key] = _quantized(source, root / "native", config)
        return made[key]

    return make


def _quantized(source: Path, folder: Path, config: RilqConfig) -> Native:
    folder.mkdir()
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tensors = load_file(source / "model.safetensors")
    tied = dense.config.tie_word_embeddings
    specs = {EMBEDDING: config.embedding_spec, HEAD: None if tied else config.head_spec}
    for name, module in dense.named_modules():
        spec = specs.get(name) if name in specs else config.linear_spec(name)
        if spec is None or not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        linear = RtnQuantizer().quantize(module.weight.detach(), spec)
        tensors |= native_tensors(name, linear)
        module.weight.data = obvious_weight(linear)
    dense.tie_weights()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, json.loads((source / "config.json").read_text()), config, torch.float32)
    return Native(folder, dense)


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    result: Tensor = model(tokens).logits
    return result


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_loaded_model_computes_what_the_dense_one_of_the_same_weights_does(
    model_type: str, native: Callable[..., Native]
) -> None:
    made = native(model_type)
    model = made.load()
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, RilqEmbedding)
    assert isinstance(model.get_output_embeddings(), RilqLinear)
    # The first hidden states, exactly; scaled where the architecture scales them.
    assert torch.equal(embedding(TOKENS), made.dense.get_input_embeddings()(TOKENS))
    torch.testing.assert_close(logits(model), logits(made.dense), rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_scaled_embedding_rounds_in_bfloat16_as_the_architecture_does(
    model_type: str, native: Callable[..., Native]
) -> None:
    made = native(model_type)
    model, dense = made.load(dtype=torch.bfloat16), copy.deepcopy(made.dense).bfloat16()
    found, expected = model.get_input_embeddings()(TOKENS), dense.get_input_embeddings()(TOKENS)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.parametrize(("embed_bits", "head_bits"), [(8, 16), (16, 8), (4, 8)])
def test_embedding_and_head_have_their_own_bits(
    embed_bits: int, head_bits: int, native: Callable[..., Native]
) -> None:
    made = native("llama", embed_bits, head_bits)
    model = made.load()
    assert isinstance(model.model.embed_tokens, RilqEmbedding) == (embed_bits < 16)
    assert isinstance(model.lm_head, RilqLinear) == (head_bits < 16)
    torch.testing.assert_close(logits(model), logits(made.dense), rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_saved_and_reloaded_model_is_identical(
    model_type: str, native: Callable[..., Native], tmp_path: Path
) -> None:
    model = native(model_type).load()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    stored = {n for n in load_file(tmp_path / "model.safetensors") if n.startswith(HEAD)}
    tied = model.config.tie_word_embeddings
    assert stored == (
        set() if tied else {f"{HEAD}.{p}" for p in ("weight", *RilqLinear.kept_buffers)}
    )


def test_tied_head_has_the_tensors_of_the_embedding_wherever_they_go(
    native: Callable[..., Native],
) -> None:
    model = native("qwen3").load()
    for each in (model, copy.deepcopy(model), copy.deepcopy(model).bfloat16()):
        embedding, head = each.get_input_embeddings(), each.get_output_embeddings()
        assert isinstance(head, TiedRilqLinear) and head.weight is embedding.weight
        assert head.weight_scale.data_ptr() == embedding.weight_scale.data_ptr()
        assert head.zero_point.data_ptr() == embedding.zero_point.data_ptr()
    assert [n for n in model.state_dict() if n.startswith(HEAD)] == [f"{HEAD}.weight"]
    copied = copy.deepcopy(model)
    copied.get_input_embeddings().weight_scale.mul_(2)
    assert not torch.equal(logits(copied), logits(model))
    assert copied.lm_head.weight_scale.data_ptr() != model.lm_head.weight_scale.data_ptr()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_dequantized_model_is_the_dense_one(model_type: str, native: Callable[..., Native]) -> None:
    made = native(model_type)
    model = made.load().dequantize(torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is type(made.dense.get_input_embeddings())
    assert type(head) is nn.Linear
    assert (head.weight is embedding.weight) == bool(model.config.tie_word_embeddings)
    assert torch.equal(embedding(TOKENS), made.dense.get_input_embeddings()(TOKENS))
    torch.testing.assert_close(logits(model), logits(made.dense), rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_bfloat16_and_device_map_load_and_generate(
    model_type: str, native: Callable[..., Native]
) -> None:
    made = native(model_type)
    model = made.load(dtype=torch.bfloat16, device_map="auto")
    ids = TOKENS.to(model.device)
    out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (2, 24)
    # bfloat16 has 8 bits of precision; the logits here reach about 1.
    torch.testing.assert_close(
        logits(model, ids).float().cpu(), logits(made.dense), rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_bare_decoder_loads_too(model_type: str, native: Callable[..., Native]) -> None:
    made = native(model_type)
    decoder = AutoModel.from_pretrained(made.folder, dtype=torch.float32)
    with torch.no_grad():
        expected = made.load().model(TOKENS).last_hidden_state
        assert torch.equal(decoder(TOKENS).last_hidden_state, expected)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("part", ["weight", "weight_scale", "zero_point"])
def test_missing_tensor_is_an_error_not_random_weights(
    model_type: str, part: str, native: Callable[..., Native], tmp_path: Path
) -> None:
    made = native(model_type)
    tensors = load_file(made.folder / "model.safetensors")
    del tensors[f"{EMBEDDING}.{part}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((made.folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=rf"{EMBEDDING}\.{part}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tied_model_with_two_settings_is_refused(
    native: Callable[..., Native], tmp_path: Path
) -> None:
    made = native("qwen3")
    (tmp_path / "model.safetensors").symlink_to(made.folder / "model.safetensors")
    config = json.loads((made.folder / "config.json").read_text())
    config["quantization_config"]["head_bits"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="embed_bits 4, head_bits 8"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_resizing_the_vocabulary_fails_and_changes_nothing(native: Callable[..., Native]) -> None:
    model = native("llama").load()
    before = logits(model)
    with pytest.raises(RuntimeError):
        model.resize_token_embeddings(400)
    assert torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_stock_peft_adapts_the_embedding_but_does_not_merge_into_it(
    model_type: str, native: Callable[..., Native]
) -> None:
    made = native(model_type)
    config = LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(made.load(), copy.deepcopy(config))
        torch.manual_seed(0)
        reference = get_peft_model(copy.deepcopy(made.dense), copy.deepcopy(config))
    torch.testing.assert_close(logits(adapted), logits(reference), rtol=0, atol=2e-5)
    assert not torch.allclose(logits(adapted), logits(made.dense), atol=1e-3)
    with pytest.raises(ValueError, match=r"model\.dequantize\(\)"):
        adapted.merge_and_unload()
