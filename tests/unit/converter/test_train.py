"""RILQ's loss and the training loop, on a student small enough to see through."""

import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rilq.calib.activations import ActivationStore, ActivationWriter
from rilq.converter import train as train_module
from rilq.converter.adapters import Adapter, AdapterSpec
from rilq.converter.loss import Loss, Model, discrepancy
from rilq.converter.train import (
    Trainer,
    TrainOptions,
    learning_rate_at,
    row_order,
    validation_losses,
)
from rilq.errors import RilqError
from rilq.progress import SilentReporter

VOCABULARY, HIDDEN = 12, 32


class OneLinear(nn.Module):
    """An embedding, one frozen linear with an adapter, and a head: `Student`'s interface."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.embedding = torch.randn(VOCABULARY, HIDDEN, generator=draw)
        self.head = torch.randn(VOCABULARY, HIDDEN, generator=draw) / HIDDEN**0.5
        adapter = Adapter(
            AdapterSpec("lora", 4, 4.0, seed=0),
            "linear",
            out_features=HIDDEN,
            in_features=HIDDEN,
            group_size=32,
            device=torch.device("cpu"),
        )
        self.adapter = adapter
        self.vocabulary, self.device = VOCABULARY, torch.device("cpu")
        self.trained = {"linear.a": adapter.a, "linear.b": adapter.b}

    def states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding[tokens]
        before = x + self.adapter(x)
        return before, 2 * before  # a "final norm" that can be told from none

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head.T


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (20, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets(tmp_path: Path, tokens: Tensor) -> Iterator[ActivationStore]:
    """The student's own states, moved by a matrix of rank 2: something an adapter can learn."""
    draw = torch.Generator().manual_seed(2)
    left, right = (torch.randn(*size, generator=draw) for size in ((HIDDEN, 2), (2, HIDDEN)))
    move = left @ right / HIDDEN**0.5
    x = OneLinear().embedding[tokens]
    shape = (20, 8, HIDDEN)
    with ActivationWriter(tmp_path / "t.bin", shape, torch.float32, label="test") as writer:
        writer.append(2 * (x + x @ move))
    yield ActivationStore(tmp_path / "t.bin", shape, torch.float32)


def trainer(tokens: Tensor, targets: ActivationStore, **changes: float) -> Trainer:
    settings = dict(learning_rate=0.02, steps=12, batch_size=4, micro_batch=4, val_every=4)
    options = TrainOptions(**{**settings, **changes})  # type: ignore[arg-type]
    student = OneLinear()
    return Trainer(student, tokens, targets, validation=4, options=options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "rate"), [(12, 6 / 40), (600, 6 / 600)])
def test_each_kind_of_what_is_trained_has_its_rate(
    steps: int, rate: float, tokens: Tensor, targets: ActivationStore
) -> None:
    student = OneLinear()
    for part in ("log_scale", "offset", "code_shift"):
        student.trained[f"linear.{part}"] = nn.Parameter(torch.zeros(1))
    options = TrainOptions(learning_rate=0.02, scales_learning_rate=0.003, steps=steps)
    train = Trainer(student, tokens, targets, validation=4, options=options)  # type: ignore[arg-type]
    peaks = {id(p): g["peak"] for g in train.optimizer.param_groups for p in g["params"]}
    found = {name.rpartition(".")[2]: peaks[id(p)] for name, p in student.trained.items()}
    scales = {"log_scale": 0.003, "offset": 0.003}
    assert found == {"a": 0.02, "b": 0.02, **scales, "code_shift": pytest.approx(rate)}


def run(train: Trainer) -> list[dict[str, Tensor]]:
    states: list[dict[str, Tensor]] = []
    train.run(
        lambda: states.append({k: v.clone() for k, v in train.tensors().items()}), SilentReporter()
    )
    return states


