"""rilq from Python does what the command does, and the example that shows it runs."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rilq
from rilq.errors import CheckpointError, OptionError

EXAMPLES = Path(__file__).parents[2] / "examples"
Run = Callable[..., Any]


@pytest.fixture
def settings(calib: Path) -> dict[str, Any]:
    """The options of `arguments`, as a Python caller writes them."""
    return dict(
        group_size=32, layer_steps=3, nsamples=12, seqlen=32, learning_rate=1e-3, steps=4,
        batch_size=8, val_every=2, max_shard_size="40kB", device="cpu", dataset=calib,
    )  # fmt: skip


def test_every_public_name_is_found() -> None:
    assert {"plan", "convert", "evaluate", "load"} <= set(dir(rilq))
    for name in rilq._HOMES:
        assert getattr(rilq, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        rilq.convrt  # noqa: B018


def test_python_writes_the_bytes_that_the_command_writes(
    tmp_path: Path,
    in_child: Run,
    run_cli: Run,
    arguments: Run,
    tiny_llama: Path,
    settings: dict[str, Any],
    hashes: Run,
) -> None:
    more = ("--bits-for", "down_proj=4", "--skip", "layers.1.mlp.up_proj", "--recipe", "fast")
    assert run_cli(*arguments(tmp_path, *more)).code == 0

    def convert() -> None:
        result = rilq.convert(
            tiny_llama,
            recipe="fast",
            skip=["layers.1.mlp.up_proj"],
            bits_for={"down_proj": 4},
            output_dir=str(tmp_path / "python"),
            exports={"dense": tmp_path / "dense"},
            **settings,
        )
        assert [each.output for each in result.exports] == [tmp_path / "dense"]
        assert result.output == tmp_path / "python" and not result.already_done
        assert result.plan.layers == 2 and len(result.plan.kept) == 1

    ended = in_child(convert)
    assert ended.code == 0, ended.err
    assert hashes(tmp_path / "python") == hashes(tmp_path / "out")


def test_an_export_that_the_result_cannot_be_written_as_is_refused_before_the_work(
    tmp_path: Path, tiny_llama: Path, settings: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(rilq.InputError, match="--keep-adapter"):
        rilq.convert(tiny_llama, output_dir=out, exports={"gptq": tmp_path / "gptq"}, **settings)
    assert not list(tmp_path.iterdir())


def test_plan_touches_nothing_and_says_what_does_not_fit(
    tmp_path: Path, tiny_llama: Path, settings: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    plan = rilq.plan(tiny_llama, output_dir=out, **settings)
    rilq.check_fits(plan)
    assert plan.layers == 2 and plan.host_bytes < plan.host_free
    large = rilq.plan(tiny_llama, output_dir=out, **{**settings, "nsamples": 10**12})
    with pytest.raises(rilq.InputError, match="needed"):
        rilq.check_fits(large)
    assert not list(tmp_path.iterdir())


def test_what_planned_raises_ends_the_call_before_any_work(
    tmp_path: Path, tiny_llama: Path, settings: dict[str, Any]
) -> None:
    def refuse(plan: Any) -> NoReturn:
        raise ValueError(f"{plan.layers} layers are too many")

    with pytest.raises(ValueError, match="2 layers are too many"):
        rilq.convert(tiny_llama, planned=refuse, output_dir=tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_wrong_options_are_refused_as_python_and_as_the_command_refuse_them() -> None:
    with pytest.raises(TypeError, match="bist"):
        rilq.plan("some/model", bist=2)
    with pytest.raises(OptionError, match="--bits 5: expected one of 2, 3, 4, 8"):
        rilq.plan("some/model", bits=5)
    with pytest.raises(OptionError, match="--recipe slow"):
        rilq.convert("some/model", recipe="slow")
    with pytest.raises(TypeError, match="bits: set them in the ConvertOptions"):
        rilq.plan(rilq.ConvertOptions("some/model"), bits=2)  # type: ignore[call-overload]


@pytest.mark.parametrize("adapter", ["pooled", "lora"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_load_gives_the_model_with_its_adapter(
    adapter: str, tmp_path: Path, run_cli: Run, arguments: Run
) -> None:
    assert run_cli(*arguments(tmp_path, "--adapter", adapter, "--quantizer", "rtn")).code == 0
    out = tmp_path / "out"
    model, tokenizer = rilq.load(out, device="cpu")
    tokens = tokenizer("the cat sat", return_tensors="pt").input_ids
    with torch.no_grad():
        found = model(tokens).logits
        base = AutoModelForCausalLM.from_pretrained(out)
        plain = base(tokens).logits
        wanted = plain
        if adapter == "lora":
            wanted = PeftModel.from_pretrained(base, out / "adapter")(tokens).logits
            assert not torch.equal(wanted, plain)
    assert torch.equal(found, wanted)
    assert not model.training


def test_load_names_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: transformers cannot load it"):
        rilq.load(tmp_path)


def test_example_plans_converts_evaluates_and_generates(
    tmp_path: Path, in_child: Run, tiny_llama: Path, calib: Path
) -> None:
    def example() -> None:
        sys.argv = ["python_api.py", str(tiny_llama), str(tmp_path / "out")]
        sys.argv += ["--calibration", str(calib), "--text", str(calib)]
        sys.argv += ["--steps", "10", "--seqlen", "32"]
        runpy.run_path(str(EXAMPLES / "python_api.py"), run_name="__main__")

    ended = in_child(example)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].startswith("2 layers, 14 linears, about")
    assert any(line.startswith("update 10: loss") for line in lines)
    assert sum("perplexity" in line for line in lines) == 2
    assert lines[-1].startswith("The city")
