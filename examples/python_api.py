"""Plan, convert, evaluate and load a checkpoint from Python.

    python examples/python_api.py examples/demo/model out/demo-2bit \\
        --calibration examples/demo/calib.txt --text examples/demo/heldout.txt
"""

import argparse
from pathlib import Path

import rilq


class EveryTenth(rilq.SilentReporter):
    """Progress as one likes it: here the loss of every tenth update."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.name = name

    def step(self, done: int, **figures: float | int | str) -> None:
        if self.name == "train" and done % 10 == 0:
            print(f"update {done}: loss {figures['loss']}")


def main() -> None:
    """Convert the model of the command line, and let it go on with a sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seqlen", type=int, default=256)
    given = parser.parse_args()
    options = {
        "bits": 2,
        "rank": 16,
        "dataset": given.calibration,
        "seqlen": given.seqlen,
        "steps": given.steps,
        "output_dir": given.output,
    }

    plan = rilq.plan(given.model, **options)
    print(f"{plan.layers} layers, {len(plan.quantized)} linears, about {plan.seconds:.0f} s")
    rilq.check_fits(plan)

    # Stopped in the middle, the same call goes on where it was.
    result = rilq.convert(given.model, report=EveryTenth(), **options)
    print(f"{result.output}: validation loss {result.quality['validation_loss']:.4f}")

    for model in (given.model, str(result.output)):
        figures = rilq.evaluate(model, given.text, seqlen=given.seqlen, speed=False)
        print(f"{model}: perplexity {figures.perplexity:.2f}")

    model, tokenizer = rilq.load(result.output, device="cpu")
    prompt = tokenizer("The city", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
