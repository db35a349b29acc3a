"""A source in block-wise FP8 converts to what its dense twin converts to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fp8_examples import in_fp8
from mixture_examples import MIXTURES
from safetensors.torch import load_file


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
    more = ("--text", calib, "--seqlen", 24, "--device", "cpu", "--json")
    figures = []
    for folder in in_fp8(source, tmp_path, (16, 48)):
        ended = run_cli("eval", folder, *more)
        assert ended.code == 0, ended.err
        figures.append(json.loads(ended.out)["perplexity"])
    assert figures[0] == figures[1]
    ended = run_cli("convert", tmp_path / "fp8", "--rotate", "--dataset", calib)
    assert ended.code == 2 and "--rotate: its weights are in FP8" in ended.err
