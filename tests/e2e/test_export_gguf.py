"""`rilq export --to gguf`: what transformers and gguf read in the file, and what is refused."""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rilq  # noqa: F401  (teaches transformers the native format)
from rilq.formats.export import gguf as export_gguf
from rilq.formats.export.kind import ExportOptions
from rilq.formats.export.source import NativeCheckpoint
from rilq.progress import SilentReporter

Run = Callable[..., Any]

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
# transformers takes from a GGUF file no head_dim for Qwen3, and no query_pre_attn_scalar,
# layer_types or caps for Gemma: those must be its defaults. It has no OLMo 2, which is read back
# by the command alone, and no rope_freqs; llama.cpp has both (test_runtimes.py).
CASES: dict[str, tuple[str, dict[str, Any], tuple[object, ...]]] = {
    "llama, tied, every number of bits": (
        "llama",
        {"tie_word_embeddings": True},
        (
            *("--bits-for", "0.mlp.*=3", "--bits-for", "1.self_attn.*=4", "--bits-for"),
            *("1.mlp.up_proj=8", "--skip", "1.mlp.gate_proj", "--embed-bits", 8, "--head-bits", 8),
        ),
    ),
    "qwen2, packed embedding": ("qwen2", {}, ("--embed-bits", 4)),
    "qwen3": ("qwen3", {"head_dim": 128}, ()),
    "gemma2": ("gemma2", {"head_dim": 256, "sliding_window": 8}, ()),
    "gemma3": ("gemma3_text", {"head_dim": 256, "sliding_window": 8}, ()),
    "phi3": ("phi3", {}, ()),
}


def logits(model: Any) -> torch.Tensor:
    rows = torch.arange(96).view(4, 24) * 7 % 320
    with torch.no_grad():
        return model(rows).logits  # type: ignore[no-any-return]


def native_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def gguf_logits(folder: Path) -> torch.Tensor:
    return logits(
        AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", dtype=torch.float32, trust_remote_code=False
        )
    )


def value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_from_the_gguf_file_what_the_native_does(
    case: str, native: Run, export: Run, run_cli: Run, tmp_path: Path
) -> None:
    model_type, overrides, options = CASES[case]
    folder = native(model_type, overrides, *options)
    ended = export(folder, tmp_path / "out", "gguf", more=("--json",))
    assert ended.code == 0, ended.err
    expected, told = native_logits(folder), json.loads(ended.out)["exports"][0]
    assert 0 < (gguf_logits(tmp_path / "out") - expected).abs().max() < 0.02 * expected.std()
    assert 0 < told["logit_difference"]["largest"] < 0.02 * expected.std()
    assert run_cli("verify", tmp_path / "out").code == 0


def test_q2_k_is_near_the_native_and_half_as_large_and_not_taken_for_q4_1(
    native: Run, export: Run, tmp_path: Path
) -> None:
    folder = native("llama", {**WIDE, "tie_word_embeddings": True})
    for kind in ("q4_1", "q2_k"):
        ended = export(folder, tmp_path / kind, "gguf", more=("--gguf-type", kind))
        assert ended.code == 0, ended.err
    expected = native_logits(folder)
    apart = (gguf_logits(tmp_path / "q2_k") - expected).abs()
    # Random weights in groups of 32, the hardest case: 0.53 and 0.094 were measured.
    assert apart.max() < 0.6 * expected.std() and apart.mean() < 0.11 * expected.std()
    sizes = {}
    for kind in ("q4_1", "q2_k"):
        reader = gguf.GGUFReader(tmp_path / kind / "model.gguf")
        linears = [t for t in reader.tensors if t.name.startswith("blk.") and len(t.shape) == 2]
        assert {t.tensor_type.name for t in linears} == {kind.upper()}
        sizes[kind] = 8 * sum(t.n_bytes for t in linears) / sum(t.n_elements for t in linears)
    assert sizes == {"q4_1": 5.0, "q2_k": 2.625}
    again = export(folder, tmp_path / "q2_k", "gguf", more=("--gguf-type", "q2_k", "--json"))
    assert json.loads(again.out)["exports"][0]["already_done"]
    other = export(folder, tmp_path / "q2_k", "gguf")
    assert other.code == 2 and str(tmp_path / "q2_k") in other.err


