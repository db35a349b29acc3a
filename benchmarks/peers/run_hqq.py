"""HQQ: half-quadratic search of the zero-points, without data."""

from importlib.metadata import version

import dense
import torch
from hqq.core.quantize import Quantizer
from torch import Tensor
from transformers import AutoModelForCausalLM

BITS = 2


def main() -> None:
    """Quantize each linear by itself; scales and zero-points stay 16-bit floats."""
    args = dense.arguments(__doc__).parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    linears = dense.decoder_linears(model)
    dense.save_dense(
        args.model,
        {f"{name}.weight": rounded(x.weight, args.group_size) for name, x in linears.items()},
        args.out,
        stored_bits=dense.bits_per_weight(BITS, args.group_size, zero_bits=dense.SCALE_BITS),
        made_by=f"hqq {version('hqq')}, groups along the inputs",
    )


def rounded(weight: Tensor, group_size: int) -> Tensor:
    """What HQQ's codes dequantize to, with scale and zero-point rounded to the stored 16 bits."""
    codes, meta = Quantizer.quantize(
        weight.data,
        nbits=BITS,
        channel_wise=True,
        group_size=group_size,
        optimize=True,
        round_zero=False,
        axis=1,
        device="cpu",
        compute_dtype=torch.float32,
    )
    for key in ("scale", "zero"):
        meta[key] = meta[key].half().float()
    return Quantizer.dequantize(codes, meta)


if __name__ == "__main__":
    main()
