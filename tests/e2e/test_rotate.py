"""`--rotate` from end to end: the same function, untied, resumable, and refused by name."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rilq  # noqa: F401  (teaches transformers the native format)
from rilq.converter import pipeline, workdir
from rilq.converter.rotation import ROTATABLE
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder
from rilq.progress import SilentReporter

TOKENS = torch.arange(60).view(2, 30)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """A tied Llama in several shards; tests must not change it."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    return make_model(folder, tie_word_embeddings=True, max_shard_size="90KB")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


def logits_of(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("tied_head", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", ROTATABLE)
def test_unquantized_output_is_the_source_to_float_precision(
    model_type: str,
    tied_head: bool,
    tmp_path: Path,
    make_model: Callable[..., Path],
    run_cli: Any,
    arguments: Any,
) -> None:
    source = make_model(tmp_path / "source", model_type, tie_word_embeddings=tied_head)
    ended = run_cli(
        *arguments(tmp_path, "--rotate", "--skip", "*", "--rank", 0, "--quiet", model=source)
    )
    assert ended.code == 0, ended.err
    before, after = logits_of(source), logits_of(tmp_path / "out")
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    found = tensors_of(tmp_path / "out")
    assert all((t == 1).all() for n, t in found.items() if n.endswith("layernorm.weight"))
    assert "lm_head.weight" in found
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def test_output_loads_verifies_and_is_what_the_plan_said(
    tmp_path: Path, tied: Path, run_cli: Any, arguments: Any
) -> None:
    options = ("--rotate", "--json")
    words = arguments(tmp_path, *options, model=tied)
    planned = run_cli(*arguments(tmp_path, *options, model=tied, command="plan"))
    plan = json.loads(planned.out)
    ended = run_cli(*words)
    assert ended.code == 0, ended.err
    out = tmp_path / "out"
    assert run_cli("verify", out).code == 0
    assert plan["output_bytes"] == sum(t.nbytes for t in tensors_of(out).values())
    size = sum(t.nbytes for t in tensors_of(tied).values())
    assert json.loads(ended.out)["bytes_read"] == size == plan["read_bytes"]
    assert plan["notes"][-1].startswith("rotated: the head is no longer tied")
    assert json.loads((out / "rilq.json").read_text())["recipe"]["rotate"] is True
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generate(TOKENS[:, :4], max_new_tokens=3, do_sample=False).shape[1] > 4


def test_eight_bits_of_a_rotated_model_come_close_to_the_source(
    tmp_path: Path, tied: Path, run_cli: Any, arguments: Any
) -> None:
    ended = run_cli(*arguments(tmp_path, "--rotate", "--bits", 8, "--rank", 0, model=tied))
    assert ended.code == 0, ended.err
    expected = logits_of(tied)
    assert (logits_of(tmp_path / "out") - expected).norm() < 0.02 * expected.norm()


@pytest.mark.slow
def test_stopped_anywhere_it_continues_to_the_same_bytes(
    tmp_path: Path, tied: Path, in_child: Any, convert: Any, quick: Any, hashes: Any
) -> None:
    points = tmp_path / "points"

    def record() -> None:
        with points.open("w") as file:
            workdir.reached = lambda point: print(point, file=file)
            options = quick(tmp_path / "whole", model=str(tied), rotate=True)
            pipeline.convert(pipeline.prepare(options, SilentReporter()), SilentReporter())

    assert in_child(record).code == 0
    whole = hashes(tmp_path / "whole" / "out")
    names = points.read_text().split()
    for number in [i for i, name in enumerate(names, start=1) if name.endswith(":committed")]:
        folder = tmp_path / str(number)
        options = quick(folder, model=str(tied), rotate=True)
        assert convert(options, at=number).code == -signal.SIGKILL
        ended = convert(options)
        assert ended.code == 0 and "warning" not in ended.err, (names[number - 1], ended.err)
        assert hashes(folder / "out") == whole, names[number - 1]


@pytest.mark.parametrize("touch", ["touched", "changed"])
def test_a_source_that_changed_since_is_told_from_one_that_was_touched(
    touch: str, tmp_path: Path, tied: Path, convert: Any, quick: Any
) -> None:
    source = shutil.copytree(tied, tmp_path / "model")
    options = quick(tmp_path, model=str(source), rotate=True, rank=0, quantizer="rtn")
    assert convert(options, at=9).code == -signal.SIGKILL  # the embedding has been read
    checkpoint, name = Checkpoint.open(LocalFolder(source)), "model.embed_tokens.weight"
    shard = checkpoint.shard_of[name]
    assert list(checkpoint.headers[shard].tensors) == [name]
    content = bytearray((source / shard).read_bytes())
    content[-4] ^= touch == "changed"  # the lowest bit of the last element
    (source / shard).write_bytes(content)
    ended = convert(options)
    if touch == "touched":
        assert ended.code == 0 and "continuing after" in ended.err, ended.err
    else:
        assert ended.code == 2, ended.err
        assert f"{source}/{shard}: the source changed since" in ended.err
        assert "lm_head.weight differs" in ended.err or "embed_tokens.weight differs" in ended.err


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_an_architecture_that_cannot_be_rotated_is_refused_before_any_work(
    command: str, tmp_path: Path, make_model: Callable[..., Path], run_cli: Any, arguments: Any
) -> None:
    source = make_model(tmp_path / "source", "gemma2")
    ended = run_cli(*arguments(tmp_path, "--rotate", command=command, model=source))
    assert ended.code == 2 and "Traceback" not in ended.err
    assert "--rotate: Gemma 2 cannot be rotated" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
