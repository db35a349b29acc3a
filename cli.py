"""The `rilq` command: parse, call one function, render. Results on stdout, the rest on stderr."""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import rilq
from rilq.cli_session import reporting, stoppable, user_errors
from rilq.cli_tables import (
    analysis_table,
    evaluation_table,
    plan_table,
    show_plan,
    show_push,
)
from rilq.errors import InputError, Interrupted, OptionError

if TYPE_CHECKING:
    from rilq.batch.jobs import ConvertCommand
    from rilq.converter.options import ConvertOptions

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a Hugging Face checkpoint into a 2-bit one, layer by layer, and win the accuracy "
    "back with RILQ.",
    context_settings={
        # --group_size is the same as --group-size.
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)

# Of click, or of the copy of it that newer versions of typer have.
_UsageError: Any = typer.BadParameter.__mro__[1]

_BASE, _DATA, _TRAIN = "Quantization", "Calibration", "RILQ training"
_MACHINE, _OUT, _PUSH = "Machine", "Output", "Push to the Hub"


def _option(panel: str, text: str, *names: str, **limits: int) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **limits)  # type: ignore[arg-type]


Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, or owner/name on the Hub.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
LogFile = Annotated[Path | None, typer.Option(help="Also write plain log lines to this file.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
Device = Annotated[str, _option(_MACHINE, "auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str, _option(_MACHINE, "Compute in auto (float32 on a CPU, else bfloat16), or a named dtype.")
]
Private = Annotated[bool, _option(_PUSH, "Make the repository private.", "--private")]
EvalText = Annotated[
    str, _option(_PUSH, "What perplexity is measured on: a file, wikitext2, c4, or owner/name.")
]
MaxPplRatio = Annotated[
    float, _option(_PUSH, "Refuse a perplexity above this multiple of the base's.")
]


def _convert_options(
    model: Model,
    recipe: Annotated[
        str,
        typer.Option(
            help="fast, default, best or paper: sets what is not given; see docs/recipes.md."
        ),
    ] = "default",
    bits: Annotated[int | None, _option(_BASE, "Bits per code: 2, 3, 4, 8. (default: 2)")] = None,
    group_size: Annotated[
        int | None, _option(_BASE, "Inputs that share a scale: 32, 64, 128. (default: 64)")
    ] = None,
    quantizer: Annotated[
        str | None,
        _option(
            _BASE,
            "rtn, hqq; lsq, gptq (calibrated); lwc, signround, blockap (trained layer by layer). "
            "(default: blockap)",
        ),
    ] = None,
    clip: Annotated[
        str | None,
        _option(
            _BASE,
            "Grid of each group, or its start: none (extremes), search (shrunk for the least "
            "squared error) or lsq (least squares). (default: none for rtn, else lsq)",
        ),
    ] = None,
    layer_steps: Annotated[
        int | None,
        _option(_BASE, "Updates per decoder layer of lwc, signround, blockap. (default: 150)"),
    ] = None,
    zero_point: Annotated[
        str | None,
        _option(
            _BASE,
            "real, or integer (before merging; a merged one is always real, see --keep-adapter). "
            "(default: real)",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        _option(_BASE, "Keep linears that fit this shell pattern in 16 bits; repeatable."),
    ] = None,
    bits_for: Annotated[
        list[str] | None,
        _option(_BASE, "PATTERN=BITS for linears that fit; repeatable, the last one wins."),
    ] = None,
    avg_bits: Annotated[
        float | None,
        _option(
            _BASE,
            "Code bits per weight on average: gives linears 3 or 4 bits instead of --bits where "
            "that gains most, as measured.",
        ),
    ] = None,
    rotate: Annotated[
        bool,
        _option(
            _BASE,
            "Rotate the weights by a randomized Hadamard matrix first; the function stays.",
            "--rotate",
        ),
    ] = False,
    embed_bits: Annotated[int, _option(_BASE, "Of the embedding: 16 (as it is), 8, 4.")] = 16,
    head_bits: Annotated[
        int, _option(_BASE, "Of the output head, likewise; in a tied model it is the embedding.")
    ] = 16,
    dataset: Annotated[
        list[str] | None,
        _option(
            _DATA,
            "Text, JSON lines or Parquet file, c4, wikitext2, or owner/name on the "
            "Hub, each with an optional =WEIGHT; repeatable. (default: c4)",
        ),
    ] = None,
    text_key: Annotated[
        str | None, _option(_DATA, "Key of the text in a record. (default: text)")
    ] = None,
    rows: Annotated[
        str | None,
        _option(
            _DATA,
            "packed: documents joined and cut; documents: one window of each. (default: packed)",
        ),
    ] = None,
    nsamples: Annotated[
        int | None, _option(_DATA, "Rows. (default: 320, or what the text gives)")
    ] = None,
    seqlen: Annotated[
        int | None, _option(_DATA, "Tokens per row. (default: 512, or the model's maximum)")
    ] = None,
    val_ratio: Annotated[
        float | None, _option(_DATA, "Share of rows held out of the training. (default: 0.2)")
    ] = None,
    seed: Annotated[
        int | None,
        _option(
            _DATA, "Of rows, their order, and the adapters. (default: 42)", min=0, max=2**32 - 1
        ),
    ] = None,
    rank: Annotated[
        int | None, _option(_TRAIN, "Of the adapters; 0 trains nothing. (default: 16)")
    ] = None,
    alpha: Annotated[
        float | None, _option(_TRAIN, "Adapters are scaled by alpha / rank. (default: 16)")
    ] = None,
    adapter: Annotated[
        str | None,
        _option(
            _TRAIN, "pooled: merged; lora: the paper's, kept beside the base. (default: pooled)"
        ),
    ] = None,
    adapter_init: Annotated[
        str | None,
        _option(
            _TRAIN,
            "What adapters start from: zero, or the closed forms loftq, eora (with a quantizer "
            "that is not trained). (default: zero)",
        ),
    ] = None,
    keep_adapter: Annotated[
        bool,
        _option(
            _TRAIN,
            "With --zero-point integer: beside the merged result, keep the base's zero-points and "
            "the adapter, for exports to formats with integer zero-points.",
            "--keep-adapter",
        ),
    ] = False,
    train: Annotated[
        str | None,
        _option(
            _TRAIN,
            "none, adapters, scales, adapters+scales, all (scales and minima, full rank), or "
            "all+codes. (default: adapters+scales; adapters for lora)",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        _option(
            _TRAIN,
            "Terms mse, ce, kl joined by +, each with an optional weight: mse+ce, 0.5*mse+kl. "
            "(default: kl)",
        ),
    ] = None,
    target: Annotated[
        str | None,
        _option(_TRAIN, "What mse compares: post-norm, pre-norm, or logits. (default: post-norm)"),
    ] = None,
    lr: Annotated[
        float | None,
        _option(_TRAIN, "Learning rate of adapters. (default: 1e-4 x 4096 / hidden size)"),
    ] = None,
    scales_lr: Annotated[
        float | None,
        _option(
            _TRAIN,
            "Of scales and minima, by size. (default: 1e-3 x 4096 / hidden size)",
        ),
    ] = None,
    schedule: Annotated[
        str | None, _option(_TRAIN, "decay or constant learning rate. (default: decay)")
    ] = None,
    steps: Annotated[int | None, _option(_TRAIN, "Updates at most. (default: 200)")] = None,
    batch_size: Annotated[int | None, _option(_TRAIN, "Rows per update. (default: 2)")] = None,
    val_every: Annotated[
        int | None, _option(_TRAIN, "Updates between validations. (default: 50)")
    ] = None,
    patience: Annotated[
        int | None, _option(_TRAIN, "Validations without a gain before stopping. (default: 5)")
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    student: Annotated[
        str, _option(_MACHINE, "Weights while training: auto, dense or packed.")
    ] = "auto",
    evict: Annotated[
        bool,
        _option(
            _MACHINE,
            "Of a model on the Hub, keep 3 shards on disk at most: each is deleted when its last "
            "tensor has been used.",
            "--evict",
        ),
    ] = False,
    max_disk: Annotated[
        str | None, _option(_MACHINE, "As --evict, and no more than this, such as 20GB.")
    ] = None,
    max_shard_size: Annotated[str, _option(_OUT, "Such as 5GB or 500MiB.")] = "5GB",
    output_dir: Annotated[
        Path | None,
        _option(_OUT, "(default: <model>-w<bits>g<group size>-rilq)", "--output-dir", "-o"),
    ] = None,
    work_dir: Annotated[
        Path | None, _option(_OUT, "State of the job. (default: <output>.rilq-work)")
    ] = None,
    resume: Annotated[str, _option(_OUT, "auto, never or required.")] = "auto",
    keep_work: Annotated[bool, _option(_OUT, "Keep the work folder after success.")] = False,
) -> "ConvertOptions":
    from rilq.converter.options import ConvertOptions

    return ConvertOptions.of_recipe(
        recipe,
        model=model,
        revision=revision,
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
        evict=evict,
        max_disk=max_disk,
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


def _convert_command() -> "ConvertCommand":
    """What a batch file may say of a job: the options of `convert`, read as its command line."""
    from rilq.batch.jobs import ConvertCommand, Option

    shared = inspect.signature(_convert_options).parameters
    group: Any = typer.main.get_command(app)
    command = group.commands["convert"]
    options = {
        name.removeprefix("--"): Option(
            flag=parameter.is_flag,
            repeatable=parameter.multiple,
            off=next(iter(parameter.secondary_opts), None),
        )
        for parameter in command.params
        for name in parameter.opts
        if parameter.param_type_name == "option"
        and name.startswith("--")
        # The batch itself says how its jobs report.
        and parameter.name not in ("help", "quiet", "as_json", "log_file")
    }

    def read(words: Sequence[str]) -> dict[str, Any]:
        try:
            with command.make_context("convert", list(words)) as context:
                return dict(context.params)
        except _UsageError as err:
            raise OptionError(err.format_message()) from err

    def make(values: Mapping[str, Any]) -> "ConvertOptions":
        return _convert_options(**{name: values[name] for name in shared})

    return ConvertCommand(options, read, make)


def _takes_convert_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `(options, *, quiet, as_json, log_file)` the options of a conversion."""
    own = list(inspect.signature(command).parameters.values())[1:]
    shared = inspect.signature(_convert_options)

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        kept = {p.name: given.pop(p.name) for p in own}
        with user_errors():
            command(_convert_options(**given), **kept)

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
        _option(_PUSH, "Push the result to this owner/name when it is done; of exports, none."),
    ] = None,
    private: Private = False,
    eval_text: EvalText = "wikitext2",
    max_ppl_ratio: MaxPplRatio = 2.0,
    export: Annotated[
        list[str] | None,
        _option(_OUT, "Also write <output>-<kind>, as `rilq export --to` does; repeatable."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:
    """Convert a checkpoint to 2 bits; run it again to continue a stopped job."""
    if private and push_to is None:
        raise OptionError("--private: has no meaning without --push-to OWNER/NAME")
    with (
        stoppable(f"state is in {options.work}"),
        reporting(quiet, log_file, options.work) as report,
    ):
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
        )
        if result.pushed is not None:
            show_push(result.pushed, report)
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


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[
        str, typer.Option(help="Text, JSON lines or Parquet file, wikitext2, c4, or owner/name.")
    ],
    seqlen: Annotated[
        int | None, typer.Option(help="Context. (default: 2048, or the model's maximum)")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Base model: adds KL divergence and top-1 agreement.")
    ] = None,
    text_key: Annotated[str, typer.Option(help="Key of the text in a record.")] = "text",
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:
    """Perplexity of any checkpoint, dense or ours, streamed layer by layer."""
    with (
        user_errors(),
        stoppable("nothing was kept"),
        reporting(quiet, log_file) as report,
    ):
        result = rilq.evaluate(
            model,
            text,
            seqlen=seqlen,
            against=against,
            device=device,
            dtype=dtype,
            revision=revision,
            text_key=text_key,
            report=report,
        )
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        Console(highlight=False).print(evaluation_table(model, result))


@app.command()
def analyze(
    model: Model,
    text: Annotated[
        str, _option(_DATA, "Held-out text: a file, wikitext2, c4, or owner/name on the Hub.")
    ],
    ranks: Annotated[str, _option(_TRAIN, "Ranks to compare, comma-separated.")] = "4,8,16,32",
    scopes: Annotated[
        str, _option(_TRAIN, "Some of svd, linear, layer, model.")
    ] = "svd,linear,layer,model",
    bits: Annotated[int, _option(_BASE, "Bits per code: 2, 3, 4, 8.")] = 2,
    group_size: Annotated[int, _option(_BASE, "Inputs that share a scale: 32, 64, 128.")] = 64,
    quantizer: Annotated[str, _option(_BASE, "rtn, or nf2: 2-bit NormalFloat, simulated.")] = "rtn",
    adapter: Annotated[
        str, _option(_TRAIN, "lora, or pooled for ranks up to the groups of a linear.")
    ] = "lora",
    alpha: Annotated[
        float, _option(_TRAIN, "At every rank; where alpha / rank is fixed, at rank 16.")
    ] = 16.0,
    dataset: Annotated[
        list[str] | None, _option(_DATA, "Calibration text, as of convert. (default: c4)")
    ] = None,
    text_key: Annotated[str, _option(_DATA, "Key of the text in a record.")] = "text",
    nsamples: Annotated[int, _option(_DATA, "Calibration rows.")] = 96,
    seqlen: Annotated[int, _option(_DATA, "Tokens per row and per held-out window.")] = 256,
    windows: Annotated[int, _option(_DATA, "Held-out windows at most, spread evenly.")] = 64,
    seed: Annotated[
        int, _option(_DATA, "Of rows, their order, and the adapters.", min=0, max=2**32 - 1)
    ] = 42,
    steps: Annotated[int, _option(_TRAIN, "Updates, of each layer and of the model.")] = 30,
    batch_size: Annotated[int, _option(_TRAIN, "Rows per update.")] = 8,
    lr: Annotated[
        float | None, _option(_TRAIN, "Learning rate. (default: 1e-4 x 4096 / hidden size)")
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    student: Annotated[
        str, _option(_MACHINE, "Weights while training: auto, dense or packed.")
    ] = "auto",
    output_dir: Annotated[
        Path | None, _option(_OUT, "(default: <model>-analysis)", "--output-dir", "-o")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:
    """Fit adapters at four scopes and several ranks, and compare: the figure of RILQ's paper."""
    with user_errors():
        from rilq.converter.analysis import AnalyzeOptions

        options = AnalyzeOptions(
            model=model,
            text=text,
            ranks=_ranks(ranks),
            scopes=tuple(scopes.split(",")),  # type: ignore[arg-type]  # checked, as the next ones
            bits=bits,
            group_size=group_size,
            quantizer=quantizer,  # type: ignore[arg-type]
            adapter=adapter,  # type: ignore[arg-type]
            alpha=alpha,
            dataset=tuple(dataset or ("c4",)),
            text_key=text_key,
            nsamples=nsamples,
            seqlen=seqlen,
            windows=windows,
            steps=steps,
            batch_size=batch_size,
            learning_rate=lr,
            seed=seed,
            revision=revision,
            device=device,
            dtype=dtype,  # type: ignore[arg-type]
            student=student,  # type: ignore[arg-type]
            output_dir=output_dir,
        )
        with (
            stoppable("nothing was kept"),
            reporting(quiet, log_file, options.output) as report,
        ):
            found = rilq.analyze(options, report)
            report.note(f"{options.output}: done")
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        Console(highlight=False).print(analysis_table(found))


def _beside(output: Path, kind: str) -> Path:
    """Where an export of the conversion to `output` goes."""
    return output.with_name(f"{output.name}-{kind}")


def _ranks(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise OptionError(f"--ranks {text}: expected whole numbers, for example 4,8,16,32")
    return tuple(map(int, words))


@app.command()
def batch(
    file: Annotated[Path, typer.Argument(help="YAML file of jobs; see docs/batch.md.")],
    max_parallel: Annotated[
        int | None,
        typer.Option(help="Jobs at once; one to a GPU. (default: 1; with Ray, all)", min=1),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: the Ray cluster that this machine is a node of.")
    ] = "local",
    only: Annotated[
        list[str] | None, typer.Option(help="Jobs that fit this shell pattern; repeatable.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Only jobs that failed the last time.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and plan all jobs, run none.")
    ] = False,
    state_dir: Annotated[
        Path | None, typer.Option(help="Logs and state. (default: <file>.rilq-batch)")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Convert many models; run it again to do what is not done."""
    from rilq.batch.display import (
        LinesDisplay,
        LiveDisplay,
        failure,
        plan_lines,
        status_dict,
        status_table,
    )
    from rilq.batch.jobs import read_jobs, select
    from rilq.batch.local_engine import LocalEngine
    from rilq.batch.outlook import check_disks, look_ahead, merge
    from rilq.batch.ray_engine import connect
    from rilq.batch.run import run_batch
    from rilq.batch.state import look_at_state, open_state, state_folder

    place = (state_dir or state_folder(file)).absolute()
    with user_errors(), stoppable(f"state is in {place}"), ExitStack() as stack:
        if engine not in ("local", "ray"):
            raise OptionError(f"--engine {engine}: expected local or ray")
        _change_folder(file)
        jobs = select(read_jobs(Path(file.name), _convert_command()), only or ())
        state = look_at_state(place) if dry_run else stack.enter_context(open_state(place))
        if retry_failed:
            jobs = [job for job in jobs if state.failed(job)]
        on_ray = engine == "ray"
        cluster = stack.enter_context(connect(state)) if on_ray else LocalEngine(state.lock)
        with reporting(quiet, None, place) as report:
            outlooks = look_ahead(jobs, report)
            todo = {
                job.name: outlooks[job.name]
                for job in jobs
                if outlooks[job.name].progress != "done" or not state.succeeded(job)
            }
            parallel = max_parallel or (max(1, len(todo)) if on_ray else 1)
            merged = merge(todo, parallel, together=1 if on_ray else None)
            for line in () if dry_run else plan_lines(merged):
                report.note(line)
        if dry_run:
            print(json.dumps(merged.as_dict()) if as_json else "\n".join(plan_lines(merged)))
        check_disks(merged)
        cluster.check([job for job in jobs if job.name in todo], merged)
        if dry_run:
            return
        show = LinesDisplay(sys.stderr, quiet=quiet).show
        if sys.stderr.isatty() and not quiet:
            show = stack.enter_context(LiveDisplay(Console(stderr=True))).show
        ended = run_batch(jobs, todo, state, cluster, parallel=parallel, show=show)
    if as_json:
        print(json.dumps({"jobs": [status_dict(status) for status in ended]}))
    else:
        Console(highlight=False).print(status_table(ended))
    for status in ended:
        if status.state == "failed":
            print(f"rilq: {status.job.name}: {failure(status)}", file=sys.stderr)
    states = {status.state for status in ended}
    if states & {"failed", "stopped"}:
        raise typer.Exit(1 if "failed" in states else Interrupted.exit_code)


def _change_folder(file: Path) -> None:
    """Go where a batch file is: its paths are meant from there, whoever runs it."""
    try:
        os.chdir(file.absolute().parent)
    except OSError as err:
        raise InputError(f"{file}: cannot be read: {err.strerror or err}") from err


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A checkpoint made by rilq: a folder, or owner/name on the Hub.")
    ],
    to: Annotated[
        list[str],
        typer.Option(help="dense, gguf, gptq, mlx, metal, vllm or compressed-tensors; repeatable."),
    ],
    output_dir: Annotated[
        Path,
        typer.Option(
            "--output-dir", "-o", help="To write; with several kinds, a folder in it for each."
        ),
    ],
    dtype: Annotated[str, typer.Option(help="fp16 or bf16, of all that is not packed.")] = "fp16",
    gguf_type: Annotated[
        str, typer.Option(help="q4_1 (exact, 5 bits) or q2_k (re-encoded, 2.6 bits).")
    ] = "q4_1",
    text: Annotated[
        str | None,
        typer.Option(help="To compare logits on: a file, wikitext2, c4, or owner/name on the Hub."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Such as 5GB or 500MiB.")] = "5GB",
    revision: Revision = None,
    device: Annotated[str, typer.Option(help="That compares: auto, cpu, cuda, ...")] = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:
    """Write a converted checkpoint for another runtime, read back and compared; docs/exports.md."""
    with (
        user_errors(),
        stoppable("nothing unfinished was kept"),
        reporting(quiet, log_file, output_dir) as report,
    ):
        from rilq.evaluation.export import export as write_exports
        from rilq.formats.export.kind import ExportOptions, export_dtype
        from rilq.formats.writer import parse_size

        kinds = list(dict.fromkeys(to))
        several = len(kinds) > 1
        exported = write_exports(
            model,
            {kind: output_dir / kind if several else output_dir for kind in kinds},
            ExportOptions(export_dtype(dtype), parse_size(max_shard_size), gguf_type),
            revision=revision,
            text=text,
            device=device,
            report=report,
        )
    if as_json:
        print(json.dumps({"exports": [each.as_dict() for each in exported]}))
    else:
        for each in exported:
            state = "already there; " if each.already_done else ""
            print(
                f"{each.output}: {each.kind}, {state}logits differ by at most "
                f"{each.difference.largest:.3g} (bound {each.bound:.3g})"
            )


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint made by rilq.")],
    as_json: AsJson = False,
) -> None:
    """Check every hash in rilq.json."""
    with user_errors():
        found = rilq.verify(folder)
    if as_json:
        print(json.dumps({
            "files_checked": found.files_checked,
            "tensors_checked": found.tensors_checked,
            "problems": list(found.problems),
        }))  # fmt: skip
    else:
        for problem in found.problems:
            print(problem, file=sys.stderr)
        state = f"{len(found.problems)} problems" if found.problems else "whole"
        print(f"{folder}: {found.files_checked} files, {found.tensors_checked} tensors: {state}")
    if found.problems:
        raise typer.Exit(1)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint made by rilq, or an export of one.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the Hub.")],
    revision: Annotated[
        str | None, _option(_PUSH, "Branch, made if it is not there. (default: main)")
    ] = None,
    private: Private = False,
    pr: Annotated[bool, _option(_PUSH, "Open a pull request instead.", "--pr")] = False,
    replace: Annotated[
        bool, _option(_PUSH, "Put it in the place of another model.", "--replace")
    ] = False,
    text: EvalText = "wikitext2",
    text_key: Annotated[str, _option(_PUSH, "Key of the text in a record.")] = "text",
    seqlen: Annotated[
        int | None, _option(_PUSH, "Context. (default: 2048, or the model's maximum)")
    ] = None,
    base: Annotated[
        str | None, _option(_PUSH, "What it was converted from, if that is a local folder.")
    ] = None,
    native: Annotated[
        Path | None, _option(_PUSH, "Of an export: what it was made from, whose perplexity counts.")
    ] = None,
    max_ppl_ratio: MaxPplRatio = 2.0,
    force: Annotated[
        bool, _option(_PUSH, "Whatever the perplexity is, even if it is unknown.", "--force")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:
    """Check a checkpoint, measure it, and push it with a model card in one commit."""
    with (
        user_errors(),
        stoppable("what was uploaded is not sent again"),
        reporting(quiet, log_file, folder) as report,
    ):
        from rilq.evaluation.push import PushOptions
        from rilq.evaluation.push import push as push_folder

        options = PushOptions(
            repo_id,
            revision=revision,
            private=private,
            pull_request=pr,
            replace=replace,
            force=force,
            max_ppl_ratio=max_ppl_ratio,
            text=text,
            text_key=text_key,
            seqlen=seqlen,
            base=base,
            native=native,
            device=device,
            dtype=dtype,
        )
        pushed = push_folder(folder, options, report)
        show_push(pushed, report)
    if as_json:
        print(json.dumps(pushed.as_dict()))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rilq {rilq.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point of the `rilq` command."""
    _open_closed_streams()
    # OpenMP's threads spin by default while they wait for each other: with one other busy process
    # on two cores, streaming then took 16 times as long. Read when torch is loaded, later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


def _open_closed_streams() -> None:
    """Send closed standard streams (`>&-`) to nowhere: else the next file gets their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, open(number, "w" if number else "r"))
