"""A source in block-wise FP8 converts to what its dense twin converts to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_examples import in_fp8
from mixture_examples import MIXTURES
from safetensors.torch import load_file

from rilq.evaluation.speed import measure_here
from rilq.evaluation.whole import Place, load


def test_fp8_and_its_dense_twin_convert_alike(
    tmp_path: Path, make_model: Callable[..., Path], run_cli: Callable[..., Any], calib: Path
) -> None:
    """A mixture, with experts that come one by one."""
    more = {**MIXTURES["deepseek_v3"], "hidden_size": 160}
    source = make_model(tmp_path / "source", "deepseek_v3", dtype=torch.bfloat16, **more)
    outs = []
    for folder in in_fp8(source, tmp_path, (128, 128)):
        outs.append(tmp_path / f"{folder.name}-out")
        ended = run_cli(
            *("convert", folder, "--dataset", calib, "--group-size", 32, "--nsamples", 10),
            *("--seqlen", 24, "--quantizer", "gptq", "--rank", 4, "--steps", 2, "--device", "cpu"),
            *("--expert-memory", "1kB", "-o", outs[-1]),
        )
        assert ended.code == 0, ended.err
        assert "quantization_config" in (outs[-1] / "config.json").read_text()
    found, expected = (load_file(out / "model.safetensors") for out in outs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_fp8_is_evaluated_as_its_twin_and_not_rotated(
    tmp_path: Path, make_model: Callable[..., Path], run_cli: Callable[..., Any], calib: Path
) -> None:
    source = make_model(tmp_path / "source", dtype=torch.bfloat16)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat sat on\nan old house\n")
    more = ("--text", calib, "--seqlen", 24, "--device", "cpu", "--json", "--no-speed")
    more = (*more, "--prompts", prompts, "--max-new-tokens", 12)
    figures = []
    for folder in in_fp8(source, tmp_path, (16, 48)):
        ended = run_cli("eval", folder, *more)
        assert ended.code == 0, ended.err
        found = json.loads(ended.out)
        figures.append((found["perplexity"], found["generations"]))
    assert figures[0] == figures[1]
    ended = run_cli("convert", tmp_path / "fp8", "--rotate", "--dataset", calib)
    assert ended.code == 2 and "--rotate: its weights are in FP8" in ended.err


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_fp8_loaded_whole_is_its_twin_to_the_last_bit(
    kind: str, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    """Blocks that the edges cut in both directions; dtypes as stored, and another one."""
    more = MIXTURES.get(kind, {})
    source = make_model(tmp_path / "source", kind, dtype=torch.bfloat16, **more)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    folders = in_fp8(source, tmp_path, (24, 48))
    for dtype in ("auto", torch.float32):
        (model, _), (twin, _) = (load(f, device="cpu", dtype=dtype) for f in folders)
        found, expected = model.state_dict(), twin.state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
        assert model.generation_config == twin.generation_config


def test_fp8_is_timed_with_its_weights_dequantized(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    source = make_model(tmp_path / "source", dtype=torch.bfloat16)
    fp8, _ = in_fp8(source, tmp_path, (16, 48))
    speed = measure_here(Place(str(fp8), device="cpu"))
    assert speed.dtype == "bfloat16" and speed.decode_tokens_per_s > 0
