"""rilq from Python: `rilq.plan`, `rilq.convert`, `rilq.load`; the commands call the same functions.

Importing this imports torch and transformers, so `import rilq` leaves it until it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

from rilq.converter import pipeline
from rilq.converter.options import ConvertOptions
from rilq.converter.pipeline import ConvertResult
from rilq.converter.plan import Plan
from rilq.errors import CheckpointError, one_line
from rilq.evaluation.export import check_planned, export
from rilq.evaluation.push import PushOptions, open_planned
from rilq.evaluation.push import push as push_folder
from rilq.formats.export.kind import ExportOptions
from rilq.formats.lora import ADAPTER_FOLDER
from rilq.progress import Reporter, SilentReporter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@overload
def plan(model: ConvertOptions, *, report: Reporter = ...) -> Plan: ...
@overload
def plan(
    model: str | Path, *, recipe: str = ..., report: Reporter = ..., **options: Any
) -> Plan: ...
def plan(
    model: str | Path | ConvertOptions,
    *,
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
    **options: Any,
) -> Plan:
    """What `convert` would do and need; reads headers, touches nothing.

    That it does not fit is not an error here; `rilq.check_fits(plan)` raises it.

    Args:
        model: a folder, or `owner/name` on the Hub; or all options at once.
        report: receives notes and warnings.
        options: of `ConvertOptions`, by name; those left out, or None, are the recipe's.

    Raises:
        InputError: the options, the checkpoint or the architecture cannot be used.
    """
    return pipeline.prepare(_options(model, options), report).plan


@overload
def convert(
    model: ConvertOptions,
    *,
    report: Reporter = ...,
    planned: Callable[[Plan], None] = ...,
    exports: Mapping[str, Path] = ...,
    push: PushOptions | None = ...,
) -> ConvertResult: ...
@overload
def convert(
    model: str | Path,
    *,
    recipe: str = ...,
    report: Reporter = ...,
    planned: Callable[[Plan], None] = ...,
    exports: Mapping[str, Path] = ...,
    push: PushOptions | None = ...,
    **options: Any,
) -> ConvertResult: ...
def convert(
    model: str | Path | ConvertOptions,
    *,
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
    planned: Callable[[Plan], None] = lambda plan: None,
    exports: Mapping[str, Path] = MappingProxyType({}),  # noqa: B008 - immutable
    push: PushOptions | None = None,
    **options: Any,
) -> ConvertResult:
    """Convert a checkpoint; a job that was stopped is continued by the same call.

    Args:
        model: a folder, or `owner/name` on the Hub; or all options at once.
        report: receives progress.
        planned: called with the plan before the work begins; what it raises ends the call.
        exports: kind to the folder to make, of the result; what a kind cannot hold is refused
            before the work begins.
        push: where the result goes then, itself and none of its exports; the right to push is
            checked before the work begins.
        options: of `ConvertOptions`, by name; those left out, or None, are the recipe's.

    Raises:
        InputError: before any work, for what cannot succeed.
        RilqError: the work failed; its state is in the work folder.
    """
    chosen = _options(model, options)
    job = pipeline.prepare(chosen, report)
    if exports:
        check_planned(job, exports, ExportOptions())
    if push is not None:
        if push.base is None and job.checkpoint.source.commit is None:
            push = replace(push, base=chosen.model)
        open_planned(job, push, report)
    planned(job.plan)
    result = pipeline.convert(job, report)
    state = "already converted by this command" if result.already_done else "done"
    report.note(f"{result.output}: {state}")
    if exports:
        written = export(result.output, exports, device=chosen.device, report=report)
        result = replace(result, exports=tuple(written))
    if push is not None:
        result = replace(result, pushed=push_folder(result.output, push, report))
    return result


def load(
    model: str | Path, *, revision: str | None = None, device: str = "auto", **options: Any
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a checkpoint, converted or not, with transformers; for generation and fine-tuning.

    A LoRA that lies beside a converted checkpoint is attached by PEFT.

    Args:
        model: a folder, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub.
        device: "auto", "cpu", "cuda", "cuda:1"; "auto" spreads over what there is.
        options: further ones of `AutoModelForCausalLM.from_pretrained`, such as `dtype`.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        loaded: PreTrainedModel | PeftModel = AutoModelForCausalLM.from_pretrained(
            model, revision=revision, device_map=device, trust_remote_code=False, **options
        )
    except (OSError, ValueError) as err:
        raise CheckpointError(
            f"{model}: transformers cannot load it: {one_line(err)}\n"
            "  give the folder of a checkpoint, or owner/name on the Hub"
        ) from err
    adapter = Path(model) / ADAPTER_FOLDER
    if adapter.is_dir():
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded.eval(), tokenizer


def _options(model: str | Path | ConvertOptions, given: Mapping[str, Any]) -> ConvertOptions:
    """Options from what Python callers write: lists, a mapping, paths as text.

    Raises:
        TypeError: an option that there is not.
        OptionError: impossible values.
    """
    if isinstance(model, ConvertOptions):
        if given:
            raise TypeError(f"{', '.join(given)}: set them in the ConvertOptions that you pass")
        return model
    chosen = {name: value for name, value in given.items() if value is not None}
    recipe = chosen.pop("recipe", "default")
    for name in ("dataset", "skip", "adapter_targets"):
        if name in chosen:
            value = chosen[name]
            several = [value] if isinstance(value, str | Path) else value
            chosen[name] = tuple(map(str, several))
    if "bits_for" in chosen:
        chosen["bits_for"] = tuple(dict(chosen["bits_for"]).items())
    for name in ("output_dir", "work_dir"):
        if name in chosen:
            chosen[name] = Path(chosen[name])
    return ConvertOptions.of_recipe(recipe, model=str(model), **chosen)
