"""What a terminal shows of an evaluation: figures, tasks, the worst passages, generations.

All text from models and files goes through `Text` and `printable`, so neither markup nor control
characters in it mean anything.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rilq.errors import printable
from rilq.progress import gigabytes

if TYPE_CHECKING:
    from rilq.evaluation.figures import (
        Divergence,
        Evaluation,
        Generation,
        Speed,
        TaskFigure,
        WorstPassage,
    )

PASSAGES = 3  # shown; the report has all
SHOWN_TEXT = 600  # characters of a passage or a generation
MARK = "bold reverse"


def evaluation_view(model: str, found: "Evaluation") -> Group:
    """An evaluation for people."""
    parts: list[RenderableType] = [Text(printable(model, 400), "bold"), _figures(found)]
    if found.tasks:
        parts.append(_tasks(found.tasks))
    for number, passage in enumerate(found.worst[:PASSAGES], 1):
        parts += ["", *_passage(number, passage)]
    for each in found.generations:
        parts += ["", *_generation(each)]
    return Group(*parts)


def _figures(found: "Evaluation") -> Table:
    table = Table(show_header=False, box=None, pad_edge=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in _figure_rows(found):
        table.add_row(name, Text(value))
    return table


def _figure_rows(found: "Evaluation") -> Iterator[tuple[str, str]]:
    yield "text", printable(found.text, 400)
    yield "windows", f"{found.windows:,} of {found.seqlen:,} tokens, {found.dtype}"
    yield from (("", printable(note, 400)) for note in found.notes[1:])  # the first is the windows
    base = found.against
    perplexity = f"{found.perplexity:.4f}"
    if base is not None:
        ratio = found.perplexity / base.base_perplexity
        perplexity += f"   base {base.base_perplexity:.4f}, ratio {ratio:.4f}"
    yield "perplexity", perplexity
    if found.bits_per_byte is not None:
        yield "bits per byte", f"{found.bits_per_byte:.4f}"
    if found.bits_per_weight is not None:
        yield "bits per weight", f"{found.bits_per_weight:.2f}"
    if (found.activation_bits, found.cache_bits) != (16, 16):
        yield (
            "bits when it runs",
            f"{found.activation_bits:.2f} per activation, {found.cache_bits:.2f} per cached value",
        )
    yield "size", gigabytes(found.size_bytes) + (", with its adapter" if found.adapter else "")
    if base is not None:
        yield from _divergence_rows(base)
    if errors := found.layer_errors:
        shown = f"{errors[0]:.3g} after the first, {errors[-1]:.3g} after the last"
        worst = max(range(len(errors)), key=errors.__getitem__)
        if worst not in (0, len(errors) - 1):
            shown += f"; most after layer {worst}, {errors[worst]:.3g}"
        yield "layer errors", shown
    if found.speed is not None:
        yield from _speed_rows(found.speed)


def _divergence_rows(base: "Divergence") -> Iterator[tuple[str, str]]:
    yield (
        "KL from the base",
        (
            f"mean {base.kl_mean:.4f}, median {base.kl_median:.4f}, 99 % {base.kl_p99:.4f}, "
            f"max {base.kl_max:.4f} nats"
        ),
    )
    yield "same top token", f"{base.top1_agreement:.2%}, of the top five {base.top5_agreement:.2%}"


def _speed_rows(speed: "Speed") -> Iterator[tuple[str, str]]:
    yield (
        "speed",
        (
            f"prefill {speed.prefill_tokens_per_s:,.1f} tokens/s ({speed.prompt_tokens} tokens), "
            f"decode {speed.decode_tokens_per_s:,.1f} tokens/s; {speed.dtype} on {speed.device}"
        ),
    )
    memory = f"{gigabytes(speed.host_bytes)} host"
    if speed.device_bytes is not None:
        memory += f", {gigabytes(speed.device_bytes)} GPU"
    yield "peak memory", f"{memory}; loaded in {speed.load_seconds:.1f} s"


def _tasks(tasks: "tuple[TaskFigure, ...]") -> Table:
    table = Table(box=SIMPLE_HEAD, title_justify="left")
    for heading in ("task", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("value", "± stderr", "shots", "samples"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in tasks:
        arrow = "↑" if each.higher_is_better else "↓"
        table.add_row(
            Text(printable(each.task)),
            Text(f"{printable(each.metric)} {arrow}"),
            f"{each.value:.4f}",
            "" if each.stderr is None else f"{each.stderr:.4f}",
            str(each.shots),
            f"{each.samples:,}",
        )
    return table


def _passage(number: int, passage: "WorstPassage") -> Iterator[RenderableType]:
    worst = passage.tokens[passage.worst]
    yield Text.assemble(
        (f"worst passage {number}", "bold"),
        f"  window {passage.window}, token {passage.start + passage.worst}: KL {worst.kl:.3g}; "
        f"base {_quoted(passage.base_choice)}, model {_quoted(passage.choice)}",
    )
    shown = Text()
    for index, token in enumerate(passage.tokens):
        marked = index == passage.worst
        shown.append(f"»{_shown(token.text)}«" if marked else _shown(token.text), MARK * marked)
    yield Padding(shown, (0, 0, 0, 2))


def _generation(each: "Generation") -> Iterator[RenderableType]:
    """Prompt, then what each wrote; the first difference is marked with » in both."""
    yield Text.assemble(("prompt", "bold"), f"  {_shown(each.prompt)}")
    if each.base is not None:
        verdict = "the same tokens"
        if each.first_difference is not None:
            verdict = f"token {each.first_difference + 1} is the first that differs"
        yield Text(f"  {verdict}", "dim")
    for name, text in (("base", each.base), ("model", each.text)):
        if text is None:
            continue
        shown = Text(f"  {name:<6} ")
        if each.first_difference is None:
            shown.append(_shown(text))
        else:
            shown.append(_shown(each.same), "dim")
            shown.append(f"»{_shown(text[len(each.same) :])}", "bold")
        yield shown


def _quoted(text: str) -> str:
    return f'"{_shown(text)}"'


def _shown(text: str) -> str:
    return printable(text, SHOWN_TEXT)
