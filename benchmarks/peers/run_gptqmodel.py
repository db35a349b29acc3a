"""GPTQModel: GPTQ with integer zero-points."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import dense
import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it fails where it counts fewer cores than 4
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402 - reads the variable
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

BITS, BATCH = 2, 8


def main() -> None:
    """Quantize, save as GPTQModel does, and dequantize what was saved."""
    parser = dense.arguments(__doc__)
    parser.add_argument("--mse", type=float, default=0.0, help="norm of its clip search; 0 is none")
    args = parser.parse_args()
    settings = QuantizeConfig(
        bits=BITS,
        group_size=args.group_size,
        sym=False,
        desc_act=False,
        mse=args.mse,
        format="gptq_v2",  # v1 stores zero-points less 1, which has no code for 0
    )
    model = GPTQModel.load(str(args.model), settings, device="cpu", dtype=torch.float32)
    rows = dense.read_rows(args.rows)
    ones = [1] * rows.shape[1]
    calibration = [{"input_ids": row.tolist(), "attention_mask": ones} for row in rows]
    model.quantize(calibration, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        saved = {k: v for f in Path(folder).glob("*.safetensors") for k, v in load_file(f).items()}
    linears = [name.removesuffix(".qweight") for name in saved if name.endswith(".qweight")]
    dense.save_dense(
        args.model,
        {f"{name}.weight": dequantized(saved, name) for name in linears},
        args.out,
        stored_bits=dense.bits_per_weight(BITS, args.group_size, zero_bits=BITS),
        made_by=f"gptqmodel {version('gptqmodel')}, mse {args.mse:g}",
    )


def dequantized(saved: dict[str, Tensor], name: str) -> Tensor:
    """`scale * (code - zero)`, `[out_features, in_features]` float32."""
    codes = unpacked(saved[f"{name}.qweight"].T)  # [out_features, in_features]
    zeros = unpacked(saved[f"{name}.qzeros"])  # [groups, out_features]
    group = saved[f"{name}.g_idx"].long()  # [in_features]
    scales = saved[f"{name}.scales"].float()
    return scales.T[:, group] * (codes - zeros.T[:, group])


def unpacked(words: Tensor) -> Tensor:
    """Codes `[n, words * 16]` float32 of int32 `[n, words]`, least significant first."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    codes = (words[..., None] >> shifts) & (2**BITS - 1)  # [n, words, 16]
    return codes.reshape(len(words), -1).float()


if __name__ == "__main__":
    main()
