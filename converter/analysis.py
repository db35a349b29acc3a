"""What an analysis is asked for and what it found; its JSON values and its table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rilq.converter.adapters import AdapterSpec
from rilq.converter.options import AdapterKind, ConvertOptions, Tier
from rilq.converter.scopes import CLOSED_FORMS, SCOPES, Fit, Rounding, Scope
from rilq.converter.spectrum import Spectrum
from rilq.errors import OptionError

DEFAULT_RANKS = (4, 8, 16, 32)
DEFAULT_ALPHA = 16.0  # of RILQ's code
REFERENCE_RANK = 16  # where alpha and alpha / rank give the same scaling

Scaling = Literal["none", "alpha", "alpha/rank"]


@dataclass(frozen=True)
class AnalyzeOptions:
    """The options of `rilq analyze`.

    Attributes:
        alpha: at every rank for the lines of fixed alpha; at rank 16 for those of fixed
            alpha / rank.
        steps: updates of each decoder layer, and of the model.
        windows: of the held-out text at most, spread evenly over it.
    """

    model: str
    text: str
    ranks: tuple[int, ...] = DEFAULT_RANKS
    scopes: tuple[Scope, ...] = SCOPES
    bits: int = 2
    group_size: int = 64
    quantizer: Rounding = "rtn"
    adapter: AdapterKind = "lora"
    alpha: float = DEFAULT_ALPHA
    dataset: tuple[str, ...] = ("c4",)
    text_key: str = "text"
    nsamples: int = 96
    seqlen: int = 256
    windows: int = 64
    steps: int = 30
    batch_size: int = 8
    learning_rate: float | None = None
    seed: int = 42
    revision: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    student: Tier | Literal["auto"] = "auto"
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        problems = []
        if not self.ranks or min(self.ranks) < 1:
            problems.append(f"--ranks {self.ranks}: expected whole numbers from 1 up")
        if unknown := [scope for scope in self.scopes if scope not in SCOPES]:
            problems.append(f"--scopes {', '.join(unknown)}: expected some of {', '.join(SCOPES)}")
        if self.quantizer not in ("rtn", "nf2"):
            problems.append(f"--quantizer {self.quantizer}: expected rtn or nf2")
        elif self.quantizer == "nf2" and (self.bits != 2 or self.student in ("packed", "offload")):
            problems.append("--quantizer nf2: has 2 bits, and is simulated in a dense student only")
        if self.windows < 1:
            problems.append(f"--windows {self.windows}: expected at least 1")
        if problems:
            raise OptionError("\n".join(problems))

    @property
    def output(self) -> Path:
        """The output folder: as given, or `<model>-analysis` here."""
        if self.output_dir is not None:
            return self.output_dir
        name = Path(self.model).resolve().name if Path(self.model).exists() else self.model
        return Path(f"{name.rpartition('/')[2]}-analysis")

    def lines(self) -> dict[tuple[Scope, Scaling], list[Fit]]:
        """What is fitted, one line of the plot per scope and scaling, in the order of the ranks.

        A closed form is the same correction whatever its scaling, so that it has one line.
        """
        lines: dict[tuple[Scope, Scaling], list[Fit]] = {}
        for scope in (s for s in SCOPES if s in self.scopes):
            scalings: tuple[Scaling, ...] = (
                ("none",) if scope in CLOSED_FORMS else ("alpha", "alpha/rank")
            )
            for scaling in scalings:
                lines[scope, scaling] = [
                    Fit(
                        scope,
                        AdapterSpec(self.adapter, rank, self._alpha(rank, scaling), self.seed),
                    )  # fmt: skip
                    for rank in sorted(set(self.ranks))
                ]
        return lines

    def _alpha(self, rank: int, scaling: Scaling) -> float:
        return self.alpha * rank / REFERENCE_RANK if scaling == "alpha/rank" else self.alpha

    def conversion(self, work: Path) -> ConvertOptions:
        """The conversion whose plan, streaming pass and training are used."""
        return ConvertOptions(
            model=self.model,
            revision=self.revision,
            bits=self.bits,
            group_size=self.group_size,
            quantizer="rtn",
            clip="none",
            dataset=self.dataset,
            text_key=self.text_key,
            nsamples=self.nsamples,
            seqlen=self.seqlen,
            seed=self.seed,
            rank=max(self.ranks),
            alpha=self.alpha,
            adapter=self.adapter,
            train="adapters",
            loss="mse+ce",
            learning_rate=self.learning_rate,
            steps=self.steps,
            batch_size=self.batch_size,
            val_every=max(1, math.ceil(self.steps / 2)),
            device=self.device,
            dtype=self.dtype,
            student="dense" if self.quantizer == "nf2" else self.student,
            output_dir=work / "out",
            work_dir=work / "work",
        )


@dataclass(frozen=True)
class Measured:
    """One student on the held-out text.

    Attributes:
        perplexity: over the predicted tokens of all windows.
        gap_closed: from plain rounding (0) to full precision (1), in nats.
        state_error: `|h - h_teacher|^2 / |h_teacher|^2` of the final hidden states.
    """

    perplexity: float
    gap_closed: float
    state_error: float


@dataclass(frozen=True)
class Row:
    """One set of adapters.

    Attributes:
        scaling: what is the same along the line: "alpha" or "alpha/rank"; "none" for a closed form,
            which does not depend on it.
        weight_error: `|W - What - c B A|^2 / |W|^2` over all linears; None for the model's scope.
    """

    scope: Scope
    scaling: Scaling
    rank: int
    alpha: float | None
    measured: Measured
    weight_error: float | None


@dataclass(frozen=True)
class Movement:
    """How far one line moves from the smallest rank to the largest, in gap closed."""

    scope: Scope
    scaling: Scaling
    first: float
    last: float

    @property
    def change(self) -> float:
        """Gap closed at the largest rank, less that at the smallest."""
        return self.last - self.first


@dataclass(frozen=True)
class Analysis:
    """What was fitted and measured.

    Attributes:
        settings: options that have an effect, without any path, and what was chosen.
        data: of the calibration rows and the held-out windows.
        full: perplexity at full precision.
        plain: plain rounding, the zero of the gap.
        base: what the adapters are beside; `plain`, unless the quantizer is another.
    """

    model: str
    settings: dict[str, Any]
    data: dict[str, Any]
    full: float
    plain: Measured
    base: Measured
    rows: tuple[Row, ...]
    spectra: tuple[Spectrum, ...]

    def movements(self) -> list[Movement]:
        """One per line of at least two ranks."""
        lines: dict[tuple[Scope, Scaling], list[Row]] = {}
        for row in self.rows:
            lines.setdefault((row.scope, row.scaling), []).append(row)
        return [
            Movement(*key, rows[0].measured.gap_closed, rows[-1].measured.gap_closed)
            for key, rows in lines.items()
            if len(rows) > 1
        ]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "model": self.model,
            "settings": self.settings,
            "data": self.data,
            "full": {"perplexity": self.full, "gap_closed": 1.0, "state_error": 0.0},
            "plain": asdict(self.plain),
            "base": asdict(self.base),
            "rows": [
                {**{k: v for k, v in asdict(row).items() if k != "measured"},
                 **asdict(row.measured)}
                for row in self.rows
            ],
            "movement": [{**asdict(m), "change": m.change} for m in self.movements()],
            "spectrum": [
                {**asdict(s), "captured": {str(rank): part for rank, part in s.captured.items()}}
                for s in self.spectra
            ],
        }  # fmt: skip


# ---- the table ----------------------------------------------------------------------------------

HEADINGS = ("scope", "fixed", "rank", "perplexity", "gap closed", "state error", "weight error")


def table_rows(found: Analysis) -> list[tuple[str, ...]]:
    """The table's cells, for people: full precision, plain rounding, then every set of adapters."""

    def cells(name: str, scaling: str, rank: str, m: Measured, weight: float | None) -> Any:
        shown = "" if weight is None else f"{weight:.4f}"
        return (name, scaling, rank, f"{m.perplexity:.4g}", f"{m.gap_closed:.3f}",
                f"{m.state_error:.4f}", shown)  # fmt: skip

    rows = [cells("full precision", "", "", Measured(found.full, 1.0, 0.0), 0.0)]
    rows.append(cells("plain rounding", "", "", found.plain, None))
    if found.base != found.plain:
        rows.append(cells(f"base ({found.settings['quantizer']})", "", "", found.base, None))
    for row in found.rows:
        name, scaling = labels(row.scope, row.scaling)
        rows.append(cells(name, scaling, str(row.rank), row.measured, row.weight_error))
    return rows


