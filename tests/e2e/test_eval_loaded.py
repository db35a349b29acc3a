"""`rilq eval` with the model loaded whole: tasks, prompts, speed, and what the terminal shows."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rilq.evaluation import evaluate as evaluation

lm_eval = pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate  # noqa: E402 - imported once, and not in each child
from lm_eval.models import huggingface  # noqa: E402, F401
from lm_eval.tasks import TaskManager  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples/demo"
NAMES = ["agreement", "next_word", "next_word_likelihood"]
KILLED = -signal.SIGKILL


def at_root() -> None:
    """The examples' data files are named from there."""
    os.chdir(ROOT)


@pytest.fixture
def checkpoint(native: Callable[..., Path]) -> Path:
    """A converted model; what it was made from is its sibling `source`."""
    return native("llama", {})


@pytest.fixture
def evaluate(checkpoint: Path, calib: Path, tmp_path: Path, run_cli: Any) -> Callable[..., Any]:
    """`evaluate(*more, first=at_root)`: the command against the base, without its speed."""

    def run(*more: object, first: Callable[[], None] = at_root) -> Any:
        return run_cli(
            *("eval", checkpoint, "--against", checkpoint.parent / "source", "--text", calib),
            *("--seqlen", 32, "--device", "cpu", "--work-dir", tmp_path / "work", *more),
            first=first,
        )

    return run


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("the cat sat on [red]mats[/red]\nan old house\n")
    return path


def test_the_demo_s_dense_export_scores_as_in_the_harness_to_the_last_digit(
    tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    rounding = ("--quantizer", "rtn", "--rank", 0, "--nsamples", 4, "--seqlen", 64)
    text = ("--dataset", DEMO / "calib.txt", "--device", "cpu")
    ended = run_cli("convert", DEMO / "model", *text, *rounding, "-o", made)
    assert ended.code == 0, ended.err
    dense = tmp_path / "dense"
    ended = run_cli("export", made, "--to", "dense", "-o", dense, "--device", "cpu")
    assert ended.code == 0, ended.err
    short = tmp_path / "short.txt"
    short.write_text((DEMO / "heldout.txt").read_text()[:2000])
    ended = run_cli(
        *("eval", dense, "--text", short, "--seqlen", 64, "--device", "cpu", "--no-speed"),
        *("--work-dir", tmp_path / "work", "--tasks", ",".join(NAMES), "--limit", 4),
        *("--num-fewshot", 1, "--task-path", "examples/tasks", "--json"),
        first=at_root,
    )
    assert ended.code == 0, ended.err
    tasks = json.loads(ended.out)["tasks"]

    monkeypatch.chdir(ROOT)
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(dense)},
        tasks=list(NAMES),
        task_manager=TaskManager(include_path="examples/tasks", include_defaults=False),
        device="cpu",
        batch_size=1,
        num_fewshot=1,
        limit=4,
    )["results"]
    found = {(each["task"], each["metric"]): each["value"] for each in tasks}
    theirs = {
        (task, key.removesuffix(",none")): value
        for task, row in results.items()
        for key, value in row.items()
        if "," in key and "_stderr" not in key
    }
    assert found == theirs
    assert len(found) == 6


def test_json_holds_tasks_and_generations_beside_the_streamed_figures(
    evaluate: Callable[..., Any], prompts: Path, checkpoint: Path
) -> None:
    ended = evaluate(
        *("--tasks", "agreement", "--task-path", "examples/tasks", "--limit", 5),
        *("--prompts", prompts, "--max-new-tokens", 6, "--no-speed", "--json"),
    )
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["perplexity"] > 1 and found["against"]["kl_mean"] > 0
    assert found["speed"] is None
    assert {(t["task"], t["metric"]) for t in found["tasks"]} == {
        ("agreement", "acc"), ("agreement", "acc_norm"), ("agreement", "brier_score")
    }  # fmt: skip
    assert {t["samples"] for t in found["tasks"]} == {5}
    first, second = found["generations"]
    assert first["prompt"] == "the cat sat on [red]mats[/red]"
    assert second["prompt"] == "an old house"
    for each in (first, second):
        assert each["text"].startswith(each["same"]) and each["base"].startswith(each["same"])
        assert (each["first_difference"] is None) == (each["text"] == each["base"])
    assert "tasks: Running loglikelihood requests" in ended.err


def test_the_terminal_shows_all_of_it_within_80_columns_and_markup_as_text(
    evaluate: Callable[..., Any], prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ended = evaluate(
        *("--tasks", "agreement", "--task-path", "examples/tasks", "--limit", 2),
        *("--prompts", prompts, "--max-new-tokens", 6),
    )
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "prompt  the cat sat on [red]mats[/red]" in ended.out
    assert "token 1 is the first that differs" in ended.out
    assert "worst passage 1" in ended.out
    for word in ("perplexity", "KL from the base", "same top token", "size", "layer errors",
                 "speed", "decode", "peak memory", "acc_norm ↑", "brier_score ↓"):  # fmt: skip
        assert word in ended.out, ended.out


def test_killed_while_it_scores_tasks_it_does_not_stream_again(
    evaluate: Callable[..., Any], prompts: Path, tmp_path: Path
) -> None:
    def killed_at_the_prompts() -> None:
        evaluation.continuations = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    asked = ("--prompts", prompts, "--max-new-tokens", 4, "--no-speed", "--json")
    assert evaluate(*asked, first=killed_at_the_prompts).code == KILLED
    assert (tmp_path / "work").is_dir()
    ended = evaluate(*asked)
    assert ended.code == 0, ended.err
    assert "continuing after 'worst'" in ended.err
    assert len(json.loads(ended.out)["generations"]) == 2
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tasks", "agreement", "--task-path", "examples/none"), "none: is not a folder"),
        (("--limit", 3, "--num-fewshot", 1), "--num-fewshot, --limit: for tasks, and none"),
        (("--tasks", "agreement", "--limit", 0), "--limit 0: expected 1 or more"),
        (("--tasks", "examples/tasks/none.yaml"), "none.yaml: cannot be read"),
        (("--prompts", "examples/none.txt"), "none.txt: cannot be read"),
        (("--prompts", "README.md", "--max-new-tokens", 500), "the model's context is 128"),
        (("--prompts", "README.md", "--device", "tpu"), "--device tpu"),
        (("--prompts", "README.md", "--dtype", "int3"), "--dtype int3"),
    ],
)
def test_what_cannot_succeed_is_refused_before_the_work(
    evaluate: Callable[..., Any], tmp_path: Path, more: tuple[object, ...], message: str
) -> None:
    ended = evaluate(*more)
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.err and "evaluate" not in ended.err
    assert not (tmp_path / "work").exists()
