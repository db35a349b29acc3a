"""The configuration that mlx-lm is given, against defaults that are not transformers'."""

from typing import Any

import pytest
from transformers import AutoConfig

from rilq.errors import OptionError
from rilq.formats.export.mlx import mlx_config
from rilq.formats.export.source import NativeForm


def form(model_type: str, **overrides: Any) -> NativeForm:
    """Of a checkpoint whose config.json holds what transformers would write."""
    config = AutoConfig.for_model(model_type, **overrides).to_diff_dict()
    return NativeForm("model", config, {}, (), {}, lora=False, recipe={})


def test_rotary_settings_have_their_older_names() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    config = mlx_config(form("llama", rope_parameters=rope))
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == 8.0


def test_defaults_that_differ_are_spelled_out() -> None:
    """mlx-lm 0.32.2 takes 1,000,000 for Qwen2, and ties every Llama that does not say."""
    assert mlx_config(form("qwen2"))["rope_theta"] == 10_000.0
    assert mlx_config(form("llama"))["tie_word_embeddings"] is False


def test_older_names_in_the_source_are_kept() -> None:
    source = form("llama")
    config = {k: v for k, v in source.config.items() if k != "rope_parameters"}
    older = NativeForm("model", config | {"rope_theta": 3e4}, {}, (), {}, lora=False, recipe={})
    assert mlx_config(older)["rope_theta"] == 3e4


def layer_types(*full: int, count: int = 6) -> list[str]:
    return ["full_attention" if i in full else "sliding_attention" for i in range(count)]


def test_gemma3_has_its_pattern_and_local_frequencies() -> None:
    config = mlx_config(form("gemma3_text", num_hidden_layers=6, layer_types=layer_types(2, 5)))
    assert config["sliding_window_pattern"] == 3
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)


@pytest.mark.parametrize("full", [(), (1, 2), (0, 3), (2, 4, 5)])
def test_other_patterns_are_refused(full: tuple[int, ...]) -> None:
    wanted = form("gemma3_text", num_hidden_layers=6, layer_types=layer_types(*full))
    with pytest.raises(OptionError, match="every n-th layer"):
        mlx_config(wanted)
