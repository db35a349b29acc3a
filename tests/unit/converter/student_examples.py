"""Students over a random Llama that is quantized by rounding, as tests of tiers share them."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rilq.converter.adapters import AdapterSpec
from rilq.converter.loss import Loss, discrepancy
from rilq.converter.options import Tier, Train
from rilq.converter.quantizers import build_quantizer
from rilq.converter.student import Student
from rilq.formats.native import RilqConfig, native_tensors
from rilq.formats.spec import QuantSpec


def write_layers(model: Path, folder: Path, bits: int) -> None:
    """The model's decoder layers, quantized, one file each, and what is outside them."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rtn = build_quantizer("rtn")
    for index, layer in enumerate(dense.model.layers):
        tensors = {n: t.detach() for n, t in layer.state_dict().items()}
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                quantized = rtn.quantize(tensors.pop(f"{name}.weight"), QuantSpec(bits, 32))
                tensors |= native_tensors(name, quantized)
        named = {f"model.layers.{index}.{n}": t.contiguous() for n, t in tensors.items()}
        save_file(named, folder / f"layer-{index}.safetensors")
    outer = {n: t for n, t in dense.state_dict().items() if ".layers." not in n}
    save_file(outer, folder / "outer.safetensors")


def read_layers(folder: Path) -> Callable[[int], dict[str, Tensor]]:
    """Reads what `write_layers` wrote."""
    return lambda index: load_file(folder / f"layer-{index}.safetensors")


def make_student(
    model: Path,
    folder: Path,
    tier: Tier,
    train: Train,
    bits: int = 2,
    *,
    kind: str = "pooled",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    recompute: bool = True,
) -> Student:
    """Over what `write_layers` wrote; all that is trained has values that do something."""
    adapters = train.startswith("adapters")
    student = Student(
        AutoConfig.from_pretrained(model),
        RilqConfig(bits, 32),
        read_layer=read_layers(folder),
        outer=load_file(folder / "outer.safetensors"),
        train=train,
        adapters=AdapterSpec(kind, 4, 8.0, seed=1) if adapters else None,  # type: ignore[arg-type]
        tier=tier,
        dtype=dtype,
        device=torch.device(device),
        recompute=recompute,
    )
    draw = torch.Generator().manual_seed(9)
    for _, parameter in sorted(student.trained.items()):
        parameter.data.add_(
            0.05 * torch.randn(parameter.shape, generator=draw).to(parameter.device)
        )
    return student


def batch(rows: int = 2, length: int = 16) -> tuple[Tensor, Tensor]:
    """Token rows `[rows, length]` and targets `[rows, length, 64]`."""
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(320, (rows, length), generator=draw)
    return tokens, torch.randn(rows, length, 64, generator=draw)


def loss_and_gradients(student: Student) -> tuple[float, dict[str, Tensor]]:
    """Of `batch`, on the CPU; once without gradients before, as a validation is."""
    tokens, target = batch()
    tokens = tokens.to(student.device)
    loss = Loss(mse=0.2, ce=0.3, kl=0.5)
    with torch.no_grad():
        before = discrepancy(student, tokens, target, loss).item()
    value = discrepancy(student, tokens, target, loss)
    value.backward()
    assert abs(value.item() - before) < 1e-5 * before
    return before, {name: p.grad.cpu() for name, p in student.trained.items()}
