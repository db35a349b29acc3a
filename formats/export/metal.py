"""`metal`: for transformers' Metal kernels; elsewhere transformers dequantizes it while loading.

Tensors `X.weight` uint32, `X.scales`, `X.qbiases`. One setting of bits for the whole model, and
linears only: embedding and head are dequantized.
Source: `MetalConfig` and integrations/metal_quantization.py of transformers 5.23.
"""

import json
from pathlib import Path

from rilq.errors import OptionError
from rilq.formats.export.affine import affine, affine_entries, refuse_lora
from rilq.formats.export.folder import (
    PackedReader,
    copy_companions,
    dense_entry,
    entries,
    write_weights,
)
from rilq.formats.export.kind import ROUNDING, DenseReader, ExportOptions
from rilq.formats.export.source import NativeCheckpoint, NativeForm
from rilq.formats.shard import listing
from rilq.formats.writer import write_config
from rilq.progress import Reporter

BITS = (2, 4, 8)


def bound(options: ExportOptions) -> float:
    """Codes are the same; scales, minima and what is not packed are rounded to 16 bits."""
    return ROUNDING[options.dtype]


def check(form: NativeForm, options: ExportOptions) -> None:
    """Bits that Metal's kernels do not know, more than one setting, an unmerged adapter.

    Raises:
        OptionError: one of them.
    """
    refuse_lora(form, "metal")
    remedy = "  export --to mlx or --to dense, or convert with other --bits"
    most = max((spec.bits for spec in form.linears.values()), default=2)
    if len({spec.bits for spec in form.linears.values()}) > 1:
        more = [name for name, spec in form.linears.items() if spec.bits == most]
        raise OptionError(
            f"{form.label}: linears have different bits, and --to metal has one setting for the "
            f"whole model: {most} bits in {listing(more, 3)}\n{remedy} for all"
        )
    if most not in BITS:
        raise OptionError(
            f"{form.label}: {most} bits, and --to metal takes {', '.join(map(str, BITS))}\n{remedy}"
        )


def write(native: NativeCheckpoint, folder: Path, options: ExportOptions, report: Reporter) -> None:
    """Write weights, `config.json` and the files beside them."""
    form, dtype = native.form, options.dtype
    found = entries(
        native,
        dtype,
        lambda name, spec: (
            affine_entries(native, name, spec, dtype, "qbiases")
            if name in form.linears
            else dense_entry(native, name, dtype)
        ),
    )
    write_weights(folder, found, options.max_shard_size, report)
    quantization = {
        "quant_method": "metal",
        "bits": next((spec.bits for spec in form.linears.values()), native.quantization.bits),
        "group_size": native.quantization.group_size,
        "modules_to_not_convert": ["lm_head", *form.kept],
    }
    write_config(folder, form.config, quantization, dtype)
    copy_companions(native, folder)


def read(folder: Path) -> DenseReader:
    """The dense model that the packed one stands for."""
    config = json.loads((folder / "config.json").read_bytes())["quantization_config"]
    return PackedReader(folder, "scales", "qbiases", lambda _: int(config["bits"]), affine)
