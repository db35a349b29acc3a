"""Streaming: a model run layer by layer is transformers' own, and what cannot be is refused."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_examples import MIXTURES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from rilq.converter.architecture import refuse_quantized
from rilq.converter.layers import StreamedModel, input_groups, linear_input
from rilq.errors import CheckpointError, InputError, UnsupportedArchitectureError
from rilq.formats.checkpoint import SOURCE_DTYPES, Checkpoint
from rilq.formats.native import RilqConfig, native_config, native_tensors
from rilq.formats.source import LocalFolder
from rilq.formats.spec import EXPERTS, QuantizedLinear, QuantSpec

CPU = torch.device("cpu")
SEQLEN = 24
WINDOW = 5  # of sliding attention: much less than a row, so that it matters
ROWS = torch.randint(320, (5, SEQLEN), generator=torch.Generator().manual_seed(0))
WEIGHTS = "model.safetensors"

# Name to model_type and what differs from the tiny config in conftest.py.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    # The soft caps are low enough to bend these small scores and logits.
    "gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    **{name: (name, overrides) for name, overrides in MIXTURES.items()},
}
MIXED = ["gemma2", "gemma3_text"]  # layers of two kinds


@dataclass(frozen=True)
class States:
    """States `[rows, seq_len, hidden]`: into the first layer, out of each, out of the norm."""

    first: Tensor
    layers: list[Tensor]
    final: Tensor
    logits: Tensor


@pytest.fixture(scope="module")
def checkpoint_of(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> Callable[[str], Path]:
    """The folder of one of `ARCHITECTURES`, made at first use; tests must not change it."""
    root = tmp_path_factory.mktemp("architectures")

    def folder_of(name: str) -> Path:
        model_type, overrides = ARCHITECTURES[name]
        if not (root / name).exists():
            make_model(root / name, model_type, **overrides)
        return root / name

    return folder_of


@pytest.fixture
def folder(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Llama checkpoint to spoil."""
    return shutil.copytree(checkpoint_of("llama"), tmp_path / "model")