def states_and_target(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The student's states before and after the norm, and a target, all `[20, 8, HIDDEN]`."""
    before, after = (t.detach() for t in OneLinear().states(tokens))
    draw = torch.Generator().manual_seed(0)
    return before, after, after + torch.randn(after.shape, generator=draw)


def value(tokens: Tensor, cached: Tensor, /, **terms: object) -> float:
    student: Model = OneLinear()
    weights = {"mse": 0.0, "ce": 0.0, **terms}
    return discrepancy(student, tokens, cached, Loss(**weights)).item()  # type: ignore[arg-type]


def test_paper_loss_is_half_mse_and_half_cross_entropy_of_the_next_token(tokens: Tensor) -> None:
    _, after, target = states_and_target(tokens)
    logits, nll = OneLinear().logits(after), 0.0
    for row in range(20):
        for t in range(7):
            nll -= F.log_softmax(logits[row, t], -1)[tokens[row, t + 1]].item() / (20 * 7)
    expected = 0.5 * (after - target).square().mean().item() + 0.5 * nll
    found = discrepancy(OneLinear(), tokens, target, Loss()).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_kl_is_that_of_the_teachers_distribution_over_every_position(tokens: Tensor) -> None:
    _, after, target = states_and_target(tokens)
    head = OneLinear().logits
    total = 0.0
    for student, teacher in zip(head(after).flatten(0, 1), head(target).flatten(0, 1), strict=True):
        p = teacher.double().softmax(-1)
        total += (p * (p.log() - student.double().log_softmax(-1))).sum().item() / (20 * 8)
    assert value(tokens, target, kl=1.0) == pytest.approx(total, rel=1e-5)
    assert value(tokens, after, kl=1.0) == pytest.approx(0, abs=1e-6)


def test_mse_compares_what_the_target_says(tokens: Tensor) -> None:
    before, after, target = states_and_target(tokens)
    head = OneLinear().logits
    for name, states, wanted in (
        ("post-norm", after, target),
        ("pre-norm", before, target),
        ("logits", head(after), head(target)),
    ):
        expected = (states - wanted).square().mean().item()
        assert value(tokens, target, mse=1.0, target=name) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", [{"kl": 1.0}, {"mse": 0.5, "ce": 0.5}, {"ce": 0.2, "kl": 3.0}])
def test_validation_tells_every_term_without_its_weight(
    tokens: Tensor, targets: ActivationStore, weights: dict[str, float]
) -> None:
    loss = Loss(**{"mse": 0.0, "ce": 0.0, **weights})  # type: ignore[arg-type]
    student: Model = OneLinear()
    found = validation_losses(
        student,  # type: ignore[arg-type]
        tokens,
        targets,
        rows=range(16, 20),
        batch=4,
        loss=loss,
        device=torch.device("cpu"),
    )
    target = targets.read(16, 20)
    alone = {term: value(tokens[16:], target, **{term: 1.0}) for term in ("mse", "ce", "kl")}
    assert found == {"total": discrepancy(student, tokens[16:], target, loss).item(), **alone}


def test_before_the_norm_no_kl_is_told(tokens: Tensor, targets: ActivationStore) -> None:
    train = trainer(tokens, targets, loss=Loss(target="pre-norm"))  # type: ignore[arg-type]
    run(train)
    assert train.progress.parts.keys() == {"mse", "ce"}


def test_every_validation_has_its_terms_and_every_interval_its_mean(
    tokens: Tensor, targets: ActivationStore
) -> None:
    train = trainer(tokens, targets)
    run(train)
    progress = train.progress
    assert [step for step, _ in progress.history] == [0, 4, 8, 12]
    assert {term: len(losses) for term, losses in progress.parts.items()} == {
        "mse": 4, "ce": 4, "kl": 4
    }  # fmt: skip
    assert len(progress.train_losses) == 3
    for index, (_, loss) in enumerate(progress.history):
        terms = 0.5 * progress.parts["mse"][index] + 0.5 * progress.parts["ce"][index]
        assert loss == pytest.approx(terms)


def test_training_lowers_the_validation_loss(tokens: Tensor, targets: ActivationStore) -> None:
    train = trainer(tokens, targets, steps=60, val_every=20)
    run(train)
    first, last = train.progress.history[0][1], train.progress.best_loss
    assert last < first - 0.2  # of which the cross-entropy of random tokens is no part


def test_gradients_of_micro_batches_add_up(tokens: Tensor, targets: ActivationStore) -> None:
    whole, split = (
        trainer(tokens, targets, steps=4),
        trainer(tokens, targets, steps=4, micro_batch=1),
    )
    run(whole), run(split)
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(parameter, split.parameters[name], rtol=1e-4, atol=1e-6)


def test_the_graph_of_a_micro_batch_is_gone_before_the_next_one(
    tokens: Tensor, targets: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = trainer(tokens, targets, steps=2, micro_batch=1)
    before: list[weakref.ref[object]] = []

    def looked_at(*args: object) -> Tensor:
        assert not [node for node in before if node() is not None]
        loss = discrepancy(*args)  # type: ignore[arg-type]
        before.append(weakref.ref(loss))
        return loss

    monkeypatch.setattr(train_module, "discrepancy", looked_at)
    run(train)
    assert len(before) == 2 * 4


def test_a_resumed_run_is_identical_to_an_unbroken_one(
    tokens: Tensor, targets: ActivationStore
) -> None:
    unbroken = trainer(tokens, targets)
    states = run(unbroken)
    facts = None
    first = trainer(tokens, targets)

    class Stop(Exception):
        pass

    def commit() -> None:
        nonlocal facts
        facts = first.progress.as_facts()
        if first.progress.step == 4:
            raise Stop

    with pytest.raises(Stop):
        first.run(commit, SilentReporter())
    assert facts is not None
    second = trainer(tokens, targets)
    second.restore(states[1], facts)
    resumed = run(second)
    for name, value in states[-1].items():
        assert torch.equal(value, resumed[-1][name]), name
    assert second.progress == unbroken.progress


def test_step_zero_is_kept_if_training_only_hurts(tokens: Tensor, targets: ActivationStore) -> None:
    train = trainer(tokens, targets, learning_rate=30.0)
    start = {n: p.detach().clone() for n, p in train.parameters.items()}
    run(train)
    assert train.progress.best_step == 0
    train.use_best()
    assert all(torch.equal(p, start[n]) for n, p in train.parameters.items())


def test_training_stops_when_validation_no_longer_gains(
    tokens: Tensor, targets: ActivationStore
) -> None:
    train = trainer(tokens, targets, learning_rate=30.0, steps=400, val_every=1, patience=3)
    run(train)
    assert train.progress.step == 3


def test_a_loss_that_is_not_finite_is_not_applied_and_ends_in_an_error(
    tokens: Tensor, targets: ActivationStore
) -> None:
    train = trainer(tokens, targets)
    student = train.student
    student.head = student.head * float("nan")  # type: ignore[operator]
    before = {n: p.detach().clone() for n, p in train.parameters.items()}
    train.progress.history.append((0, 1.0))  # as if step 0 had been validated
    with pytest.raises(RilqError, match="not finite 3 times in a row at step 2.*\n.*--lr"):
        run(train)
    assert all(torch.equal(p, before[n]) for n, p in train.parameters.items())


def test_rows_come_in_a_new_order_every_epoch_and_all_of_them() -> None:
    order = list(islice(row_order(7, seed=3), 21))
    epochs = [order[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order == list(islice(row_order(7, seed=3), 21))


def test_rate_warms_up_stays_and_falls_to_zero() -> None:
    rates = [learning_rate_at(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == 1.0 == rates[50]
    assert rates[75] == pytest.approx(0.5) and rates[100] == 0
    assert learning_rate_at(0, 1) == 1.0
