"""`--keep-adapter`: beside the merged result, the base with integer zero-points and its adapter."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rilq  # noqa: F401  (teaches transformers the native format)
from rilq.converter import workdir
from rilq.converter.options import QUANTIZERS
from rilq.formats.packed_linear import RilqLinear

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Run = Callable[..., Any]

KEEP = ("--zero-point", "integer", "--keep-adapter")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def converted(tmp_path: Path, run_cli: Run, arguments: Run) -> Callable[..., dict[str, Any]]:
    """`converted(*options, folder=..., model=...)`: run the command; what `--json` said."""

    def make(*more: object, folder: str = "", **model: Path) -> dict[str, Any]:
        ended = run_cli(*arguments(tmp_path / folder, *KEEP, *more, "--json", **model))
        assert ended.code == 0, ended.err
        told: dict[str, Any] = json.loads(ended.out)
        return told | {"said": ended.err}

    return make


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


def integers_of(out: Path) -> dict[str, Tensor]:
    """Zero-points of the integer base, by linear."""
    stored = load_file(out / "integer-base" / "zero_points.safetensors")
    return {name.removesuffix(".integer_zero_point"): zero for name, zero in stored.items()}


def dense_base(out: Path) -> Any:
    """The integer base as a float model: the checkpoint's codes and scales, its own zero-points."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name, zero in integers_of(out).items():
        model.get_submodule(name).zero_point.copy_(zero.half())
    return model.dequantize(torch.float32)


def check_integers(out: Path, bits: int = 2) -> None:
    """The base's zero-points are codes, of every linear, and merging has changed them all."""
    zeros, merged = integers_of(out), tensors_of(out)
    assert {f"{name}.zero_point" for name in zeros} == {n for n in merged if "zero_point" in n}
    for name, zero in zeros.items():
        assert zero.dtype == torch.uint8 and int(zero.max()) <= 2**bits - 1
        assert not torch.equal(merged[f"{name}.zero_point"], zero.half())
    assert len({int(z) for zero in zeros.values() for z in zero.unique()}) > 1


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_zero_points_of_the_base_are_integers_of_every_quantizer(
    quantizer: str, converted: Run, tmp_path: Path
) -> None:
    converted("--quantizer", quantizer)
    check_integers(tmp_path / "out")


@pytest.mark.parametrize(
    ("train", "model_type"),
    [("adapters", "llama"), ("adapters+scales", "llama"), ("adapters+scales", "gemma2")],
)
def test_base_with_its_adapter_in_peft_is_the_merged_checkpoint(
    train: str, model_type: str, converted: Run, make_model: Run, tmp_path: Path, run_cli: Run
) -> None:
    source = make_model(tmp_path / "source", model_type)
    told = converted("--train", train, "--quantizer", "rtn", model=source)
    out = tmp_path / "out"
    tokens = torch.arange(3, 67).view(2, 32)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    beside = PeftModel.from_pretrained(dense_base(out), out / "integer-base" / "adapter")
    with torch.no_grad():
        wanted, found = merged(tokens).logits, beside(tokens).logits
        with beside.disable_adapter():
            alone = beside(tokens).logits
    # A merged zero-point of up to 4 is exact to 2^-10 of a step in float16.
    bound = 0.05 * (alone - wanted).abs().max()
    assert (found - wanted).abs().max() < bound
    assert told["quality"]["kept_max_logit_difference"] < bound
    check_integers(out)
    assert run_cli("verify", out).code == 0


def test_figures_say_what_integer_zero_points_cost_and_what_the_adapter_is_worth(
    converted: Run, tmp_path: Path
) -> None:
    told = converted("--quantizer", "lsq", "--steps", 20, "--val-every", 10)
    quality, said = told["quality"], told["said"]
    errors = quality["rounding_error"]
    assert 0 < errors["real"] < errors["integer"] < 1
    assert f"{errors['integer']:.4f}" in said and f"{errors['real']:.4f}" in said
    # Unmerged, merged, and base with adapter are one model but for the rounding to float16.
    trained = quality["validation_loss"]
    assert quality["validation_loss_merged"] == pytest.approx(trained, rel=1e-3)
    assert quality["validation_loss_kept"] == pytest.approx(trained, rel=1e-3)
    assert quality["validation_loss_integer_base"] > trained + 1e-3
    assert f"{quality['validation_loss_integer_base']:.4f}" in said


