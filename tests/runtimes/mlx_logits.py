"""Runs in an environment with mlx-lm: load a folder as its users do, print logits.

    python mlx_logits.py FOLDER ROWS.npy LOGITS.npy

Computed in float32, so that what differs is the weights; then greedy text is generated in the
dtype of the folder, and printed.
"""

import sys
from importlib.metadata import version

import mlx.core as mx
import numpy as np
from mlx_lm import generate, load


def main() -> None:
    """Load, compute, generate."""
    folder, rows, out = sys.argv[1:]
    model, tokenizer = load(folder)
    text = generate(model, tokenizer, prompt="the cat", max_tokens=8)
    model.set_dtype(mx.float32)
    logits = model(mx.array(np.load(rows)))
    np.save(out, np.array(logits.astype(mx.float32)))
    print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}: {text!r}")


if __name__ == "__main__":
    main()
