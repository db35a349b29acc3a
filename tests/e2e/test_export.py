"""`rilq export`, from the command to what transformers computes with the export."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rilq  # noqa: F401  (teaches transformers the native format)

Run = Callable[..., Any]

# Model type, overrides of its configuration, and options of the conversion.
CASES: dict[str, tuple[str, dict[str, Any], tuple[object, ...]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}, ()),
    "llama, embedding and head packed": ("llama", {}, ("--embed-bits", 8, "--head-bits", 4)),
    "llama, 4 bits, one linear kept": ("llama", {}, ("--bits", 4, "--skip", "0.mlp.down_proj")),
    "qwen2, biases": ("qwen2", {}, ()),
    "qwen3": ("qwen3", {}, ()),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 16}, ()),
    "gemma3, packed": (
        "gemma3_text",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        ("--embed-bits", 8, "--head-bits", 8),
    ),
    "phi3, 8 bits": ("phi3", {}, ("--bits", 8)),
}


def load(native: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32)


def load_export(folder: Path) -> Any:
    """As users do, in the folder's own dtype; then in float32, so that only weights differ."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    return torch.nn.Module.float(model)  # a quantized model's own method refuses


def logits(model: Any) -> Tensor:
    rows = torch.arange(96).view(4, 24) * 7 % 320
    with torch.no_grad():
        return model(rows).logits  # type: ignore[no-any-return]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


# -- what the runtimes compute ---------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_dense_and_metal_load_in_transformers_and_compute_what_the_native_does(
    case: str, native: Run, export: Run, run_cli: Run, tmp_path: Path
) -> None:
    model_type, overrides, options = CASES[case]
    folder = native(model_type, overrides, *options)
    ended = export(folder, tmp_path / "out", "dense", "metal", more=("--json",))
    assert ended.code == 0, ended.err
    expected = logits(load(folder))
    told = json.loads(ended.out)["exports"]
    assert [each["kind"] for each in told] == ["dense", "metal"]
    for each in told:
        out = tmp_path / "out" / each["kind"]
        assert Path(each["output"]) == out
        model = load_export(out)
        assert not any("rilq" in type(module).__module__ for module in model.modules())
        found = (logits(model) - expected).abs().max().item()
        spread = expected.std().item()
        assert 0 < found < 0.02 * spread
        # Of another text, but of the same size.
        assert 0 < each["logit_difference"]["largest"] < 0.02 * spread
        assert each["logit_difference"]["largest"] < each["bound"]
        assert run_cli("verify", out).code == 0


def test_the_exports_carry_what_belongs_to_the_model(
    native: Run, export: Run, tmp_path: Path
) -> None:
    folder = native(*CASES["qwen3"][:2])
    assert export(folder, tmp_path / "out", "dense", "mlx", "metal", "vllm").code == 0
    manifest = json.loads((folder / "rilq.json").read_text())
    for out in (tmp_path / "out").iterdir():
        for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
            assert (out / name).read_bytes() == (folder / name).read_bytes()
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert (
            tokenizer("the cat").input_ids
            == AutoTokenizer.from_pretrained(folder)("the cat").input_ids
        )
        written = json.loads((out / "rilq.json").read_text())
        assert written["recipe"] == manifest["recipe"] and written["source"] == manifest["source"]
        assert written["export"]["kind"] == out.name
        assert written["export"]["logit_difference"]["largest"] <= written["export"]["bound"]


def test_bfloat16_is_rounded_more_and_declared(native: Run, export: Run, tmp_path: Path) -> None:
    folder = native(*CASES["qwen2, biases"][:2])
    apart = {}
    for dtype in ("fp16", "bf16"):
        ended = export(
            folder, tmp_path / dtype, "dense", more=("--dtype", dtype, "--json", "--quiet")
        )
        assert ended.code == 0, ended.err
        apart[dtype] = json.loads(ended.out)["exports"][0]["logit_difference"]["largest"]
    config = AutoConfig.from_pretrained(tmp_path / "bf16")
    assert config.dtype == torch.bfloat16
    assert {t.dtype for t in tensors_of(tmp_path / "bf16").values()} == {torch.bfloat16}
    assert 3 < apart["bf16"] / apart["fp16"] < 20  # 3 bits


# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_lora_beside_the_base_is_in_the_dense_export_and_refused_elsewhere(
    native: Run, export: Run, tmp_path: Path
) -> None:
    folder = native(
        "llama",
        {},
        "--rank",
        4,
        "--adapter",
        "lora",
        "--steps",
        24,
        "--lr",
        "3e-3",
        "--val-every",
        4,
    )
    assert export(folder, tmp_path / "dense", "dense").code == 0
    expected = logits(PeftModel.from_pretrained(load(folder), folder / "adapter"))
    found = logits(load_export(tmp_path / "dense"))
    assert (found - expected).abs().max() < 0.02 * expected.std()
    assert (found - logits(load(folder))).abs().max() > 0.02 * expected.std(), "the LoRA is tiny"
    for kind in ("mlx", "metal", "vllm"):
        ended = export(folder, tmp_path / kind, kind)
        assert ended.code == 2 and "--to dense" in ended.err and "--adapter pooled" in ended.err
    without = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.rmtree(without / "adapter")
    ended = export(without, tmp_path / "base", "dense")
    assert ended.code == 2 and "adapter/adapter_model.safetensors" in ended.err


