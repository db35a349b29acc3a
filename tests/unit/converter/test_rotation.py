"""Rotated checkpoints: the same function from other weights, or a refusal by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mixture_examples import MIXTURES
from rotation_examples import MODELS, TOKENS, WEIGHTS, Folders, edit, logits, opened
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from rilq.converter.architecture import SUPPORTED, load_config
from rilq.converter.hadamard import Rotation, random_rotation
from rilq.converter.layers import StreamedModel
from rilq.converter.rotation import EMBEDDING, FINAL_NORM, HEAD, ROTATABLE, RotatedCheckpoint
from rilq.errors import CheckpointError, NonFiniteError, UnsupportedArchitectureError
from rilq.formats.shard import tensor_hash

SEED = 7
REFUSED = sorted(SUPPORTED.keys() - set(ROTATABLE))


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> Callable[[str], Path]:
    return Folders(tmp_path_factory.mktemp("models"), make_model)


def rotated(folder: Path, seed: int = SEED) -> RotatedCheckpoint:
    return RotatedCheckpoint(opened(folder), seed=seed)


def turns(config: PretrainedConfig) -> tuple[Tensor, Tensor]:
    """`Q` and `R` multiplied out, from the seed."""
    generator = torch.Generator().manual_seed(SEED)
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return tuple(dense(random_rotation(n, generator)) for n in (config.hidden_size, heads))  # type: ignore[return-value]


def dense(turn: Rotation) -> Tensor:
    return turn.apply(torch.eye(len(turn.signs), dtype=torch.float64))


# -- the function stays ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_stay_exact_to_float_precision(name: str, folder_of: Callable[[str], Path]) -> None:
    source, turned = opened(folder_of(name)), rotated(folder_of(name))
    before = logits(load_config(source), source.read(source.tensors))
    after = logits(load_config(turned), turned.read(turned.tensors))
    assert (after - before).abs().max() < 2e-6 * before.abs().max()


def test_every_supported_architecture_is_tried_or_refused() -> None:
    tried = {model_type for model_type, _ in MODELS.values()}
    assert tried == set(ROTATABLE) and tried | set(REFUSED) == SUPPORTED.keys()


@pytest.mark.parametrize("name", ["llama, tied", "qwen2", "phi3"])
def test_streamed_layer_by_layer_it_is_the_same_model(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    found = []
    for checkpoint in (opened(folder_of(name)), rotated(folder_of(name))):
        streamed = StreamedModel(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
        streamed.load_outer(checkpoint.read(streamed.outer_names()))
        streamed.prepare(TOKENS.shape[1])
        with torch.no_grad():
            hidden = streamed.embed(TOKENS)
            for index in range(len(streamed.layers)):
                with streamed.loaded(index, checkpoint.read(streamed.layer_names(index))):
                    hidden = streamed.run(index, hidden)
            found.append(streamed.logits(hidden))
    assert (found[1] - found[0]).abs().max() < 1e-5 * found[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_each_element_is_rounded_once(
    dtype: torch.dtype, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    half, wide = tmp_path / "half", tmp_path / "wide"
    for folder, stored in ((half, dtype), (wide, torch.float32)):
        shutil.copytree(folder_of("qwen2"), folder)
        edit(folder, lambda _, tensor, stored=stored: tensor.to(dtype).to(stored))  # type: ignore[misc]
    exact, found = rotated(wide), rotated(half)
    for name, tensor in found.read(found.tensors).items():
        assert tensor.dtype == dtype
        wanted = exact.read([name])[name]
        half_a_place = 0.501 * torch.finfo(dtype).eps * (wanted.abs() + torch.finfo(dtype).tiny)
        assert ((tensor.float() - wanted).abs() <= half_a_place).all(), name


# -- the weights do not ----------------------------------------------------------------------------


def expected(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Llama- or Phi-like checkpoint by the formulas, densely, in float64."""
    source = opened(folder)
    config = load_config(source)
    old = {name: tensor.double() for name, tensor in source.read(source.tensors).items()}
    q, r = turns(config)
    values = config.num_key_value_heads * len(r)
    r_in = torch.block_diag(*[r] * config.num_attention_heads)
    r_values = torch.block_diag(*[r] * config.num_key_value_heads)
    new = {}
    for name, tensor in old.items():
        layer, inner = ".".join(name.split(".")[:3]), ".".join(name.split(".")[3:])
        before = f"{layer}.{'input' if 'self_attn' in inner else 'post_attention'}_layernorm.weight"
        if name.endswith(("layernorm.weight", FINAL_NORM)):
            new[name] = torch.ones_like(tensor)
        elif inner.endswith(("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias")):
            new[name] = tensor
        elif inner.endswith(("gate_proj.bias", "up_proj.bias")):
            new[name] = tensor
        elif inner.endswith(("o_proj.bias", "down_proj.bias")):
            new[name] = tensor @ q
        elif inner.endswith("v_proj.bias"):
            new[name] = tensor @ r_values
        elif name == EMBEDDING:
            new[name] = tensor @ q
        elif name == HEAD:
            new[name] = tensor * old[FINAL_NORM] @ q
        elif inner.endswith("down_proj.weight"):
            new[name] = q.T @ tensor
        elif inner.endswith("o_proj.weight"):
            new[name] = q.T @ tensor @ r_in
        else:
            new[name] = tensor * old[before] @ q
            if inner.endswith(("v_proj.weight", "qkv_proj.weight")):
                new[name][-values:] = r_values.T @ new[name][-values:]
    if config.tie_word_embeddings:
        new[HEAD] = old[EMBEDDING] * old[FINAL_NORM] @ q
    return new


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_of_the_formulas(name: str, folder_of: Callable[[str], Path]) -> None:
    wanted = expected(folder_of(name))
    found = rotated(folder_of(name))
    tensors = found.read(found.tensors)
    assert tensors.keys() == wanted.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, wanted[key].float(), rtol=1e-6, atol=1e-6, msg=key)


