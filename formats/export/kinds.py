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


def check_kind(name: str, form: NativeForm, options: ExportOptions) -> None:
    """Refuse what a kind cannot hold; see `ExportKind.check`.

    Raises:
        InputError: the message names the remedy.
    """
    kind = kind_of(name)
    if kind is not dense and form.is_mixture:
        raise OptionError(
            f"{form.label}: is a mixture of experts, which --to {name} cannot write yet\n"
            "  export --to dense, which any program reads"
        )
    kind.check(form, options)


def possible(form: NativeForm) -> dict[str, ExportOptions]:
    """The kinds that a checkpoint can be exported to here, each with options that it takes."""
    found = dict[str, ExportOptions]()
    for name in KINDS:
        for options in (ExportOptions(dtype=torch.bfloat16), ExportOptions()):
            try:
                check_kind(name, form, options)
            except InputError:
                continue
            found[name] = options  # float16 where both will do
    return found