def test_q2_k_of_narrow_rows_is_refused_by_name_before_anything_is_written(
    native: Run, export: Run, tmp_path: Path
) -> None:
    folder = native("llama", {**WIDE, "intermediate_size": 384})
    ended = export(folder, tmp_path / "out", "gguf", more=("--gguf-type", "q2_k"))
    assert ended.code == 2 and not (tmp_path / "out").exists()
    assert "model.layers.0.mlp.down_proj.weight (rows of 384)" in ended.err
    assert "up_proj" not in ended.err and "--gguf-type q4_1" in ended.err


def test_the_file_says_what_llama_cpp_asks_for(native: Run, export: Run, tmp_path: Path) -> None:
    folder = native("qwen2", {}, "--embed-bits", 4)
    assert export(folder, tmp_path / "out", "gguf").code == 0
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    expected = {
        "general.architecture": "qwen2",
        "general.type": "model",
        "general.name": "source",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q4_1),
        "qwen2.block_count": 2,
        "qwen2.embedding_length": 64,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.key_length": 16,
        "qwen2.context_length": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text(),
    }
    assert {key: value(reader, key) for key in expected} == expected
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "Q4_1"
    assert types["output.weight"] == "F16"
    assert types["blk.0.attn_q.bias"] == types["output_norm.weight"] == "F32"


def test_a_gguf_reader_finds_the_tokenizer_again(
    native: Run, export: Run, tmp_path: Path, text: str
) -> None:
    folder = native("qwen2", {}, "--embed-bits", 4)
    assert export(folder, tmp_path / "out", "gguf").code == 0
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    sentence = text[:400] + " It's 2024:\n\n  x = 17;"
    assert theirs(sentence).input_ids == ours(sentence).input_ids
    assert theirs.chat_template == ours.chat_template


def test_a_lora_beside_the_base_becomes_a_second_file(
    native: Run, export: Run, tmp_path: Path
) -> None:
    options = ("--rank", 4, "--adapter", "lora", "--steps", 24, "--lr", "3e-3", "--val-every", 4)
    folder = native("llama", {}, *options)
    ended = export(folder, tmp_path / "out", "gguf", more=("--json",))
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)["exports"][0]["logit_difference"]
    assert told["largest"] < 0.02 * told["spread"], "the adapter is read back with the base"
    base = gguf_logits(tmp_path / "out")
    assert (base - native_logits(folder)).abs().max() < 0.02 * base.std(), "a LoRA is in the base"
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    expected = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
    }
    assert {key: value(reader, key) for key in expected} == expected
    found = {t.name: np.array(t.data) for t in reader.tensors}
    source = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(found) == len(source) == 2 * 2 * 7
    name = "base_model.model.model.layers.1.self_attn.{}_proj.lora_{}.weight"
    for linear in "qv":
        a, b = (source[name.format(linear, part)].float().numpy() for part in "AB")
        assert np.array_equal(found[f"blk.1.attn_{linear}.weight.lora_a"], a)
        stored = found[f"blk.1.attn_{linear}.weight.lora_b"]
        if linear == "q":  # 4 heads of 16: row 2 i + h of a head is row 8 h + i of transformers'
            stored = stored.reshape(4, 8, 2, 4).swapaxes(1, 2).reshape(64, 4)
        assert np.array_equal(stored, b)


@pytest.mark.parametrize("room", [4096, 60_000])  # ends in the metadata, and in the tensors
def test_a_full_volume_is_told_in_words(
    room: int, native: Run, in_child: Run, tmp_path: Path
) -> None:
    checkpoint = NativeCheckpoint.open(native("qwen2", {}, "--embed-bits", 4), SilentReporter())

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        export_gguf.write(checkpoint, tmp_path, ExportOptions(), SilentReporter())

    ended = in_child(write)
    assert ended.code == 2, ended.err
    assert f"{tmp_path}/model.gguf: cannot be written" in ended.err and "make room" in ended.err


def test_without_the_package_one_line_says_what_to_install(
    native: Run, run_cli: Run, tmp_path: Path
) -> None:
    folder = native("qwen2", {}, "--embed-bits", 4)

    def remove() -> None:
        sys.modules["gguf"] = None  # type: ignore[assignment]  # how Python marks what is not there

    out = ("-o", tmp_path / "out", "--device", "cpu")
    ended = run_cli("export", folder, "--to", "gguf", *out, first=remove)
    assert ended.code == 2 and "pip install 'rilq[gguf]'" in ended.err
