"""Speed and memory of a model loaded in a process of its own."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from rilq.errors import InputError
from rilq.evaluation.speed import measure_speed
from rilq.evaluation.whole import HEADROOM, Place
from rilq.progress import SilentReporter


class Said(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_memory_is_that_of_the_model_and_not_of_the_libraries(
    tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A module of a name that is imported, in the current folder.
    (tmp_path / "statistics.py").write_text("raise SystemExit('the wrong one')\n")
    monkeypatch.chdir(tmp_path)
    folder = make_model(tmp_path / "model", hidden_size=64, vocab_size=100_000)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))  # 51 MB
    report = Said()
    found = measure_speed(Place(str(folder), device="cpu", dtype="float32"), report)
    assert found is not None, report.warnings
    assert not report.warnings
    # Weights, and their file as far as it is mapped; an interpreter with torch holds 400 MB.
    assert size <= found.host_bytes <= 2 * size + 150e6
    assert (found.device_bytes, found.dtype) == (None, "float32")
    assert found.device.startswith("cpu, ")
    assert (found.prompt_tokens, found.new_tokens) == (96, 32)  # of a context of 128
    assert found.prefill_tokens_per_s > found.decode_tokens_per_s > 0
    assert found.load_seconds > 0


def test_a_model_larger_than_free_memory_is_passed_over_with_a_note(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in tiny_llama.glob("*.safetensors"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size // 2))
    report = Said()
    place = Place(str(tiny_llama), device="cpu")
    assert measure_speed(place, report) is None
    assert report.notes and report.notes[0].startswith("not measured: speed: ")
    with pytest.raises(InputError, match="--tasks: .* has to be in memory as a whole"):
        place.check_room("--tasks")


def test_room_counts_the_dtype_that_is_loaded(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Place(str(tiny_llama), device="cpu").check_room("speed")
    half = int(checkpoint.total_bytes / 2 * HEADROOM) + 1
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=half))
    Place(str(tiny_llama), device="cpu", dtype="bfloat16").check_room("speed")
    with pytest.raises(InputError):
        Place(str(tiny_llama), device="cpu", dtype="float32").check_room("speed")


@pytest.mark.slow  # a process that imports torch, for one line
def test_a_model_that_cannot_be_loaded_gives_a_warning_and_no_figures(
    tiny_llama: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{}")
    report = Said()
    assert measure_speed(Place(str(broken), device="cpu"), report) is None
    (warning,) = report.warnings
    assert warning.startswith("speed and memory were not measured: the process that did it ended")
    assert "\n" not in warning


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_its_memory_is_measured_too(tiny_llama: Path) -> None:
    found = measure_speed(Place(str(tiny_llama), device="cuda"), Said())
    size = sum(path.stat().st_size for path in tiny_llama.glob("*.safetensors"))
    assert found is not None and found.device_bytes is not None
    assert found.device_bytes >= 0.9 * size  # headers are not loaded