def skeleton_of(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    checkpoint = Checkpoint.open(LocalFolder(folder), dtypes=SOURCE_DTYPES | {torch.int32})
    return StreamedModel(checkpoint, dtype=dtype, device=CPU)


def open_streamed(
    folder: Path, dtype: torch.dtype = torch.float32, seqlen: int = SEQLEN
) -> StreamedModel:
    streamed = skeleton_of(folder, dtype)
    streamed.load_outer(streamed.checkpoint.read(streamed.outer_names()))
    streamed.check_tied()
    streamed.prepare(seqlen)
    return streamed


def layer_tensors(streamed: StreamedModel, index: int) -> dict[str, Tensor]:
    return streamed.checkpoint.read(streamed.layer_names(index))


@torch.no_grad()
def streamed_states(streamed: StreamedModel, rows: Tensor, batch: int) -> States:
    """`batch` rows at a time through everything."""

    def batched(run: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        return torch.cat([run(part) for part in torch.split(values, batch)])

    first = hidden = batched(streamed.embed, rows)
    layers = []
    for index in range(len(streamed.layers)):
        with streamed.loaded(index, layer_tensors(streamed, index)):
            hidden = batched(partial(streamed.run, index), hidden)
        layers.append(hidden)
    return States(
        first, layers, batched(streamed.final_norm, hidden), batched(streamed.logits, hidden)
    )


def in_memory(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    # Only eager attention has soft caps; transformers 5.17 takes sdpa for Gemma 2.
    attention = {"attn_implementation": "eager"} if "gemma2" in folder.parts else {}
    # What transformers takes by default sums experts in another order, which shows in bfloat16.
    experts = {"experts_implementation": "eager"} if {*MIXTURES} & {*folder.parts} else {}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, **attention, **experts
    )
    return model.eval()


@torch.no_grad()
def in_memory_states(folder: Path, dtype: torch.dtype, rows: Tensor) -> States:
    model = in_memory(folder, dtype)
    layers: list[Tensor] = []
    for layer in model.get_submodule("model.layers").children():
        layer.register_forward_hook(
            lambda _module, _args, out: layers.append(out[0] if isinstance(out, tuple) else out)
        )
    out = model(rows, use_cache=False, output_hidden_states=True)
    return States(out.hidden_states[0], layers, out.hidden_states[-1], out.logits.float())


def assert_same_states(
    found: States, expected: States, *, rtol: float = 1e-6, atol: float = 1e-5
) -> None:
    assert len(found.layers) == len(expected.layers)
    places = {"embedding": (found.first, expected.first), "norm": (found.final, expected.final)}
    places |= {
        f"layer {i}": p for i, p in enumerate(zip(found.layers, expected.layers, strict=True))
    }
    for place, (left, right) in (places | {"logits": (found.logits, expected.logits)}).items():
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol, msg=f"{place}: {{}}".format)


def set_config(folder: Path, **changes: Any) -> None:
    """Change entries of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def set_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Change tensors of a checkpoint in one file; None removes one."""
    tensors = load_file(folder / WEIGHTS) | changes
    kept = {name: t.clone() for name, t in tensors.items() if t is not None}
    save_file(kept, folder / WEIGHTS, {"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        skeleton_of(folder)
    return str(caught.value)


# -- the same as in memory ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_states_equal_the_model_in_memory(
    name: str, checkpoint_of: Callable[[str], Path]
) -> None:
    folder = checkpoint_of(name)
    found = streamed_states(open_streamed(folder), ROWS, batch=2)
    assert_same_states(found, in_memory_states(folder, torch.float32, ROWS))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_streamed_equals_bfloat16_in_memory_exactly(
    name: str, checkpoint_of: Callable[[str], Path]
) -> None:
    folder = checkpoint_of(name)
    found = streamed_states(open_streamed(folder, torch.bfloat16), ROWS, batch=len(ROWS))
    assert found.final.dtype == torch.bfloat16
    assert_same_states(found, in_memory_states(folder, torch.bfloat16, ROWS), rtol=0, atol=0)


@pytest.mark.parametrize("name", MIXED)
@torch.no_grad()
def test_arguments_of_a_neighbouring_layer_give_visibly_other_states(
    name: str, checkpoint_of: Callable[[str], Path]
) -> None:
    streamed = open_streamed(checkpoint_of(name))
    hidden = streamed.embed(ROWS)
    with streamed.loaded(0, layer_tensors(streamed, 0)) as layer:
        own = streamed.run(0, hidden)
        other = layer(hidden, **streamed._calls[1])
        same_kind = layer(hidden, **streamed._calls[2])
    assert (own - (other[0] if isinstance(other, tuple) else other)).abs().max() > 0.1
    assert torch.equal(own, same_kind[0] if isinstance(same_kind, tuple) else same_kind)


def test_sliding_window_changes_the_states(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint_of("mistral"), tmp_path / "model")
    narrow = streamed_states(open_streamed(folder), ROWS, batch=5)
    set_config(folder, sliding_window=SEQLEN)
    wide = streamed_states(open_streamed(folder), ROWS, batch=5)
    assert torch.equal(narrow.layers[0][:, :WINDOW], wide.layers[0][:, :WINDOW])
    assert (narrow.layers[0][:, WINDOW:] - wide.layers[0][:, WINDOW:]).abs().amax() > 0.01


def test_prepare_again_for_rows_of_another_length(checkpoint_of: Callable[[str], Path]) -> None:
    folder, short = checkpoint_of("gemma3_text"), ROWS[:, :9]
    streamed = open_streamed(folder, seqlen=SEQLEN)
    streamed.prepare(9)
    found = streamed_states(streamed, short, batch=2)
    assert_same_states(found, in_memory_states(folder, torch.float32, short))


def test_native_checkpoint_streams_as_it_loads(folder: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    spec, tensors = QuantSpec(2, 32), load_file(folder / WEIGHTS)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        out_features, in_features = tensors.pop(name).shape
        codes = torch.randint(4, (out_features, in_features), generator=draw, dtype=torch.uint8)
        groups = torch.rand(out_features, in_features // 32, generator=draw)
        linear = QuantizedLinear(codes, (groups / 10).half(), (groups * 3).half(), spec)
        tensors |= native_tensors(name.removesuffix(".weight"), linear)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    set_config(folder, quantization_config=RilqConfig(2, 32).to_dict())
    found = streamed_states(open_streamed(folder), ROWS, batch=2)
    assert_same_states(found, in_memory_states(folder, torch.float32, ROWS))


# -- memory ------------------------------------------------------------------------------------


def materialised(streamed: StreamedModel) -> set[int]:
    """Decoder layers of which any parameter or buffer holds memory."""
    return {
        index
        for index, layer in enumerate(streamed.layers)
        if any(not t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    }


@pytest.mark.parametrize("name", ["llama-tied", "gemma3_text", "phi3"])
def test_only_the_loaded_layer_holds_weights(
    name: str, checkpoint_of: Callable[[str], Path]
) -> None:
    streamed = open_streamed(checkpoint_of(name))
    assert materialised(streamed) == set()
    for index in range(len(streamed.layers)):
        with streamed.loaded(index, layer_tensors(streamed, index)) as layer:
            assert materialised(streamed) == {index}
            assert not any(p.is_meta or p.requires_grad for p in layer.parameters())
    assert materialised(streamed) == set()


def test_weights_leave_also_after_an_error(checkpoint_of: Callable[[str], Path]) -> None:
    streamed = open_streamed(checkpoint_of("llama"))
    with pytest.raises(RuntimeError), streamed.loaded(1, layer_tensors(streamed, 1)):
        streamed.run(1, torch.zeros(2, SEQLEN, 7))  # 7 is not the hidden size
    assert materialised(streamed) == set()


def test_skeleton_holds_no_weights_and_unload_drops_all(
    checkpoint_of: Callable[[str], Path],
) -> None:
    folder = checkpoint_of("llama")
    assert all(p.is_meta for p in skeleton_of(folder).model.parameters())
    streamed = open_streamed(folder)
    assert not streamed.model.get_parameter("model.norm.weight").is_meta
    streamed.unload()
    assert all(p.is_meta for p in streamed.model.parameters())


@pytest.mark.parametrize("name", ["llama3-rope", "gemma3_text"])
def test_rotary_frequencies_stay_float32_in_a_bfloat16_model(
    name: str, checkpoint_of: Callable[[str], Path]
) -> None:
    folder = checkpoint_of(name)
    expected = dict(in_memory(folder, torch.float32).named_buffers())
    found = dict(open_streamed(folder, torch.bfloat16).model.named_buffers())
    rotary = [key for key in expected if "inv_freq" in key]
    assert rotary
    for key in rotary:
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], expected[key])


# -- inputs of linears -------------------------------------------------------------------------

SEPARATE = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
FUSED = [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]]


@pytest.mark.parametrize(
    ("name", "groups"), [("llama", SEPARATE), ("gemma2", SEPARATE), ("phi3", FUSED)]
)
@torch.no_grad()
def test_linears_that_share_an_input_are_grouped_in_the_order_they_run(
    name: str, groups: list[list[str]], checkpoint_of: Callable[[str], Path]
) -> None:
    streamed = open_streamed(checkpoint_of(name))
    linears = streamed.linears(1)
    with streamed.loaded(1, layer_tensors(streamed, 1)):
        found = input_groups(streamed, 1, linears, streamed.embed(ROWS[:1]))
    assert found == [[f"model.layers.1.{leaf}" for leaf in group] for group in groups]
    assert not any(module._forward_pre_hooks for module in linears.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_linear_input_is_what_the_linear_gets_in_memory(
    name: str, checkpoint_of: Callable[[str], Path]
) -> None:
    folder = checkpoint_of(name)
    streamed, model = open_streamed(folder), in_memory(folder)
    last = len(streamed.layers) - 1
    expected: dict[str, Tensor] = {}
    linears = {n: m for n, m in streamed.linears(last).items() if EXPERTS not in n}
    for path in linears:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _module, args, path=path: expected.update({path: args[0]})
        )
    hidden = model(ROWS, use_cache=False, output_hidden_states=True).hidden_states[last]
    with streamed.loaded(last, layer_tensors(streamed, last)):
        for path, linear in linears.items():
            found = linear_input(streamed, last, linear, hidden)
            torch.testing.assert_close(found, expected[path], rtol=1e-6, atol=1e-5)
            assert not linear._forward_pre_hooks


@torch.no_grad()
def test_linear_input_computes_nothing_after_it(checkpoint_of: Callable[[str], Path]) -> None:
    streamed = open_streamed(checkpoint_of("llama"))
    reached: list[str] = []
    for path, module in streamed.linears(0).items():
        module.register_forward_hook(lambda *_, path=path: reached.append(path.split(".")[-1]))
    with streamed.loaded(0, layer_tensors(streamed, 0)):
        gate = streamed.linears(0)["model.layers.0.mlp.gate_proj"]
        linear_input(streamed, 0, gate, streamed.embed(ROWS[:1]))
    assert reached == ["q_proj", "k_proj", "v_proj", "o_proj"]


# -- refused architectures ---------------------------------------------------------------------

REFUSED = {
    "gpt_oss": "GptOssForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "gpt2": "GPT2LMHeadModel",
}


@pytest.mark.parametrize(("model_type", "architecture"), REFUSED.items())
def test_unsupported_architecture_is_refused_by_name(
    model_type: str, architecture: str, folder: Path
) -> None:
    config = AutoConfig.for_model(model_type).to_dict() | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(UnsupportedArchitectureError) as caught:
        skeleton_of(folder)
    for word in (f"{folder}/config.json", architecture, repr(model_type), "Llama 2/3"):
        assert word in str(caught.value)


def plant_remote_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Code that leaves a file behind when it is imported; returns that file."""
    marker = folder.parent / "executed"
    for module in ("configuration_custom", "modeling_custom"):
        (folder / f"{module}.py").write_text(
            f"open({str(marker)!r}, 'w').close()\nclass Custom: pass\n"
        )
    auto_map = {
        "AutoConfig": "configuration_custom.Custom",
        "AutoModelForCausalLM": "modeling_custom.Custom",
    }
    set_config(folder, auto_map=auto_map)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    return marker


def assert_not_asked(marker: Path) -> None:
    assert sys.stdin.read() == "y\n", "standard input was read"
    assert not marker.exists(), "remote code was executed"


def test_remote_code_is_refused_unasked_and_not_executed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = plant_remote_code(folder, monkeypatch)
    set_config(folder, model_type="custom", architectures=["CustomForCausalLM"])
    message = refusal(folder)
    assert "CustomForCausalLM" in message and "'custom'" in message and "remote code" in message
    assert_not_asked(marker)


def test_remote_code_that_is_not_needed_is_ignored(
    folder: Path, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = plant_remote_code(folder, monkeypatch)
    found = streamed_states(open_streamed(folder), ROWS, batch=5)
    assert_not_asked(marker)
    assert_same_states(found, in_memory_states(checkpoint_of("llama"), torch.float32, ROWS))


def test_model_whose_layer_arguments_depend_on_the_tokens_is_refused(
    checkpoint_of: Callable[[str], Path],
) -> None:
    streamed = open_streamed(checkpoint_of("llama"))
    rotary = streamed.model.get_submodule("model.rotary_emb")
    rotary.register_forward_hook(lambda _m, args, out: tuple(o * args[0].mean() for o in out))
    with pytest.raises(UnsupportedArchitectureError, match="llama.*depend on the tokens"):
        streamed.prepare(SEQLEN + 1)


@pytest.mark.parametrize("in_place", [False, True])
def test_model_that_works_between_layers_is_refused(
    in_place: bool, checkpoint_of: Callable[[str], Path]
) -> None:
    streamed = open_streamed(checkpoint_of("llama"))
    decoder: Any = streamed.model.get_submodule("model")

    def forward(input_ids: Tensor, use_cache: bool) -> BaseModelOutput:
        hidden = decoder.embed_tokens(input_ids)
        for layer in decoder.layers:
            hidden = layer(hidden)
            hidden = hidden.add_(1) if in_place else hidden + 1
        return BaseModelOutput(last_hidden_state=hidden)

    decoder.forward = forward
    with pytest.raises(UnsupportedArchitectureError, match="llama.*between decoder layers"):
        streamed.embed(ROWS)


# -- faults of config.json and of the weights --------------------------------------------------

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": None}, ["model_type"]),
        ({"model_type": 7}, ["model_type"]),
        ({"num_attention_heads": 0}, ["num_attention_heads 0"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads 0"]),
        ({"num_key_value_heads": 3}, ["model.layers.0.self_attn.k_proj.weight", "head counts"]),
        ({"hidden_size": 96}, ["hidden_size", EMBEDDING, "[320, 64]", "[320, 96]"]),
        ({"hidden_size": "64"}, ["hidden_size '64'"]),
        ({"num_hidden_layers": 1}, ["num_hidden_layers 1", "model.layers.1.mlp.up_proj.weight"]),
        ({"num_hidden_layers": 3}, ["num_hidden_layers 3", "model.layers.2.mlp.up_proj.weight"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers -1"]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers 1000000000000", "21 tensors"]),
        ({"vocab_size": 400}, ["vocab_size", EMBEDDING, "[320, 64]", "[400, 64]"]),
        ({"pad_token_id": 5000}, ["pad_token_id"]),
        ({"hidden_act": "nope"}, ["hidden_act", "'nope'"]),
        ({"quantization_config": GPTQ}, ["quantization_config", "already quantized (gptq)"]),
        ({"quantization_config": "gptq"}, ["quantization_config", "already quantized"]),
        (
            {"quantization_config": {"quant_method": "rilq", "bits": 5}},
            ["quantization_config", "bits", "5"],
        ),
        (
            {"quantization_config": {"quant_method": "rilq", "group_size": 128}},
            ["quantization_config", "group size 128", "model.layers.0.self_attn.q_proj"],
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_config_fault_names_file_and_key(
    changes: dict[str, Any], words: list[str], folder: Path
) -> None:
    set_config(folder, **changes)
    message = refusal(folder)
    for word in ("config.json", *words):
        assert word in message


@pytest.mark.parametrize("count", [2, 4])
def test_layer_count_that_disagrees_with_layer_types_is_refused(
    count: int, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint_of("gemma3_text"), tmp_path / "model")
    set_config(folder, num_hidden_layers=count)
    message = refusal(folder)
    assert str(folder) in message and "config.json" in message and "num_hidden_layers" in message


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("lm_head.weight", None, "missing"),
        (UP, None, "missing"),
        ("model.norm.weight", None, "missing"),
        (UP, torch.zeros(128, 63), "shape [128, 63]"),
        ("model.layers.0.self_attn.q_proj.bias", torch.zeros(64), "not part of the model"),
    ],
)
def test_wrong_set_of_tensors_is_refused_by_name(
    name: str, value: Tensor | None, problem: str, folder: Path
) -> None:
    set_tensors(folder, **{name: value})
    message = refusal(folder)
    assert str(folder) in message and problem in message
    assert name in message


@pytest.mark.parametrize("config", [GPTQ, RilqConfig(2, 32).to_dict()])
def test_quantized_checkpoint_is_not_converted_again(config: dict[str, Any], folder: Path) -> None:
    set_config(folder, quantization_config=config)
    with pytest.raises(CheckpointError, match="config.json: quantization_config: .*already"):
        refuse_quantized(Checkpoint.open(LocalFolder(folder)))


def test_dense_checkpoint_has_no_native_config(folder: Path) -> None:
    checkpoint = Checkpoint.open(LocalFolder(folder))
    assert native_config(checkpoint) is None
    refuse_quantized(checkpoint)


# -- oddities that are harmless ----------------------------------------------------------------


def test_tied_head_that_is_stored_too_works(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    tied = checkpoint_of("llama-tied")
    folder = shutil.copytree(tied, tmp_path / "model")
    set_tensors(folder, **{"lm_head.weight": load_file(tied / WEIGHTS)[EMBEDDING]})
    streamed = open_streamed(folder)
    assert "lm_head.weight" not in streamed.outer_names()
    found = streamed_states(streamed, ROWS, batch=5)
    assert_same_states(found, in_memory_states(tied, torch.float32, ROWS))
    head, embedding = map(streamed.model.get_parameter, ("lm_head.weight", EMBEDDING))
    assert head.data_ptr() == embedding.data_ptr()


def test_tied_head_that_is_stored_with_other_values_is_refused(folder: Path) -> None:
    set_config(folder, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"(?s)lm_head.weight.*tie_word_embeddings"):
        open_streamed(folder)


def test_stored_rotary_frequencies_are_ignored(
    folder: Path, checkpoint_of: Callable[[str], Path]
) -> None:
    stale = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    set_tensors(folder, **stale)
    found = streamed_states(open_streamed(folder), ROWS, batch=5)
    assert_same_states(found, in_memory_states(checkpoint_of("llama"), torch.float32, ROWS))


def test_legacy_config_keys_are_understood(folder: Path) -> None:
    set_config(folder, rope_parameters=None, rope_theta=500.0, dtype=None, torch_dtype="float16")
    streamed = open_streamed(folder)
    frequencies = streamed.model.get_buffer("model.rotary_emb.inv_freq")
    torch.testing.assert_close(frequencies, 500.0 ** (-torch.arange(8) / 8))
    found = streamed_states(streamed, ROWS, batch=2)
    assert found.final.dtype == torch.float32
    assert_same_states(found, in_memory_states(folder, torch.float32, ROWS))


@pytest.mark.parametrize(
    "changes",
    [
        {"return_dict": False},
        {"output_hidden_states": True, "output_attentions": True},
        {"_attn_implementation": "flash_attention_2"},
        {"architectures": None},
        {"attention_dropout": 0.5},
    ],
    ids=str,
)
def test_config_entries_about_a_run_change_nothing(
    changes: dict[str, Any], folder: Path, checkpoint_of: Callable[[str], Path]
) -> None:
    set_config(folder, **changes)
    found = streamed_states(open_streamed(folder), ROWS, batch=5)
    assert_same_states(found, in_memory_states(checkpoint_of("llama"), torch.float32, ROWS))
