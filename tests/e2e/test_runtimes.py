"""Exports in the programs that they are for, each in an environment of its own.

Opt-in (`make test-runtimes`): environments are made from the network first, and take minutes and
gigabytes. What ran, and with what result, is in docs/runtimes.md.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import ENVIRONMENTS
from accuracy_run import python_of, run
from transformers import AutoModelForCausalLM

import rilq  # noqa: F401  (teaches transformers the native format)
from rilq.evaluation.loading import code

pytestmark = pytest.mark.slow_runtime

SCRIPTS = Path(__file__).resolve().parents[1] / "runtimes"
TORCH = "torch==2.13.0"
RUNTIMES = {
    "mlx": ENVIRONMENTS["mlx"],
    "humming": (TORCH, "numpy==2.4.6", "safetensors==0.8.0", "humming-kernels==0.1.19"),
    "peft": (
        TORCH,
        *("transformers==5.23.0", "peft==0.21.2", "optimum==2.3.0"),
        *("gptqmodel==7.6.0", "compressed-tensors==0.20.0"),
    ),
}

MLX: dict[str, tuple[str, dict[str, Any], tuple[object, ...]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}, ()),
    "llama, every number of bits": (
        "llama",
        {},
        (
            *("--bits-for", "0.mlp.*=3", "--bits-for", "1.self_attn.*=4"),
            *("--bits-for", "1.mlp.up_proj=8", "--skip", "1.mlp.gate_proj"),
            *("--embed-bits", 4, "--head-bits", 8),
        ),
    ),
    "llama, stretched": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 50000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        (),
    ),
    "mistral": ("mistral", {"sliding_window": None}, ()),
    "qwen2": ("qwen2", {}, ()),
    "qwen3, tied and packed": (
        "qwen3",
        {"tie_word_embeddings": True},
        ("--embed-bits", 8, "--head-bits", 8),
    ),
    "gemma2": ("gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 16}, ()),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        (),
    ),
    "phi3": ("phi3", {}, ()),
    "olmo2": ("olmo2", {}, ()),
}


@pytest.fixture(scope="session")
def python() -> Callable[[str], Path]:
    """`python(name)`: the interpreter of an environment, which is made on first use."""
    homes = Path(os.environ.get("RILQ_ENVS", "~/.cache/rilq-benchmarks")).expanduser()

    def make(name: str) -> Path:
        homes.mkdir(parents=True, exist_ok=True)
        return python_of(homes / name, RUNTIMES[name])

    return make


def rows() -> torch.Tensor:
    return torch.arange(128).view(4, 32) * 7 % 320


def native_logits(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(rows()).logits.numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", MLX)
def test_mlx_lm_computes_what_the_native_checkpoint_does(
    case: str,
    native: Callable[..., Path],
    export: Callable[..., Any],
    python: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model_type, overrides, options = MLX[case]
    folder = native(model_type, overrides, *options)
    assert export(folder, tmp_path / "mlx", "mlx").code == 0
    np.save(tmp_path / "rows.npy", rows().numpy())
    script = SCRIPTS / "mlx_logits.py"
    said = run(
        [python("mlx"), script, tmp_path / "mlx", tmp_path / "rows.npy", tmp_path / "logits.npy"],
        threads=1,
    ).output
    expected, found = native_logits(folder), np.load(tmp_path / "logits.npy")
    apart = np.abs(found - expected).max()
    print(f"{case}: {apart:.2g} of a spread of {expected.std():.2g}; {said.strip()}")
    assert apart < 0.02 * expected.std()


def test_humming_reads_the_configuration_and_asks_for_the_tensors_that_are_there(
    native: Callable[..., Path],
    export: Callable[..., Any],
    python: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Its published schema, without a GPU: what it is told, and names, dtypes, shapes."""
    kept = ("--skip", "0.self_attn.[qkv]_proj", "--bits-for", "1.mlp.gate_proj=3")
    folder = native("llama", {}, *kept, "--bits-for", "1.mlp.up_proj=3")
    assert export(folder, tmp_path / "vllm", "vllm").code == 0
    said = run([python("humming"), SCRIPTS / "humming_schema.py", tmp_path / "vllm"], threads=1)
    assert "11 linears" in said.output
    print(said.output)


KEEP = (
    *("--zero-point", "integer", "--keep-adapter", "--rank", 16, "--lr", "1e-2"),
    *("--steps", 20, "--val-every", 20, "--batch-size", 8),
)
INTEGER: dict[str, tuple[str, tuple[object, ...]]] = {
    "llama": ("llama", ()),
    "llama, 3 bits": ("llama", ("--bits", 3)),
    "llama, 8 bits": ("llama", ("--bits", 8)),
    "qwen2": ("qwen2", ()),
    "qwen3, linears kept, embedding packed": (
        "qwen3",
        ("--skip", "v_proj", "--skip", "1.mlp.*", "--embed-bits", 8),
    ),
    "gemma2": ("gemma2", ()),
    "gemma3": ("gemma3_text", ()),
}


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
def test_transformers_and_peft_compute_with_base_and_adapter_what_the_native_checkpoint_does(
    kind: str,
    native: Callable[..., Path],
    export: Callable[..., Any],
    python: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """All models in one process: gptqmodel takes long to import."""
    outputs, expected = [], []
    for number, (model_type, options) in enumerate(INTEGER.values()):
        folder = native(model_type, {}, *KEEP, *options)
        outputs.append(tmp_path / str(number))
        assert export(folder, outputs[-1], kind).code == 0
        expected.append(native_logits(folder))
    np.save(tmp_path / "rows.npy", rows().numpy())
    script = SCRIPTS / "peft_logits.py"
    said = run([python("peft"), script, tmp_path / "rows.npy", *outputs], threads=1).output
    print(said)
    for case, out, wanted in zip(INTEGER, outputs, expected, strict=True):
        apart, alone = (
            np.abs(np.load(f"{out}{which}.npy") - wanted).max() for which in ("", ".base")
        )
        print(
            f"{case}, {kind}: {apart:.2g} of a spread of {wanted.std():.2g}, "
            f"the base alone {alone:.2g}"
        )
        assert apart < 0.02 * wanted.std()


@pytest.mark.parametrize(
    ("kind", "environment"), [("mlx", "mlx"), ("gptq", "peft"), ("compressed-tensors", "peft")]
)
def test_the_commands_of_model_cards_run(
    kind: str,
    environment: str,
    native: Callable[..., Path],
    export: Callable[..., Any],
    python: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """As they stand, in the environment that they need."""
    assert export(native("llama", {}, *KEEP), tmp_path / kind, kind).code == 0
    said = code(kind, str(tmp_path / kind), adapter=kind != "mlx")
    interpreter = python(environment)
    if kind == "mlx":
        said = f"PATH={interpreter.parent}:$PATH {said}"
    words = ["sh", "-c"] if kind == "mlx" else [interpreter, "-c"]
    output = run([*words, said], threads=1).output
    print(output)
    assert "Once upon a time" in output or "Generation" in output
