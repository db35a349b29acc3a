"""Tasks through our loader: the harness' own scores, and errors before any work."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tqdm
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rilq.errors import InputError, OptionError, RilqError
from rilq.evaluation.figures import TaskFigure
from rilq.evaluation.tasks import figures_of, load_tasks, run_tasks
from rilq.evaluation.whole import Place
from rilq.formats.lora import ADAPTER_FOLDER
from rilq.progress import SilentReporter

lm_eval = pytest.importorskip("lm_eval")

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples/tasks"
NAMES = ["agreement", "next_word", "next_word_likelihood"]


class Stages(SilentReporter):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int | None]] = []
        self.last: dict[str, int] = {}

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.seen.append((name, total))

    def step(self, done: int, **figures: Any) -> None:
        self.last[self.seen[-1][0]] = done


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples' data files are named from there."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def adapted(tiny_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint with a LoRA beside it that changes much."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "adapted"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / ADAPTER_FOLDER)
    return folder


def ours(model: Path, names: list[str], report: SilentReporter, **options: Any) -> Any:
    tasks = load_tasks(names, EXAMPLES)
    with Place(str(model), device="cpu").loaded() as (loaded, tokenizer):
        return run_tasks(tasks, loaded, tokenizer, report=report, **options)


def theirs(model: Path, *, peft: Path | None = None, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), **({"peft": str(peft)} if peft else {})},
        tasks=list(NAMES),
        task_manager=lm_eval.tasks.TaskManager(include_path=EXAMPLES, include_defaults=False),
        device="cpu",
        batch_size=1,
        **options,
    )
    return found


def test_scores_are_those_of_the_harness_own_backend_to_the_last_digit(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Stages()
    found = ours(tiny_llama, NAMES, report, num_fewshot=2, limit=8)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    results = theirs(tiny_llama, num_fewshot=2, limit=8)["results"]
    assert {(each.task, each.metric) for each in found} == {
        ("agreement", "acc"),
        ("agreement", "acc_norm"),
        ("agreement", "brier_score"),
        ("next_word", "exact_match,first-word"),
        ("next_word_likelihood", "acc"),
        ("next_word_likelihood", "perplexity"),
    }
    for each in found:
        key = each.metric if "," in each.metric else f"{each.metric},none"
        assert each.value == results[each.task][key]
        metric, _, filtered = key.partition(",")
        stderr = results[each.task][f"{metric}_stderr,{filtered}"]
        assert each.stderr == (None if stderr == "N/A" else stderr)
        assert (each.shots, each.samples, each.version) == (2, 8, "1.0")
        assert each.higher_is_better == (metric != "brier_score")
    # 8 samples with two choices, 8 likelihoods; 8 generations.
    assert ("tasks: Running loglikelihood requests", 24) in report.seen
    assert report.last["tasks: Running generate_until requests"] == 8


# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_lora_beside_the_checkpoint_is_scored_with_it(adapted: Path, tiny_llama: Path) -> None:
    def values(model: Path, **options: Any) -> list[float]:
        results = theirs(model, limit=4, **options)["results"]
        row = results["next_word_likelihood"]
        return [row["perplexity,none"], results["agreement"]["brier_score,none"]]

    found = {(f.task, f.metric): f.value for f in ours(adapted, NAMES, SilentReporter(), limit=4)}
    own = [found["next_word_likelihood", "perplexity"], found["agreement", "brier_score"]]
    assert own == values(tiny_llama, peft=adapted / ADAPTER_FOLDER)
    assert own != values(tiny_llama)


def test_the_harness_progress_bars_are_its_own_again_afterwards(tiny_llama: Path) -> None:
    before = tqdm.tqdm, lm_eval.models.huggingface.tqdm, lm_eval.api.task.tqdm
    level = logging.getLogger("lm_eval").level
    ours(tiny_llama, ["agreement"], Stages(), limit=1)
    assert before == (tqdm.tqdm, lm_eval.models.huggingface.tqdm, lm_eval.api.task.tqdm)
    assert logging.getLogger("lm_eval").level == level


def test_a_group_has_its_own_row_and_the_samples_of_its_tasks() -> None:
    # As the harness 0.4.13 gives it, shortened.
    row = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 8}
    results = {
        "results": {"a": row, "b": {**row, "acc_stderr,none": "N/A"}, "all": row},
        "groups": {"all": row},
        "group_subtasks": {"all": ["a", "b"]},
        "versions": {"a": 1.0, "b": "Yaml", "all": "N/A"},
        "n-shot": {"a": 0, "b": 5},
        "n-samples": {"a": {"effective": 3}, "b": {"effective": 4}},
        "higher_is_better": {"a": {"acc": True}, "b": {"acc": False}, "all": {"acc": None}},
    }
    assert figures_of(results) == (
        TaskFigure("a", "1.0", "acc", 0.5, 0.1, 0, 3, True),
        TaskFigure("b", "Yaml", "acc", 0.5, None, 5, 4, False),
        TaskFigure("all", "N/A", "acc", 0.5, 0.1, 0, 7, True),
    )


def test_a_file_by_its_path_and_a_pattern_name_tasks() -> None:
    by_path = load_tasks([str(EXAMPLES / "agreement.yaml")])
    assert [each.task_name for each in by_path.objects] == ["agreement"]
    by_pattern = load_tasks(["next_word*", "next_word"], EXAMPLES)
    assert [each.task_name for each in by_pattern.objects] == ["next_word", "next_word_likelihood"]


@pytest.mark.slow  # a group may name tasks of the harness, so all of those are read
def test_a_group_of_local_tasks_is_one_object(
    tmp_path: Path, make_task: Callable[..., Path]
) -> None:
    make_task("one")
    make_task("two")
    (tmp_path / "all.yaml").write_text("group: both\ntask: [one, two]\n")
    (both,) = load_tasks(["both"], tmp_path).objects
    assert sorted(both.child_names) == ["one", "two"]


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a task's file; options replace lines of it."""

    def make(name: str, **changed: Any) -> Path:
        data = tmp_path / "data.jsonl"
        data.write_text(json.dumps({"words": "a small", "next": "dog"}) + "\n")
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "loglikelihood",
            "doc_to_text": "{{words}}",
            "doc_to_target": " {{next}}",
            "metric_list": [{"metric": "acc"}],
            **changed,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(task))  # JSON is YAML
        return path

    return make


