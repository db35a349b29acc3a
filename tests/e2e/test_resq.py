"""`--method resq` and its baselines from end to end: two passes, resumable, loaded, refused."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rilq
from rilq.calib.activations import ActivationStore
from rilq.converter import pipeline, workdir
from rilq.converter.options import ConvertOptions
from rilq.converter.resq.options import METHODS
from rilq.formats.resq.cache import ResqCache
from rilq.progress import SilentReporter

ROWS, SEQLEN = 6, 24
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def resq(tiny_llama: Path, calib: Path) -> Callable[..., ConvertOptions]:
    """`resq(folder, **given)`: options of a conversion of tiny_llama to `folder/out`."""

    def options(folder: Path, **given: Any) -> ConvertOptions:
        return ConvertOptions.of_recipe(
            "default",
            **{
                "model": str(tiny_llama),
                "method": "resq",
                "dataset": (str(calib),),
                "nsamples": ROWS,
                "seqlen": SEQLEN,
                "max_shard_size": "40kB",
                "device": "cpu",
                "output_dir": folder / "out",
                **given,
            },
        )

    return options


def run_quietly(options: ConvertOptions) -> pipeline.ConvertResult:
    return pipeline.convert(pipeline.prepare(options, SilentReporter()), SilentReporter())


def words(tiny_llama: Path, calib: Path, folder: Path, *more: object) -> list[object]:
    """The command line of `resq(folder)`."""
    given = f"--method resq --nsamples {ROWS} --seqlen {SEQLEN} --device cpu".split()
    return [tiny_llama, *given, "--dataset", calib, "-o", folder / "out", *more]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


@pytest.mark.parametrize(
    ("method", "source"),
    [*((method, {}) for method in METHODS), ("resq", {"lowest_bits": 2, "high_bits": 6})],
)
def test_what_is_loaded_computes_what_the_conversion_has_run(
    method: str, source: dict[str, Any], tmp_path: Path, resq: Any
) -> None:
    check_loaded(resq(tmp_path, method=method, keep_work=True, **source))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {}),  # has biases
        ("qwen3", {"head_dim": 8}),  # hidden / heads is 16; norms of queries and keys
    ],
    ids=["llama-tied", "mistral", "qwen2", "qwen3"],
)
def test_so_it_is_with_every_architecture(
    model_type: str, sizes: dict[str, Any], tmp_path: Path, resq: Any, make_model: Any
) -> None:
    source = make_model(tmp_path / "source", model_type, **sizes)
    check_loaded(resq(tmp_path, model=str(source), keep_work=True))


@torch.no_grad()
def check_loaded(options: ConvertOptions) -> None:
    """Convert; what transformers loads has the hidden states that were streamed last."""
    result = run_quietly(options)
    tokens = load_file(options.work / "rows.safetensors")["tokens"]
    model: Any = AutoModelForCausalLM.from_pretrained(options.output, dtype=torch.float32)
    ran: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _module, _args, out: ran.append(out))
    model(tokens, use_cache=False)
    store = ActivationStore(options.work / "student-0002.bin", (ROWS, SEQLEN, 64), torch.float32)
    torch.testing.assert_close(ran[0], store.read(0, ROWS), rtol=1e-4, atol=1e-4)
    assert all(0 < error < 0.5 for error in result.quality["layer_errors"])


def test_the_plan_says_what_is_stored_and_read(tmp_path: Path, resq: Any) -> None:
    result = run_quietly(resq(tmp_path))
    found = tensors_of(tmp_path / "out")
    assert result.plan.output_bytes == sum(tensor.nbytes for tensor in found.values())
    assert result.plan.read_bytes == 2 * sum(
        t.nbytes for t in tensors_of(Path(result.plan.model)).values()
    )
    linears = [n.removesuffix("_scale") for n in found if n.endswith(".weight_scale")]
    stored = sum(found[n].nbytes + found[f"{n}_scale"].nbytes for n in linears)
    weights = sum(p.out_features * p.in_features for p in result.plan.quantized)
    assert len(linears) == len(result.plan.quantized)
    assert result.plan.bits_per_weight == pytest.approx(8 * stored / weights)
    manifest = json.loads((tmp_path / "out" / "rilq.json").read_text())
    assert (manifest["activation_bits"], manifest["cache_bits"]) == (
        pytest.approx(result.plan.run_time_bits.activation_bits),
        result.plan.run_time_bits.cache_bits,
    )


def test_commands_plan_convert_verify_and_evaluate(
    tmp_path: Path, run_cli: Any, tiny_llama: Path, calib: Path
) -> None:
    planned = run_cli("plan", *words(tiny_llama, calib, tmp_path))
    assert planned.code == 0, planned.err
    assert "the checkpoint is read twice" in " ".join(planned.out.replace("│", "").split())
    ended = run_cli("convert", *words(tiny_llama, calib, tmp_path))
    assert ended.code == 0, ended.err
    assert "error by layer" in ended.err
    page = (tmp_path / "out.report.html").read_text()
    assert "resq, 4 bits, 8 in 0.125 of the channels" in page
    assert run_cli("verify", tmp_path / "out").code == 0
    measured = run_cli(
        "eval", tmp_path / "out", "--text", calib, "--seqlen", SEQLEN, "--against", tiny_llama,
        "--device", "cpu", "--no-speed", "--json",
    )  # fmt: skip
    assert measured.code == 0, measured.err
    figures = json.loads(measured.out)
    manifest = json.loads((tmp_path / "out" / "rilq.json").read_text())
    shown = "bits when it runs  {activation_bits:.2f} per activation, {cache_bits:.2f} per cached"
    assert shown.format(**manifest) in ended.err
    for name in ("bits_per_weight", "activation_bits", "cache_bits"):
        assert figures[name] == pytest.approx(manifest[name])


@torch.no_grad()
def test_the_result_generates_over_a_quantized_cache(tmp_path: Path, resq: Any) -> None:
    run_quietly(resq(tmp_path))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    found = model.generate(
        torch.arange(8)[None], max_new_tokens=6, min_new_tokens=6, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert found.sequences.shape == (1, 14)
    assert isinstance(found.past_key_values, ResqCache)


# -- adapters --------------------------------------------------------------------------------------

TRAINING: dict[str, Any] = {"rank": 4, "steps": 4, "val_every": 2, "batch_size": 4}


def test_adapters_trained_through_quantized_activations_gain(tmp_path: Path, resq: Any) -> None:
    """Of a model that knows something; a random one has nothing that held-out rows could gain."""
    demo = Path(__file__).parents[2] / "examples" / "demo"
    options = resq(
        tmp_path, model=str(demo / "model"), dataset=(str(demo / "calib.txt"),), nsamples=16,
        seqlen=64, rank=8, steps=8, val_every=8, batch_size=4, learning_rate=1e-3, low_bits=3,
        high_bits=4,
    )  # fmt: skip
    quality = run_quietly(options).quality
    assert quality["validation_loss"] < 0.98 * quality["validation_loss_before"]
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def test_killed_in_training_it_goes_on_to_the_same_bytes(
    tmp_path: Path, resq: Any, convert: Any, hashes: Any, in_child: Any
) -> None:
    whole, stopped, points = tmp_path / "whole", tmp_path / "stopped", tmp_path / "points"

    def record() -> None:
        with points.open("w") as file:
            workdir.reached = lambda point: print(point, file=file)
            run_quietly(resq(whole, **TRAINING))

    assert in_child(record).code == 0
    at = points.read_text().split().index("train:committed") + 1
    assert convert(resq(stopped, **TRAINING), at).code == KILLED
    ended = convert(resq(stopped, **TRAINING))
    assert ended.code == 0, ended.err
    assert hashes(stopped / "out") == hashes(whole / "out")


# -- stopping --------------------------------------------------------------------------------------


def test_killed_in_either_pass_it_goes_on_to_the_same_bytes(
    tmp_path: Path, resq: Any, in_child: Any, convert: Any, hashes: Any
) -> None:
    whole, points = tmp_path / "whole", tmp_path / "points"

    def record() -> None:
        with points.open("w") as file:
            workdir.reached = lambda point: print(point, file=file)
            run_quietly(resq(whole))

    assert in_child(record).code == 0
    reached = points.read_text().split()
    expected = hashes(whole / "out")
    units = [at for at, point in enumerate(reached, start=1) if point.endswith(":committed")]
    stages = {reached[at - 1].partition(":")[0] for at in units}
    assert {"covariances", "bases", "outer", "layers", "shards"} <= stages
    # After each unit, and before each line of one that writes more than a file.
    written = [
        at
        for at, point in enumerate(reached, start=1)
        if point in ("covariances:written", "bases:written", "layers:written")
    ]
    folder = tmp_path / "stopped"
    for at in [*units[1:-3:2], *written[2::3]]:
        assert convert(resq(folder), at).code == KILLED, reached[at - 1]
        assert not (folder / "out").exists()
        ended = convert(resq(folder))
        assert ended.code == 0, ended.err
        assert hashes(folder / "out") == expected, f"killed at {at}, {reached[at - 1]}"
        shutil.rmtree(folder)


def test_killed_again_and_again_it_redoes_no_finished_layer(
    tmp_path: Path, resq: Any, convert: Any
) -> None:
    """Each run gets a few commit points further; without that it would never end."""
    codes = []
    for _ in range(20):
        codes.append(convert(resq(tmp_path), 8).code)
        if codes[-1] == 0:
            break
    assert codes[-1] == 0
    assert set(codes[:-1]) == {KILLED}


def test_another_method_is_another_job(tmp_path: Path, resq: Any, convert: Any) -> None:
    assert convert(resq(tmp_path), 8).code == KILLED
    ended = convert(resq(tmp_path, method="quik"))
    assert ended.code == 2
    assert "--method: 'resq' there, 'quik' now" in ended.err


def test_two_processes_find_what_one_finds_but_for_rounding(
    tmp_path: Path, together: Any, run_cli: Any, tiny_llama: Path, calib: Path
) -> None:
    def command(folder: Path) -> list[str]:
        return ["convert", *map(str, words(tiny_llama, calib, folder, "--no-report"))]

    assert run_cli(*command(tmp_path / "one")).code == 0
    shared = tmp_path / "two"
    stopped = together(2, command(shared), ("covariances:committed", 2))  # after the first layer
    assert stopped[0].code == KILLED
    ended = together(2, command(shared))
    assert [each.code for each in ended] == [0, 0], [each.err for each in ended]
    one, two = tensors_of(tmp_path / "one" / "out"), tensors_of(shared / "out")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if tensor.dtype != torch.int32:  # scales and rotations, and what is rotated
            apart = (tensor.float() - two[name].float()).norm() / tensor.float().norm()
            assert apart < 0.05, name  # a clipped scale is one of a grid, and may be the next
    errors = [
        json.loads((folder / "out" / "rilq.json").read_text())["quality"]["layer_errors"]
        for folder in (tmp_path / "one", shared)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gemma2", "phi3", "mixtral"])
def test_another_architecture_is_refused_by_name(
    model_type: str, tmp_path: Path, run_cli: Any, make_model: Any, calib: Path
) -> None:
    source = make_model(tmp_path / "source", model_type)
    ended = run_cli("plan", *words(source, calib, tmp_path))
    assert ended.code == 2
    assert "--method resq" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--export", "dense"), "--export dense: no other format can hold"),
        (("--rank", 4, "--adapter", "pooled"), "take up no adapter"),
        (("--high-fraction", 0.01), "use a larger --high-fraction"),
    ],
    ids=["export", "rank", "fraction"],
)
def test_what_cannot_be_is_refused_before_any_work(
    more: tuple[object, ...], said: str, tmp_path: Path, run_cli: Any, tiny_llama: Path, calib: Path
) -> None:
    ended = run_cli("convert", *words(tiny_llama, calib, tmp_path, *more))
    assert ended.code == 2
    assert said in ended.err
    assert list(tmp_path.iterdir()) == []


def test_its_output_is_not_converted_again(tmp_path: Path, resq: Any) -> None:
    run_quietly(resq(tmp_path))
    with pytest.raises(rilq.InputError, match="quantized already"):
        run_quietly(resq(tmp_path / "again", model=str(tmp_path / "out")))
