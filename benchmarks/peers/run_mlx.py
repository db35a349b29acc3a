"""mlx-lm: rounding to nearest, GPTQ, or DWQ (distilling into scales and biases).

Computed in float32, since bfloat16 is slow on a CPU (and gave GPTQ 64.3, not 62.5); scales and
biases are then rounded to the 16 bits that are stored.
"""

from importlib.metadata import version

import dense
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import torch
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import load_model, quantize_model
from torch import Tensor

SEED = 123  # mlx-lm's own
HEAD_BITS, HEAD_GROUP = 8, 32  # of what GPTQ quantizes besides the decoder; not used here
DWQ_BATCH, DWQ_VALIDATION = 4, 32  # its defaults


def main() -> None:
    """Quantize the decoder's linears by one of mlx-lm's methods."""
    parser = dense.arguments(__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("rtn", "gptq", "dwq"), required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="of DWQ")
    parser.add_argument("--passes", type=int, default=1, help="of DWQ over the rows")
    args = parser.parse_args()
    np.random.seed(SEED), mx.random.seed(SEED)
    rows = dense.read_rows(args.rows)
    model, config = load_model(args.model)
    model.set_dtype(mx.float32)
    settings = f"mlx-lm {version('mlx-lm')}, {args.method}"
    if args.method == "gptq":
        data = mx.array(rows.numpy())
        model, _ = gptq_quantize(model, data, 2, args.group_size, HEAD_BITS, HEAD_GROUP)
    else:
        model, _ = quantize_model(
            model, config, args.group_size, 2, quant_predicate=lambda path, _: ".layers." in path
        )
    if args.method == "dwq":
        teacher, _ = load_model(args.model)
        teacher.set_dtype(mx.float32)
        distill(model, teacher, rows, args.passes, args.learning_rate)
        settings += f", {args.passes} passes, rate {args.learning_rate:g}"
    weights = {
        f"{path}.weight": to_torch(
            mx.dequantize(
                linear.weight,
                linear.scales.astype(mx.float16).astype(mx.float32),
                linear.biases.astype(mx.float16).astype(mx.float32),
                group_size=linear.group_size,
                bits=linear.bits,
            )
        )
        for path, linear in model.named_modules()
        if ".layers." in path and isinstance(linear, nn.QuantizedLinear)
    }
    bits = dense.bits_per_weight(2, args.group_size, zero_bits=16)
    dense.save_dense(args.model, weights, args.out, stored_bits=bits, made_by=settings)


def distill(
    model: nn.Module, teacher: nn.Module, rows: Tensor, passes: int, learning_rate: float
) -> None:
    """DWQ with the teacher's logits computed as they are needed."""
    items = [(row.tolist(), 0) for row in rows]
    training, validation = items[:-DWQ_VALIDATION], items[-DWQ_VALIDATION:]
    dwq_quantize(
        model,
        lambda batch, index, split: teacher(batch),
        optimizers.Adam(learning_rate=learning_rate, bias_correction=True),
        training * passes,
        validation,
        batch_size=DWQ_BATCH,
        max_seq_length=rows.shape[1] + 1,
        seed=SEED,
        dtype=mx.float32,
    )


def to_torch(array: mx.array) -> Tensor:
    """By way of numpy, which has no bfloat16."""
    return torch.from_numpy(np.array(array.astype(mx.float32)))


if __name__ == "__main__":
    main()
