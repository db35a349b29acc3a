"""Zero-shot and few-shot tasks, by lm-evaluation-harness through its own model interface.

The extra `eval` installs the harness. Importing it takes seconds, so that happens only inside.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from rilq.errors import InputError, OptionError, RilqError, one_line, printable
from rilq.evaluation.figures import TaskFigure
from rilq.evaluation.whole import bars_hidden
from rilq.progress import Reporter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 10  # names in a message


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks and groups with their data, and where they were found: objects of the harness."""

    manager: Any
    objects: tuple[Any, ...]


def load_tasks(names: Sequence[str], folder: Path | None = None) -> LoadedTasks:
    """Find tasks and load their data, before any model is loaded.

    Args:
        names: of tasks, groups or tags, patterns of them (`arc_*`), or paths of YAML files.
        folder: with further tasks, which come before the harness' own of the same name. A YAML
            file may name functions in Python files beside it, which are run.

    Raises:
        OptionError: the harness is not installed, or there is no such task.
        InputError: a file is not YAML, or a task's data cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import pattern_match
    except ImportError as err:
        raise OptionError(
            f"--tasks: needs lm-evaluation-harness: {one_line(err)}\n  pip install 'rilq[eval]'"
        ) from err
    if folder is not None and not folder.is_dir():
        raise OptionError(
            f"--task-path {folder}: is not a folder\n"
            "  give the folder with the tasks' YAML files, or a path to one of them in --tasks"
        )
    local = [Path(name) for name in names if _is_file(name)]
    if folder is not None:
        local += sorted(folder.glob("**/*.yaml"))
    keys = [_top_keys(path) for path in local]
    with _quiet():
        # The harness' own are 14,000 files, which take seconds to read. A group may name some.
        manager = TaskManager(include_path=folder, include_defaults=False)
        known = [
            name for name in names if _is_file(name) or pattern_match([name], manager.all_tasks)
        ]
        if len(known) < len(names) or any("group" in each for each in keys):
            manager = TaskManager(include_path=folder)
        wanted = [each for name in names for each in _matching(name, manager.all_tasks, folder)]
        objects = [each for name in dict.fromkeys(wanted) for each in _load(manager, name)]
    return LoadedTasks(manager, tuple(objects))


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _matching(name: str, known: Sequence[str], folder: Path | None) -> list[str]:
    from lm_eval.utils import pattern_match

    if _is_file(name):
        return [name]
    if found := pattern_match([name], known):
        return list(found)
    close = get_close_matches(name, known, SHOWN)
    where = (
        f"neither in {folder} nor in the harness" if folder is not None else "not in the harness"
    )
    raise OptionError(
        f"--tasks {printable(name)}: there is no such task: {where}\n  "
        + (f"close to it: {', '.join(close)}" if close else "`lm-eval ls tasks` lists them")
        + "; for a task of your own, give --task-path FOLDER or the path of its YAML file"
    )


def _top_keys(path: Path) -> set[str]:
    """Keys of a task's file; the harness itself passes over files that it cannot read."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"))  # tags mean nothing yet
    except OSError as err:
        raise InputError(f"--tasks {path}: cannot be read: {err.strerror or err}") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise InputError(
            f"{path}: not YAML: {one_line(err)}\n"
            "  correct it; lm-evaluation-harness describes the format in docs/new_task_guide.md"
        ) from err
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path}: expected the keys and values of a task or a group")
    return {key.value for key, _ in root.value}


