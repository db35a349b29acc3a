"""Checkpoints in ResQ's bases: the function of their source, or a refusal by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rotation_examples import MODELS, Folders, logits, opened
from torch import Tensor

from rilq.converter.architecture import SUPPORTED, load_config
from rilq.converter.resq.basis import (
    Bases,
    Covariances,
    Sizes,
    hadamard_bases,
    identity_bases,
    permuted_bases,
    resq_bases,
)
from rilq.converter.resq.rotated import ResqCheckpoint, resq_sizes
from rilq.converter.rotation import HEAD
from rilq.errors import UnsupportedArchitectureError
from rilq.formats.resq.install import ARCHITECTURES
from rilq.formats.resq.parts import Parts

OURS = [name for name, (model_type, _) in MODELS.items() if model_type in ARCHITECTURES]


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> Callable[[str], Path]:
    return Folders(tmp_path_factory.mktemp("models"), make_model)


def some_covariances(sizes: Sizes) -> Covariances:
    draw = torch.Generator().manual_seed(5)

    def some(*shape: int) -> Tensor:
        factor = torch.randn(*shape, shape[-1], generator=draw, dtype=torch.float64)
        return factor @ factor.mT

    head = sizes.head_dim
    return Covariances(
        some(sizes.hidden), some(sizes.layers, sizes.kv_heads, head), some(sizes.layers, head)
    )


def bases_of(kind: str, folder: Path) -> Bases:
    sizes = resq_sizes(load_config(opened(folder)))
    covariances = some_covariances(sizes)
    parts = [Parts.of(size, (4, 8), (0.875, 0.125)) for size in (sizes.hidden, sizes.head_dim)]
    return {
        "resq": resq_bases(covariances, *parts, seed=1),
        "quarot": hadamard_bases(sizes, seed=1),
        "quik": permuted_bases(covariances),
        "none": identity_bases(sizes),
    }[kind]


@pytest.mark.parametrize("name", OURS)
def test_logits_in_float32_are_those_of_the_source(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    source = opened(folder_of(name))
    turned = ResqCheckpoint(opened(folder_of(name)), bases_of("resq", folder_of(name)))
    found = []
    for checkpoint in (source, turned):
        tensors = checkpoint.read(checkpoint.tensors)
        found.append(logits(load_config(checkpoint), tensors, torch.float32))
    assert (found[1] - found[0]).abs().max() < 1e-5 * found[0].abs().max()
    assert HEAD in turned.tensors and turned.config["tie_word_embeddings"] is False


@pytest.mark.parametrize("kind", ["quarot", "quik", "none"])
@pytest.mark.parametrize("name", ["qwen2, tied", "qwen3"])
def test_logits_stay_in_the_bases_of_other_methods(
    kind: str, name: str, folder_of: Callable[[str], Path]
) -> None:
    source, turned = opened(folder_of(name)), opened(folder_of(name))
    turned = ResqCheckpoint(turned, bases_of(kind, folder_of(name)))
    before = logits(load_config(source), source.read(source.tensors))
    after = logits(load_config(turned), turned.read(turned.tensors))
    assert (after - before).abs().max() < 2e-6 * before.abs().max()


def test_values_of_each_kv_head_are_turned_by_its_own_matrix(
    folder_of: Callable[[str], Path],
) -> None:
    """By the formulas: W_v and its bias by U_B, the columns of W_o by that of the group's head."""
    folder = folder_of("qwen2")
    bases = bases_of("resq", folder)
    source, turned = opened(folder), ResqCheckpoint(opened(folder), bases)
    config = load_config(source)
    group = config.num_attention_heads // config.num_key_value_heads
    assert group > 1 and not torch.allclose(bases.values[1, 0], bases.values[1, 1])
    old = {name: tensor.double() for name, tensor in source.read(source.tensors).items()}
    new = turned.read(turned.tensors)
    layer = "model.layers.1."
    of_values = torch.block_diag(*bases.values[1])
    of_heads = torch.block_diag(*bases.values[1].repeat_interleave(group, dim=0))
    norm = old[f"{layer}input_layernorm.weight"]
    expected = {
        "v_proj.weight": of_values.T
        @ (old[f"{layer}self_attn.v_proj.weight"] * norm)
        @ bases.residual,
        "v_proj.bias": old[f"{layer}self_attn.v_proj.bias"] @ of_values,
        "o_proj.weight": bases.residual.T @ old[f"{layer}self_attn.o_proj.weight"] @ of_heads,
    }
    for name, tensor in expected.items():
        found = new[f"{layer}self_attn.{name}"]
        torch.testing.assert_close(found, tensor.float(), rtol=1e-6, atol=1e-6, msg=name)


def test_large_tensors_are_turned_in_parts(
    monkeypatch: pytest.MonkeyPatch, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of("qwen2, tied")
    bases = bases_of("resq", folder)
    whole = ResqCheckpoint(opened(folder), bases)
    tensors = whole.read(whole.tensors)
    monkeypatch.setattr("rilq.converter.resq.rotated.ROWS", 4)  # less than a head's
    in_parts = ResqCheckpoint(opened(folder), bases)
    for name, tensor in in_parts.read(in_parts.tensors).items():
        torch.testing.assert_close(tensor, tensors[name])


def test_head_size_is_what_the_config_says(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llama, 12 x 4 and 12")  # 48 / 4 heads is 12, too; qwen3's is not
    assert resq_sizes(load_config(opened(folder))).head_dim == 12
    config = load_config(opened(folder_of("qwen3")))
    config.head_dim = 40
    assert resq_sizes(config).head_dim == 40
    assert config.hidden_size // config.num_attention_heads != 40


@pytest.mark.parametrize("model_type", sorted(SUPPORTED.keys() - set(ARCHITECTURES)))
def test_other_architectures_are_refused_by_name(
    model_type: str, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    source = opened(folder_of("llama"))
    # Not every release of transformers takes Llama's for another architecture's.
    own = {name: value for name, value in source.config.items() if name != "rope_parameters"}
    source.config = {**own, "model_type": model_type}
    bases = bases_of("none", folder_of("llama"))
    with pytest.raises(UnsupportedArchitectureError) as caught:
        ResqCheckpoint(source, bases)
    assert SUPPORTED[model_type] in str(caught.value) and "Llama 2/3" in str(caught.value)
