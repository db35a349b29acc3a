"""Every supported architecture converted for real, its output compared with transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_examples import MIXTURES
from transformers import AutoModelForCausalLM, AutoTokenizer

import rilq  # noqa: F401  (teaches transformers the native format)
from rilq.formats.packed_linear import RilqLinear

WINDOWS = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0},
    "gemma3_text": {"sliding_window": 8, "layer_types": WINDOWS},
    "phi3": {},
    "olmo2": {},
    **MIXTURES,
}


@pytest.mark.parametrize(
    ("model_type", "more"),
    [*((name, ()) for name in ARCHITECTURES), ("llama", ("--rotate",)), ("phi3", ("--rotate",))],
)
def test_converted_model_loads_and_its_student_was_that_model(
    model_type: str,
    more: tuple[str, ...],
    tmp_path: Path,
    make_model: Callable[..., Path],
    run_cli: Callable[..., Any],
    calib: Path,
) -> None:
    """The validation loss that training ended with is that of the loaded output.

    The student is built by us; the output is loaded by transformers. If masks, soft caps, scaled
    embeddings or tied heads differed between the two, so would the loss.
    """
    source = make_model(tmp_path / "source", model_type, **ARCHITECTURES[model_type])
    ended = run_cli(
        *("convert", source, "--dataset", calib, "--group-size", 32, "--nsamples", 10),
        *("--seqlen", 24, "--steps", 4, "--val-every", 2, "--rank", 4, "--lr", "1e-3"),
        *("--layer-steps", 3, "--loss", "mse+ce", "--no-report"),
        *("-o", tmp_path / "out", "--keep-work", "--json", *more),
    )
    assert ended.code == 0, ended.err
    quality = json.loads(ended.out)["quality"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert any(isinstance(m, RilqLinear) for m in model.modules())
    assert "rilq" not in type(model).__module__
    tokens, targets = kept_rows(tmp_path / "out.rilq-work", model.config.hidden_size)
    finals: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: finals.append(args[0]))
    with torch.no_grad():
        logits = model(tokens[-2:]).logits
    cross_entropy = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[-2:, 1:].flatten()
    )
    expected = 0.5 * (finals[0] - targets[-2:]).square().mean() + 0.5 * cross_entropy
    assert quality["validation_loss_merged"] == pytest.approx(expected.item(), rel=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=3, do_sample=False)


def kept_rows(work: Path, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration rows and the teacher's final hidden states, from a kept work folder."""
    from safetensors.torch import load_file

    tokens = load_file(work / "rows.safetensors")["tokens"]
    flat = torch.frombuffer(bytearray((work / "targets.bin").read_bytes()), dtype=torch.float32)
    return tokens, flat.view(*tokens.shape, hidden)