def test_rounding_error_is_that_of_the_weights(
    converted: Run, tmp_path: Path, tiny_llama: Path
) -> None:
    """`rtn --clip lsq` rounds as the figure does, so that its output must have this error."""
    told = converted("--quantizer", "rtn", "--clip", "lsq", "--train", "adapters")
    base, source = dense_base(tmp_path / "out"), tensors_of(tiny_llama)
    apart = size = 0.0
    for name in integers_of(tmp_path / "out"):
        weight = source[f"{name}.weight"]
        apart += (base.get_submodule(name).weight - weight).square().sum().item()
        size += weight.square().sum().item()
    assert told["quality"]["rounding_error"]["integer"] == pytest.approx(apart / size, rel=1e-4)


def test_merged_result_is_the_same_with_and_without_what_is_kept(
    converted: Run, tmp_path: Path, run_cli: Run, arguments: Run
) -> None:
    converted(folder="kept")
    ended = run_cli(*arguments(tmp_path / "plain", "--zero-point", "integer"))
    assert ended.code == 0, ended.err
    kept, plain = (tensors_of(tmp_path / name / "out") for name in ("kept", "plain"))
    assert kept.keys() == plain.keys() and all(torch.equal(kept[n], plain[n]) for n in kept)
    assert not (tmp_path / "plain" / "out" / "integer-base").exists()


def test_zero_points_fit_the_bits_of_each_linear(converted: Run, tmp_path: Path) -> None:
    converted("--avg-bits", 2.5, "--quantizer", "rtn", "--embed-bits", 8)
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    bits = {n: m.bits for n, m in model.named_modules() if isinstance(m, RilqLinear)}
    largest = {name: int(zero.max()) for name, zero in integers_of(out).items()}
    assert largest.keys() == bits.keys()
    assert set(bits.values()) > {2}
    assert all(largest[name] < 2 ** bits[name] for name in bits)
    assert any(largest[name] > 3 for name in bits)


def test_plan_counts_what_is_kept(converted: Run, tmp_path: Path) -> None:
    told = converted("--rank", 3, "--quantizer", "rtn")
    out = tmp_path / "out"
    kept = [load_file(p) for p in (out / "integer-base").rglob("*.safetensors")]
    beside = sum(t.nbytes for each in kept for t in each.values())
    written = beside + sum(t.nbytes for t in tensors_of(out).values())
    assert len(kept) == 2 and told["plan"]["output_bytes"] == written


def test_verify_finds_a_flipped_byte_in_every_kept_file(
    converted: Run, tmp_path: Path, run_cli: Run
) -> None:
    converted("--quantizer", "rtn")
    out = tmp_path / "out"
    files = [path for path in (out / "integer-base").rglob("*") if path.is_file()]
    assert len(files) == 3
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        ended = run_cli("verify", out)
        assert ended.code == 1 and path.name in ended.err
        path.write_bytes(whole)
    assert run_cli("verify", out).code == 0


def test_killed_before_it_is_published_it_finishes_with_the_same_bytes(
    tmp_path: Path, run_cli: Run, arguments: Run, hashes: Run
) -> None:
    def die_before_publishing() -> None:
        workdir.reached = lambda point: kill_self() if point == "publish:before" else None

    words = (*KEEP, "--quantizer", "rtn")
    assert run_cli(*arguments(tmp_path / "whole", *words)).code == 0
    killed = arguments(tmp_path / "killed", *words)
    assert run_cli(*killed, first=die_before_publishing).code == -signal.SIGKILL
    assert run_cli(*killed).code == 0
    whole, resumed = (hashes(tmp_path / name / "out") for name in ("whole", "killed"))
    assert whole == resumed and "integer-base/adapter/adapter_config.json" in whole


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--keep-adapter",), ("--keep-adapter", "--zero-point real", "add --zero-point integer")),
        ((*KEEP, "--train", "all+codes"), ("--keep-adapter", "--train all+codes", "use --train")),
        ((*KEEP, "--rank", 0), ("--keep-adapter", "--rank 0")),
    ],
)
def test_a_contradiction_is_refused_and_names_both_options(
    words: tuple[object, ...],
    named: tuple[str, ...],
    tmp_path: Path,
    run_cli: Run,
    arguments: Run,
) -> None:
    ended = run_cli(*arguments(tmp_path, *words))
    assert ended.code == 2 and all(name in ended.err for name in named), ended.err
    assert "Traceback" not in ended.err and not list(tmp_path.iterdir())
