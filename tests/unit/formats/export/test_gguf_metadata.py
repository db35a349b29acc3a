"""Architectures as metadata, against transformers' own rotary factors, and what is refused."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rilq.errors import OptionError
from rilq.formats.export.gguf_metadata import (
    ARCHITECTURES,
    add_architecture,
    check_architecture,
    ignored_window,
    rope_tensors,
    row_width,
)
from rilq.formats.export.source import NativeForm

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}


def form(model_type: str, **config: Any) -> NativeForm:
    written = AutoConfig.for_model(model_type, **config).to_dict()
    return NativeForm("model", written, {}, (), {}, lora=False, recipe={})


def metadata(of: NativeForm, path: Path) -> dict[str, Any]:
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[of.model_type]])
    add_architecture(writer, of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_rope_factors_are_what_transformers_divides_its_frequencies_by() -> None:
    of = form("llama", rope_parameters=LLAMA3, max_position_embeddings=131072, head_dim=128)
    config = AutoConfig.for_model(**of.config)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    factors = rope_tensors(of)["rope_freqs.weight"]
    torch.testing.assert_close(plain / factors, stretched, rtol=1e-5, atol=0)
    assert factors.min() == 1 and factors.max() == 8 and len(factors.unique()) > 3


def test_longrope_factors_are_tensors() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 48}
    of = form(
        "phi3",
        rope_parameters={**rope, "long_factor": [2.0] * 48},
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
    )
    check_architecture(of)
    long, short = (rope_tensors(of)[f"rope_factors_{reach}.weight"] for reach in ("long", "short"))
    assert torch.equal(long, 2 * short) and short.tolist() == [1.0] * 48


def test_longrope_says_where_it_begins_and_scales_attention(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 48}
    of = form(
        "phi3",
        rope_parameters={**rope, "long_factor": [2.0] * 48},
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
    )
    found = metadata(of, tmp_path / "model.gguf")
    assert found["phi3.rope.scaling.original_context_length"] == 4096
    # sqrt(1 + ln 32 / ln 4096), as in Phi-3's modelling code.
    assert found["phi3.rope.scaling.attn_factor"] == pytest.approx(1.1902381)


def test_yarn_is_named_with_its_factor(tmp_path: Path) -> None:
    found = metadata(form("qwen2", rope_parameters=YARN), tmp_path / "model.gguf")
    assert found["qwen2.rope.scaling.type"] == "yarn"
    assert found["qwen2.rope.scaling.factor"] == 4.0
    assert found["qwen2.rope.scaling.original_context_length"] == 32768
    assert found["qwen2.rope.freq_base"] == 1000000.0


def test_gemma_3_has_two_rotary_bases_and_names_its_windowed_layers(tmp_path: Path) -> None:
    found = metadata(form("gemma3_text", num_hidden_layers=7), tmp_path / "model.gguf")
    assert found["gemma3.rope.freq_base"] == 1000000.0
    assert found["gemma3.rope.freq_base_swa"] == 10000.0
    assert found["gemma3.attention.sliding_window"] == 4096
    assert found["gemma3.attention.sliding_window_pattern"] == [True] * 5 + [False, True]


def test_gemma_2_has_both_caps(tmp_path: Path) -> None:
    found = metadata(form("gemma2"), tmp_path / "model.gguf")
    assert found["gemma2.attn_logit_softcapping"] == 50.0
    assert found["gemma2.final_logit_softcapping"] == 30.0


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_is_accepted_with_its_defaults(model_type: str, tmp_path: Path) -> None:
    of = form(model_type)
    check_architecture(of)
    arch = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model_type]]
    found = metadata(of, tmp_path / "model.gguf")
    assert found["general.architecture"] == arch
    heads, width = found[f"{arch}.attention.head_count"], found[f"{arch}.attention.key_length"]
    assert row_width(of, "model.layers.0.self_attn.o_proj") == heads * width
    assert row_width(of, "model.layers.0.mlp.up_proj") == found[f"{arch}.embedding_length"]


@pytest.mark.parametrize(
    ("model_type", "config", "said"),
    [
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar 144, llama.cpp has 256"),
        ("gemma2", {"final_logit_softcapping": None}, "no softcapping"),
        ("gemma3_text", {"tie_word_embeddings": False}, "a head of its own"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu', llama.cpp has 'silu'"),
        ("qwen3", {"attention_bias": True}, "attention_bias, llama.cpp has no such tensors"),
        ("olmo2", {"head_dim": 64}, "head_dim 64"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type 'llama3' of full_attention"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor of full_attention",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(
    model_type: str, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(OptionError, match="llama.cpp computes something else") as raised:
        check_architecture(form(model_type, **config))
    assert said in str(raised.value) and "export --to dense" in str(raised.value)


def test_gemma_2_27b_scales_attention_by_the_width_of_the_model() -> None:
    sizes = {"num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32}
    check_architecture(form("gemma2", **sizes, head_dim=128, query_pre_attn_scalar=144))


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(OptionError, match="'gpt2'\n  it knows llama, mistral"):
        check_architecture(form("gpt2"))


@pytest.mark.parametrize(
    ("model_type", "config", "window"),
    [
        ("mistral", {"sliding_window": 4096}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}, 512),
        ("qwen2", {}, None),
        ("gemma2", {}, None),
    ],
)
def test_a_window_that_llama_cpp_ignores_is_known(
    model_type: str, config: dict[str, Any], window: int | None
) -> None:
    assert ignored_window(form(model_type, **config)) == window
