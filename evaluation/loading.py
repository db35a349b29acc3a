"""How each runtime loads a checkpoint: the text of model cards and of docs/exports.md.

It is here once; tests run it as it stands, where the runtime is installed.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from rilq.formats.export.gguf import ADAPTER_FILE, MODEL_FILE
from rilq.formats.lora import ADAPTER_FOLDER

NATIVE = "native"


@dataclass(frozen=True)
class Runtime:
    """What loads a kind of checkpoint.

    Attributes:
        title: what its users call it.
        needs: what has to be installed, for a sentence.
        library: `library_name` in a card's metadata.
        tags: further ones there, by which the Hub and its users find such checkpoints.
        commands: it is used by commands instead of Python.
    """

    title: str
    needs: str
    library: str = "transformers"
    tags: tuple[str, ...] = ()
    commands: bool = False


RUNTIMES = {
    NATIVE: Runtime("transformers", "rilq"),
    "dense": Runtime("transformers, 16 bits", "transformers"),
    "metal": Runtime("transformers, Metal", "transformers and, on Apple's GPUs, kernels"),
    "mlx": Runtime("mlx-lm", "mlx-lm", "mlx", ("mlx",), commands=True),
    "gguf": Runtime("llama.cpp", "llama.cpp", "gguf", ("gguf",), commands=True),
    "gptq": Runtime("GPTQ with PEFT", "transformers, optimum, gptqmodel and peft", tags=("gptq",)),
    "compressed-tensors": Runtime(
        "compressed-tensors with PEFT",
        "transformers, compressed-tensors and peft",
        tags=("compressed-tensors",),
    ),
    "vllm": Runtime("vLLM, experimental", "vllm", "vllm", ("vllm",), commands=True),
}


def code(kind: str, model: str, *, revision: str | None = None, adapter: bool = False) -> str:
    """What loads a checkpoint of a kind and writes a few words with it: Python, or commands.

    Args:
        kind: "native", or one of the exports.
        model: a folder; where it takes Python, `owner/name` too.
        revision: of that name; None for a folder.
        adapter: one lies beside it.
    """
    place = shlex.quote(model)
    if kind == "mlx":
        return f"mlx_lm.generate --model {place} --prompt 'Once upon a time'"
    if kind == "gguf":
        beside = f" --lora {place}/{ADAPTER_FILE}" if adapter else ""
        return f"llama-cli -m {place}/{MODEL_FILE}{beside}"
    if kind == "vllm":
        return f"vllm serve {place}"
    return _python(kind, model, revision, adapter)


def _python(kind: str, model: str, revision: str | None, adapter: bool) -> str:
    where = json.dumps(model) + (f", revision={json.dumps(revision)}" if revision else "")
    names = "AutoModelForCausalLM, AutoTokenizer"
    lines = []
    if kind == NATIVE:
        lines.append("import rilq  # teaches transformers the format; without it, loading fails")
    if adapter:
        lines.append("from peft import PeftModel")
    if kind == "compressed-tensors":
        names = f"{names}, CompressedTensorsConfig"
    lines += [f"from transformers import {names}", ""]
    arguments = f'{where}, device_map="auto"'
    if kind == "compressed-tensors":
        lines.append("dense = CompressedTensorsConfig(dequantize=True)")
        arguments = f"\n    {arguments}, quantization_config=dense\n"
    lines.append(f"model = AutoModelForCausalLM.from_pretrained({arguments})")
    if adapter:
        beside = f'subfolder="{ADAPTER_FOLDER}"'
        lines.append(f"model = PeftModel.from_pretrained(model, {where}, {beside})")
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained({where})",
        'prompt = tokenizer("Once upon a time", return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))",
    ]
    return "\n".join(lines)


def from_hub(kind: str, repo_id: str, *, revision: str | None = None, adapter: bool = False) -> str:
    """The same for a repository that holds it, as Markdown; commands are given a download."""
    if not RUNTIMES[kind].commands:
        return _block("python", code(kind, repo_id, revision=revision, adapter=adapter))
    folder = repo_id.partition("/")[2]
    download = f"hf download {repo_id}{_option(revision)} --local-dir {folder}"
    return _block("sh", f"{download}\n{code(kind, folder, adapter=adapter)}")


def after_export(
    kind: str,
    repo_id: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    adapter: bool = False,
) -> str:
    """The same for a repository with a native checkpoint, exported first, as Markdown.

    Args:
        kind: of the export.
        repo_id: holds the native checkpoint.
        revision: of it; None for `main`.
        dtype: for `rilq export --dtype`; None for its default.
        adapter: one lies beside the export.
    """
    folder = f"{repo_id.partition('/')[2]}-{kind}"
    rounding = f" --dtype {dtype}" if dtype else ""
    export = f"rilq export {repo_id}{_option(revision)} --to {kind}{rounding} -o {folder}"
    use = code(kind, folder, adapter=adapter)
    if RUNTIMES[kind].commands:
        return _block("sh", f"{export}\n{use}")
    return f"{_block('sh', export)}\n{_block('python', use)}"


def _option(revision: str | None) -> str:
    return f" --revision {shlex.quote(revision)}" if revision else ""


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
