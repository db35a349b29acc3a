"""--adapter-init: conversions whose adapters start from a closed form."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rilq.converter import pipeline, workdir
from rilq.progress import SilentReporter

INITS = ["loftq", "eora"]


@pytest.fixture
def unbroken(tmp_path: Path, in_child: Any, quick: Any) -> Callable[..., list[str]]:
    """`unbroken(**options)`: convert to `tmp_path/whole/out`; the commit points in order."""

    def make(**options: Any) -> list[str]:
        folder = tmp_path / "whole"
        folder.mkdir()

        def body() -> None:
            with (folder / "points").open("w") as file:
                workdir.reached = lambda point: print(point, file=file)
                job = pipeline.prepare(quick(folder, **options), SilentReporter())
                pipeline.convert(job, SilentReporter())

        ended = in_child(body)
        assert ended.code == 0, ended.err
        return (folder / "points").read_text().split()

    return make


def quality(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "rilq.json").read_text())["quality"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("init", INITS)
def test_killed_around_a_layer_or_the_first_validation_it_finishes_with_the_same_bytes(
    init: str,
    tmp_path: Path,
    convert: Any,
    quick: Any,
    hashes: Any,
    unbroken: Callable[..., list[str]],
) -> None:
    points = unbroken(quantizer="gptq", adapter_init=init)
    expected = hashes(tmp_path / "whole" / "out")
    # Before and after layer 0 is committed, and before and after step 0 is.
    layers = [i for i, p in enumerate(points, 1) if p.startswith("layers:")][3:6]
    first = [i for i, p in enumerate(points, 1) if p.startswith("train:")][:2]
    for number in layers + first:
        options = quick(tmp_path / str(number), quantizer="gptq", adapter_init=init)
        assert convert(options, at=number).code == -signal.SIGKILL
        ended = convert(options)
        assert ended.code == 0 and "warning" not in ended.err, ended.err
        assert hashes(tmp_path / str(number) / "out") == expected, points[number - 1]


def test_a_damaged_start_is_found_and_made_again(
    tmp_path: Path,
    convert: Any,
    quick: Any,
    hashes: Any,
    unbroken: Callable[..., list[str]],
) -> None:
    points = unbroken(quantizer="gptq", adapter_init="eora")
    options = quick(tmp_path / "other", quantizer="gptq", adapter_init="eora")
    assert convert(options, at=points.index("train:written") + 1).code == -signal.SIGKILL
    path = options.work / "init-0001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    ended = convert(options)
    assert ended.code == 0 and f"{path.name}: missing or damaged" in ended.err
    assert hashes(tmp_path / "other" / "out") == hashes(tmp_path / "whole" / "out")


@pytest.mark.parametrize("init", INITS)
def test_training_starts_from_the_closed_form_and_the_merged_result_is_the_unmerged(
    init: str, tmp_path: Path, convert: Any, quick: Any
) -> None:
    for name, options in {"zero": {}, init: {"adapter_init": init}}.items():
        ended = convert(quick(tmp_path / name, quantizer="rtn", rank=2, **options))
        assert ended.code == 0, ended.err
    zero, found = quality(tmp_path / "zero"), quality(tmp_path / init)
    # Step 0 is the quality of the start, and the student's states were those of the start.
    assert found["validation_loss_before"] != zero["validation_loss_before"]
    pairs = list(zip(found["layer_errors"], zero["layer_errors"], strict=True))
    assert all(of_start < of_zero for of_start, of_zero in pairs), pairs
    assert found["validation_loss_merged"] == pytest.approx(found["validation_loss"], rel=1e-3)
    assert found["merge_max_logit_difference"] < 0.05


def test_the_output_has_the_same_tensors_however_the_adapters_started(
    tmp_path: Path, convert: Any, quick: Any
) -> None:
    names = {}
    for init in ("zero", "eora"):
        assert (
            convert(quick(tmp_path / init, quantizer="rtn", adapter_init=init, adapter="lora")).code
            == 0
        )
        shards = sorted((tmp_path / init / "out").glob("*.safetensors"))
        names[init] = [name for shard in shards for name in load_file(shard)]
    assert names["eora"] == names["zero"]


def test_a_start_without_adapters_is_refused(tmp_path: Path, run_cli: Any, arguments: Any) -> None:
    ended = run_cli(*arguments(tmp_path, "--rank", 0, "--adapter-init", "eora"))
    assert ended.code == 2 and "--adapter-init eora: needs adapters" in ended.err
