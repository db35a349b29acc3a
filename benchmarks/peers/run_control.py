"""The control: the full-precision decoder linears, trained on the same rows with the paper's loss.

Half of that is the cross-entropy of the calibration text (`kl` alone, to the model itself, has
nothing to gain). Nothing is quantized, so whatever this gains on the calibration text's own domain
is what training on that text buys, and what it loses on another text is the price.
"""

import copy

import dense
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rilq.converter.loss import Loss, discrepancy
from rilq.converter.train import learning_rate_at, row_order

BATCH, VALIDATE_EVERY, VALIDATION_SHARE, SEED = 8, 25, 0.2, 42  # as `--recipe paper` does it


def main() -> None:
    """Train every decoder linear's weights; save the best of the validations, step 0 included."""
    parser = dense.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args()
    rows = dense.read_rows(args.rows)
    training = rows[: len(rows) - max(1, round(VALIDATION_SHARE * len(rows)))]
    held_out = rows[len(training) :]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.requires_grad_(False)
    teacher = copy.deepcopy(model)
    linears = dense.decoder_linears(model)
    weights = [linear.weight.requires_grad_() for linear in linears.values()]
    adam = torch.optim.Adam(weights)
    order = row_order(len(training), SEED)
    best, best_step, kept = validation_loss(model, teacher, held_out), 0, snapshot(linears)
    for step in range(args.steps):
        batch = training[[next(order) for _ in range(BATCH)]]
        for group in adam.param_groups:
            group["lr"] = args.learning_rate * learning_rate_at(step, args.steps)
        adam.zero_grad()
        loss_on(model, teacher, batch).backward()
        adam.step()
        if (step + 1) % VALIDATE_EVERY == 0:
            loss = validation_loss(model, teacher, held_out)
            print(f"step {step + 1}: validation loss {loss:.5f}, best so far {best:.5f}")
            if loss < best:
                best, best_step, kept = loss, step + 1, snapshot(linears)
    dense.save_dense(
        args.model,
        kept,
        args.out,
        stored_bits=16,
        made_by=f"rate {args.learning_rate:g}, best of {args.steps} updates: {best_step}",
    )


class Whole:
    """A causal language model as rilq's loss sees one."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.vocabulary = model, model.config.vocab_size

    def states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states after the norm, twice: nothing here looks at those before it."""
        hidden = self.model.model(tokens).last_hidden_state
        return hidden, hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits `[..., vocabulary]`."""
        return self.model.lm_head(hidden).float()


def loss_on(model: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    """RILQ's loss of a batch `[rows, seq_len]` against the untrained model's final states."""
    with torch.no_grad():
        target = teacher.model(tokens).last_hidden_state
    return discrepancy(Whole(model), tokens, target, Loss())


@torch.no_grad()
def validation_loss(model: nn.Module, teacher: nn.Module, rows: Tensor) -> float:
    """Mean loss over the held-out rows."""
    losses = [loss_on(model, teacher, batch) * len(batch) for batch in rows.split(BATCH)]
    return float(sum(losses)) / len(rows)


def snapshot(linears: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """A copy of the weights by their name in the checkpoint."""
    return {f"{name}.weight": linear.weight.detach().clone() for name, linear in linears.items()}


if __name__ == "__main__":
    main()