# -- what vLLM is told -----------------------------------------------------------------------------


def test_vllm_export_has_the_fields_and_tensors_of_hummings_schema(
    native: Run, export: Run, tmp_path: Path
) -> None:
    """Names, dtypes and shapes as `HummingWeightSchema` of humming-kernels 0.1.19 asks for them."""
    kept = ("--skip", "0.self_attn.[qkv]_proj", "--bits-for", "1.mlp.gate_proj=3")
    folder = native("llama", {}, *kept, "--bits-for", "1.mlp.up_proj=3", "--head-bits", 4)
    assert export(folder, tmp_path / "vllm", "vllm").code == 0
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert config["dtype"] == "float16"
    fused = "model.layers.1.mlp.gate_up_proj"
    assert config["quantization_config"] == {
        "quant_method": "humming",
        "b_dtype": "uint2",
        "weight_scale_group_size": 32,
        "has_zero_point": True,
        "is_fp_zero_point": True,
        "ignore": ["lm_head", "model.layers.0.self_attn.qkv_proj"],
        "dynamic": {f"+:{re.escape(fused)}$": {"b_dtype": "uint3"}},
    }
    tensors, stored = tensors_of(tmp_path / "vllm"), tensors_of(folder)
    for name, bits in (("model.layers.1.mlp.up_proj", 3), ("model.layers.1.mlp.down_proj", 2)):
        rows, width = (128, 64) if bits == 3 else (64, 128)
        words, scale, zero = (
            tensors[f"{name}.{p}"] for p in ("weight", "weight_scale", "zero_point")
        )
        assert (words.dtype, words.shape) == (torch.int32, (rows, width * bits // 32))
        assert scale.dtype == zero.dtype == torch.float16
        assert scale.shape == zero.shape == (rows, width // 32)
        for part in ("weight", "weight_scale", "zero_point"):
            assert torch.equal(tensors[f"{name}.{part}"], stored[f"{name}.{part}"])
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float16
    assert tensors["lm_head.weight"].dtype == torch.float16, "vLLM packs no head"


# -- what is refused -------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, tuple[object, ...], str, tuple[str, ...]]] = {
    "3 bits": ("llama", ("--bits", 3), "metal", ("3 bits", "2, 4, 8", "--to mlx")),
    "mixed bits": (
        "llama",
        ("--bits-for", "1.mlp.up_proj=4"),
        "metal",
        ("4 bits in model.layers.1.mlp.up_proj", "--to mlx"),
    ),
    "parts of a fused linear": (
        "llama",
        ("--bits-for", "1.mlp.up_proj=4"),
        "vllm",
        ("model.layers.1.mlp.gate_up_proj", "--to mlx", "--bits-for"),
    ),
    "float16 Gemma": ("gemma2", (), "vllm", ("gemma2", "--dtype bf16")),
    "layers that mlx-lm does not know": (
        "gemma3_text",
        (),
        "mlx",
        ("layer_types", "none", "--to dense"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_runtime_cannot_hold_is_refused_with_the_remedy(
    case: str, native: Run, export: Run, tmp_path: Path
) -> None:
    model_type, options, kind, said = REFUSED[case]
    ended = export(native(model_type, {}, *options), tmp_path / "out", "dense", kind)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert all(word in ended.err for word in said), ended.err
    assert not (tmp_path / "out").exists(), "refused before any work"


def test_gemma_goes_to_vllm_in_bfloat16(native: Run, export: Run, tmp_path: Path) -> None:
    folder = native(*CASES["gemma2"][:2])
    assert export(folder, tmp_path / "out", "vllm", more=("--dtype", "bf16")).code == 0
    tensors = tensors_of(tmp_path / "out")
    assert {t.dtype for t in tensors.values()} == {torch.int32, torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "onnx"), ("'onnx'", "dense, gguf, mlx")),
        (("--to", "dense", "--dtype", "fp8"), ("--dtype fp8", "bf16")),
        (("--to", "dense", "--text", "missing.txt"), ("missing.txt",)),
    ],
)
def test_bad_options_are_one_message(
    arguments: tuple[str, ...], said: tuple[str, ...], native: Run, run_cli: Run, tmp_path: Path
) -> None:
    folder = native(*CASES["qwen3"][:2])
    ended = run_cli("export", folder, "-o", tmp_path / "out", "--device", "cpu", *arguments)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert all(word in ended.err for word in said), ended.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_rilq_did_not_write_is_refused(
    tiny_llama: Path, export: Run, tmp_path: Path
) -> None:
    ended = export(tiny_llama, tmp_path / "out", "dense")
    assert ended.code == 2 and "native format" in ended.err and "rilq convert" in ended.err


def test_an_output_that_is_in_use_is_refused(native: Run, export: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ended = export(native(*CASES["qwen3"][:2]), tmp_path, "dense")
    assert ended.code == 2 and "not empty" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_value_too_large_for_float16_is_named(
    make_model: Run, run_cli: Run, export: Run, calib: Path, tmp_path: Path
) -> None:
    source = make_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert = ("convert", source, "--dataset", calib, "--group-size", 32, "--nsamples", 8)
    options = ("--seqlen", 24, "--quantizer", "rtn", "--rank", 0, "-o", tmp_path / "native")
    assert run_cli(*convert, *options, "--device", "cpu", "--no-report").code == 0
    ended = export(tmp_path / "native", tmp_path / "out", "dense")
    assert ended.code == 2 and "model.norm.weight" in ended.err and "--dtype bf16" in ended.err
    assert not (tmp_path / "out").exists()
    assert (
        export(tmp_path / "native", tmp_path / "out", "dense", more=("--dtype", "bf16")).code == 0
    )


# -- damage ----------------------------------------------------------------------------------------


def wrong_minimum() -> None:
    """Called in a child: a mistake in what is written, as if the sign were another."""
    from rilq.formats.export import affine, metal

    right = affine.affine_entries

    def wrong(*arguments: Any) -> Any:
        entries = right(*arguments)
        name = next(name for name in entries if name.endswith("qbiases"))
        make = entries[name].make
        entries[name] = type(entries[name])(entries[name].layout, lambda: -make())
        return entries

    metal.affine_entries = wrong


def test_an_export_that_computes_something_else_is_refused_and_removed(
    native: Run, run_cli: Run, tmp_path: Path
) -> None:
    folder = native(*CASES["qwen3"][:2])
    words = ("export", folder, "--to", "metal", "-o", tmp_path / "out", "--device", "cpu")
    ended = run_cli(*words, first=wrong_minimum)
    assert ended.code == 1 and "Traceback" not in ended.err
    assert "refused" in ended.err and "expected at most" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_native_checkpoint_is_refused_by_the_tensors_name(
    native: Run, export: Run, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(native(*CASES["qwen3"][:2]), tmp_path / "copy"))
    shard = next(p for p in sorted(folder.glob("*.safetensors")))
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    ended = export(folder, tmp_path / "out", "vllm")
    assert ended.code == 2 and "rilq.json" in ended.err
    assert any(name in ended.err for name in load_file(shard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def stop_while_comparing() -> None:
    """Called in a child: SIGTERM once the export is written."""
    from rilq.evaluation.readback import ReadBack

    ReadBack.compare = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[method-assign]


def test_a_stopped_export_leaves_nothing(native: Run, run_cli: Run, tmp_path: Path) -> None:
    folder = native(*CASES["qwen3"][:2])
    words = ("export", folder, "--to", "dense", "-o", tmp_path / "out", "--device", "cpu")
    ended = run_cli(*words, first=stop_while_comparing)
    assert ended.code == 75 and "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


# -- again, and with convert -----------------------------------------------------------------------


def test_the_same_export_again_is_found_done_and_another_is_refused(
    native: Run, export: Run, hashes: Run, tmp_path: Path
) -> None:
    folder = native(*CASES["qwen3"][:2])
    assert export(folder, tmp_path / "out", "mlx").code == 0
    before = hashes(tmp_path)
    again = export(folder, tmp_path / "out", "mlx")
    assert again.code == 0 and "already there" in again.out
    assert hashes(tmp_path) == before
    other = export(folder, tmp_path / "out", "mlx", more=("--dtype", "bf16"))
    assert other.code == 2 and "not empty" in other.err


def test_two_exports_have_the_same_bytes_and_tensors_as_wide_as_the_shards_allow(
    native: Run, export: Run, hashes: Run, tmp_path: Path
) -> None:
    folder = native(*CASES["qwen3"][:2])
    for name in "ab":
        ended = export(folder, tmp_path / name, "dense", more=("--max-shard-size", "50kB"))
        assert ended.code == 0, ended.err
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    assert (logits(load_export(tmp_path / "a")) - logits(load(folder))).abs().max() < 0.01


def test_convert_writes_exports_beside_its_output(
    tmp_path: Path, run_cli: Run, arguments: Run
) -> None:
    words = arguments(tmp_path, "--export", "dense", "--export", "mlx", "--json")
    ended = run_cli(*words)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)["exports"]
    assert [Path(each["output"]).name for each in told] == ["out-dense", "out-mlx"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-dense", "out-mlx"]
    expected = logits(load(tmp_path / "out"))
    found = logits(load_export(tmp_path / "out-dense"))
    assert (found - expected).abs().max() < 0.02 * expected.std()
    again = run_cli(*words)
    assert again.code == 0, again.err
    assert all(each["already_done"] for each in json.loads(again.out)["exports"])


def test_convert_refuses_an_export_before_it_begins(
    tmp_path: Path, run_cli: Run, arguments: Run
) -> None:
    ended = run_cli(*arguments(tmp_path, "--bits", 3, "--export", "metal"))
    assert ended.code == 2 and "3 bits" in ended.err
    assert list(tmp_path.iterdir()) == []
