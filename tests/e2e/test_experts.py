"""Mixtures of experts, converted for real: quantizers, rare experts, little memory, resuming."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_examples import MIXTURES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rilq  # noqa: F401  (teaches transformers the native format)
from rilq.converter.experts import DATA_FREE
from rilq.evaluation.report.subject import folder_subject
from rilq.formats.native import native_tensors
from rilq.formats.packed_linear import RilqLinear
from rilq.formats.spec import QuantSpec

QUICK = "--group-size 32 --nsamples 10 --seqlen 24 --device cpu --layer-steps 3"
MANY: dict[str, Any] = {**MIXTURES["qwen3_moe"], "num_experts": 16}


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> Callable[[str], Path]:
    """`sources(name)`: a random mixture, made once; `many` has more experts than tokens reach."""
    root = tmp_path_factory.mktemp("mixtures")

    def source(name: str) -> Path:
        if not (root / name).exists():
            overrides = MANY if name == "many" else MIXTURES[name]
            make_model(root / name, "qwen3_moe" if name == "many" else name, **overrides)
        return root / name

    return source


@pytest.fixture
def quickly(run_cli: Callable[..., Any], calib: Path) -> Callable[..., Any]:
    """`quickly(source, out, *more)`: the command, and how it ended."""

    def run(source: Path, out: Path, *more: object, command: str = "convert") -> Any:
        return run_cli(command, source, "--dataset", calib, *QUICK.split(), "-o", out, *more)

    return run


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def test_experts_are_packed_and_run_as_the_evaluation_runs_them(
    tmp_path: Path,
    sources: Any,
    quickly: Any,
    run_cli: Any,
    calib: Path,
) -> None:
    out = tmp_path / "out"
    ended = quickly(sources("mixtral"), out, "--quantizer", "gptq", "--rank", 0)
    assert ended.code == 0, ended.err
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    expert = model.model.layers[1].mlp.experts.get_submodule("3.w2")
    assert isinstance(expert, RilqLinear)
    assert expert is model.get_submodule("model.layers.1.block_sparse_moe.experts.3.w2")
    assert not isinstance(model.get_submodule("model.layers.1.mlp.gate"), RilqLinear)
    tokens = torch.arange(40, 72)[None]
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 35)
    model.save_pretrained(tmp_path / "again")
    before, again = stored(out), stored(tmp_path / "again")
    assert before.keys() == again.keys()
    assert all(torch.equal(before[name], again[name]) for name in before)
    ended = run_cli("eval", out, "--text", calib, "--seqlen", 32, "--json", "--device", "cpu")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["perplexity"] > 1, found


def test_experts_that_saw_too_few_tokens_are_quantized_without_data_and_listed(
    tmp_path: Path, sources: Any, quickly: Any
) -> None:
    """480 choices of 240 tokens are shared out over 16 experts; an expert needs 64."""
    source, out = sources("many"), tmp_path / "out"
    ended = quickly(source, out, "--quantizer", "gptq", "--rank", 0)
    assert ended.code == 0, ended.err
    quality = json.loads((out / "rilq.json").read_text())["quality"]
    listed = quality["experts_without_data"]
    linears = [n.removesuffix(".weight") for n in stored(source) if ".experts." in n]
    assert 0 < len(listed) < len(linears)
    assert all(count < 64 for count in listed.values())
    assert f"{len(listed)} linears of experts saw too few tokens" in ended.err
    for least, _, most in quality["expert_tokens"]:
        assert least < 64 < most
    dense, packed = stored(source), stored(out)
    for name in linears:
        alone = native_tensors(name, DATA_FREE.quantize(dense[f"{name}.weight"], QuantSpec(2, 32)))
        same = all(torch.equal(packed[key], value) for key, value in alone.items())
        assert same == (name in listed), name
    shown = folder_subject(out)
    assert dict(shown.experts_without_data) == listed
    assert [list(each) for each in shown.expert_tokens] == quality["expert_tokens"]


def test_an_offloaded_mixture_is_trained_as_a_packed_one(
    tmp_path: Path, sources: Any, quickly: Any
) -> None:
    """Its first layer has no experts."""
    losses = []
    for tier in ("packed", "offload"):
        ended = quickly(
            *(sources("deepseek_v3"), tmp_path / tier, "--quantizer", "rtn", "--student", tier),
            *("--rank", 4, "--adapter-targets", "all", "--steps", 6, "--val-every", 2),
        )
        assert ended.code == 0, ended.err
        quality = json.loads((tmp_path / tier / "rilq.json").read_text())["quality"]
        losses.append([loss for _, loss in quality["history"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert all(abs(loss - losses[0][0]) > 1e-4 * losses[0][0] for loss in losses[0][1:])


@pytest.mark.parametrize("quantizer", ["gptq", "blockap"])
def test_a_layer_whose_experts_do_not_fit_the_memory_comes_to_the_same(
    quantizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sources: Any,
    quickly: Any,
) -> None:
    """Experts come one by one; blockap then leaves them to least squares, and says so."""
    outs, planned = {}, {}
    for name, memory in (("whole", "1GB"), ("apart", "1kB")):
        outs[name] = tmp_path / name
        more = ("--quantizer", quantizer, "--layer-steps", 30, "--rank", 0)
        more += ("--expert-memory", memory)
        ended = quickly(sources("qwen2_moe"), outs[name], *more)
        assert ended.code == 0, ended.err
        planned[name] = float(ended.err.partition("peak memory")[2].split()[0])
        assert ("one by one" in ended.err) == (name == "apart")
        assert ("least squares of their outputs" in ended.err) == (
            (name, quantizer) == ("apart", "blockap")
        )
    assert planned["apart"] <= planned["whole"]
    whole, apart = (stored(out) for out in outs.values())
    if quantizer == "gptq":
        assert all(torch.equal(whole[name], apart[name]) for name in whole)
    else:
        told = [json.loads((out / "rilq.json").read_text()) for out in outs.values()]
        assert [each["recipe"]["trains_experts"] for each in told] == [True, False]
        for each in told:
            assert all(0 < error < 0.5 for error in each["quality"]["layer_errors"])
        changed = {n for n in whole if not torch.equal(whole[n], apart[n])}
        assert any(".experts." in n for n in changed)


def test_a_killed_conversion_of_a_mixture_continues_to_the_same_bytes(
    tmp_path: Path, sources: Any, quickly: Any, hashes: Any, convert: Any, quick: Any
) -> None:
    """Some experts are chosen in few updates only: their moments must continue too."""
    options = {"model": str(sources("many")), "adapter_targets": ("all",), "quantizer": "lsq",
               "batch_size": 1, "seqlen": 16}  # fmt: skip
    assert convert(quick(tmp_path / "unbroken", **options)).code == 0
    for at in (24,):  # after the second checkpoint of the training
        folder = tmp_path / f"killed-{at}"
        assert convert(quick(folder, **options), at=at).code == -9
        assert convert(quick(folder, **options)).code == 0
        assert hashes(folder / "out") == hashes(tmp_path / "unbroken" / "out"), at


def test_targets_that_match_nothing_are_refused(tmp_path: Path, sources: Any, quickly: Any) -> None:
    ended = quickly(sources("mixtral"), tmp_path / "x", "--adapter-targets", "nothing")
    assert ended.code == 2 and "--adapter-targets nothing: matches no" in ended.err
    # It has no linear but those of attention and of experts.
    ended = quickly(sources("mixtral"), tmp_path / "x", "--adapter-targets", "mlp")
    assert ended.code == 2 and "--adapter-targets mlp: matches no" in ended.err


def test_a_mixture_is_exported_dense_and_refused_elsewhere(
    tmp_path: Path, sources: Any, quickly: Any, export: Any, run_cli: Any
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    assert quickly(sources("mixtral"), out, "--quantizer", "rtn", "--rank", 0).code == 0
    assert run_cli("verify", out).code == 0
    ended = export(out, dense, "dense")
    assert ended.code == 0, ended.err
    tokens = torch.arange(40, 72)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        for folder in (out, dense)
    ]
    # In the mean: rounding lets the router choose another expert for a token here and there.
    assert (logits[0] - logits[1]).abs().mean() < 1e-2 * logits[0].std()
    for kind in ("mlx", "metal", "vllm", "gguf", "gptq", "compressed-tensors"):
        ended = export(out, tmp_path / kind, kind)
        assert ended.code == 2, ended.err
        assert "mixture of experts" in ended.err and "--to dense" in ended.err


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft
def test_an_adapter_of_experts_is_what_stock_peft_loads(
    tmp_path: Path, sources: Any, quickly: Any, export: Any
) -> None:
    """The dense export has the adapter merged in."""
    from peft import PeftModel

    out, dense = tmp_path / "out", tmp_path / "dense"
    ended = quickly(
        *(sources("qwen2_moe"), out, "--quantizer", "rtn", "--adapter", "lora", "--rank", 4),
        *("--adapter-targets", "all", "--loss", "mse+ce", "--steps", 20, "--val-every", 5),
    )
    assert ended.code == 0, ended.err
    assert json.loads((out / "rilq.json").read_text())["quality"]["best_step"] > 0
    names = load_file(out / "adapter" / "adapter_model.safetensors")
    parts = {part for name in names for part in name.split(".")}
    assert {"self_attn", "shared_expert", "experts"} <= parts
    assert export(out, dense, "dense").code == 0
    tokens = torch.arange(40, 72)[None]
    base = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    plain = base(tokens).logits
    adapted = PeftModel.from_pretrained(base, out / "adapter")(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(tokens).logits
    assert (adapted - merged).abs().mean() < 0.1 * (plain - merged).abs().mean()
