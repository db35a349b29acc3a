"""Exports to formats with integer zero-points: read by their layout alone, adapted by PEFT."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import rilq  # noqa: F401  (teaches transformers the native format)

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Run = Callable[..., Any]

INTEGER = ("--zero-point", "integer")
TRAINED = ("--steps", 20, "--val-every", 20, "--batch-size", 8)
KEEP = (*INTEGER, "--keep-adapter", "--rank", 16, "--lr", "1e-2", *TRAINED)
KINDS = ("gptq", "compressed-tensors")

CASES: dict[str, tuple[str, tuple[object, ...]]] = {
    "llama": ("llama", ()),
    "llama, 3 bits, some linears kept": (
        "llama",
        ("--bits", 3, "--skip", "v_proj", "--skip", "1.mlp.*"),
    ),
    "qwen2, biases": ("qwen2", ()),
    "qwen3, embedding packed": ("qwen3", ("--embed-bits", 8)),
    "gemma3": ("gemma3_text", ()),
}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


def column_codes(words: Tensor, bits: int, count: int) -> np.ndarray:
    """Codes `[count, n]` that the columns of int32 `[words, n]` hold, the lowest bits first."""
    found = np.empty((count, words.shape[1]), np.int64)
    unsigned = words.numpy().view(np.uint32).astype(np.uint64)
    pairs = np.vstack([unsigned, np.zeros_like(unsigned[:1])])  # a code may straddle two words
    for i in range(count):
        word, shift = divmod(bits * i, 32)
        both = pairs[word] | pairs[word + 1] << np.uint64(32)
        found[i] = both >> np.uint64(shift) & np.uint64(2**bits - 1)
    return found


def gptq_weight(tensors: dict[str, Tensor], name: str, config: dict[str, Any]) -> Tensor:
    """`[out, in]` float32, as the format's second version is defined."""
    bits, (groups, rows) = config["bits"], tensors[f"{name}.scales"].shape
    group = tensors[f"{name}.g_idx"].long()
    assert group.tolist() == [i // config["group_size"] for i in range(len(group))]
    codes = column_codes(tensors[f"{name}.qweight"], bits, len(group))
    zeros = column_codes(tensors[f"{name}.qzeros"].T.contiguous(), bits, rows).T
    assert zeros.shape == (groups, rows)
    scales = tensors[f"{name}.scales"].numpy().astype(np.float64)
    return torch.from_numpy((scales[group] * (codes - zeros[group])).T).float()


def compressed_weight(tensors: dict[str, Tensor], name: str, config: dict[str, Any]) -> Tensor:
    """`[out, in]` float32; codes and zero-points are signed, and stored with an offset."""
    weights = config["config_groups"]["group_0"]["weights"]
    bits, offset = weights["num_bits"], 2 ** (weights["num_bits"] - 1)
    rows, width = tensors[f"{name}.weight_shape"].tolist()
    words = tensors[f"{name}.weight_packed"].T.contiguous()
    codes = column_codes(words, bits, width).T - offset
    zeros = column_codes(tensors[f"{name}.weight_zero_point"], bits, rows) - offset
    scales = tensors[f"{name}.weight_scale"].numpy().astype(np.float64)
    spread = [np.repeat(part, weights["group_size"], axis=1) for part in (zeros, scales)]
    return torch.from_numpy(spread[1] * (codes - spread[0])).float()


READERS = {
    "gptq": ("qweight", ("qzeros", "scales", "g_idx"), gptq_weight),
    "compressed-tensors": (
        "weight_packed",
        ("weight_scale", "weight_zero_point", "weight_shape"),
        compressed_weight,
    ),
}


def dense_model(folder: Path, kind: str) -> Any:
    """transformers' float model with the weights that the export stands for, its adapter apart."""
    packed, others, weight_of = READERS[kind]
    tensors = tensors_of(folder)
    config = AutoConfig.from_pretrained(folder)
    quantization = config.quantization_config
    del config.quantization_config
    dense = {}
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        if part == packed:
            dense[f"{module}.weight"] = weight_of(tensors, module, quantization)
        elif part not in others:
            dense[name] = value.float()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dense, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied in Gemma
    model.tie_weights()
    return model.eval()


def logits(model: Any) -> Tensor:
    rows = torch.arange(96).view(4, 24) * 7 % 320
    with torch.no_grad():
        return model(rows).logits  # type: ignore[no-any-return]


def native_logits(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("case", CASES)
def test_base_and_peft_adapter_compute_what_the_merged_checkpoint_does(
    case: str, native: Run, export: Run, run_cli: Run, tmp_path: Path
) -> None:
    model_type, options = CASES[case]
    folder = native(model_type, {}, *KEEP, *options)
    ended = export(folder, tmp_path, *KINDS, more=("--json",))
    assert ended.code == 0, ended.err
    expected = native_logits(folder)
    for told in json.loads(ended.out)["exports"]:
        out = tmp_path / told["kind"]
        base = dense_model(out, told["kind"])
        alone = logits(base)
        found = logits(PeftModel.from_pretrained(base, out / "adapter"))
        assert (found - expected).abs().max() < 0.03 * expected.std()
        assert (alone - expected).abs().max() > 5 * (found - expected).abs().max()
        assert told["logit_difference"]["largest"] < told["bound"]
        assert run_cli("verify", out).code == 0


def test_gptq_is_written_as_its_second_version(native: Run, export: Run, tmp_path: Path) -> None:
    folder = native("llama", {}, *KEEP)
    assert export(folder, tmp_path / "out", "gptq").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": 2,
        "group_size": 32,
        "desc_act": False,
        "sym": False,
        "lm_head": False,
    }
    tensors, name = tensors_of(tmp_path / "out"), "model.layers.0.mlp.down_proj"
    layout = {
        part: (t.dtype, tuple(t.shape))
        for key, t in tensors.items()
        if key.rpartition(".")[0] == name
        for part in [key.rpartition(".")[2]]
    }
    assert layout == {  # in_features 128, out_features 64
        "qweight": (torch.int32, (8, 64)),
        "qzeros": (torch.int32, (4, 4)),
        "scales": (torch.float16, (4, 64)),
        "g_idx": (torch.int32, (128,)),
    }


def test_compressed_tensors_names_its_format_and_what_is_not_packed(
    native: Run, export: Run, tmp_path: Path
) -> None:
    folder = native("llama", {}, *KEEP, "--skip", "0.self_attn.v_proj")
    assert export(folder, tmp_path / "out", "compressed-tensors").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized" and config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head", "model.layers.0.self_attn.v_proj"]
    assert config["config_groups"]["group_0"] == {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 2,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": 32,
            "dynamic": False,
        },
    }
    tensors, name = tensors_of(tmp_path / "out"), "model.layers.0.mlp.down_proj"
    assert tensors[f"{name}.weight_packed"].shape == (64, 8)
    assert tensors[f"{name}.weight_zero_point"].shape == (4, 4)
    assert tensors[f"{name}.weight_shape"].tolist() == [64, 128]


