"""GGUF files in llama.cpp: what it computes, how it cuts text, and whether it chats.

Opt-in (`make test-runtimes`). RILQ_LLAMA_CPP_PYTHON names an interpreter that has
llama-cpp-python; without it an environment is made, whose build takes about 18 minutes on 2 cores.
What ran, and with what result, is in docs/runtimes.md.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from accuracy_run import python_of, run
from peft import PeftModel
from tokenizer_examples import byte_level, sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer

import rilq  # noqa: F401  (teaches transformers the native format)
from rilq.formats.export.gguf_pretokenizer import DIFFICULT, KNOWN
from rilq.formats.export.gguf_tokenizer import add_vocabulary, read_vocabulary
from rilq.progress import SilentReporter

pytestmark = pytest.mark.slow_runtime

SCRIPTS = Path(__file__).resolve().parents[1] / "runtimes"
TEXT = "the small cat ran home, it's 1234 trees.\n\n  Under the BIRDS'll  sing!"

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# With 8 bits all matrices are float16, and nothing but llama.cpp's own float16 is between them:
# names, rotary order, windows, norms and caps are seen. Blocks of Q4_1 and Q2_K it multiplies with
# activations that it rounds to 8 bits.
CASES: dict[str, tuple[str, dict[str, Any], tuple[object, ...], float]] = {
    "llama, tied, stretched": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
        ("--bits", 8),
        0.02,
    ),
    "mistral": ("mistral", {"sliding_window": None}, ("--bits", 8), 0.02),
    "qwen2": ("qwen2", {}, ("--bits", 8), 0.02),
    "qwen3": ("qwen3", {}, ("--bits", 8), 0.02),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 16}, ("--bits", 8), 0.02),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        ("--bits", 8),
        0.02,
    ),
    "phi3": ("phi3", {}, ("--bits", 8), 0.02),
    "olmo2": ("olmo2", {}, ("--bits", 8), 0.02),
    "olmo2, tied": ("olmo2", {"tie_word_embeddings": True}, ("--bits", 8), 0.02),
    "llama, q4_1": ("llama", {}, (), 0.15),
    "qwen2, q4_1, packed embedding": ("qwen2", {}, ("--embed-bits", 4), 0.15),
    "gemma3, q4_1, every number of bits": (
        "gemma3_text",
        {"query_pre_attn_scalar": 16},
        ("--bits-for", "0.mlp.*=3", "--bits-for", "1.self_attn.*=4", "--skip", "1.mlp.gate_proj"),
        0.15,
    ),
}
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.fixture(scope="session")
def python() -> Path:
    """An interpreter with llama-cpp-python."""
    if given := os.environ.get("RILQ_LLAMA_CPP_PYTHON"):
        return Path(given)
    homes = Path(os.environ.get("RILQ_ENVS", "~/.cache/rilq-benchmarks")).expanduser()
    homes.mkdir(parents=True, exist_ok=True)
    # What llama.cpp's build finds out about the processor is not always true: AMX may be named and
    # not allowed. Nor does pip's cache know for which processor a wheel was built.
    portable = ("--no-cache-dir", "--config-settings=cmake.define.GGML_NATIVE=OFF")
    wanted = (*portable, "llama-cpp-python==0.3.36", "numpy==2.4.6")
    return python_of(homes / "llama-cpp-python", wanted)


def rows() -> torch.Tensor:
    return torch.arange(128).view(4, 32) * 7 % 320


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(rows()).logits.numpy()  # type: ignore[no-any-return]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def in_llama_cpp(
    python: Path, out: Path, scratch: Path, *more: object
) -> tuple[np.ndarray, dict[str, Any]]:
    np.save(scratch / "rows.npy", rows().numpy())
    script = SCRIPTS / "llama_cpp_logits.py"
    command = [python, script, out / "model.gguf", scratch / "rows.npy", scratch / "logits.npy"]
    said = json.loads(run([*command, TEXT, *more], threads=1).output)
    return np.load(scratch / "logits.npy"), said


@pytest.mark.parametrize("name", [*KNOWN, "sentencepiece"])
def test_llama_cpp_cuts_a_difficult_text_as_each_tokenizer_that_we_name(
    name: str, text: str, python: Path, tmp_path: Path
) -> None:
    tokenizer = sentencepiece(text) if name not in KNOWN else byte_level(text, *KNOWN[name])
    tokenizer.save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, len(tokenizer), SilentReporter())
    assert vocabulary.pre == (name if name in KNOWN else "default")
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    add_vocabulary(writer, vocabulary, tmp_path)
    writer.add_vocab_size(len(tokenizer))
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    texts = [DIFFICULT, TEXT, text[:500], "   ", "", " a"]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = SCRIPTS / "llama_cpp_tokens.py"
    files = (tmp_path / "vocabulary.gguf", tmp_path / "texts.json")
    found = json.loads(run([python, script, *files], threads=1).output)
    assert found == [tokenizer(each).input_ids for each in texts]


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_native_does_and_cuts_text_alike(
    case: str,
    native: Callable[..., Path],
    export: Callable[..., Any],
    python: Path,
    tmp_path: Path,
) -> None:
    model_type, overrides, options, bound = CASES[case]
    folder = native(model_type, overrides, *options)
    assert export(folder, tmp_path / "out", "gguf").code == 0
    expected = logits(load(folder))
    found, said = in_llama_cpp(python, tmp_path / "out", tmp_path)
    apart = np.abs(found - expected).max()
    print(f"{case}: {apart:.2g} of a spread of {expected.std():.2g}; {said}")
    assert apart < bound * expected.std()
    assert said["tokens"] == AutoTokenizer.from_pretrained(folder)(TEXT).input_ids


def test_llama_cpp_generates_the_same_text_and_chats_by_the_template(
    native: Callable[..., Path], export: Callable[..., Any], python: Path, tmp_path: Path
) -> None:
    folder = native("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}, "--bits", 8)
    assert export(folder, tmp_path / "out", "gguf").code == 0
    _, said = in_llama_cpp(python, tmp_path / "out", tmp_path)
    generated = load(folder).generate(
        rows()[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    assert said["greedy"] == generated[0, 32:].tolist()
    message = [{"role": "user", "content": "the cat"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert said["prompt"] == tokenizer.apply_chat_template(message, tokenize=False)
    assert said["answer"], "it says nothing"


def test_llama_cpp_computes_q2_k(
    native: Callable[..., Path], export: Callable[..., Any], python: Path, tmp_path: Path
) -> None:
    folder = native("llama", WIDE, "--group-size", 128)
    assert export(folder, tmp_path / "out", "gguf", more=("--gguf-type", "q2_k")).code == 0
    dense = logits(
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
        )
    )
    found, _ = in_llama_cpp(python, tmp_path / "out", tmp_path)
    native_ = logits(load(folder))
    print(
        f"q2_k: {np.abs(found - dense).max():.2g} from its own weights, "
        f"{np.abs(dense - native_).max():.2g} of these from the native's; {native_.std():.2g}"
    )
    assert np.abs(found - dense).max() < 0.25 * dense.std()


# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_llama_cpp_adds_the_lora(
    native: Callable[..., Path], export: Callable[..., Any], python: Path, tmp_path: Path
) -> None:
    options = ("--rank", 8, "--adapter", "lora", "--steps", 80, "--lr", "1e-2", "--val-every", 8)
    folder = native("llama", {}, *options)
    assert export(folder, tmp_path / "out", "gguf").code == 0
    base = logits(load(folder))
    expected = logits(PeftModel.from_pretrained(load(folder), folder / "adapter"))
    found, _ = in_llama_cpp(python, tmp_path / "out", tmp_path, tmp_path / "out" / "adapter.gguf")
    print(
        f"base + LoRA: {np.abs(found - expected).max():.2g}, the LoRA itself "
        f"{np.abs(base - expected).max():.2g}, of a spread of {expected.std():.2g}"
    )
    assert np.abs(found - expected).max() < 0.15 * expected.std()
    assert np.abs(base - expected).max() > 0.5 * expected.std(), "the LoRA is tiny"