def test_large_tensors_are_turned_in_parts(
    monkeypatch: pytest.MonkeyPatch, folder_of: Callable[[str], Path]
) -> None:
    whole = rotated(folder_of("phi3"))
    tensors = whole.read(whole.tensors)
    monkeypatch.setattr("rilq.converter.rotation.CHUNK", 300)  # four rows, less than a head's
    in_parts = rotated(folder_of("phi3"))
    for name, tensor in in_parts.read(in_parts.tensors).items():
        torch.testing.assert_close(tensor, tensors[name])


def test_another_seed_gives_other_weights(folder_of: Callable[[str], Path]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    one, same, two = (rotated(folder_of("llama"), seed).read([name])[name] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, two)


def test_an_outlier_channel_is_gone(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    """What the rotation is for: in an input channel's place, its share in every channel."""
    folder = shutil.copytree(folder_of("llama"), tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"

    def spike(key: str, tensor: Tensor) -> Tensor:
        return tensor.index_fill(1, torch.tensor([5]), 4.0) if key == name else tensor

    edit(folder, spike)

    def peak(tensor: Tensor) -> float:
        return (tensor.abs().amax(1) / tensor.square().mean(1).sqrt()).mean().item()

    assert peak(opened(folder).read([name])[name]) > 7
    assert peak(rotated(folder).read([name])[name]) < 4


# -- it stands for its source ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_hashes_and_bytes_read_are_the_sources(name: str, folder_of: Callable[[str], Path]) -> None:
    source, turned = opened(folder_of(name)), rotated(folder_of(name))
    tensors = source.read(source.tensors)
    layers = [[n for n in turned.tensors if n.startswith(f"model.layers.{i}.")] for i in (0, 1)]
    outer = [n for n in turned.tensors if not n.startswith("model.layers.")]
    for names in (outer, *layers):
        turned.read(names)
    assert {n: turned.hashes[n] for n in tensors} == {n: tensor_hash(tensors[n]) for n in tensors}
    assert turned.hashes[HEAD] == source.hashes[HEAD if HEAD in tensors else EMBEDDING]
    assert turned.bytes_read == source.bytes_read
    assert turned.nbytes(turned.source_names(turned.tensors)) == source.total_bytes
    assert turned.header_hash() == source.header_hash()
    assert turned.file_signatures() == source.file_signatures()


def test_a_tied_head_becomes_a_tensor_of_its_own(folder_of: Callable[[str], Path]) -> None:
    turned = rotated(folder_of("llama, tied"))
    assert turned.config["tie_word_embeddings"] is False
    assert turned.tensors[HEAD].shape == turned.tensors[EMBEDDING].shape
    found = turned.read([HEAD, EMBEDDING])
    assert list(found) == [HEAD, EMBEDDING] and not torch.equal(found[HEAD], found[EMBEDDING])
    assert torch.equal(rotated(folder_of("llama, tied")).read([HEAD])[HEAD], found[HEAD])


def test_a_stored_head_that_is_tied_is_taken_for_the_embedding(
    tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(folder_of("llama, tied"), tmp_path / "model")
    without = rotated(folder).read([HEAD])[HEAD]
    tensors = load_file(folder / WEIGHTS)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(rotated(folder).read([HEAD])[HEAD], without)
    tensors[HEAD][3, 3] += 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head.weight differs from the embedding"):
        rotated(folder).read([HEAD])


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", REFUSED)
def test_norms_behind_the_linears_and_experts_are_refused_by_name(
    model_type: str, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    folder = make_model(tmp_path / "model", model_type, **MIXTURES.get(model_type, {}))
    with pytest.raises(UnsupportedArchitectureError) as caught:
        rotated(folder)
    assert ("mixture of experts" in str(caught.value)) == (model_type in MIXTURES)
    assert f"--rotate: {SUPPORTED[model_type]} cannot be rotated" in str(caught.value)
    assert "leave out --rotate" in str(caught.value) and "Llama 2/3, Mistral" in str(caught.value)


@pytest.mark.parametrize("model_type", sorted({*REFUSED} - {*MIXTURES}))
def test_what_is_refused_could_not_be_exact(
    model_type: str, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    """Each has a norm with a weight for each channel at the output of attention or MLP."""
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", model_type))
    last: list[nn.Module] = []
    for module in model.model.layers[0].modules():
        if isinstance(module, nn.Linear) or type(module).__name__.endswith("RMSNorm"):
            module.register_forward_hook(lambda m, _args, _out: last.append(m))
    model(TOKENS)
    assert type(last[-1]).__name__.endswith("RMSNorm")


def test_a_tensor_that_no_formula_is_for_is_refused_by_name(
    tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(folder_of("llama"), tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.self_attn.sinks"] = torch.ones(4)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UnsupportedArchitectureError, match=r"model\.layers\.1\.self_attn\.sinks"):
        rotated(folder)


def test_what_does_not_fit_its_dtype_once_rotated_is_refused_by_name(
    tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(folder_of("llama"), tmp_path / "model")

    def large(name: str, tensor: Tensor) -> Tensor:
        return tensor.fill_(60000.0).half() if name.endswith("0.mlp.up_proj.weight") else tensor

    edit(folder, large)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(NonFiniteError, match=f"{name}: too large for float16"):
        rotated(folder).read([name])


def test_an_untied_config_with_rotary_buffers_of_old_exports_is_read(
    tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(folder_of("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]  # false is Llama's default
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / WEIGHTS)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[buffer] = torch.ones(8)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    turned = rotated(folder)
    assert torch.equal(turned.read([buffer])[buffer], torch.ones(8))
    head = rotated(folder_of("llama")).read([HEAD])[HEAD]
    assert torch.equal(turned.read([HEAD])[HEAD], head)
