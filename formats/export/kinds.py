"""All kinds of export by name."""

from collections.abc import Mapping

from rilq.errors import OptionError
from rilq.formats.export import compressed_tensors, dense, gguf, gptq, metal, mlx, vllm
from rilq.formats.export.kind import ExportKind

KINDS: Mapping[str, ExportKind] = {
    "dense": dense,
    "gguf": gguf,
    "mlx": mlx,
    "metal": metal,
    "vllm": vllm,
    "gptq": gptq,
    "compressed-tensors": compressed_tensors,
}


def kind_of(name: str) -> ExportKind:
    """The kind with this name.

    Raises:
        OptionError: there is none.
    """
    if name not in KINDS:
        raise OptionError(f"export to {name!r}: expected one of {', '.join(KINDS)}")
    return KINDS[name]
