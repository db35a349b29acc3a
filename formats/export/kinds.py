"""All kinds of export by name."""

from collections.abc import Mapping

import torch

from rilq.errors import InputError, OptionError
from rilq.formats.export import compressed_tensors, dense, gguf, gptq, metal, mlx, vllm
from rilq.formats.export.kind import ExportKind, ExportOptions
from rilq.formats.export.source import NativeForm

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


def possible(form: NativeForm) -> dict[str, ExportOptions]:
    """The kinds that a checkpoint can be exported to here, each with options that it takes."""
    found = dict[str, ExportOptions]()
    for name, kind in KINDS.items():
        for options in (ExportOptions(dtype=torch.bfloat16), ExportOptions()):
            try:
                kind.check(form, options)
            except InputError:
                continue
            found[name] = options  # float16 where both will do
    return found
