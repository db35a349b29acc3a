"""`gguf`: a file that llama.cpp loads and chats with, and a LoRA beside it as a second one.

Decoder linears of 2, 3 or 4 bits are Q4_1, which holds them but for the rounding of the minima;
with `--gguf-type q2_k` those of 2 bits are Q2_K, re-encoded. Linears of 8 bits are 16-bit matrices.
Embedding and head are 16-bit matrices too, or Q4_1 where they have 4 bits; norms and biases are
float32, as llama.cpp's converter writes them. The package gguf is an extra, and is imported late.
"""

from pathlib import Path

from rilq.errors import OptionError
from rilq.formats.export.gguf_blocks import Q2_K_WEIGHTS
from rilq.formats.export.kind import ROUNDING, DenseReader, ExportOptions
from rilq.formats.export.source import NativeCheckpoint, NativeForm
from rilq.formats.shard import listing
from rilq.progress import Reporter

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
TYPES = ("q4_1", "q2_k")

# Of the logits' standard deviation. The grids of Q2_K are coarser than ours: 0.66, 0.51 and 0.25
# were measured on random models of 2 layers in groups of 32, 64 and 128.
_REENCODED = 1.5


def bound(options: ExportOptions) -> float:
    """Q4_1 rounds the minima, and what is not packed; Q2_K re-encodes."""
    return _REENCODED if options.gguf_type == "q2_k" else ROUNDING[options.dtype]


def check(form: NativeForm, options: ExportOptions) -> None:
    """The package gguf, an architecture that llama.cpp has, and rows that fill Q2_K's blocks.

    Raises:
        OptionError: one of them is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as err:
        raise OptionError("--to gguf needs the package gguf\n  pip install 'rilq[gguf]'") from err
    from rilq.formats.export.gguf_metadata import check_architecture, row_width

    if options.gguf_type not in TYPES:
        raise OptionError(f"--gguf-type {options.gguf_type}: expected one of {', '.join(TYPES)}")
    check_architecture(form)
    if options.gguf_type != "q2_k":
        return
    widths = {n: row_width(form, n) for n, spec in form.linears.items() if spec.bits == 2}
    if narrow := [f"{n}.weight (rows of {w})" for n, w in widths.items() if w % Q2_K_WEIGHTS]:
        raise OptionError(
            f"{form.label}: --gguf-type q2_k needs rows that are multiples of {Q2_K_WEIGHTS}, but "
            f"it has {listing(narrow)}\n  take --gguf-type q4_1, which holds them"
        )


def write(native: NativeCheckpoint, folder: Path, options: ExportOptions, report: Reporter) -> None:
    """Write `model.gguf`, and `adapter.gguf` for an adapter that lies beside the base."""
    from rilq.formats.export.gguf_file import write_adapter, write_model

    write_model(native, folder / MODEL_FILE, options, report)
    if native.adapter is not None:
        write_adapter(native, native.adapter, folder / ADAPTER_FILE, report)


def read(folder: Path) -> DenseReader:
    """The dense model that the blocks stand for, the adapter added in."""
    from rilq.formats.export.gguf_reader import GgufReader

    adapter = folder / ADAPTER_FILE
    return GgufReader(folder / MODEL_FILE, adapter if adapter.is_file() else None)
