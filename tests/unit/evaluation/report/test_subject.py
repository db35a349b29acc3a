"""What is gathered of a checkpoint, from its folder and from runs."""

import json
import shutil
from dataclasses import replace
from math import nan
from pathlib import Path

import pytest
import report_examples as examples

from rilq.converter import pipeline
from rilq.converter.options import ConvertOptions
from rilq.errors import CheckpointError
from rilq.evaluation.report.subject import folder_subject, runs_subject
from rilq.progress import SilentReporter
from rilq.records.run import LossPoint


@pytest.fixture(scope="module")
def converted(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, text: str
) -> pipeline.ConvertResult:
    """Trained, with one linear in more bits and one in 16."""
    folder = tmp_path_factory.mktemp("converted")
    (folder / "words.txt").write_text(text[:3000])
    options = ConvertOptions(
        model=str(tiny_llama),
        dataset=(str(folder / "words.txt"),),
        quantizer="rtn",
        group_size=32,
        bits_for=(("model.layers.1.mlp.down_proj", 4),),
        skip=("model.layers.1.mlp.up_proj",),
        nsamples=8,
        seqlen=32,
        steps=2,
        val_every=1,
        device="cpu",
        output_dir=folder / "tiny-w2",
    )
    return pipeline.convert(pipeline.prepare(options, SilentReporter()), SilentReporter())


def test_a_folder_tells_recipe_losses_layers_and_checksums(
    converted: pipeline.ConvertResult,
) -> None:
    found = folder_subject(converted.output)
    assert (found.name, found.model) == ("tiny-w2", "tiny-llama")
    total = [p for p in found.losses if (p.kind, p.term) == ("validation", "total")]
    assert [(p.step, p.value) for p in total] == converted.quality["history"]
    assert {p.term for p in found.losses} > {"mse", "kl"}
    assert [layer.error for layer in found.layers] == converted.quality["layer_errors"]
    assert found.recipe["quantizer"] == "rtn" and found.started is None and not found.evaluations
    sizes = {each.name: each.size for each in found.files}
    assert found.size_bytes == sizes["model.safetensors"]
    assert found.size_bytes == (converted.output / "model.safetensors").stat().st_size


def test_bits_of_a_layer_are_those_of_its_quantized_linears_with_scales(
    converted: pipeline.ConvertResult,
) -> None:
    first, second = (layer.bits for layer in folder_subject(converted.output).layers)
    # tiny_llama, of float32: q and o of 64 x 64, k and v of 32 x 64, and three of 64 x 128.
    attention, each = 2 * 64 * 64 + 2 * 32 * 64, 64 * 128
    expected = (attention * 3 + each * (3 + 5)) / (attention + 2 * each)
    assert first == 3.0 and second == pytest.approx(expected)


def test_runs_add_evaluations_and_stages_and_the_newest_counts(
    converted: pipeline.ConvertResult,
) -> None:
    values = [examples.evaluation(ppl).as_dict() for ppl in (18.0, 19.0)]
    other = examples.evaluation(30.0, tokens_digest="other").as_dict()
    evals = [
        examples.run(id=i, command="eval", evaluation=each, losses=(), layers=())
        for i, each in ((4, values[0]), (3, values[1]), (2, other))
    ]
    again = examples.run(id=5, losses=(), layers=(), stages=())  # found its work done
    found = folder_subject(converted.output, [again, *evals, examples.run(id=1)])
    assert [each.perplexity for each in found.evaluations] == [18.0, 30.0]
    assert [run.id for run in found.runs] == [1, 2, 4] and found.machine["cores"] == 2
    assert found.losses == examples.run().losses
    assert found.recipe["quantizer"] == "rtn", "rilq.json says what made the checkpoint"


def test_runs_alone_tell_what_was_recorded() -> None:
    wild = LossPoint("train", "total", 7, nan)
    made = examples.run(losses=(*examples.run().losses, wild), figures={"bits_per_weight": 2.5})
    found = runs_subject("", [made])
    assert (found.name, found.model) == ("model-w2g64-rilq", "model")
    assert found.bits_per_weight == 2.5 and wild not in found.losses and not found.files
    measured = replace(made, command="eval", evaluation=examples.evaluation().as_dict())
    assert runs_subject("", [measured]).evaluation == examples.evaluation()


def test_an_evaluation_kept_by_another_version_is_left_out() -> None:
    old = {k: v for k, v in examples.evaluation().as_dict().items() if k != "tasks"}
    runs = [examples.run(id=i, command="eval", evaluation=old) for i in (2, 1)]
    assert runs_subject("", runs).evaluations == ()


def test_figures_of_an_earlier_push_are_shown_while_the_checkpoint_is_the_same(
    converted: pipeline.ConvertResult, tmp_path: Path
) -> None:
    from rilq.formats.verify import file_hash

    folder = Path(shutil.copytree(converted.output, tmp_path / "copy"))
    kept = {"asked": {"checkpoint": file_hash(folder / "rilq.json")}}
    kept["figures"] = examples.evaluation().as_dict()
    (tmp_path / "copy.rilq-eval.json").write_text(json.dumps(kept))
    assert folder_subject(folder).evaluation == examples.evaluation()
    manifest = (folder / "rilq.json").read_text()
    (folder / "rilq.json").write_text(manifest + " ")
    assert folder_subject(folder).evaluation is None


def test_another_json_is_refused(converted: pipeline.ConvertResult, tmp_path: Path) -> None:
    for content in ('{"files": {}, "tensors": {}}', '{"files": {}, "tensors": {}, "quality": 1}'):
        (tmp_path / "rilq.json").write_text(content)
        with pytest.raises(CheckpointError, match="is not what rilq writes"):
            folder_subject(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        folder_subject(tmp_path / "nowhere")
