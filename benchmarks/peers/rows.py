"""Write the calibration rows that every method gets: those that `rilq convert` would take."""

import argparse
from pathlib import Path

from safetensors.torch import save_file

from rilq.calib.dataset import calibration_rows
from rilq.calib.sources import parse_source
from rilq.calib.tokenizer import load_tokenizer
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder


def main() -> None:
    """Print the rows' digest, which `rilq.json` of a conversion states too."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--dataset", required=True)
    add("--nsamples", type=int)
    add("--seqlen", type=int, required=True)
    add("--seed", type=int, required=True)
    add("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = calibration_rows(
        [parse_source(args.dataset)],
        load_tokenizer(Checkpoint.open(LocalFolder(args.model))),
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        seed=args.seed,
    )
    save_file({"rows": rows.tokens}, args.out, metadata={"digest": rows.digest})
    print(rows.digest)


if __name__ == "__main__":
    main()