@pytest.mark.slow  # all tasks of the harness are read
def test_an_unknown_task_is_refused_with_names_close_to_it() -> None:
    with pytest.raises(OptionError, match="--tasks agreemnt: .* neither in .*\n.*agreement"):
        load_tasks(["agreemnt"], EXAMPLES)


def test_a_broken_file_is_named_though_another_task_was_asked_for(
    tmp_path: Path, make_task: Callable[..., Path]
) -> None:
    make_task("fine")
    (tmp_path / "broken.yaml").write_text("task: [unclosed\n")
    with pytest.raises(InputError, match=r"broken\.yaml: not YAML: .*line"):
        load_tasks(["fine"], tmp_path)
    (tmp_path / "broken.yaml").write_text("- a list\n")
    with pytest.raises(InputError, match=r"broken\.yaml: expected the keys"):
        load_tasks(["fine"], tmp_path)


def test_a_missing_data_file_is_refused_with_where_it_is_looked_for(
    make_task: Callable[..., Path],
) -> None:
    path = make_task("lost", dataset_kwargs={"data_files": {"test": "nowhere.jsonl"}})
    with pytest.raises(InputError, match="nowhere.jsonl.*\n.*from the current folder"):
        load_tasks([str(path)])


def test_a_task_of_the_hub_without_a_network_is_refused(make_task: Callable[..., Path]) -> None:
    path = make_task("remote", dataset_path="no-such-owner/no-such-set", dataset_kwargs=None)
    with pytest.raises(InputError, match="no-such-set.*\n.*fetches its data from the Hub"):
        load_tasks([str(path)])


def test_a_template_without_its_key_is_refused(make_task: Callable[..., Path]) -> None:
    path = make_task("odd", doc_to_choice="{{nothing}}", output_type="multiple_choice")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tasks([str(path)])


def test_a_task_that_runs_what_the_model_writes_is_refused(make_task: Callable[..., Path]) -> None:
    path = make_task("unsafe", unsafe_code=True)
    with pytest.raises(OptionError, match="unsafe runs code that the model writes"):
        load_tasks([str(path)])


def test_what_the_harness_cannot_do_is_one_message(
    tiny_llama: Path, make_task: Callable[..., Path]
) -> None:
    tasks = load_tasks([str(make_task("poor"))])  # one row, and 5 others are asked for
    with Place(str(tiny_llama), device="cpu").loaded() as (model, tokenizer):
        with pytest.raises(RilqError, match="lm-evaluation-harness gave up: "):
            run_tasks(tasks, model, tokenizer, num_fewshot=5, report=SilentReporter())


def test_a_missing_harness_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(OptionError, match=r"pip install 'rilq\[eval\]'"):
        load_tasks(["agreement"], EXAMPLES)


def test_a_task_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--task-path .*: is not a folder"):
        load_tasks(["agreement"], tmp_path / "none")
