"""The same work on a CUDA device; skipped where there is none."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rilq.calib.activations import ActivationStore, ActivationWriter
from rilq.converter.layer_reader import reading_ahead
from rilq.converter.quantizers import build_quantizer, inverse_factor
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.native import native_tensors
from rilq.formats.packed_linear import packed_linear
from rilq.formats.source import LocalFolder
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


def test_memory_on_the_gpu_is_shown(tmp_path: Path) -> None:
    kept = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    shown = float(usage(tmp_path).partition(" GB on the GPU")[0].rpartition(" ")[2])
    assert shown >= kept.nbytes / 1e9 - 0.05


def test_hidden_states_pass_through_page_locked_memory_unchanged(tmp_path: Path) -> None:
    values = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))
    path, shape = tmp_path / "h", (6, 4, 8)
    with ActivationWriter(path, shape, torch.bfloat16) as writer:
        for batch in values.cuda().split(2):
            writer.append(batch)
    store = ActivationStore(path, shape, torch.bfloat16, pinned=True)
    for start, batch in store.batches(4):
        assert batch.is_pinned()
        there = batch.to("cuda", non_blocking=True).cpu()
        assert torch.equal(there, values[start : start + 4].to(torch.bfloat16))


def test_a_layer_that_is_read_ahead_lies_in_page_locked_memory(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(LocalFolder(tiny_llama))
    names = [name for name in checkpoint.tensors if ".layers.0." in name]
    with reading_ahead(checkpoint, [names], budget=1, pinned=True) as reader:
        reader.start([names])
        tensors = reader.take()
    stored = Checkpoint.open(LocalFolder(tiny_llama)).read(names)
    assert all(t.is_pinned() and torch.equal(t, stored[name]) for name, t in tensors.items())


def test_a_wide_hessian_is_factored_in_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverse_factor, "AT_ONCE", 0)
    monkeypatch.setattr(inverse_factor, "BLOCK", 512)
    x = torch.randn(5000, 4096, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x
    inverse_factor.inverse_factor(hessian[:512, :512].cuda(), 0.01, print)  # workspaces
    given = hessian.cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - given.nbytes
    factor = inverse_factor.inverse_factor(given, 0.01, print)
    assert torch.cuda.max_memory_allocated() - before <= inverse_factor.factor_bytes(4096)
    on_cpu = inverse_factor.inverse_factor(hessian, 0.01, print)
    torch.testing.assert_close(factor.cpu(), on_cpu, rtol=1e-3, atol=1e-4)
