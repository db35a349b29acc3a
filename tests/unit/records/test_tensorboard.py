"""TensorBoard's files, read back by its own reader."""

import sys
from pathlib import Path

import pytest

from rilq.errors import OptionError, OutputError
from rilq.records.run import LayerFigure, LossPoint, Run, Sample
from rilq.records.tensorboard import write_events

RUN = Run(
    7, "convert", 1_700_000_000.0, 20.0, "done", "m", "c", "/c",
    recipe={"bits": 2},
    figures={"perplexity": 19.5},
    losses=(
        LossPoint("validation", "total", 0, 1.5),
        LossPoint("validation", "total", 50, 1.25),
        LossPoint("train", "kl", 50, 0.5),
    ),
    layers=(LayerFigure(0, 0.125, 2.5), LayerFigure(1, 0.25, None)),
    samples=(Sample(1.0, 10**9, None, 10**10), Sample(2.0, 10**9, 5, 10**10)),
)  # fmt: skip


def test_all_series_are_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = write_events(RUN, tmp_path / "events")
    assert place == tmp_path / "events" / "run-7"
    assert [path.name for path in (tmp_path / "events").iterdir()] == ["run-7"]
    found = EventAccumulator(str(place))
    found.Reload()
    series = {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }
    assert series == {
        "loss/validation/total": [(0, 1.5), (50, 1.25)],
        "loss/train/kl": [(50, 0.5)],
        "figures/perplexity": [(0, 19.5)],
        "layers/error": [(0, 0.125), (1, 0.25)],
        "layers/bits": [(0, 2.5)],
        "machine/host_bytes": [(1, 1e9), (2, 1e9)],
        "machine/disk_free_bytes": [(1, 1e10), (2, 1e10)],
        "machine/device_bytes": [(2, 5)],
    }
    assert found.Scalars("machine/host_bytes")[1].wall_time == RUN.started + 2
    text = found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"bits": 2' in text


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    write_events(RUN, tmp_path)
    with pytest.raises(OutputError, match="run-7: is there already"):
        write_events(RUN, tmp_path)


def test_a_missing_package_is_one_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OptionError, match=r"\n  pip install 'rilq\[tensorboard\]'"):
        write_events(RUN, tmp_path)
    assert list(tmp_path.iterdir()) == []
