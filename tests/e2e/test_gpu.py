"""The same work on a CUDA device; skipped where there is none."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mixture_examples import MIXTURES
from student_examples import batch, loss_and_gradients, make_student, write_layers

from rilq.calib.activations import ActivationStore, ActivationWriter
from rilq.converter.layer_reader import reading_ahead
from rilq.converter.options import Tier, Train
from rilq.converter.quantizers import build_quantizer, inverse_factor
from rilq.formats.checkpoint import SOURCE_DTYPES, Checkpoint
from rilq.formats.export import vllm
from rilq.formats.native import native_tensors
from rilq.formats.packed_linear import packed_linear
from rilq.formats.packing import dequantize, dequantize_packed, pack
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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (3, 5), (1023, 7), (4097, 32)])
def test_the_triton_kernel_gives_what_torch_gives(
    rows: int, groups: int, size: int, bits: int
) -> None:
    kernel = pytest.importorskip("rilq.formats.dequantize_triton", reason="needs triton")
    draw = torch.Generator("cuda").manual_seed(bits)
    codes = torch.randint(2**bits, (rows, groups * size), generator=draw, device="cuda")
    codes = codes.to(torch.uint8)
    for stored in (torch.float16, torch.float32):
        scale, zero = torch.rand(2, rows, groups, generator=draw, device="cuda").to(stored)
        zero = 2**bits * zero - 0.5
        words = pack(codes, bits)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            found = kernel.dequantize(words, scale, zero, bits, dtype=dtype)
            assert torch.equal(found, dequantize(codes, scale, zero, dtype=dtype))
            assert torch.equal(found, dequantize_packed(words, scale, zero, bits, dtype=dtype))


@pytest.fixture(scope="module")
def deep(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> Callable[[int], tuple[Path, Path]]:
    """`deep(layers)`: a model, and the folder of its layers in 2 bits."""

    def make(layers: int) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("deep")
        make_model(folder / "model", num_hidden_layers=layers)
        (folder / "layers").mkdir()
        write_layers(folder / "model", folder / "layers", 2)
        return folder / "model", folder / "layers"

    return make


@pytest.mark.parametrize("train", ["adapters", "scales", "adapters+scales", "all"])
def test_all_tiers_have_the_same_loss_and_gradients(
    train: Train, deep: Callable[[int], tuple[Path, Path]]
) -> None:
    places = deep(5)
    tiers: list[Tier] = ["packed", "dense", "offload"]
    on_cpu = loss_and_gradients(make_student(*places, "packed", train))
    for tier in tiers:
        loss, grads = loss_and_gradients(make_student(*places, tier, train, device="cuda"))
        assert loss == pytest.approx(on_cpu[0], rel=1e-3)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, on_cpu[1][name], rtol=1e-2, atol=1e-5, msg=name)


def test_offloaded_layers_take_no_device_memory_of_their_own(
    deep: Callable[[int], tuple[Path, Path]],
) -> None:
    peaks = []
    for layers in (4, 12):
        student = make_student(*deep(layers), "offload", "scales", device="cuda")
        torch.cuda.reset_peak_memory_stats()
        begun = torch.cuda.memory_allocated()
        for _ in range(2):
            student.states(batch()[0].cuda())[1].sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - begun)
        assert all(p.device.type == "cpu" for p in student.trained.values())
        del student
    of_a_layer = 4 * (2 * 16 * 64)  # bytes that are kept of it: its input
    assert peaks[1] - peaks[0] < 8 * 4 * of_a_layer


@pytest.mark.parametrize("tier", ["packed", "offload"])
def test_conversion_in_each_tier_comes_close_to_the_dense_one(
    tier: str, tmp_path: Path, arguments: Callable[..., list[str]]
) -> None:
    losses = {}
    for each in ("dense", tier):
        (tmp_path / each).mkdir()
        limit = ("--device", "cuda", "--dtype", "float32", "--device-memory", "4GB", "--json")
        words = arguments(tmp_path / each, "--student", each, *limit)
        done = subprocess.run(
            [sys.executable, "-m", "rilq", *words], capture_output=True, text=True, check=True
        )
        losses[each] = json.loads(done.stdout)["quality"]["validation_loss_merged"]
    assert losses[tier] == pytest.approx(losses["dense"], rel=0.02)


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


# Linears of a decoder layer that vLLM makes one of, by their rows.
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def fused_linears(folder: Path) -> Iterator[tuple[str, dict[str, torch.Tensor], torch.Tensor]]:
    """Of an export's only layer as vLLM loads them: names, packed tensors, dense weight."""
    stored = Checkpoint.open(LocalFolder(folder), dtypes=SOURCE_DTYPES | {torch.int32})
    dense = vllm.read(folder)
    for members in FUSED:
        names = [f"model.layers.0.{member}" for member in members]
        tensors = {
            part: torch.cat([stored.read([f"{n}.{part}"])[f"{n}.{part}"] for n in names])
            for part in ("weight", "weight_scale", "zero_point")
        }
        yield ", ".join(members), tensors, torch.cat([dense.read(f"{n}.weight") for n in names])


@pytest.mark.filterwarnings("default")  # what humming and triton warn of is not ours
@pytest.mark.parametrize(
    ("bits", "dtype", "within"),
    [(2, "fp16", 2e-3), (3, "fp16", 2e-3), (4, "fp16", 2e-3), (8, "fp16", 2e-3), (2, "bf16", 2e-2)],
)
def test_a_merged_linear_through_hummings_kernel_is_the_dense_one(
    bits: int,
    dtype: str,
    within: float,
    tmp_path: Path,
    make_model: Callable[..., Path],
    arguments: Callable[..., list[str]],
) -> None:
    """Closer than it would be if the adapter in the zero-points were lost to rounding them."""
    humming = pytest.importorskip("humming.layer", reason="needs humming-kernels")
    sizes = dict(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=1)
    source = make_model(tmp_path / "source", **sizes)
    words = arguments(tmp_path, "--bits", bits, "--quantizer", "lsq", model=source)
    export = ["export", str(tmp_path / "out"), "--to", "vllm", "-o", str(tmp_path / "vllm")]
    for command in (words, [*export, "--dtype", dtype]):
        subprocess.run([sys.executable, "-m", "rilq", *command], check=True)
    told = json.loads((tmp_path / "vllm" / "config.json").read_text())["quantization_config"]
    compute = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    draw = torch.Generator().manual_seed(0)
    for names, tensors, weight in fused_linears(tmp_path / "vllm"):
        layer = humming.HummingLayer(*weight.shape, dict(told), torch_dtype=compute).cuda()
        layer.weight_schema.validate_tensors(tensors, *weight.shape, compute)
        layer.load_from_tensors(tensors)
        layer.transform()
        rounded = {**tensors, "zero_point": tensors["zero_point"].round()}
        without = dequantize_packed(*rounded.values(), bits)
        for rows in (1, 100):
            x = torch.randn(rows, weight.shape[1], generator=draw).to(compute)
            found, expected = layer(x.cuda()).cpu().float(), x.float() @ weight.T
            assert (found - expected).norm() < within * expected.norm(), (names, rows)
            assert (x.float() @ without.T - found).norm() > within * expected.norm(), names
