import pytest
import torch

from rilq.converter.ranks import ALONE, Ranks, _buckets, launched, most_rows


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 320])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_row_has_one_process(rows: int, count: int) -> None:
    everybody = [Ranks(index, count) for index in range(count)]
    assert [row for ranks in everybody for row in ranks.share(rows)] == list(range(rows))
    assert tuple(ranks.share(rows).start for ranks in everybody) == everybody[0].starts(rows)
    sizes = [len(ranks.share(rows)) for ranks in everybody]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == most_rows(rows, count)


def test_one_alone_changes_nothing() -> None:
    tensor = torch.ones(3)
    parameter = torch.nn.Parameter(torch.ones(2))
    ALONE.add_gradients([parameter])
    assert ALONE.added(tensor) is tensor
    assert parameter.grad is None
    assert ALONE.gather("x") == ["x"]
    assert ALONE.first and not ALONE.several


def test_rows_that_are_too_few_to_share_are_made_by_everybody() -> None:
    """Without a word to the others: there are none here that could answer."""
    for ranks in (ALONE, Ranks(2, 3)):
        (made,) = ranks.by_rows(2, lambda rows: (torch.arange(10)[rows],))
        assert made.tolist() == [0, 1]


class Twins(Ranks):
    """Two processes that have the same."""

    def added(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


def test_gradients_are_added_up_and_where_nobody_has_one_there_is_none() -> None:
    """As of an expert that no token chose: Adam takes no step with it, in one process or many."""
    parameters = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 3), 1.5)
    parameters[2].grad = torch.zeros(2, 3)
    Twins(count=2).add_gradients(parameters)
    assert torch.equal(parameters[0].grad, torch.full((2, 3), 3.0))
    assert parameters[1].grad is None
    assert torch.equal(parameters[2].grad, torch.zeros(2, 3))


def test_gradients_go_in_buckets_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rilq.converter.ranks.BUCKET", 40)
    parameters = [torch.zeros(size) for size in (4, 6, 1, 20, 2)]
    assert [[p.numel() for p in b] for b in _buckets(parameters)] == [[4, 6], [1], [20], [2]]


def test_a_launcher_is_recognised_by_what_it_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() == (0, 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "2")
    assert launched() == (2, 4)