def as_markdown(found: Analysis) -> str:
    """The table, how far each line moves, and the spectrum's figures."""
    s, calibration = found.settings, found.data["calibration"]
    lines = [
        f"# {found.model}: {s['adapter']} adapters on {s['bits']}-bit {s['quantizer']}, groups of "
        f"{s['group_size']}",
        "",
        f"{calibration['rows']} calibration rows of {calibration['seqlen']} tokens, "
        f"{found.data['held_out']['windows']} held-out windows; {s['steps']} updates of "
        f"{s['batch_size']} rows for each trained layer or model, peak rate "
        f"{s['learning_rate']:.3g}. Gap closed: 0 at plain rounding, 1 at full precision, in nats.",
        "",
        *_markdown_table(HEADINGS, table_rows(found)),
    ]
    ranks = sorted(found.spectra[0].captured)
    if moves := found.movements():
        names = ("scope", "fixed", f"gap at rank {ranks[0]}", f"gap at rank {ranks[-1]}")
        cells = [
            (*labels(m.scope, m.scaling), *(f"{x:.3f}" for x in (m.first, m.last, m.change)))
            for m in moves
        ]
        lines += ["", *_markdown_table((*names, "change"), cells)]
    columns = ("bits", "relative error", *(f"removed by rank {rank}" for rank in ranks))
    shares = [
        (str(p.bits), f"{p.relative_error:.4f}", *(f"{p.captured[rank]:.3f}" for rank in ranks))
        for p in found.spectra
    ]
    return "\n".join([*lines, "", *_markdown_table(columns, shares)]) + "\n"


def labels(scope: Scope, scaling: Scaling) -> tuple[str, str]:
    """Names of a scope and a scaling for people."""
    name = "weight-SVD" if scope == "svd" else f"{scope}-loss"
    return name, "closed form" if scaling == "none" else scaling


def _markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return [line(names), line(["---"] * len(names)), *map(line, rows)]
