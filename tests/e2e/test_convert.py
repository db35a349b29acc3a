"""The command from end to end on a tiny random model, its output loaded by real consumers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rilq  # noqa: F401  (teaches transformers the native format)
from rilq.formats.packed_linear import RilqLinear

# PEFT uses a name that transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Run = Callable[..., Any]


@pytest.fixture
def converted(tmp_path: Path, run_cli: Run, arguments: Run) -> Callable[..., Path]:
    """`converted(*more options)`: run the command in a child; the output folder."""

    def make(*more: object) -> Path:
        ended = run_cli(*arguments(tmp_path, *more))
        assert ended.code == 0, ended.err
        return tmp_path / "out"

    return make


def logits_of(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)("the cat sat", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(tokens).logits


def test_output_loads_generates_saves_and_loads_again(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    out = converted()
    assert (out / "model.safetensors.index.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("the cat", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] > 2
    assert sum(isinstance(m, RilqLinear) for m in model.modules()) == 14
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(model, out), logits_of(again, out))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    shards = sorted(folder.glob("*.safetensors"))
    return {n: t for shard in shards for n, t in load_file(shard).items()}


@pytest.mark.parametrize(
    ("train", "changed"),
    [
        ("adapters", {"zero_point"}),
        ("scales", {"weight_scale"}),
        ("adapters+scales", {"weight_scale", "zero_point"}),
        ("all", {"weight_scale", "zero_point"}),
        ("all+codes", {"weight", "weight_scale", "zero_point"}),
    ],
)
def test_trained_output_differs_from_its_base_in_what_was_trained_and_merges_exactly(
    train: str,
    changed: set[str],
    converted: Callable[..., Path],
    tmp_path: Path,
    run_cli: Run,
    arguments: Run,
) -> None:
    # Codes start in the middle of what rounds to them: a few updates do not move them.
    more = ("--steps", "200", "--val-every", "100") if train == "all+codes" else ()
    merged = converted("--train", train, *more)
    (tmp_path / "base").mkdir()
    assert run_cli(*arguments(tmp_path / "base", "--train", "none")).code == 0
    ours, base = tensors_of(merged), tensors_of(tmp_path / "base" / "out")
    assert ours.keys() == base.keys()
    different = {n for n in ours if not torch.equal(ours[n], base[n])}
    assert {name.rpartition(".")[2] for name in different} == changed
    quality = json.loads((merged / "rilq.json").read_text())["quality"]
    assert quality["validation_loss"] < quality["validation_loss_before"]
    assert quality["validation_loss_merged"] == pytest.approx(quality["validation_loss"], rel=5e-3)
    assert 0 < quality["merge_max_logit_difference"] < 0.05


def test_manifest_records_recipe_data_and_quality(converted: Callable[..., Path]) -> None:
    manifest = json.loads((converted() / "rilq.json").read_text())
    assert manifest["recipe"]["bits"] == 2 and manifest["recipe"]["seed"] == 42
    assert manifest["recipe"]["learning_rate"] == 1e-3
    quality = manifest["quality"]
    assert [step for step, _ in quality["history"]] == [0, 2, 4]
    assert [step for step, _ in quality["train_history"]] == [2, 4]
    parts = quality["validation_parts"]
    assert {term: len(losses) for term, losses in parts.items()} == {"mse": 3, "ce": 3, "kl": 3}
    assert parts["kl"] == [loss for _, loss in quality["history"]]  # the default loss
    assert manifest["recipe"]["scales_learning_rate"] == 1e-2  # ten times that
    assert manifest["recipe"]["recipe"] == "default" and manifest["recipe"]["loss"] == "kl"
    assert manifest["recipe"]["train"] == "adapters+scales"
    assert manifest["calibration"]["rows"] == 12 and len(manifest["calibration"]["digest"]) == 32
    assert {"rilq", "torch", "transformers"} <= manifest["versions"].keys()
    quality = manifest["quality"]
    assert len(quality["layer_errors"]) == 2 and all(0 < e < 2 for e in quality["layer_errors"])
    assert quality["history"][0] == [0, quality["validation_loss_before"]]
    assert "model.layers.0.mlp.up_proj.zero_point" in manifest["tensors"]


def test_nothing_in_the_output_tells_where_or_when_it_was_made(
    converted: Callable[..., Path], tmp_path: Path, tiny_llama: Path
) -> None:
    out = converted()
    texts = [p.read_text() for p in out.glob("*.json")]
    for place in (tmp_path, tiny_llama.parent):
        assert not any(str(place) in text for text in texts)


def test_plain_lora_is_kept_as_a_folder_that_stock_peft_attaches(
    converted: Callable[..., Path],
) -> None:
    out = converted("--adapter", "lora", "--rank", 4)
    base = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    plain = logits_of(base, out)
    adapted = PeftModel.from_pretrained(base, out / "adapter")
    assert (logits_of(adapted, out) - plain).abs().max() > 1e-4


def test_stock_peft_trains_a_new_lora_on_the_output(converted: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted(), dtype=torch.float32)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    tokens = torch.arange(8)[None]
    lora(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [p.grad for p in lora.parameters() if p.requires_grad]
    assert gradients and all(g is not None for g in gradients)


def test_skip_and_bits_for_are_recorded_and_honoured_on_loading(
    converted: Callable[..., Path],
) -> None:
    out = converted("--skip", "layers.0.*", "--bits-for", "down_proj=4", "--bits-for", "v_proj=3")
    model = AutoModelForCausalLM.from_pretrained(out)
    layers = model.model.layers
    assert not any(isinstance(m, RilqLinear) for m in layers[0].modules())
    bits = {
        n.rpartition(".")[2]: m.bits for n, m in layers[1].named_modules() if hasattr(m, "bits")
    }
    assert bits["down_proj"] == 4 and bits["v_proj"] == 3 and bits["q_proj"] == 2
    manifest = json.loads((out / "rilq.json").read_text())
    assert manifest["recipe"]["bits_for"] == {"down_proj": 4, "v_proj": 3}
    assert manifest["kept_in_16_bits"]["model.layers.0.mlp.up_proj"] == "--skip layers.0.*"
    logits_of(model, out)


@pytest.mark.parametrize("quantizer", ["gptq", "blockap"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_more_bits_come_closer_to_the_source(
    bits: int, quantizer: str, converted: Callable[..., Path], tiny_llama: Path
) -> None:
    out = converted("--bits", bits, "--rank", 0, "--quantizer", quantizer)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    source = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    expected = logits_of(source, tiny_llama)
    error = (logits_of(model, out) - expected).norm() / expected.norm()
    assert error < {3: 0.5, 4: 0.3, 8: 0.02}[bits]


def test_every_tier_of_the_student_gives_the_same(
    tmp_path: Path, run_cli: Run, arguments: Run
) -> None:
    losses = {}
    for tier in ("dense", "packed", "offload"):
        (tmp_path / tier).mkdir()
        ended = run_cli(*arguments(tmp_path / tier, "--student", tier, "--json"))
        assert ended.code == 0, ended.err
        losses[tier] = json.loads(ended.out)["quality"]["validation_loss"]
    for tier in ("packed", "offload"):
        assert losses[tier] == pytest.approx(losses["dense"], rel=1e-4)


def test_integer_zero_points_of_the_base_stay_integers_without_adapters(
    converted: Callable[..., Path],
) -> None:
    out = converted("--zero-point", "integer", "--rank", 0)
    zeros = [
        t
        for shard in out.glob("*.safetensors")
        for n, t in load_file(shard).items()
        if n.endswith(".zero_point")
    ]
    assert len(zeros) == 14
    assert all(torch.equal(z, z.round()) and z.min() >= 0 and z.max() <= 3 for z in zeros)


def test_each_tensor_of_the_checkpoint_is_read_once(
    tmp_path: Path, run_cli: Run, arguments: Run, tiny_llama: Path
) -> None:
    told = json.loads(run_cli(*arguments(tmp_path, "--json")).out)
    size = sum(t.nbytes for p in tiny_llama.glob("*.safetensors") for t in load_file(p).values())
    assert told["bytes_read"] == size == told["plan"]["read_bytes"]


def test_plan_touches_nothing_and_says_what_convert_does(
    tmp_path: Path, run_cli: Run, arguments: Run
) -> None:
    ended = run_cli(*arguments(tmp_path, "--json", command="plan"))
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    assert list(tmp_path.iterdir()) == []
    assert len(plan["quantized"]) == 14 and plan["bits_per_weight"] == 3.0
    out = tmp_path / "out"
    assert run_cli(*arguments(tmp_path)).code == 0
    written = sum(t.nbytes for p in out.glob("*.safetensors") for t in load_file(p).values())
    assert plan["output_bytes"] == written


def test_plan_for_people_names_what_is_kept_and_why(
    tmp_path: Path, run_cli: Run, arguments: Run
) -> None:
    ended = run_cli(*arguments(tmp_path, "--skip", "v_proj", command="plan"))
    for expected in ("v_proj", "--skip", "peak memory", "disk", "bits per", "time"):
        assert expected in ended.out


def test_verify_finds_a_flipped_byte_and_names_the_tensor(
    converted: Callable[..., Path], run_cli: Run
) -> None:
    out = converted()
    assert run_cli("verify", out).code == 0
    shard = sorted(out.glob("*.safetensors"))[-1]
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)
    ended = run_cli("verify", out)
    assert ended.code == 1 and shard.name in ended.err and "tensor" in ended.err


def test_eval_of_output_agrees_with_transformers(
    converted: Callable[..., Path], run_cli: Run, calib: Path
) -> None:
    out = converted()
    told = json.loads(
        run_cli("eval", out, "--text", calib, "--seqlen", 32, "--no-speed", "--json").out
    )
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(out)(calib.read_text(), add_special_tokens=False).input_ids
    rows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        expected = model(rows, labels=rows).loss.exp().item()
    assert told["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert told["windows"] == len(rows) and told["seqlen"] == 32


def test_underscores_and_dashes_in_options_are_the_same(
    tmp_path: Path, run_cli: Run, arguments: Run
) -> None:
    words = arguments(tmp_path, "--rank", 0, "--keep_work")
    assert run_cli(*[w.replace("--group-size", "--group_size") for w in words]).code == 0
    assert (tmp_path / "out.rilq-work" / "journal.jsonl").is_file()


def test_without_a_network_and_a_dataset_one_line_says_what_to_do(
    tmp_path: Path, run_cli: Run, tiny_llama: Path
) -> None:
    ended = run_cli("convert", tiny_llama, "--group-size", 32, "-o", tmp_path / "out")
    assert ended.code == 2 and "--dataset" in ended.err and "Traceback" not in ended.err


def test_module_form_of_the_command_runs() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "rilq", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("rilq ")
