"""The first pass of ResQ: its sums are those of the model in memory, whatever it was stopped by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rilq.converter.fewer_rows import RowsAtOnce
from rilq.converter.layers import StreamedModel
from rilq.converter.resq.basis import Covariances
from rilq.converter.resq.covariances import CovariancePass
from rilq.converter.workdir import open_workdir
from rilq.errors import Interrupted
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.resq.install import ARCHITECTURES
from rilq.formats.source import LocalFolder
from rilq.progress import SilentReporter

ROWS, SEQLEN = 5, 16
REPORT = SilentReporter()


def rows() -> Tensor:
    return torch.randint(320, (ROWS, SEQLEN), generator=torch.Generator().manual_seed(3))


def streamed_covariances(source: Path, work: Path, at_once: int = 2) -> Covariances:
    checkpoint = Checkpoint.open(LocalFolder(source), report=REPORT)
    streamed = StreamedModel(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    with open_workdir(work, {}, {}, resume="auto", report=REPORT) as folder:
        steps = CovariancePass(checkpoint, streamed, rows(), folder, RowsAtOnce(at_once, 1), REPORT)
        return steps.run()


def covariance(x: Tensor) -> Tensor:
    vectors = x.reshape(-1, x.shape[-1]).double()
    return vectors.T @ vectors / len(vectors)


@torch.no_grad()
def covariances_in_memory(source: Path) -> Covariances:
    """From transformers' own model: outputs of norms without weights, and of its own cache."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.fill_(1.0)
            norm.register_forward_hook(lambda _module, _args, out: inputs.append(out))
    # The linears behind a norm take up its weight instead, so that the model stays what it is.
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight.mul_(other.input_layernorm.weight)
        for name in ("gate_proj", "up_proj"):
            getattr(layer.mlp, name).weight.mul_(other.post_attention_layernorm.weight)
    cache = model(rows(), use_cache=True).past_key_values.layers
    return Covariances(
        covariance(torch.stack(inputs)),
        torch.stack(
            [torch.stack([covariance(each.values[:, head]) for head in range(2)]) for each in cache]
        ),
        torch.stack([covariance(each.keys) for each in cache]),
    )


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_covariances_are_those_of_the_model_in_memory(
    model_type: str, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    source = make_model(tmp_path / "model", model_type)
    found, expected = streamed_covariances(source, tmp_path / "work"), covariances_in_memory(source)
    for name in ("residual", "values", "keys"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_head_size_comes_from_the_configuration(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    source = make_model(tmp_path / "model", "qwen3", head_dim=8)  # hidden / heads is 16
    found = streamed_covariances(source, tmp_path / "work")
    assert found.keys.shape == (2, 8, 8)
    assert found.values.shape == (2, 2, 8, 8)


@pytest.mark.parametrize("stop", [0, 1])
def test_a_pass_stopped_in_any_layer_goes_on_to_the_same_bits(
    stop: int, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = streamed_covariances(tiny_llama, tmp_path / "whole")
    original, saved = CovariancePass._save, []

    def save(self: CovariancePass, index: int, sums: Any) -> Any:
        saved.append(index)
        if saved == list(range(stop + 1)):  # the first time that it is here
            raise Interrupted("stopped")
        return original(self, index, sums)

    monkeypatch.setattr(CovariancePass, "_save", save)
    with pytest.raises(Interrupted):
        streamed_covariances(tiny_llama, tmp_path / "work")
    found = streamed_covariances(tiny_llama, tmp_path / "work")
    assert saved == [*range(stop + 1), *range(stop, 2)]  # finished layers are not done again
    for name in ("residual", "values", "keys"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
