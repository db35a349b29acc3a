"""--avg-bits: linears with more bits where that was measured to gain most."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rilq.converter import pipeline, workdir
from rilq.formats.packed_linear import RilqLinear
from rilq.formats.packing import dequantize_packed
from rilq.progress import SilentReporter

Run = Callable[..., Any]
GPTQ = ("--quantizer", "gptq")


@pytest.fixture
def converted(tmp_path: Path, run_cli: Run, arguments: Run) -> Callable[..., dict[str, Any]]:
    """`converted(folder, *more options)`: run the command; what `--json` said."""

    def make(folder: str, *more: object) -> dict[str, Any]:
        ended = run_cli(*arguments(tmp_path / folder, *more, "--json"))
        assert ended.code == 0, ended.err
        told: dict[str, Any] = json.loads(ended.out)
        return told

    return make


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


@pytest.mark.parametrize("base", ["gptq", "hqq", "signround"])
def test_every_consumer_honours_the_bits_and_the_average_is_met(
    base: str, converted: Run, tmp_path: Path, run_cli: Run
) -> None:
    told = converted("a", "--quantizer", base, "--layer-steps", 3, "--avg-bits", 2.5)
    out = tmp_path / "a" / "out"
    manifest = json.loads((out / "rilq.json").read_text())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    chosen = manifest["quality"]["bits"]["chosen"]
    assert config["bits_for"] == chosen and set(chosen.values()) <= {3, 4}
    assert config["bits"] == 2 and manifest["recipe"]["avg_bits"] == 2.5
    model = AutoModelForCausalLM.from_pretrained(out)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, RilqLinear)}
    assert {n: m.bits for n, m in linears.items() if m.bits != 2} == chosen
    weights = {n: m.out_features * m.in_features for n, m in linears.items()}
    average = sum(w * linears[n].bits for n, w in weights.items()) / sum(weights.values())
    assert average == manifest["quality"]["bits"]["average"] == 2.5
    # 16-bit scale and zero-point for each group of 32.
    assert manifest["bits_per_weight"] == told["plan"]["bits_per_weight"] == 2.5 + 1
    assert told["plan"]["output_bytes"] == sum(t.nbytes for t in tensors_of(out).values())
    assert manifest["bits_per_parameter"] == pytest.approx(told["plan"]["bits_per_parameter"])
    assert run_cli("verify", out).code == 0


def test_output_is_that_of_the_same_bits_given_by_name(converted: Run, tmp_path: Path) -> None:
    """Plain rounding of one linear knows nothing of the others'."""
    rtn = ("--quantizer", "rtn", "--rank", 0)
    told = converted("a", *rtn, "--avg-bits", 2.7)
    chosen = told["quality"]["bits"]["chosen"]
    assert chosen
    converted("b", *rtn, *(w for n, b in chosen.items() for w in ("--bits-for", f"{n}={b}")))
    found, expected = (tensors_of(tmp_path / name / "out") for name in "ab")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_gains_are_those_of_the_layer_with_one_linear_replaced(
    converted: Run, tmp_path: Path, tiny_llama: Path
) -> None:
    told = converted("a", *GPTQ, "--rank", 0, "--avg-bits", 2.5, "--keep-work")
    work = tmp_path / "a" / "out.rilq-work"
    rows = load_file(work / "rows.safetensors")["tokens"][:10]  # 2 of 12 are for validation
    files = {2: work / "layer-0000.safetensors"}
    files |= {bits: work / f"layer-0000-bits-{bits}.safetensors" for bits in (3, 4)}
    stored = {bits: load_file(path) for bits, path in files.items()}
    gains = {n: g for n, g in told["quality"]["bits"]["gains"].items() if ".layers.0." in n}
    assert len(gains) == 7

    def output(bits: dict[str, int]) -> Tensor:
        """Of decoder layer 0 with its linears in so many bits."""
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        with torch.no_grad():
            for name, value in bits.items():
                parts = [
                    stored[value][f"{name}.{p}"] for p in ("weight", "weight_scale", "zero_point")
                ]
                weight = dequantize_packed(*parts, value, dtype=torch.float32)
                model.get_parameter(f"{name}.weight").copy_(weight)
            return model(rows, output_hidden_states=True).hidden_states[1]

    wanted = output({})
    base = dict.fromkeys(gains, 2)

    def error(bits: dict[str, int]) -> float:
        return ((output(bits) - wanted).square().sum() / wanted.square().sum()).item()

    for name, by_bits in gains.items():
        for bits, gain in by_bits.items():
            expected = error(base) - error(base | {name: int(bits)})
            assert gain == pytest.approx(expected, abs=1e-6), (name, bits)


