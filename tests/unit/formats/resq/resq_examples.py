"""Small ResQ checkpoints, made by plain rounding, and the dense models that they stand for."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rilq.formats.resq.config import ResqConfig
from rilq.formats.resq.hadamard import kronecker_apply
from rilq.formats.resq.install import install
from rilq.formats.resq.linear import ResqLinear
from rilq.formats.resq.parts import Parts
from rilq.formats.resq.weight import ResqWeight, resq_tensors
from rilq.formats.writer import write_config

HADAMARD = (8, 16)  # of the tiny models' intermediate size


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float32."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].float().contiguous()


def rounded(weight: Tensor, parts: Parts, heads: int = 1) -> ResqWeight:
    """Symmetric rounding to the nearest code, each output channel and part for itself."""
    codes, scales = [], []
    split = weight.float().unflatten(1, (heads, parts.size)).split(parts.widths, -1)
    for bits, values in zip(parts.bits, split, strict=True):
        scale = (values.abs().amax((1, 2)) / (2 ** (bits - 1) - 1)).half()
        codes.append((values / scale.float()[:, None, None]).round().to(torch.int8))
        scales.append(scale)
    return ResqWeight(torch.cat(codes, -1).flatten(1), torch.stack(scales, 1), parts, heads)


def obvious_weight(weight: ResqWeight) -> Tensor:
    """`scale * code`, column by column."""
    dense = torch.empty(weight.codes.shape)
    ends = torch.tensor(weight.parts.widths).cumsum(0).tolist()
    for column in range(dense.shape[1]):
        part = next(p for p, end in enumerate(ends) if column % weight.parts.size < end)
        dense[:, column] = weight.scale[:, part].float() * weight.codes[:, column].float()
    return dense


@dataclass(frozen=True)
class Example:
    """A ResQ checkpoint, and a plain transformers model with the weights that it stands for."""

    folder: Path
    dense: PreTrainedModel
    config: ResqConfig


def make_resq(source: Path, folder: Path, config: ResqConfig) -> Example:
    """Round the linears of a dense checkpoint; rotations of keys and inputs are random."""
    generator = torch.Generator().manual_seed(1)
    dense = AutoModelForCausalLM.from_pretrained(source)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    tensors: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    factors = [orthogonal(size, generator) for size in config.hadamard]
    for name in install(skeleton, config):
        linear = skeleton.get_submodule(name)
        assert isinstance(linear, ResqLinear)
        weight, turned = tensors[f"{name}.weight"].float(), linear.hadamard != []
        made = rounded(
            kronecker_apply(weight, factors) if turned else weight, linear.parts, linear.heads
        )
        tensors |= resq_tensors(name, made, factors if turned else ())
        stands_for = made.dense()
        if turned:
            stands_for = kronecker_apply(stands_for, [factor.T for factor in factors])
        dense.get_submodule(name).weight.data = stands_for
    for name, tensor in skeleton.state_dict().items():
        if name.endswith("key_rotation.weight"):
            tensors[name] = orthogonal(len(tensor), generator)
    folder.mkdir(parents=True)
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    write_config(folder, AutoConfig.from_pretrained(source).to_dict(), config, torch.float32)
    for path in source.glob("*token*"):
        shutil.copy(path, folder)
    return Example(folder, dense.eval(), config)