def _load(manager: Any, name: str) -> list[Any]:
    """A task, a group, or the tasks of a tag, with their data; the harness tries a first prompt.

    Raises:
        InputError: it does not work, or cannot be run here.
    """
    try:
        loaded = manager.load([name])
    except Exception as err:  # of the data's loader, of the file's contents, of the template's, ...
        raise InputError(
            f"--tasks {printable(name)}: cannot be loaded: {one_line(err)}\n"
            "  a task of the harness fetches its data from the Hub, unless it is in the cache; the "
            "data files of a YAML file are looked for from the current folder"
        ) from err
    for task in loaded["tasks"].values():
        for flag, why in (("UNSAFE_CODE", "runs code that the model writes"),
                          ("MULTIMODAL", "needs more than text")):  # fmt: skip
            if getattr(task, flag, False):
                raise OptionError(
                    f"--tasks {printable(name)}: {task.task_name} {why}\n  leave it out"
                )
    groups = loaded.get("groups", {})
    nested = {child for children in loaded.get("group_map", {}).values() for child in children}
    tops = [groups[each] for each in groups if each not in nested]
    return tops or list(loaded["tasks"].values())


def run_tasks(
    tasks: LoadedTasks,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    report: Reporter,
) -> tuple[TaskFigure, ...]:
    """Score a model.

    On a CPU one request runs at a time, as by default in the harness: so nothing is padded, and the
    figures are those of its own `hf` model to the last digit. On a GPU the harness finds the
    largest batch that fits.

    Args:
        tasks: of `load_tasks`; they are used up.
        model: in evaluation mode, where it is to run.
        num_fewshot: examples in each prompt, in place of the tasks' own number. As in the harness,
            a task whose file says 0 keeps 0.
        limit: samples of each task; None for all.

    Raises:
        RilqError: the harness gives up.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    batch = "auto" if model.device.type == "cuda" else 1
    with _quiet(), _bars_reported(report), torch.random.fork_rng():
        try:
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
            results = simple_evaluate(
                model=wrapped,
                tasks=list(tasks.objects),
                task_manager=tasks.manager,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as err:  # whatever a task's own code and templates raise
            raise RilqError(
                f"--tasks: lm-evaluation-harness gave up: {one_line(err)}\n"
                "  check the task's file, --num-fewshot and --limit"
            ) from err
    return figures_of(results)


def figures_of(results: Mapping[str, Any]) -> tuple[TaskFigure, ...]:
    """The metrics of the harness' results, tasks and groups in its order.

    Args:
        results: what `simple_evaluate` returns.
    """
    found = []
    rows = {**results["results"], **results.get("groups", {})}
    for task, row in rows.items():
        for key, value in row.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = row.get(f"{metric}_stderr,{filtered}")
            counts = [
                results["n-samples"][each]["effective"]
                for each in _leaves(task, results.get("group_subtasks", {}))
                if each in results["n-samples"]
            ]
            better = results.get("higher_is_better", {}).get(task, {}).get(metric)
            found.append(
                TaskFigure(
                    task=task,
                    version=str(results["versions"].get(task, "")),
                    metric=metric if filtered == "none" else key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    shots=int(results["n-shot"].get(task, 0)),
                    samples=sum(counts),
                    higher_is_better=better is not False,
                )
            )
    return tuple(found)


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, or the task itself."""
    if not children.get(name):
        return [name]
    return [leaf for child in children[name] for leaf in _leaves(child, children)]


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs, and prints to standard output, where a command's result belongs."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), bars_hidden():
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def _bars_reported(report: Reporter) -> Iterator[None]:
    """The harness' progress bars as stages of `report`; it has no other way to follow it."""
    import tqdm
    from lm_eval.api import model as models
    from lm_eval.api import task
    from lm_eval.models import huggingface

    class Stage(tqdm.tqdm):  # type: ignore[misc]
        begun = False

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO()})
            self.begun = bool(self.desc)  # one without a name is over at once
            if self.begun:
                report.stage(f"tasks: {self.desc}", self.total, "request")

        def display(self, *_: object, **__: object) -> None:
            if self.begun:
                report.step(self.n)

    # The package too: the harness' metrics import from it at the moment of use.
    places = [each for each in (models, task, huggingface, tqdm) if hasattr(each, "tqdm")]
    before = [place.tqdm for place in places]
    for place in places:
        place.tqdm = Stage
    try:
        yield
    finally:
        for place, bar in zip(places, before, strict=True):
            place.tqdm = bar
