"""AutoRound (SignRound): rounding and clipping learned block by block, integer zero-points."""

from importlib.metadata import version

import dense
from auto_round import AutoRound
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS, BATCH = 2, 8


def main() -> None:
    """Tune, and save what the codes, scales and zero-points dequantize to.

    Tuned in float32 and without torch.compile, which for models of this size takes longer to
    compile than the tuning itself; on stories260K-w192, its default of bfloat16 gave perplexity
    9.24, float32 9.19.
    """
    parser = dense.arguments(__doc__)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--neuqi", action="store_true", help="its search of the starting grid")
    parser.add_argument("--extension", action="store_true", help="its extension for 2 bits")
    args = parser.parse_args()
    rows = dense.read_rows(args.rows)
    tuner = AutoRound(
        AutoModelForCausalLM.from_pretrained(args.model, dtype="float32"),
        AutoTokenizer.from_pretrained(args.model),
        bits=BITS,
        group_size=args.group_size,
        sym=False,
        iters=args.iterations,
        dataset=list(rows.split(BATCH)),
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=BATCH,
        device_map="cpu",
        amp=False,
        enable_neuqi=args.neuqi,
        enable_alg_ext=args.extension,
        enable_torch_compile=False,
    )
    tuned, _ = tuner.quantize()
    settings = [f"auto-round {version('auto-round')}", f"{args.iterations} iterations"]
    settings += ["NeUQI"] * args.neuqi + ["extension"] * args.extension
    dense.save_dense(
        args.model,
        {f"{name}.weight": dequantized(x) for name, x in dense.decoder_linears(tuned).items()},
        args.out,
        stored_bits=dense.bits_per_weight(BITS, args.group_size, zero_bits=BITS),
        made_by=", ".join(settings),
    )


def dequantized(linear: nn.Linear) -> Tensor:
    """`scale * (code - zero)` in float32, with the codes that the tuned weight stands for."""
    weight = linear.weight.detach().float()
    scale = linear.scale.float().reshape(len(weight), -1, 1)  # [out_features, groups, 1]
    zero = linear.zp.float().reshape(scale.shape)
    codes = (weight.reshape(*scale.shape[:2], -1) / scale + zero).round()
    if codes.min() < 0 or codes.max() >= 2**BITS or not zero.equal(zero.round()):
        raise SystemExit(f"{linear}: codes or zero-points outside {BITS} bits")
    return (scale * (codes - zero)).reshape(weight.shape)


if __name__ == "__main__":
    main()
