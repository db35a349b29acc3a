"""What the report says of one checkpoint: its first screen, its plots, its texts."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from rilq.evaluation.figures import SIXTEEN, Evaluation, Generation, WorstPassage
from rilq.evaluation.recipes import levels
from rilq.evaluation.report.comparison import Plot
from rilq.evaluation.report.plots import kl_plot, layers_plot, loss_plot, timeline_plot
from rilq.evaluation.report.subject import Subject
from rilq.evaluation.report.svg import to_svg
from rilq.evaluation.report.tables import Table, folded_tables, open_tables, when
from rilq.progress import duration, gigabytes

SHADES = (0.1, 0.5, 1.0, 2.0, 4.0)  # nats of KL from which on a token is shaded more
_FIRST_WORD = re.compile(r"\s*\S+")


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class ShadedToken:
    """A token of a passage; `shade` from 0 (as the base) to `len(SHADES)`."""

    text: str
    shade: int
    title: str
    worst: bool


@dataclass(frozen=True)
class Passage:
    """A worst-hit passage, for people."""

    where: str
    tokens: tuple[ShadedToken, ...]
    base_choice: str
    choice: str


@dataclass(frozen=True)
class Continuation:
    """What one model wrote: as the other one, the first word that differs, and the rest."""

    who: str
    same: str
    differs: str
    rest: str


@dataclass(frozen=True)
class Pair:
    """Generations side by side."""

    prompt: str
    texts: tuple[Continuation, ...]


@dataclass(frozen=True)
class Section:
    """All of one checkpoint; what is empty is not shown.

    Attributes:
        mark: a letter, by which plots of several checkpoints name it.
        about: where it comes from.
        verdict: whether it is good, in a sentence or two.
    """

    mark: str
    name: str
    about: str
    verdict: str
    tiles: tuple[Tile, ...]
    plots: tuple[Plot, ...]
    passages: tuple[Passage, ...]
    pairs: tuple[Pair, ...]
    tables: tuple[Table, ...]
    folded: tuple[Table, ...]


def section(subject: Subject, mark: str) -> Section:
    """The section of a checkpoint.

    Args:
        mark: unique on the page, of letters.
    """
    found = subject.evaluation
    return Section(
        mark=mark,
        name=subject.name,
        about=_about(subject),
        verdict=_verdict(subject),
        tiles=tuple(_tiles(subject)),
        plots=tuple(_plots(subject, mark)),
        passages=tuple(map(_passage, found.worst)) if found else (),
        pairs=tuple(_pair(each) for e in subject.evaluations for each in e.generations),
        tables=tuple(open_tables(subject)),
        folded=tuple(folded_tables(subject)),
    )


def _about(subject: Subject) -> str:
    parts = []
    if subject.model:
        parts.append(f"made from {subject.model}" if subject.recipe else subject.model)
    recipe = subject.recipe
    if {"method", "low_bits", "quantizer"} <= recipe.keys():
        parts.append(f"{recipe['method']}, {levels(recipe)}")
        parts.append(f"quantizer {recipe['quantizer']}")
    if {"bits", "group_size", "quantizer"} <= recipe.keys():
        parts.append(f"{recipe['bits']} bits in groups of {recipe['group_size']}")
        parts.append(f"quantizer {recipe['quantizer']}")
    if recipe.get("rank"):
        parts.append(f"rank {recipe['rank']}")
    if subject.started is not None:
        parts.append(when(subject.started))
    return " · ".join(parts)


def _verdict(subject: Subject) -> str:
    found = subject.evaluation
    if found is None:
        losses = [p.value for p in subject.losses if (p.kind, p.term) == ("validation", "total")]
        said = "Its perplexity has not been measured."
        if len(losses) > 1:
            said = (
                f"The training brought the validation loss from {losses[0]:.4g} to "
                f"{min(losses):.4g}. {said}"
            )
        return said
    text = found.text.partition("@")[0]
    base = found.against
    if base is None:
        return f"Perplexity {found.perplexity:.4g} on {text}; it was not compared with its base."
    return (
        f"Perplexity {found.perplexity:.4g} on {text}: "
        f"{found.perplexity / base.base_perplexity:.3f} times the {base.base_perplexity:.4g} of "
        f"full precision. For {base.top1_agreement:.1%} of the tokens both think the same one most "
        "likely."
    )


def _tiles(subject: Subject) -> Iterator[Tile]:
    found = subject.evaluation
    if found is not None:
        yield from _measured_tiles(found)
    if subject.bits_per_weight is not None:
        yield Tile("Bits per weight", f"{subject.bits_per_weight:.2f}", "codes and scales")
    for title, bits, counted in (
        ("Bits per activation", subject.activation_bits, "codes"),
        ("Bits per cached value", subject.cache_bits, "codes and scales"),
    ):
        if bits is not None and bits != SIXTEEN:
            yield Tile(title, f"{bits:.2f}", counted)
    if subject.size_bytes is not None:
        yield Tile("Size", gigabytes(subject.size_bytes), "of all weights")
    if found is not None and (speed := found.speed) is not None:
        yield Tile(
            "Tokens per second",
            _rate(speed.decode_tokens_per_s),
            f"prefill {_rate(speed.prefill_tokens_per_s)} · {speed.device} {speed.dtype}",
        )
        held = speed.host_bytes if speed.device_bytes is None else speed.device_bytes
        place = "host" if speed.device_bytes is None else speed.device
        yield Tile("Peak memory", gigabytes(held), f"loaded and generating, {place}")
    if found is None:
        held_out = [p for p in subject.losses if (p.kind, p.term) == ("validation", "total")]
        if held_out:
            best = min(held_out, key=lambda p: p.value)
            note = f"{held_out[0].value:.4g} before the training"
            yield Tile("Validation loss", f"{best.value:.4g}", note)


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def _measured_tiles(found: Evaluation) -> Iterator[Tile]:
    base = found.against
    note = ""
    if base is not None:
        note = f"{found.perplexity / base.base_perplexity:.3f} × the base's "
        note += f"{base.base_perplexity:.4g}"
    yield Tile("Perplexity", f"{found.perplexity:.4g}", note)
    if base is not None:
        yield Tile("KL from the base", f"{base.kl_mean:.3g}", f"99th percentile {base.kl_p99:.3g}")
        yield Tile(
            "Same top token",
            f"{base.top1_agreement:.1%}",
            f"top-5 overlap {base.top5_agreement:.1%}",
        )
    if found.bits_per_byte is not None:
        yield Tile("Bits per byte", f"{found.bits_per_byte:.4g}", "of the text")


def _plots(subject: Subject, mark: str) -> Iterator[Plot]:
    found = subject.evaluation
    if found is not None and found.against is not None and any(found.against.kl_counts):
        svg = to_svg(
            kl_plot(found.against),
            prefix=f"{mark}-kl",
            label=f"Histogram of the KL per token, mean {found.against.kl_mean:.3g}",
        )
        yield Plot(
            "KL per token", svg, f"{found.tokens:,} tokens of {found.text.partition('@')[0]}"
        )
    seen = []
    for term in ("total", "mse", "ce", "kl"):
        points = [p for p in subject.losses if p.term == term]
        held_out = [(p.step, p.value) for p in points if p.kind == "validation"]
        if len(points) < 2 or held_out in seen:  # the only term of a loss is the total
            continue
        seen.append(held_out)
        what = f"Loss ({subject.recipe.get('loss', 'total')})" if term == "total" else term.upper()
        svg = to_svg(loss_plot(points), prefix=f"{mark}-loss-{term}", label=f"{what} over updates")
        yield Plot(what, svg)
    final = (found.layer_errors if found else None) or ()
    if subject.layers or final:
        svg = to_svg(
            layers_plot(subject.layers, final),
            prefix=f"{mark}-layers",
            label="Relative error of each decoder layer",
        )
        yield Plot("Error of each decoder layer", svg)
    for number, run in enumerate(subject.runs):
        svg = to_svg(
            timeline_plot(run),
            prefix=f"{mark}-time-{number}",
            label=f"Stages of {run.command} over time",
        )
        yield Plot(f"{run.command}: {duration(run.seconds)}", svg, when(run.started))


def _passage(found: WorstPassage) -> Passage:
    tokens = tuple(
        ShadedToken(t.text, bisect_right(SHADES, t.kl), f"{t.kl:.2f} nats", i == found.worst)
        for i, t in enumerate(found.tokens)
    )
    worst = found.tokens[found.worst]
    where = f"window {found.window}, token {found.start + found.worst}: KL {worst.kl:.2f} nats"
    return Passage(where, tokens, found.base_choice, found.choice)


def _pair(found: Generation) -> Pair:
    texts = [_continuation("this checkpoint", found.text, found)]
    if found.base is not None:
        texts.insert(0, _continuation("full precision", found.base, found))
    return Pair(found.prompt, tuple(texts))


def _continuation(who: str, text: str, found: Generation) -> Continuation:
    if found.first_difference is None or not text.startswith(found.same):
        return Continuation(who, text, "", "")
    rest = text[len(found.same) :]
    word = _FIRST_WORD.match(rest)
    cut = word.end() if word else len(rest)
    return Continuation(who, found.same, rest[:cut], rest[cut:])