def test_a_base_that_nothing_was_merged_into_needs_no_kept_one(
    native: Run, export: Run, tmp_path: Path
) -> None:
    lora = ("--adapter", "lora", "--rank", 4, "--lr", "1e-2", *TRAINED)
    folder = native("llama", {}, *INTEGER, "--train", "scales", *TRAINED)
    assert export(folder, tmp_path / "scales", "gptq").code == 0
    assert not (tmp_path / "scales" / "adapter").exists()
    found = logits(dense_model(tmp_path / "scales", "gptq"))
    torch.testing.assert_close(found, native_logits(folder), rtol=0, atol=2e-3)
    folder = native("llama", {}, *INTEGER, *lora)
    assert export(folder, tmp_path / "lora", "gptq").code == 0
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        copied, own = (place / "adapter" / part for place in (tmp_path / "lora", folder))
        assert copied.read_bytes() == own.read_bytes()


REFUSED: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "real": ((), ("--zero-point integer --keep-adapter", "--to dense")),
    "merged": (
        (*INTEGER, "--rank", 4, *TRAINED),
        ("real numbers", "--zero-point integer --keep-adapter"),
    ),
    "minima trained": (
        (*INTEGER, "--train", "all", *TRAINED),
        ("--zero-point integer --keep-adapter",),
    ),
    "mixed bits": (
        (*KEEP, "--bits-for", "1.mlp.up_proj=4"),
        ("4 bits in model.layers.1.mlp.up_proj", "--to dense"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_round_zero_points_is_refused_with_the_options_that_help(
    case: str, native: Run, export: Run, tmp_path: Path
) -> None:
    options, said = REFUSED[case]
    for kind in KINDS:
        ended = export(native("llama", {}, *options), tmp_path / "out", kind)
        assert ended.code == 2 and "Traceback" not in ended.err
        assert all(word in ended.err for word in (*said, f"--to {kind}")), ended.err
        assert list(tmp_path.iterdir()) == []


def test_convert_refuses_such_an_export_before_it_begins(
    tmp_path: Path, run_cli: Run, arguments: Run
) -> None:
    ended = run_cli(*arguments(tmp_path, "--export", "gptq"))
    assert ended.code == 2 and "--zero-point integer --keep-adapter" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_convert_writes_it_where_the_options_are_right(
    tmp_path: Path, run_cli: Run, arguments: Run
) -> None:
    kept = (*INTEGER, "--keep-adapter", "--quantizer", "rtn", "--export", "gptq")
    ended = run_cli(*arguments(tmp_path, *kept))
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-gptq"]


def test_outputs_that_fill_no_whole_words_are_refused_by_gptq_alone(
    native: Run, export: Run, tmp_path: Path
) -> None:
    heads = {"num_key_value_heads": 1, "num_attention_heads": 8, "head_dim": 8}
    folder = native("llama", heads, *KEEP)
    ended = export(folder, tmp_path / "gptq", "gptq")
    assert ended.code == 2 and "k_proj" in ended.err and "--to compressed-tensors" in ended.err
    out = tmp_path / "compressed"
    assert export(folder, out, "compressed-tensors").code == 0
    model = PeftModel.from_pretrained(dense_model(out, "compressed-tensors"), out / "adapter")
    expected = native_logits(folder)
    assert (logits(model) - expected).abs().max() < 0.03 * expected.std()


@pytest.mark.parametrize("name", ["zero_points.safetensors", "adapter/adapter_model.safetensors"])
def test_a_damaged_base_is_refused_by_the_files_name(
    name: str, native: Run, export: Run, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(native("llama", {}, *KEEP), tmp_path / "copy"))
    path = folder / "integer-base" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    for damage in ("flipped", "missing"):
        if damage == "missing":
            path.unlink()
        ended = export(folder, tmp_path / "out", "gptq")
        assert ended.code == 2 and path.name in ended.err and "again" in ended.err
        assert sorted(each.name for each in tmp_path.iterdir()) == ["copy"]
