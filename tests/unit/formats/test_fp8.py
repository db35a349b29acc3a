"""Block-wise FP8 sources are read as the dense checkpoint that they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_examples import in_fp8
from safetensors.torch import load_file, save_file
from torch import Tensor

from rilq.errors import CheckpointError, NonFiniteError
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.fp8 import BlockFp8Checkpoint, dequantize_blocks, open_source_checkpoint
from rilq.formats.source import LocalFolder

WEIGHTS = "model.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folders(tmp_path: Path, make_model: Callable[..., Path]) -> tuple[Path, Path]:
    """A Llama in FP8, and its dense twin in bfloat16; 160 is no multiple of 128."""
    source = make_model(tmp_path / "source", hidden_size=160, dtype=torch.bfloat16)
    return in_fp8(source, tmp_path, (128, 128))


def change(folder: Path, **tensors: Tensor | None) -> None:
    state = load_file(folder / WEIGHTS) | tensors
    save_file({n: t for n, t in state.items() if t is not None}, folder / WEIGHTS)


def configure(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= entries
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("shape", "block"), [((256, 256), (128, 128)), ((130, 300), (128, 128)), ((5, 7), (2, 3))]
)
def test_every_weight_is_multiplied_by_the_scale_of_its_block(
    shape: tuple[int, int], block: tuple[int, int]
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw).to(torch.float8_e4m3fn)
    blocks = [-(-n // size) for n, size in zip(shape, block, strict=True)]
    scales = torch.rand(blocks, generator=draw) + 0.5
    dense = dequantize_blocks(weight, scales, block, torch.float32)
    for row in range(shape[0]):
        for column in (0, shape[1] // 2, shape[1] - 1):
            scale = scales[row // block[0], column // block[1]]
            assert dense[row, column] == weight[row, column].float() * scale


def test_names_sizes_and_tensors_are_those_of_the_dense_twin(folders: tuple[Path, Path]) -> None:
    found, dense = (open_source_checkpoint(LocalFolder(folder)) for folder in folders)
    assert isinstance(found, BlockFp8Checkpoint) and type(dense) is Checkpoint
    assert "quantization_config" not in found.config
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in found.tensors.items()} == {
        n: (t.dtype, t.shape, t.nbytes) for n, t in dense.tensors.items()
    }
    tensors, expected = found.read(found.tensors), dense.read(dense.tensors)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    stored = sum(info.nbytes for info in found.headers[WEIGHTS].tensors.values())
    assert found.bytes_read == found.source_bytes(found.tensors) == stored < dense.bytes_read


def test_a_changed_scale_is_another_weight(folders: tuple[Path, Path]) -> None:
    hashes = []
    for factor in (1.0, 2.0):
        scales = load_file(folders[0] / WEIGHTS)[f"{Q}_scale_inv"] * factor
        change(folders[0], **{f"{Q}_scale_inv": scales})
        checkpoint = open_source_checkpoint(LocalFolder(folders[0]))
        checkpoint.read([Q])
        hashes.append(checkpoint.hashes[Q])
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"weight_block_size": None}, ["weight_block_size None", "already quantized"]),
        ({"weight_block_size": [128, 0]}, ["[128, 0]"]),
        ({"weight_block_size": [64, 64]}, [f"{Q}_scale_inv", "[64, 64]"]),
        ({"fmt": "e5m2"}, ["e5m2"]),
        ({"quant_method": "gptq"}, [Q, "F8_E4M3", "quantized already"]),
    ],
)
def test_fp8_of_another_kind_is_refused(
    entries: dict[str, Any], words: list[str], folders: tuple[Path, Path]
) -> None:
    configure(folders[0], **entries)
    with pytest.raises(CheckpointError) as caught:
        open_source_checkpoint(LocalFolder(folders[0]))
    assert all(word in str(caught.value) for word in words), caught.value


def test_weights_and_scales_that_do_not_belong_together_are_refused(
    folders: tuple[Path, Path],
) -> None:
    change(folders[0], **{f"{Q}_scale_inv": None})
    with pytest.raises(CheckpointError, match=rf"{Q}_scale_inv"):
        open_source_checkpoint(LocalFolder(folders[0]))


def test_what_is_not_finite_is_refused_by_name(folders: tuple[Path, Path]) -> None:
    change(folders[0], **{f"{Q}_scale_inv": torch.full((1, 2), 3e38)})
    with pytest.raises(NonFiniteError, match=Q):
        open_source_checkpoint(LocalFolder(folders[0])).read([Q])
