"""Embedding and head in fewer bits: which, in what parts, and as what the student sees them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rilq.converter import outer
from rilq.converter.layers import StreamedModel
from rilq.converter.options import ConvertOptions
from rilq.converter.outer import embed_as_saved, outer_specs, quantize_outer
from rilq.converter.quantizers.rtn import RtnQuantizer
from rilq.converter.student import Student
from rilq.errors import OptionError, UnsupportedArchitectureError
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.native import RilqConfig, RilqEmbedding, quantized_linear_from
from rilq.formats.packing import dequantize
from rilq.formats.source import LocalFolder
from rilq.formats.spec import QuantSpec

CPU = torch.device("cpu")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def open_streamed(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(Checkpoint.open(LocalFolder(folder)), dtype=dtype, device=CPU)


def options(folder: Path, **more: Any) -> ConvertOptions:
    return ConvertOptions(str(folder), **{"group_size": 32, **more})


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """A tied Llama; tests must not change it."""
    return make_model(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


# -- which -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ({}, {}),
        ({"embed_bits": 4}, {EMBEDDING: 4}),
        ({"head_bits": 8}, {HEAD: 8}),
        ({"embed_bits": 8, "head_bits": 4}, {EMBEDDING: 8, HEAD: 4}),
    ],
)
def test_untied_embedding_and_head_have_each_their_own_setting(
    bits: dict[str, int], expected: dict[str, int], tiny_llama: Path
) -> None:
    specs = outer_specs(open_streamed(tiny_llama), options(tiny_llama, **bits))
    assert specs == {name: QuantSpec(value, 32) for name, value in expected.items()}


def test_a_tied_head_is_quantized_as_the_embedding_only(tied: Path) -> None:
    given = options(tied, embed_bits=8, head_bits=8, zero_point="integer")
    assert outer_specs(open_streamed(tied), given) == {EMBEDDING: QuantSpec(8, 32, "integer")}


def test_a_tied_model_with_two_settings_is_refused(tied: Path) -> None:
    with pytest.raises(OptionError, match="--embed-bits 8 --head-bits 8"):
        outer_specs(open_streamed(tied), options(tied, embed_bits=8))


def test_an_embedding_of_its_own_kind_is_refused_by_name(tiny_llama: Path) -> None:
    class Hashed(nn.Embedding):
        """Stands for what a later transformers may come up with."""

    streamed = open_streamed(tiny_llama)
    with torch.device("meta"):
        streamed.model.set_input_embeddings(Hashed(320, 64))  # type: ignore[operator]
    with pytest.raises(UnsupportedArchitectureError, match=r"llama: .*Hashed(.|\n)*--embed-bits"):
        outer_specs(streamed, options(tiny_llama, embed_bits=8))
    assert outer_specs(streamed, options(tiny_llama, head_bits=8)) == {HEAD: QuantSpec(8, 32)}


# -- quantizing --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_quantized_in_parts_are_those_of_the_whole_matrix(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = QuantSpec(bits, 32)
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(50, 64, generator=draw).bfloat16()
    weight[7] = 0  # a padding token
    tensors = {f"{EMBEDDING}.weight": weight, "model.norm.weight": torch.ones(64)}
    monkeypatch.setattr("rilq.formats.packed_linear.CHUNK", 7 * 64)  # seven rows at a time
    saved = quantize_outer(tensors, {EMBEDDING: spec}, CPU)
    found = quantized_linear_from(saved, EMBEDDING, spec)
    expected = RtnQuantizer("search").quantize(weight, spec)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero_point, expected.zero_point)
    assert saved["model.norm.weight"] is tensors["model.norm.weight"]
    back = dequantize(found.codes, found.scale, found.zero_point)
    assert torch.equal(back[7], torch.zeros(64))
    error = (back - weight.float()).norm() / weight.float().norm()
    # Steps of a 15th (a 255th) of a range of some 4 standard deviations; a step over sqrt(12).
    assert error < {4: 0.12, 8: 0.008}[bits]


def test_no_more_than_a_part_is_quantized_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Spy(RtnQuantizer):
        def quantize(self, weight: Tensor, *more: Any) -> Any:
            sizes.append(len(weight))
            return super().quantize(weight, *more)

    monkeypatch.setattr(outer, "RtnQuantizer", Spy)
    monkeypatch.setattr("rilq.formats.packed_linear.CHUNK", 20 * 64)
    quantize_outer({f"{HEAD}.weight": torch.randn(50, 64)}, {HEAD: QuantSpec(4, 32)}, CPU)
    assert sizes == [20, 20, 10]


# -- what the student sees ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_streamed_student_starts_from_exactly_what_the_packed_embedding_gives(
    dtype: torch.dtype, tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = open_streamed(tied, dtype)
    source = {n: t.clone() for n, t in streamed.checkpoint.read(streamed.outer_names()).items()}
    streamed.load_outer(source)
    tokens = torch.arange(40).view(2, 20)
    before = streamed.embed(tokens)
    specs = {EMBEDDING: QuantSpec(4, 32)}
    saved = quantize_outer(source, specs, CPU)
    monkeypatch.setattr("rilq.formats.packed_linear.CHUNK", 7 * 64)
    embed_as_saved(streamed, saved, specs)
    packed = RilqEmbedding(nn.Embedding(320, 64, dtype=dtype), specs[EMBEDDING])
    names = ("weight", "weight_scale", "zero_point")
    packed.load_state_dict({n: saved[f"{EMBEDDING}.{n}"] for n in names})
    after = streamed.embed(tokens)
    assert torch.equal(after, packed(tokens)) and not torch.equal(after, before)


@pytest.mark.parametrize("tier", ["dense", "packed"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_student_computes_with_the_quantized_embedding_and_head(
    tier: str, is_tied: bool, tiny_llama: Path, tied: Path
) -> None:
    folder = tied if is_tied else tiny_llama
    dense: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    state = {n: t.detach().clone() for n, t in dense.state_dict().items()}
    specs = {EMBEDDING: QuantSpec(4, 32)} | ({} if is_tied else {HEAD: QuantSpec(8, 32)})
    source = {n: t for n, t in state.items() if ".layers." not in n}
    if is_tied:
        del source[f"{HEAD}.weight"]
    student = Student(
        dense.config,
        RilqConfig(
            modules_to_not_convert=["layers.*", "model.layers.*"],
            group_size=32,
            embed_bits=4,
            head_bits=4 if is_tied else 8,
        ),
        read_layer=lambda i: {n: t for n, t in state.items() if f".layers.{i}." in n},
        outer=(saved := quantize_outer(source, specs, CPU)),
        train="none",
        adapters=None,
        tier=tier,  # type: ignore[arg-type]
        dtype=torch.float32,
        device=CPU,
    )
    for name, spec in specs.items():
        linear = quantized_linear_from(saved, name, spec)
        weight = dequantize(linear.codes, linear.scale, linear.zero_point)
        dense.get_submodule(name).weight.data = weight
    dense.tie_weights()
    assert isinstance(student.model.get_input_embeddings(), RilqEmbedding)  # type: ignore[operator]
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        final = student.states(tokens)[1]
        found = student.logits(final)
        expected = dense(tokens, output_hidden_states=True)
    torch.testing.assert_close(found, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(final, expected.hidden_states[-1], rtol=0, atol=1e-5)