def test_trained_scales_and_adapters_merge_into_a_mixed_base(converted: Run) -> None:
    quality = converted("a", *GPTQ, "--avg-bits", 2.5, "--loss", "mse+ce")["quality"]
    assert quality["best_step"] > 0
    assert quality["validation_loss_merged"] == pytest.approx(quality["validation_loss"], rel=1e-3)
    assert quality["merge_max_logit_difference"] < 0.05


def test_the_base_as_average_is_the_conversion_without(converted: Run, tmp_path: Path) -> None:
    converted("a", *GPTQ, "--avg-bits", 2)
    converted("b", *GPTQ)
    found, expected = (tensors_of(tmp_path / name / "out") for name in "ab")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_killed_around_layers_and_the_choice_it_finishes_with_the_same_bytes(
    tmp_path: Path, in_child: Run, convert: Run, quick: Run, hashes: Run
) -> None:
    given = {"quantizer": "gptq", "avg_bits": 2.5}
    points = tmp_path / "points"

    def body() -> None:
        with points.open("w") as file:
            workdir.reached = lambda point: print(point, file=file)
            job = pipeline.prepare(quick(tmp_path / "whole", **given), SilentReporter())
            pipeline.convert(job, SilentReporter())

    ended = in_child(body)
    assert ended.code == 0, ended.err
    expected = hashes(tmp_path / "whole" / "out")
    names = points.read_text().split()
    assert names.count("bits:committed") == 1
    moments = [i for i, n in enumerate(names, 1) if n.startswith(("layers:", "bits:"))]
    # The embedding's three are no news.
    later = [names.index("train:committed") + 1, names.index("shards:committed") + 1]
    for number in moments[3:] + later:
        options = quick(tmp_path / str(number), **given)
        assert convert(options, at=number).code == -signal.SIGKILL
        ended = convert(options)
        assert ended.code == 0 and "warning" not in ended.err, ended.err
        assert hashes(tmp_path / str(number) / "out") == expected, names[number - 1]


def kill_at_the_choice() -> None:
    """Called in a child: it kills itself once the choice is in the journal."""

    def reached(point: str) -> None:
        if point == "bits:committed":
            os.kill(os.getpid(), signal.SIGKILL)

    workdir.reached = reached


def test_a_damaged_alternative_is_named_and_made_again(
    tmp_path: Path, run_cli: Run, arguments: Run, converted: Run, hashes: Run
) -> None:
    given = ("--quantizer", "rtn", "--rank", 0, "--avg-bits", 2.5)
    converted("whole", *given)
    words = arguments(tmp_path / "other", *given)
    assert run_cli(*words, first=kill_at_the_choice).code == -signal.SIGKILL
    damaged = tmp_path / "other" / "out.rilq-work" / "layer-0001-bits-3.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    ended = run_cli(*words)
    assert ended.code == 0 and f"{damaged}: missing or damaged" in ended.err
    assert hashes(tmp_path / "other" / "out") == hashes(tmp_path / "whole" / "out")


def test_plan_counts_the_alternatives_on_disk(converted: Run, tmp_path: Path) -> None:
    rtn = ("--quantizer", "rtn", "--rank", 0, "--keep-work")
    # An average of the base's bits: the output is the same, and only the alternatives are more.
    told = [converted("a", *rtn, "--avg-bits", 2), converted("b", *rtn)]
    planned = [sum(disk["needed"] for disk in each["plan"]["disks"]) for each in told]
    files = (tmp_path / "a" / "out.rilq-work").glob("layer-*-bits-*.safetensors")
    stored = [tensor.nbytes for file in files for tensor in load_file(file).values()]
    assert len(stored) == 2 * 14 * 3 and planned[0] - planned[1] == sum(stored)


def test_plan_for_people_says_the_average(tmp_path: Path, run_cli: Run, arguments: Run) -> None:
    ended = run_cli(*arguments(tmp_path, "--avg-bits", 2.3, command="plan"))
    assert ended.code == 0 and "2.3 bits on average" in " ".join(ended.out.split())
    assert not list(tmp_path.iterdir())
