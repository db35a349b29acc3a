"""The same work on a CUDA device; skipped where there is none."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mixture_examples import MIXTURES

from rilq.converter.quantizers import build_quantizer
from rilq.formats.native import native_tensors
from rilq.formats.packed_linear import packed_linear
from rilq.formats.spec import QuantSpec
from rilq.progress import usage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_linear_and_its_gradient_are_those_of_the_cpu(bits: int) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*size, generator=draw) for size in ((48, 128), (5, 128)))
    native = native_tensors("x", build_quantizer("rtn").quantize(weight, QuantSpec(bits, 64)))
    results = []
    for device in ("cpu", "cuda"):
        words, scale, zero = (t.to(device) for t in native.values())
        leaf = x.to(device, copy=True).requires_grad_()
        out = packed_linear(leaf, words, scale, zero, None, bits)
        out.square().sum().backward()
        results.append((out.detach().cpu(), leaf.grad.cpu()))
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


def test_conversion_on_the_gpu_comes_close_to_that_on_the_cpu(
    tmp_path: Path, arguments: Callable[..., list[str]]
) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        words = arguments(tmp_path / device, "--device", device, "--dtype", "float32", "--json")
        done = subprocess.run(
            [sys.executable, "-m", "rilq", *words], capture_output=True, text=True, check=True
        )
        losses[device] = json.loads(done.stdout)["quality"]["validation_loss_merged"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)


@pytest.mark.parametrize("memory", ["1GB", "1kB"])
def test_a_mixture_on_the_gpu_comes_close_to_that_on_the_cpu(
    memory: str,
    tmp_path: Path,
    make_model: Callable[..., Path],
    arguments: Callable[..., list[str]],
) -> None:
    """All experts of a layer on the device, or one at a time."""
    source = make_model(tmp_path / "source", "qwen2_moe", **MIXTURES["qwen2_moe"])
    errors = {}
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        more = ("--device", device, "--dtype", "float32", "--json", "--quantizer", "gptq")
        words = arguments(tmp_path / device, *more, "--expert-memory", memory, model=source)
        done = subprocess.run(
            [sys.executable, "-m", "rilq", *words], capture_output=True, text=True, check=True
        )
        errors[device] = json.loads(done.stdout)["quality"]["layer_errors"]
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.1)


def test_memory_on_the_gpu_is_shown(tmp_path: Path) -> None:
    kept = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    shown = float(usage(tmp_path).partition(" GB on the GPU")[0].rpartition(" ")[2])
    assert shown >= kept.nbytes / 1e9 - 0.05
