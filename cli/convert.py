"""`rilq convert` and `rilq plan`, which take the same options."""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import rilq
from rilq.cli.app import app
from rilq.cli.options import (
    BASE,
    DATA,
    MACHINE,
    OUT,
    PUSH,
    RESQ,
    TRAIN,
    AsJson,
    Db,
    Device,
    Dtype,
    EvalText,
    LogFile,
    MaxPplRatio,
    Model,
    Private,
    Quiet,
    Revision,
    option,
)
from rilq.cli.session import is_first, reporting, stoppable, user_errors
from rilq.cli.summary import show_conversion
from rilq.cli.tables import plan_table, show_plan, show_push
from rilq.errors import OptionError

if TYPE_CHECKING:
    from rilq.converter.options import ConvertOptions


def convert_options(
    model: Model,
    method: Annotated[
        str,
        option(
            BASE,
            "rilq, or W4A4KV4: resq (high-variance directions in 8 bits), or its baselines quarot, "
            "quik, rtn-w4a4; see docs/resq.md.",
        ),
    ] = "rilq",
    recipe: Annotated[
        str,
        typer.Option(
            help="fast, default, best or paper: sets what is not given; see docs/recipes.md."
        ),
    ] = "default",
    bits: Annotated[int | None, option(BASE, "Bits per code: 2, 3, 4, 8. (default: 2)")] = None,
    group_size: Annotated[
        int | None, option(BASE, "Inputs that share a scale: 32, 64, 128. (default: 64)")
    ] = None,
    quantizer: Annotated[
        str | None,
        option(
            BASE,
            "rtn, hqq; lsq, gptq (calibrated); lwc, signround, blockap (trained layer by layer). "
            "(default: blockap)",
        ),
    ] = None,
    clip: Annotated[
        str | None,
        option(
            BASE,
            "Grid of each group, or its start: none (extremes), search (shrunk for the least "
            "squared error) or lsq (least squares). (default: none for rtn, else lsq)",
        ),
    ] = None,
    layer_steps: Annotated[
        int | None,
        option(BASE, "Updates per decoder layer of lwc, signround, blockap. (default: 150)"),
    ] = None,
    zero_point: Annotated[
        str | None,
        option(
            BASE,
            "real, or integer (before merging; a merged one is always real, see --keep-adapter). "
            "(default: real)",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        option(BASE, "Keep linears that fit this shell pattern in 16 bits; repeatable."),
    ] = None,
    bits_for: Annotated[
        list[str] | None,
        option(BASE, "PATTERN=BITS for linears that fit; repeatable, the last one wins."),
    ] = None,
    avg_bits: Annotated[
        float | None,
        option(
            BASE,
            "Code bits per weight on average: gives linears 3 or 4 bits instead of --bits where "
            "that gains most, as measured.",
        ),
    ] = None,
    rotate: Annotated[
        bool,
        option(
            BASE,
            "Rotate the weights by a randomized Hadamard matrix first; the function stays.",
            "--rotate",
        ),
    ] = False,
    embed_bits: Annotated[int, option(BASE, "Of the embedding: 16 (as it is), 8, 4.")] = 16,
    head_bits: Annotated[
        int, option(BASE, "Of the output head, likewise; in a tied model it is the embedding.")
    ] = 16,
    high_fraction: Annotated[
        float | None,
        option(
            RESQ, "Share of the channels in high bits; of those in lowest too. (default: 0.125)"
        ),
    ] = None,
    high_bits: Annotated[int | None, option(RESQ, "Of the high part. (default: 8)")] = None,
    low_bits: Annotated[int | None, option(RESQ, "Of the other channels. (default: 4)")] = None,
    lowest_bits: Annotated[
        int | None,
        option(
            RESQ,
            "Of the channels of least variance, as many as are high: with 2 and --high-bits 6 the "
            "average is 4. (default: no such part)",
        ),
    ] = None,
    rotations: Annotated[
        str | None,
        option(
            RESQ,
            "Some of A (residual stream), B (values), C (keys), D (input of down_proj), or none. "
            "(default: ABCD)",
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        option(
            DATA,
            "Text, JSON lines or Parquet file, c4, wikitext2, or owner/name on the "
            "Hub, each with an optional =WEIGHT; repeatable. (default: c4)",
        ),
    ] = None,
    text_key: Annotated[
        str | None, option(DATA, "Key of the text in a record. (default: text)")
    ] = None,
    rows: Annotated[
        str | None,
        option(
            DATA,
            "packed: documents joined and cut; documents: one window of each. (default: packed)",
        ),
    ] = None,
    nsamples: Annotated[
        int | None, option(DATA, "Rows. (default: 320, or what the text gives)")
    ] = None,
    seqlen: Annotated[
        int | None, option(DATA, "Tokens per row. (default: 512, or the model's maximum)")
    ] = None,
    val_ratio: Annotated[
        float | None, option(DATA, "Share of rows held out of the training. (default: 0.2)")
    ] = None,
    seed: Annotated[
        int | None,
        option(DATA, "Of rows, their order, and the adapters. (default: 42)", min=0, max=2**32 - 1),
    ] = None,
    rank: Annotated[
        int | None, option(TRAIN, "Of the adapters; 0 trains nothing. (default: 16)")
    ] = None,
    alpha: Annotated[
        float | None, option(TRAIN, "Adapters are scaled by alpha / rank. (default: 16)")
    ] = None,
    adapter: Annotated[
        str | None,
        option(TRAIN, "pooled: merged; lora: the paper's, kept beside the base. (default: pooled)"),
    ] = None,
    adapter_targets: Annotated[
        list[str] | None,
        option(
            TRAIN,
            "Linears that get an adapter: attention, mlp, experts, all, or patterns; repeatable. "
            "(default: attention and mlp)",
        ),
    ] = None,
    adapter_init: Annotated[
        str | None,
        option(
            TRAIN,
            "What adapters start from: zero, or the closed forms loftq, eora (with a quantizer "
            "that is not trained). (default: zero)",
        ),
    ] = None,
    keep_adapter: Annotated[
        bool,
        option(
            TRAIN,
            "With --zero-point integer: beside the merged result, keep the base's zero-points and "
            "the adapter, for exports to formats with integer zero-points.",
            "--keep-adapter",
        ),
    ] = False,
    train: Annotated[
        str | None,
        option(
            TRAIN,
            "none, adapters, scales, adapters+scales, all (scales and minima, full rank), or "
            "all+codes. (default: adapters+scales; adapters for lora)",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        option(
            TRAIN,
            "Terms mse, ce, kl joined by +, each with an optional weight: mse+ce, 0.5*mse+kl. "
            "(default: kl)",
        ),
    ] = None,
    target: Annotated[
        str | None,
        option(TRAIN, "What mse compares: post-norm, pre-norm, or logits. (default: post-norm)"),
    ] = None,
    lr: Annotated[
        float | None,
        option(TRAIN, "Learning rate of adapters. (default: 1e-4 x 4096 / hidden size)"),
    ] = None,
    scales_lr: Annotated[
        float | None,
        option(
            TRAIN,
            "Of scales and minima, by size. (default: 1e-3 x 4096 / hidden size)",
        ),
    ] = None,
    schedule: Annotated[
        str | None, option(TRAIN, "decay or constant learning rate. (default: decay)")
    ] = None,
    steps: Annotated[int | None, option(TRAIN, "Updates at most. (default: 200)")] = None,
    batch_size: Annotated[int | None, option(TRAIN, "Rows per update. (default: 2)")] = None,
    val_every: Annotated[
        int | None, option(TRAIN, "Updates between validations. (default: 50)")
    ] = None,
    patience: Annotated[
        int | None, option(TRAIN, "Validations without a gain before stopping. (default: 5)")
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    student: Annotated[
        str, option(MACHINE, "Weights while training: auto, dense, packed or offload.")
    ] = "auto",
    micro_batch: Annotated[
        str,
        option(
            MACHINE,
            "Rows that run at once, in the pass and of an update: a number, or auto, from the "
            "free memory; halved, once, where a GPU's memory runs out all the same.",
        ),
    ] = "auto",
    device_memory: Annotated[
        str | None, option(MACHINE, "Use no more of a GPU's memory than this, such as 24GB.")
    ] = None,
    evict: Annotated[
        bool,
        option(
            MACHINE,
            "Of a model on the Hub, keep 3 shards on disk at most: each is deleted when its last "
            "tensor has been used.",
            "--evict",
        ),
    ] = False,
    max_disk: Annotated[
        str | None, option(MACHINE, "As --evict, and no more than this, such as 20GB.")
    ] = None,
    expert_memory: Annotated[
        str | None,
        option(
            MACHINE,
            "The most that the experts of a layer may take together, such as 8GB; above it they "
            "come one by one. (default: half of what is free)",
        ),
    ] = None,
    max_shard_size: Annotated[str, option(OUT, "Such as 5GB or 500MiB.")] = "5GB",
    output_dir: Annotated[
        Path | None,
        option(
            OUT,
            "(default: <model>-w<bits>g<group size>-rilq, or such as <model>-w4a4kv4-resq)",
            "--output-dir",
            "-o",
        ),
    ] = None,
    work_dir: Annotated[
        Path | None, option(OUT, "State of the job. (default: <output>.rilq-work)")
    ] = None,
    resume: Annotated[str, option(OUT, "auto, never or required.")] = "auto",
    keep_work: Annotated[bool, option(OUT, "Keep the work folder after success.")] = False,
) -> "ConvertOptions":
    """The options of a conversion from its command line; each one's own help is above.

    Raises:
        OptionError: impossible values, or values that do not go together.
    """
    from rilq.converter.options import ConvertOptions

    return ConvertOptions.of_recipe(
        recipe,
        model=model,
        revision=revision,
        method=method,
        high_fraction=high_fraction,
        high_bits=high_bits,
        low_bits=low_bits,
        lowest_bits=lowest_bits,
        rotations=rotations,
        bits=bits,
        group_size=group_size,
        quantizer=quantizer,
        clip=clip,
        layer_steps=layer_steps,
        zero_point=zero_point,
        skip=tuple(skip or ()),
        bits_for=tuple(_pattern_bits(text) for text in bits_for or ()),
        avg_bits=avg_bits,
        rotate=rotate,
        embed_bits=embed_bits,
        head_bits=head_bits,
        dataset=tuple(dataset or ("c4",)),
        text_key=text_key,
        rows=rows,
        nsamples=nsamples,
        seqlen=seqlen,
        val_ratio=val_ratio,
        seed=seed,
        rank=rank,
        alpha=alpha,
        adapter=adapter,
        adapter_targets=tuple(adapter_targets) if adapter_targets else None,
        adapter_init=adapter_init,
        keep_adapter=keep_adapter,
        train=train,
        loss=loss,
        target=target,
        learning_rate=lr,
        scales_learning_rate=scales_lr,
        schedule=schedule,
        steps=steps,
        batch_size=batch_size,
        val_every=val_every,
        patience=patience,
        device=device,
        dtype=dtype,
        student=student,
        micro_batch=_rows_at_once(micro_batch),
        device_memory=device_memory,
        evict=evict,
        max_disk=max_disk,
        expert_memory=expert_memory,
        max_shard_size=max_shard_size,
        output_dir=output_dir,
        work_dir=work_dir,
        resume=resume,
        keep_work=keep_work,
    )


def _pattern_bits(text: str) -> tuple[str, int]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdigit():
        raise OptionError(f"--bits-for {text}: expected PATTERN=BITS, for example down_proj=4")
    return pattern, int(bits)


def _rows_at_once(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit():
        raise OptionError(f"--micro-batch {text}: expected auto or a number of rows")
    return int(text)


def _takes_convert_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `(options, *, quiet, as_json, log_file)` the options of a conversion."""
    own = list(inspect.signature(command).parameters.values())[1:]
    shared = inspect.signature(convert_options)

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        kept = {p.name: given.pop(p.name) for p in own}
        with user_errors():
            command(convert_options(**given), **kept)

    wrapper.__signature__ = shared.replace(  # type: ignore[attr-defined]
        parameters=[*(p.replace(kind=p.KEYWORD_ONLY) for p in [*shared.parameters.values(), *own])],
        return_annotation=None,
    )
    wrapper.__annotations__ = {
        p.name: p.annotation
        for p in wrapper.__signature__.parameters.values()  # type: ignore[attr-defined]
    }
    return wrapper


@app.command()
@_takes_convert_options
def convert(
    options: "ConvertOptions",
    push_to: Annotated[
        str | None,
        option(PUSH, "Push the result to this owner/name when it is done; of exports, none."),
    ] = None,
    private: Private = False,
    eval_text: EvalText = "wikitext2",
    max_ppl_ratio: MaxPplRatio = 2.0,
    export: Annotated[
        list[str] | None,
        option(OUT, "Also write <output>-<kind>, as `rilq export --to` does; repeatable."),
    ] = None,
    page: Annotated[
        bool,
        option(OUT, "Also write <output>.report.html, a page to look at.", "--report/--no-report"),
    ] = True,
    db: Db = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:
    """Convert a checkpoint to 2 bits, or to W4A4KV4; run it again to continue a stopped job."""
    if private and push_to is None:
        raise OptionError("--private: has no meaning without --push-to OWNER/NAME")
    with (
        stoppable(f"state is in {options.work}"),
        reporting(quiet, log_file, options.work) as report,
    ):
        from rilq.evaluation.report.page import page_beside

        place = page_beside(options.output) if page else None
        pushing = None
        if push_to is not None:
            pushing = rilq.PushOptions(
                push_to,
                private=private,
                text=eval_text,
                max_ppl_ratio=max_ppl_ratio,
                device=options.device,
                dtype=options.dtype,
            )
        result = rilq.convert(
            options,
            report=report,
            planned=lambda plan: show_plan(plan, report),
            exports={kind: _beside(options.output, kind) for kind in export or ()},
            push=pushing,
            page=place,
            db=db,
        )
        if result.pushed is not None:
            show_push(result.pushed, report)
    if not is_first():
        return
    if as_json:
        print(json.dumps({
            "output": str(result.output),
            "already_done": result.already_done,
            "quality": result.quality,
            "bytes_read": result.bytes_read,
            "plan": result.plan.as_dict(),
            "exports": [each.as_dict() for each in result.exports],
            "pushed": result.pushed and result.pushed.as_dict(),
        }, default=str))  # fmt: skip
    elif not quiet:
        show_conversion(result, options.model, place, Console(stderr=True, highlight=False))


@app.command()
@_takes_convert_options
def plan(
    options: "ConvertOptions",
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:
    """Show what `convert` would do and need; touches nothing."""
    with stoppable("nothing was touched"), reporting(quiet, log_file) as report:
        planned = rilq.plan(options, report=report)
    if as_json:
        print(json.dumps(planned.as_dict(), default=str))
    else:
        Console(highlight=False).print(plan_table(planned))
    rilq.check_fits(planned)


def _beside(output: Path, kind: str) -> Path:
    """Where an export of the conversion to `output` goes."""
    return output.with_name(f"{output.name}-{kind}")
