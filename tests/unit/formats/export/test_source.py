"""What a native checkpoint is known to be before anything is exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rilq.errors import CheckpointError
from rilq.formats.export.source import NativeCheckpoint
from rilq.formats.native import RilqConfig, native_tensors
from rilq.formats.packing import dequantize
from rilq.formats.spec import QuantizedLinear, QuantSpec
from rilq.formats.verify import write_manifest
from rilq.formats.writer import write_config
from rilq.progress import SilentReporter

LINEAR = "model.layers.0.mlp.up_proj"
SPEC = QuantSpec(3, 32)


def quantized(rows: int, width: int) -> QuantizedLinear:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(8, (rows, width), generator=draw).to(torch.uint8)
    scale, zero = torch.rand(2, rows, width // 32, generator=draw).half()
    return QuantizedLinear(codes, scale + 0.1, zero * 3, SPEC)


@pytest.fixture
def folder(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    """A native checkpoint with one quantized linear."""
    source = make_model(tmp_path / "source")
    out = tmp_path / "native"
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    kept = [n.removesuffix(".weight") for n in tensors if "_proj" in n and LINEAR not in n]
    tensors |= native_tensors(LINEAR, quantized(*tensors[f"{LINEAR}.weight"].shape))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = RilqConfig(3, 32, modules_to_not_convert=["lm_head", *kept])
    write_config(out, json.loads((source / "config.json").read_text()), config, torch.float32)
    write_manifest(out, {"recipe": {"bits": 3}})
    return out


def opened(folder: Path) -> NativeCheckpoint:
    return NativeCheckpoint.open(folder, SilentReporter())


def test_the_form_says_what_is_quantized_and_what_is_not(folder: Path) -> None:
    form = opened(folder).form
    assert form.linears == {LINEAR: SPEC} and form.outer == {} and not form.lora
    assert len(form.kept) == 13 and form.recipe == {"bits": 3}
    assert form.model_type == "llama" and "quantization_config" not in form.config


def test_dense_weights_are_those_of_the_codes(folder: Path) -> None:
    native = opened(folder)
    part = quantized(128, 64)
    expected = dequantize(part.codes, part.scale, part.zero_point)
    assert native.shape(LINEAR) == (128, 64)
    assert torch.equal(native.dense_weight(LINEAR, torch.float32), expected)
    assert torch.equal(native.dense_weight(LINEAR, torch.bfloat16), expected.bfloat16())


def test_a_changed_tensor_is_found_when_it_is_read(folder: Path) -> None:
    native = opened(folder)
    native.tensor(f"{LINEAR}.zero_point")
    native.check_read()
    content = bytearray((folder / "model.safetensors").read_bytes())
    info = native.checkpoint.tensors[f"{LINEAR}.zero_point"]
    content[info.begin] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    native = opened(folder)
    native.tensor(f"{LINEAR}.zero_point")
    with pytest.raises(CheckpointError, match=f"{LINEAR}.zero_point"):
        native.check_read()


def test_the_content_hash_is_that_of_the_weights(folder: Path) -> None:
    before = opened(folder).content_hash
    assert opened(folder).content_hash == before
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LINEAR}.zero_point"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder, {"recipe": {"bits": 3}})
    assert opened(folder).content_hash != before


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 4}, LINEAR),
        ({"group_size": 64}, LINEAR),
        ({"modules_to_not_convert": ["lm_head", LINEAR]}, LINEAR),
        ({"quant_method": "gptq"}, "native format"),
    ],
)
def test_a_configuration_that_does_not_fit_the_tensors_is_refused(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=said):
        opened(folder)


def test_a_folder_of_two_checkpoints_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "rilq.json").read_text())
    del manifest["tensors"]["model.norm.weight"]
    (folder / "rilq.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="model.norm.weight"):
        opened(folder)
    (folder / "rilq.json").unlink()
    with pytest.raises(CheckpointError, match="rilq.json"):
        opened(folder)
