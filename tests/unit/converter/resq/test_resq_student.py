"""Students over ResQ's linears: tiers agree, and gradients pass what quantizes inputs and cache."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rilq.converter.adapters import AdapterSpec
from rilq.converter.hadamard import random_rotation
from rilq.converter.resq.weights import fold, round_parts
from rilq.converter.student import Student
from rilq.formats.resq.config import ResqConfig
from rilq.formats.resq.install import full_precision
from rilq.formats.resq.weight import resq_tensors

HADAMARD = random_rotation(128, torch.Generator().manual_seed(0)).factors
CONFIG = ResqConfig(hadamard=tuple(map(len, HADAMARD)))
CPU = torch.device("cpu")


def quantized_layer(layer: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A decoder layer's tensors as they are stored, in an identity basis of the keys."""
    tensors = {f"{prefix}.{n}": t.detach() for n, t in layer.state_dict().items()}
    tensors[f"{prefix}.self_attn.key_rotation.weight"] = torch.eye(16)
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            name, leaf = f"{prefix}.{path}", path.rpartition(".")[2]
            heads = 4 if leaf == "o_proj" else 1
            factors = HADAMARD if leaf == "down_proj" else ()
            weight = fold(tensors.pop(f"{name}.weight"), factors)
            parts = CONFIG.linear_parts(name, module.in_features // heads)
            tensors |= resq_tensors(name, round_parts(weight, parts, heads=heads), factors)
    return tensors


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


def student(dense: Any, tier: Any) -> Student:
    layers = [
        quantized_layer(layer, f"model.layers.{index}")
        for index, layer in enumerate(dense.model.layers)
    ]
    made = Student(
        copy.deepcopy(dense.config),
        CONFIG,
        read_layer=lambda index: dict(layers[index]),
        outer={n: t for n, t in dense.state_dict().items() if ".layers." not in n},
        train="adapters",
        adapters=AdapterSpec("lora", 4, 8.0, seed=1),
        tier=tier,
        dtype=torch.float32,
        device=CPU,
    )
    draw = torch.Generator().manual_seed(2)
    for _, value in sorted(made.trained.items()):
        value.data.add_(0.02 * torch.randn(value.shape, generator=draw))
    return made


def loss_and_gradients(made: Student) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(3))
    loss = made(tokens).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss, {name: value.grad for name, value in sorted(made.trained.items())}


def test_dense_and_packed_students_have_the_same_loss_and_gradients(dense: Any) -> None:
    loss, gradients = loss_and_gradients(student(dense, "dense"))
    other_loss, others = loss_and_gradients(student(dense, "packed"))
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(gradients, others)


def test_every_adapter_of_every_layer_has_a_gradient(dense: Any) -> None:
    gradients = loss_and_gradients(student(dense, "dense"))[1]
    assert len(gradients) == 2 * 7 * 2  # a and b of seven linears in two layers
    assert all(bool(gradient.any()) for gradient in gradients.values())


def test_inputs_keys_and_values_are_quantized_while_training(dense: Any) -> None:
    made = student(dense, "dense")
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        quantized = made(tokens)
        with full_precision(made.model):
            plain = made(tokens)
    assert (quantized - plain).abs().max() > 1e-3
