"""Perplexity by streaming: what transformers and PEFT compute in memory, one layer at a time."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from rilq.calib.activations import ActivationWriter
from rilq.converter.adapters import AdapterSpec
from rilq.converter.layers import StreamedModel
from rilq.converter.quantizers import build_quantizer
from rilq.errors import CheckpointError, OptionError, OutputError, RilqError
from rilq.evaluation import forward, lockstep
from rilq.evaluation.divergence import divergence
from rilq.evaluation.figures import Evaluation, Passages
from rilq.evaluation.lora import find_adapter
from rilq.evaluation.perplexity import measure_texts
from rilq.evaluation.scores import Scores
from rilq.formats.checkpoint import SOURCE_DTYPES, Checkpoint
from rilq.formats.lora import ADAPTER_FOLDER, write_peft_adapter
from rilq.formats.native import RilqConfig, native_tensors
from rilq.formats.shard_writer import write_tensors
from rilq.formats.source import LocalFolder
from rilq.formats.writer import write_config
from rilq.progress import SilentReporter

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

SEQLEN = 32
KEPT = "model.layers.0.mlp.up_proj"  # stays as it was
LORA = AdapterSpec("lora", rank=3, alpha=6.0, seed=0)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """About 700 tokens of plain text."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text[:3000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows(text_file: Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The same text, tokenized at once and cut: `[rows, SEQLEN]`."""
    ids = tokenizer(text_file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = len(ids) // SEQLEN
    return torch.tensor(ids[: count * SEQLEN]).view(count, SEQLEN)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """`tiny_llama` in 2 bits, groups of 32, all linears but one."""
    return make_native(tiny_llama, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, native: Path, tiny_llama: Path) -> Path:
    """The native checkpoint with a LoRA on every quantized linear, as a conversion leaves it."""
    folder = tmp_path_factory.mktemp("adapted") / "model"
    shutil.copytree(native, folder)
    write_lora(folder, tiny_llama)
    return folder


def make_native(source: Path, folder: Path) -> Path:
    config = RilqConfig(2, 32, modules_to_not_convert=["lm_head", KEPT])
    tensors: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    for name in linears(source):
        if (spec := config.linear_spec(name)) is not None:
            quantized = build_quantizer("rtn").quantize(tensors.pop(f"{name}.weight"), spec)
            tensors |= native_tensors(name, quantized)
    write_tensors(folder / "model.safetensors", tensors)
    write_config(folder, json.loads((source / "config.json").read_text()), config, torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    return folder


def write_lora(folder: Path, source: Path, spec: AdapterSpec = LORA) -> None:
    draw = torch.Generator().manual_seed(3)
    adapters = {}
    for name, (out_features, in_features) in linears(source).items():
        if name != KEPT:
            adapters[f"{name}.a"] = torch.randn(spec.rank, in_features, generator=draw) / 4
            adapters[f"{name}.b"] = torch.randn(out_features, spec.rank, generator=draw) / 4
    write_peft_adapter(folder, adapters, rank=spec.rank, alpha=spec.alpha)


def linears(source: Path) -> dict[str, tuple[int, int]]:
    """Names and shapes of the decoder's linears."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def in_memory(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def predictions(model: Any, rows: Tensor) -> Tensor:
    """Logits in float32 for all tokens of each row but the first."""
    logits: Tensor = model(rows, use_cache=False).logits[:, :-1].float()
    return logits


def perplexity_of(logits: Tensor, rows: Tensor) -> float:
    return math.exp(F.cross_entropy(logits.flatten(0, 1).double(), rows[:, 1:].flatten()).item())


def run(model: Path, text: Path, **options: Any) -> Evaluation:
    chosen = {"seqlen": SEQLEN, "device": "cpu", **options}
    ((figures, _),) = measure_texts([str(model)], str(text), **chosen)
    return figures


def measure(
    *models: Path, text: Path, against: Path | None = None, **options: Any
) -> list[tuple[Evaluation, Passages]]:
    return measure_texts(
        [str(model) for model in models],
        str(text),
        against=None if against is None else str(against),
        seqlen=SEQLEN,
        device="cpu",
        **options,
    )


class Warnings(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, message: str) -> None:
        self.lines.append(message)


# -- the same as in memory ---------------------------------------------------------------------


# Gemma caps logits or scales embeddings; Phi-3 fuses projections; OLMo 2 has norms on outputs.
@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2"]
)
def test_perplexity_is_that_of_a_plain_loop_in_memory_dense_and_native(
    tmp_path: Path, make_model: Callable[..., Path], text_file: Path, rows: Tensor, model_type: str
) -> None:
    dense = make_model(tmp_path / "model", model_type, tie_word_embeddings=True)
    (tmp_path / "native").mkdir()
    for folder in (dense, make_native(dense, tmp_path / "native")):
        expected = perplexity_of(predictions(in_memory(folder), rows), rows)
        assert run(folder, text_file).perplexity == pytest.approx(expected, rel=1e-5)


def test_lora_beside_a_checkpoint_counts_as_peft_applies_it(
    adapted: Path, native: Path, text_file: Path, rows: Tensor
) -> None:
    model = PeftModel.from_pretrained(in_memory(adapted), adapted / ADAPTER_FOLDER).eval()
    expected = perplexity_of(predictions(model, rows), rows)
    found = run(adapted, text_file)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.adapter
    assert abs(found.perplexity - run(native, text_file).perplexity) > 1


def test_computing_in_bfloat16_is_close_and_named(tiny_llama: Path, text_file: Path) -> None:
    full, half = (run(tiny_llama, text_file, dtype=d) for d in ("auto", "bfloat16"))
    assert (full.dtype, half.dtype) == ("float32", "bfloat16")
    assert half.perplexity == pytest.approx(full.perplexity, rel=0.02)
    assert half.perplexity != full.perplexity


@pytest.mark.parametrize("logits", [1, 320 * 10, 320 * 100])  # one token, a part of a row, 3 rows
def test_perplexity_does_not_depend_on_how_logits_are_cut(
    tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, logits: int
) -> None:
    whole = run(tiny_llama, text_file).perplexity
    monkeypatch.setattr(forward, "LOGITS", logits)
    monkeypatch.setattr(forward, "LAYER_TOKENS", 100)
    assert run(tiny_llama, text_file).perplexity == pytest.approx(whole, rel=1e-6)


# -- what is reported --------------------------------------------------------------------------


def test_counts_windows_predictions_and_bytes(
    tiny_llama: Path, text_file: Path, rows: Tensor
) -> None:
    found = run(tiny_llama, text_file)
    assert (found.windows, found.seqlen) == tuple(rows.shape)
    assert found.tokens == rows[:, 1:].numel()
    assert found.size_bytes == sum(f.stat().st_size for f in tiny_llama.glob("*.safetensors"))
    assert found.text.startswith("words.txt@xxh3:")
    assert json.loads(json.dumps(found.as_dict()))["against"] is None


def test_adapter_counts_in_size_but_not_in_bits_per_weight(
    adapted: Path, native: Path, text_file: Path
) -> None:
    with_adapter, without = run(adapted, text_file), run(native, text_file)
    assert with_adapter.bits_per_weight == without.bits_per_weight
    weights = adapted / ADAPTER_FOLDER / "adapter_model.safetensors"
    assert with_adapter.size_bytes == without.size_bytes + weights.stat().st_size


def test_bits_per_weight_counts_codes_scales_and_zero_points(
    native: Path, tiny_llama: Path, text_file: Path
) -> None:
    tensors = load_file(native / "model.safetensors")
    packed = [name.removesuffix("_scale") for name in tensors if name.endswith("_scale")]
    stored = sum(
        tensors[name.replace("weight", part)].nbytes
        for name in packed
        for part in ("weight", "weight_scale", "zero_point")
    )
    shapes = linears(tiny_llama)
    weights = sum(math.prod(shapes[name.removesuffix(".weight")]) for name in packed)
    assert run(native, text_file).bits_per_weight == 8 * stored / weights == 3.0
    assert run(tiny_llama, text_file).bits_per_weight == 32


def test_bits_per_byte_counts_the_bytes_that_the_windows_spell(
    tiny_llama: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "accents.txt"
    path.write_text("the café was naïve; a red dog ran home. " * 30, encoding="utf-8")
    found = run(tiny_llama, path)
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    spelled = tokenizer.decode(ids[: found.windows * SEQLEN]).encode("utf-8")
    bits = math.log2(found.perplexity) * found.windows * SEQLEN / len(spelled)
    assert found.bits_per_byte == pytest.approx(bits)


def test_bits_per_byte_counts_the_text_of_records_and_not_their_json(
    tiny_llama: Path, tmp_path: Path, text_file: Path
) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"id": 7, "story": text_file.read_text()}))
    found, plain = run(tiny_llama, path, text_key="story"), run(tiny_llama, text_file)
    assert found.tokens_digest == plain.tokens_digest
    assert found.bits_per_byte == plain.bits_per_byte


# -- against a base ----------------------------------------------------------------------------


def test_a_model_does_not_diverge_from_itself(native: Path, text_file: Path) -> None:
    found = run(native, text_file, against=str(native))
    assert found.against is not None
    assert found.against.kl_max == found.against.kl_mean == 0
    assert found.against.top1_agreement == 1
    assert found.against.base_perplexity == found.perplexity


def test_divergence_from_the_base_is_that_of_the_models_in_memory(
    native: Path, tiny_llama: Path, text_file: Path, rows: Tensor
) -> None:
    base, student = (predictions(in_memory(folder), rows) for folder in (tiny_llama, native))
    p, q = base.double().softmax(-1), student.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    ((found, passages),) = measure(native, text=text_file, against=tiny_llama)
    assert found.perplexity == pytest.approx(perplexity_of(student, rows), rel=1e-5)
    assert found.against is not None
    assert found.against.base_perplexity == pytest.approx(perplexity_of(base, rows), rel=1e-5)
    figures = [found.against.kl_mean, found.against.kl_median, found.against.kl_p99]
    expected = [kl.mean(), kl.quantile(0.5), kl.quantile(0.99)]
    assert figures == pytest.approx([value.item() for value in expected], rel=1e-3)
    assert found.against.kl_max == pytest.approx(kl.max().item(), rel=1e-3)
    assert passages.kl is not None and passages.kl.dtype == np.float16
    assert passages.kl == pytest.approx(kl.numpy(), rel=2e-3, abs=1e-6)
    assert sum(found.against.kl_counts) == found.tokens
    edges = found.against.kl_edges
    assert sum(found.against.kl_counts[edges.index(0.1) :]) == (kl >= 0.1).sum()
    agreeing = (base.argmax(-1) == student.argmax(-1)).double()
    assert found.against.top1_agreement == pytest.approx(agreeing.mean().item())
    assert passages.top1 is not None
    assert passages.top1.tolist() == agreeing.sum(1).long().tolist()


def test_top5_agreement_is_the_mean_share_of_the_bases_five(
    native: Path, tiny_llama: Path, text_file: Path, rows: Tensor
) -> None:
    base, student = (predictions(in_memory(folder), rows) for folder in (tiny_llama, native))
    top, own = (logits.topk(5).indices.flatten(0, 1).tolist() for logits in (base, student))
    shares = torch.tensor([len({*a} & {*b}) / 5 for a, b in zip(top, own, strict=True)]).double()
    ((found, passages),) = measure(native, text=text_file, against=tiny_llama)
    assert found.against is not None and passages.top5 is not None
    assert found.against.top5_agreement == pytest.approx(shares.mean().item())
    assert passages.top5 == pytest.approx(shares.view(len(rows), -1).sum(1).numpy())


def test_passages_sum_to_the_figures(native: Path, tiny_llama: Path, text_file: Path) -> None:
    ((found, passages),) = measure(native, text=text_file, against=tiny_llama)
    assert passages.loss.shape == (found.windows,) and passages.tokens == found.seqlen - 1
    assert math.exp(passages.loss.sum() / found.tokens) == found.perplexity
    assert passages.base_loss is not None and found.against is not None
    assert math.exp(passages.base_loss.sum() / found.tokens) == found.against.base_perplexity


def test_layer_errors_are_those_of_the_hidden_states_in_memory(
    native: Path, tiny_llama: Path, text_file: Path, rows: Tensor
) -> None:
    states = []
    for folder in (tiny_llama, native):
        model, seen = in_memory(folder), []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        predictions(model, rows)
        states.append(seen)
    expected = [
        ((own - base).double().square().sum() / base.double().square().sum()).item()
        for base, own in zip(*states, strict=True)
    ]
    ((found, _),) = measure(native, text=text_file, against=tiny_llama)
    assert found.layer_errors == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("other", [{"num_hidden_layers": 1}, {"hidden_size": 96, "head_dim": 24}])
def test_a_base_of_another_shape_gives_divergence_but_no_layer_errors(
    native: Path,
    text_file: Path,
    tmp_path: Path,
    make_model: Callable[..., Path],
    other: dict[str, int],
) -> None:
    base = make_model(tmp_path / "base", **other)
    ((found, _),) = measure(native, text=text_file, against=base)
    assert found.layer_errors is None
    assert found.against is not None and found.against.kl_mean > 0
    assert found.against.base_perplexity == run(base, text_file).perplexity


def test_several_checkpoints_get_the_figures_that_each_gets_alone(
    native: Path, adapted: Path, tiny_llama: Path, text_file: Path
) -> None:
    models = [native, adapted]
    together = measure(*models, text=text_file, against=tiny_llama)
    for model, (found, passages) in zip(models, together, strict=True):
        ((alone, windows),) = measure(model, text=text_file, against=tiny_llama)
        assert found == alone
        assert passages.loss.tolist() == windows.loss.tolist()


def test_the_base_runs_once_for_all_checkpoints(
    native: Path,
    adapted: Path,
    tiny_llama: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    real = forward.run_layer

    def watched(subject: forward.Subject, *more: Any) -> str:
        ran.append(Path(subject.label).name)
        return real(subject, *more)

    monkeypatch.setattr(lockstep, "run_layer", watched)
    measure(native, adapted, text=text_file, against=tiny_llama)
    assert ran == [tiny_llama.name, native.name, adapted.name] * 2


def test_divergence_is_from_the_base_to_the_other_and_not_back() -> None:
    scores = Scores.empty(3, 1, vocabulary=2, compared=True)
    base, other = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    targets = torch.zeros(1, 1, dtype=torch.int64)
    for window, logits in enumerate((other, base, base.flip(0))):
        pair = [logits.view(1, 1, 2), base.view(1, 1, 2)]
        scores.add(slice(window, window + 1), 0, pair, targets)
    found = divergence(scores, 2.0)
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)  # by hand: 0.5108
    assert found.kl_max == pytest.approx(expected, rel=1e-5)
    assert found.kl_mean == pytest.approx(expected / 3, rel=1e-5)
    assert found.kl_median == 0
    assert found.kl_p99 == pytest.approx(0.98 * expected, rel=1e-5)


# -- memory and disk ---------------------------------------------------------------------------


def test_one_layer_at_a_time_is_in_memory_and_the_module_tree_comes_back(
    adapted: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[int]]] = []
    models: list[tuple[StreamedModel, list[str]]] = []
    real = StreamedModel.run

    def watched(streamed: StreamedModel, index: int, hidden: Tensor) -> Tensor:
        if not models:
            models.append((streamed, []))
        real_layers = [
            i
            for i, layer in enumerate(streamed.layers)
            if any(not t.is_meta for t in layer.state_dict().values())
        ]
        seen.append((index, real_layers))
        return real(streamed, index, hidden)

    monkeypatch.setattr(StreamedModel, "run", watched)
    run(adapted, text_file)
    assert seen == [(0, [0]), (1, [1])]
    streamed = models[0][0]
    assert all(t.is_meta for t in streamed.layers.state_dict().values())
    found = {name for name in streamed.model.state_dict() if ".layers." in name}
    assert found == {name for name in streamed.checkpoint.tensors if ".layers." in name}


def test_the_work_folder_holds_three_boundaries_at_most_and_is_gone_afterwards(
    native: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, rows: Tensor
) -> None:
    work, boundary = tmp_path / "work", rows.numel() * 64 * 4
    sizes: list[int] = []

    def measure() -> None:
        sizes.append(sum(f.stat().st_size for f in work.glob("*.bin")))

    class Watch(SilentReporter):
        def step(self, done: int, **figures: Any) -> None:
            measure()

    real = ActivationWriter.__exit__

    def watched(writer: ActivationWriter, *error: Any) -> None:
        real(writer, *error)
        measure()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationWriter, "__exit__", watched)
        run(native, text_file, against=str(tiny_llama), work=work, report=Watch())
    # The embedding of both; of each layer the base's and the model's, before and after its commit;
    # then the scores.
    steps = [1, 2, *[3, 2, 3, 2] * 2, 2]
    assert sizes == [count * boundary for count in steps]
    assert not work.exists()


def test_too_little_space_is_said_before_the_work(
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    rows: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = 2 * rows.numel() * 64 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(OutputError, match="needed for hidden states"):
        run(tiny_llama, text_file, work=tmp_path / "work")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert run(tiny_llama, text_file, work=tmp_path / "work").windows


# -- what cannot work --------------------------------------------------------------------------


def test_windows_are_as_long_as_the_model_allows_and_not_longer(
    tiny_llama: Path, text_file: Path
) -> None:
    assert run(tiny_llama, text_file, seqlen=None).seqlen == 128
    with pytest.raises(OptionError, match=r"--seqlen 129: max_position_embeddings of .* is 128"):
        run(tiny_llama, text_file, seqlen=129)


def test_another_vocabulary_is_refused(
    tiny_llama: Path, text_file: Path, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    other = make_model(tmp_path / "other", vocab_size=352)
    with pytest.raises(CheckpointError, match="has 320 tokens, .*other has 352 tokens"):
        run(tiny_llama, text_file, against=str(other))


def test_an_unknown_dtype_is_refused(tiny_llama: Path, text_file: Path) -> None:
    with pytest.raises(OptionError, match="--dtype int8: expected one of auto, float32"):
        run(tiny_llama, text_file, dtype="int8")


def test_a_loss_beyond_all_measure_is_an_error_and_not_a_figure(
    tmp_path: Path, make_model: Callable[..., Path], text_file: Path
) -> None:
    folder = make_model(tmp_path / "model", tie_word_embeddings=False)
    with changed_tensors(folder) as tensors:
        tensors["lm_head.weight"] *= 1e6
    with pytest.raises(RilqError, match="nats per token"):
        run(folder, text_file)


@contextmanager
def changed_tensors(folder: Path) -> Iterator[dict[str, Tensor]]:
    tensors = load_file(folder / "model.safetensors")
    yield tensors
    write_tensors(folder / "model.safetensors", tensors)


# -- adapters that cannot be used --------------------------------------------------------------


def test_an_adapter_that_is_more_than_plain_lora_is_refused_by_name(
    adapted: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(adapted, folder)
    path = folder / ADAPTER_FOLDER / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True, "bias": "all"}))
    with pytest.raises(CheckpointError, match="sets use_dora, bias"):
        run(folder, text_file)


@pytest.mark.parametrize("change", ["rank", "missing", "unknown"])
def test_an_adapter_for_another_model_is_refused(
    adapted: Path, text_file: Path, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(adapted, folder)
    path = folder / ADAPTER_FOLDER / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    value = tensors.pop(key)
    if change == "rank":
        tensors[key] = value[:, :2].contiguous()
    if change == "unknown":
        tensors[key.replace("layers.1", "layers.7")] = value
    write_tensors(path, tensors)
    with pytest.raises(CheckpointError, match=r"not a LoRA of rank 3 for this model: .*q_proj"):
        run(folder, text_file)


@pytest.fixture
def bereft(native: Path, tmp_path: Path) -> Path:
    """A checkpoint that was made with an adapter, without it."""
    folder = tmp_path / "bereft"
    shutil.copytree(native, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["recipe"] = {"adapter": "lora", "rank": 3}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_lost_adapter_is_warned_about(bereft: Path, text_file: Path) -> None:
    report = Warnings()
    assert not run(bereft, text_file, report=report).adapter
    assert "has no adapter/adapter_config.json" in report.lines[0]


class PinnedRepository:
    """The files of a folder as a repository on the Hub shows them: with a commit, no folders."""

    commit = "0" * 40

    def __init__(self, folder: Path) -> None:
        local = LocalFolder(folder)
        self.label, self.files, self.path, self.head = "o/n", local.files, local.path, local.head


def test_an_adapter_on_the_hub_is_not_passed_over_in_silence(bereft: Path) -> None:
    source = PinnedRepository(bereft)
    checkpoint = Checkpoint.open(source, dtypes=SOURCE_DTYPES | {torch.int32})
    streamed = StreamedModel(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(CheckpointError, match="o/n: its adapter .* cannot be read from the Hub"):
        find_adapter(streamed, SilentReporter())
