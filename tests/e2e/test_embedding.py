"""Embedding and head in 8 or 4 bits, from the command to what transformers computes."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import rilq  # noqa: F401  (teaches transformers the native format)
from rilq.formats.packed_embedding import RilqEmbedding, TiedRilqLinear
from rilq.formats.packed_linear import RilqLinear

Run = Callable[..., Any]

# Model type and overrides; bits of embedding and head.
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "untied": ("llama", {}, 4, 8),
    "untied, embedding only": ("llama", {}, 8, 16),
    "untied, head only": ("qwen2", {}, 16, 4),
    "tied": ("llama", {"tie_word_embeddings": True}, 4, 4),
    "tied and scaled": ("gemma3_text", {}, 8, 8),
}


@pytest.fixture(scope="module")
def sources() -> dict[str, Path]:
    """Checkpoints by case, made by the first test that needs them."""
    return {}


@pytest.fixture
def converted(
    sources: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Run,
    run_cli: Run,
    arguments: Run,
) -> Callable[..., tuple[Path, Path, dict[str, Any]]]:
    """`converted(case, *more)`: the source, the output folder, and what `--json` said."""

    def make(case: str, *more: object) -> tuple[Path, Path, dict[str, Any]]:
        model_type, overrides, embed, head = CASES[case]
        if case not in sources:
            sources[case] = make_model(tmp_path_factory.mktemp("models"), model_type, **overrides)
        bits = ("--embed-bits", embed, "--head-bits", head)
        ended = run_cli(
            *arguments(tmp_path, *bits, "--json", "--loss", "mse+ce", *more, model=sources[case])
        )
        assert ended.code == 0, ended.err
        return sources[case], tmp_path / "out", json.loads(ended.out)

    return make


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def rows_of(folder: Path) -> Tensor:
    """The calibration rows in a kept work folder."""
    return load_file(folder.with_name("out.rilq-work") / "rows.safetensors")["tokens"]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


@pytest.mark.parametrize("case", CASES)
def test_output_computes_what_its_dense_model_does_and_evaluates_so(
    case: str, converted: Run, run_cli: Run, calib: Path, tmp_path: Path
) -> None:
    _, out, told = converted(case, "--rank", 0)
    _, _, embed, head = CASES[case]
    model = load(out)
    assert isinstance(model.get_input_embeddings(), RilqEmbedding) == (embed < 16)
    assert isinstance(model.get_output_embeddings(), RilqLinear) == (head < 16)
    dense = load(out).dequantize(torch.float32)
    assert not any(isinstance(m, (RilqLinear, RilqEmbedding)) for m in dense.modules())
    ids = AutoTokenizer.from_pretrained(out)(calib.read_text(), add_special_tokens=False).input_ids
    rows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(rows).logits, dense(rows).logits, rtol=0, atol=2e-5)
        expected = dense(rows, labels=rows).loss.exp().item()
    said = json.loads(
        run_cli("eval", out, "--text", calib, "--seqlen", 32, "--no-speed", "--json").out
    )
    assert said["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert run_cli("verify", out).code == 0


@pytest.mark.parametrize("case", CASES)
def test_teacher_has_the_sources_embedding_and_the_student_the_quantized_one(
    case: str, converted: Run
) -> None:
    """The error after each layer, and the loss that training ended with, from scratch."""
    source, out, told = converted(case, "--keep-work")
    teacher, student = load(source), load(out)
    tokens = rows_of(out)
    finals: list[Tensor] = []
    for model in (teacher, student):
        model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: finals.append(args[0])
        )
    with torch.no_grad():
        teacher(tokens)
        logits = student(tokens).logits
    kept = (out.with_name("out.rilq-work") / "targets.bin").read_bytes()
    targets = torch.frombuffer(bytearray(kept), dtype=torch.float32).view_as(finals[0])
    torch.testing.assert_close(targets, finals[0], rtol=1e-4, atol=1e-4)
    count = told["plan"]["validation_rows"]
    cross_entropy = F.cross_entropy(
        logits[-count:, :-1].flatten(0, 1), tokens[-count:, 1:].flatten()
    )
    squares = (finals[1] - targets)[-count:].square().mean()
    expected = 0.5 * squares + 0.5 * cross_entropy
    assert told["quality"]["validation_loss_merged"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("case", ["untied", "tied and scaled"])
def test_the_first_layer_is_quantized_on_what_the_quantized_embedding_gives(
    case: str, converted: Run
) -> None:
    source, out, told = converted(case, "--rank", 0, "--keep-work")
    with torch.no_grad():
        states = [load(f)(rows_of(out), output_hidden_states=True) for f in (source, out)]
    # Of the first of two layers: nothing but the layer's own output is in it.
    expected, found = (s.hidden_states[1] for s in states)
    error = ((found - expected).square().sum() / expected.square().sum()).item()
    assert told["quality"]["layer_errors"][0] == pytest.approx(error, rel=1e-3)


def test_adapters_change_zero_points_of_the_decoder_only(converted: Run, tmp_path: Path) -> None:
    _, out, _ = converted("tied", "--train", "adapters")
    trained = tensors_of(out)
    out.rename(tmp_path / "trained")
    _, out, _ = converted("tied", "--rank", 0)
    base = tensors_of(out)
    changed = {n for n in base if not torch.equal(base[n], trained[n])}
    assert changed and all(".layers." in n and n.endswith(".zero_point") for n in changed)


def test_packed_student_gives_what_the_dense_one_gives(converted: Run, tmp_path: Path) -> None:
    _, out, dense = converted("tied", "--student", "dense")
    out.rename(tmp_path / "dense")
    _, _, packed = converted("tied", "--student", "packed")
    losses = [told["quality"]["validation_loss"] for told in (dense, packed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_plan_counts_the_bytes_and_the_configuration_says_the_bits(
    case: str, converted: Run
) -> None:
    source, out, told = converted(case, "--rank", 0)
    _, _, embed, head = CASES[case]
    plan, written = told["plan"], tensors_of(out)
    assert plan["output_bytes"] == sum(t.nbytes for t in written.values())
    assert plan["bits_per_parameter"] == pytest.approx(
        8 * plan["output_bytes"] / sum(t.numel() for t in tensors_of(source).values())
    )
    assert (
        told["bytes_read"]
        == plan["read_bytes"]
        == sum(t.nbytes for t in tensors_of(source).values())
    )
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    manifest = json.loads((out / "rilq.json").read_text())
    assert config["format_version"] == manifest["format_version"] == 2
    assert (config["embed_bits"], config["head_bits"]) == (embed, head)
    assert ("lm_head" in config["modules_to_not_convert"]) == (head == 16)
    recipe = manifest["recipe"]
    assert (recipe["embed_bits"], recipe["head_bits"]) == (embed, head)


def test_without_the_options_the_format_is_the_first_version(
    tmp_path: Path, run_cli: Run, arguments: Run
) -> None:
    assert run_cli(*arguments(tmp_path, "--rank", 0)).code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 1
    assert tensors_of(tmp_path / "out")["model.embed_tokens.weight"].dtype == torch.float32


def test_one_tensor_serves_embedding_and_head_of_a_tied_model(
    converted: Run, tmp_path: Path
) -> None:
    _, out, _ = converted("tied")
    assert not [name for name in tensors_of(out) if name.startswith("lm_head")]
    model = load(out)
    assert isinstance(model.lm_head, TiedRilqLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "given", ["--embed-bits 4", "--head-bits 8", "--embed-bits 4 --head-bits 8"]
)
def test_a_tied_model_takes_one_setting_for_both(
    given: str, tmp_path: Path, make_model: Run, run_cli: Run, arguments: Run
) -> None:
    model = make_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    for command in ("plan", "convert"):
        words = arguments(tmp_path, *given.split(), command=command, model=model)
        ended = run_cli(*words)
        assert ended.code == 2 and "Traceback" not in ended.err
        assert "tie_word_embeddings" in ended.err
        assert given.replace(" --head", ", --head") in ended.err
        bits = min(int(word) for word in given.split() if word.isdigit())
        assert f"--embed-bits {bits} --head-bits {bits}" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_group_size_that_does_not_divide_the_embedding_is_refused_with_the_remedy(
    tmp_path: Path, make_model: Run, run_cli: Run, arguments: Run
) -> None:
    # Hidden size 96; all linears that read it are kept, so that only the embedding is in the way.
    model = make_model(tmp_path / "model", "llama", hidden_size=96)
    skipped = [w for p in "qkv" for w in ("--skip", f"{p}_proj")]
    skipped += ["--skip", "gate_proj", "--skip", "up_proj", "--group-size", 64]
    words = arguments(tmp_path, *skipped, "--embed-bits", 4, command="plan", model=model)
    ended = run_cli(*words)
    assert ended.code == 2 and "Traceback" not in ended.err
    for said in ("--group-size 64", "model.embed_tokens", "96", "--group-size 32", "at 16"):
        assert said in ended.err
    assert run_cli(*arguments(tmp_path, *skipped, command="plan", model=model)).code == 0


def test_plan_for_people_shows_embedding_and_head(
    tmp_path: Path, run_cli: Run, arguments: Run
) -> None:
    words = arguments(tmp_path, "--embed-bits", 4, command="plan")
    lines = run_cli(*words).out.splitlines()
    [embedding] = [line for line in lines if "embedding" in line]
    [head] = [line for line in lines if "head" in line]
    assert "4 bits, groups of 32" in embedding and "as in the source" in head


# -- resume ----------------------------------------------------------------------------------------

MOMENTS = [
    ("outer", "written"),
    ("outer", "committed"),
    ("layers", "written"),
    ("layers", "committed"),
    ("trained", "committed"),
]


def at_first(point: str) -> Callable[[], None]:
    """Called in a child: it kills itself at the first commit point of that name."""
    import os

    from rilq.converter import workdir

    def reached(name: str) -> None:
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare() -> None:
        workdir.reached = reached

    return prepare


@pytest.mark.slow
def test_killed_and_resumed_conversion_has_the_same_bytes(
    tmp_path: Path, run_cli: Run, arguments: Run, hashes: Run
) -> None:
    bits = ("--embed-bits", 4, "--head-bits", 8)
    assert run_cli(*arguments(tmp_path / "unbroken", *bits)).code == 0
    unbroken = hashes(tmp_path / "unbroken" / "out")
    for stage, moment in MOMENTS:
        words = arguments(tmp_path / f"{stage}-{moment}", *bits)
        assert run_cli(*words, first=at_first(f"{stage}:{moment}")).code == -signal.SIGKILL
        ended = run_cli(*words)
        assert ended.code == 0 and "warning" not in ended.err, ended.err
        assert hashes(tmp_path / f"{stage}-{moment}" / "out") == unbroken, (stage, moment)


def test_a_damaged_quantized_embedding_is_named_and_made_again(
    tmp_path: Path, run_cli: Run, arguments: Run, hashes: Run
) -> None:
    bits = ("--embed-bits", 4, "--head-bits", 8)
    assert run_cli(*arguments(tmp_path / "unbroken", *bits)).code == 0
    words = arguments(tmp_path, *bits)
    assert run_cli(*words, first=at_first("layers:committed")).code == -signal.SIGKILL
    damaged = tmp_path / "out.rilq-work" / "outer-quantized.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    ended = run_cli(*words)
    assert ended.code == 0 and f"{damaged}: missing or damaged" in ended.err
    assert hashes(tmp_path / "out") == hashes(tmp_path / "unbroken" / "out")
