"""What an evaluation finds, as plain values that the terminal, the record and the report share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Divergence:
    """A model compared with its base on the same tokens; it shows damage that perplexity hides.

    Attributes:
        kl_mean, kl_median, kl_p99, kl_max: of KL(base || this) per predicted token, in nats; the
            99th percentile is interpolated linearly.
        top1_agreement: share of the tokens for which both think the same one most likely.
        top5_agreement: mean share of the base's five most likely tokens that are among this one's.
        base_perplexity: the base's own.
        kl_edges, kl_counts: histogram of the KL per token: `len(edges) == len(counts) + 1`, the
            edges are a geometric row; what lies outside counts in the first or last bin.
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top5_agreement: float
    base_perplexity: float
    kl_edges: tuple[float, ...]
    kl_counts: tuple[int, ...]

    def filled_bins(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Edges and counts of the histogram without the empty bins at both ends."""
        filled = [index for index, count in enumerate(self.kl_counts) if count]
        if not filled:
            return self.kl_edges[:1], ()
        first, last = filled[0], filled[-1]
        return self.kl_edges[first : last + 2], self.kl_counts[first : last + 1]


@dataclass(frozen=True)
class PassageToken:
    """A token of a passage: its text, and KL(base || this) of its prediction, in nats."""

    text: str
    kl: float


@dataclass(frozen=True)
class WorstPassage:
    """A stretch of text where the model is far from its base.

    Attributes:
        window: its number in the text, from 0.
        start: position of the first token in that window.
        tokens: the worst token with some before and after it; their texts together are the text.
        worst: index of the worst among `tokens`.
        base_choice, choice: what base and model think most likely in its place.
    """

    window: int
    start: int
    tokens: tuple[PassageToken, ...]
    worst: int
    base_choice: str
    choice: str

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WorstPassage:
        """From what `asdict` gave, lists for tuples.

        Raises:
            KeyError, TypeError: it is something else.
        """
        tokens = tuple(PassageToken(**each) for each in values["tokens"])
        return cls(**{**values, "tokens": tokens})


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task, as lm-evaluation-harness gives it.

    Attributes:
        task, version: of the harness.
        metric: with its filter where that is not "none": "acc", "exact_match,strict-match".
        value: in the harness's units; higher is better if `higher_is_better`.
        stderr: standard error; None where the harness gives none.
        shots: examples in the prompt.
        samples: that were scored.
    """

    task: str
    version: str
    metric: str
    value: float
    stderr: float | None
    shots: int
    samples: int
    higher_is_better: bool


@dataclass(frozen=True)
class Generation:
    """What a model and its base write after the same prompt, greedily.

    Attributes:
        base: None if there was nothing to compare with.
        first_difference: index of the first generated token that differs; None if none does.
        same: the part of `text` before that token.
    """

    prompt: str
    text: str
    base: str | None
    first_difference: int | None
    same: str


@dataclass(frozen=True)
class Speed:
    """The model loaded by transformers, as its users run it, batch size 1.

    Attributes:
        prefill_tokens_per_s: of a prompt of `prompt_tokens`.
        decode_tokens_per_s: of `new_tokens` after it.
        host_bytes: peak resident memory of the process that only did this, less what the
            interpreter and its libraries hold before loading.
        device_bytes: peak memory on the GPU; None on a CPU.
        load_seconds: until it was ready.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prompt_tokens: int
    new_tokens: int
    host_bytes: int
    device_bytes: int | None
    load_seconds: float
    device: str
    dtype: str


SIXTEEN = 16.0  # bits of activations and cached values that are not quantized


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a checkpoint.

    Attributes:
        perplexity: `exp` of the mean negative log-likelihood over the predicted tokens.
        tokens: predicted tokens, `windows * (seqlen - 1)`.
        windows: non-overlapping windows of the text; a last partial one is left out.
        seqlen: tokens per window.
        bits_per_byte: the mean loss in bits, times tokens per byte of the text in the windows; None
            if the tokenizer cannot say which bytes its tokens stand for.
        bits_per_weight: over the quantized linears, codes with 16-bit scales and zero-points (not
            the adapter); of a dense checkpoint over all linears of the decoder layers, as stored.
        size_bytes: of all weight files, the adapter's included.
        adapter: a LoRA beside the checkpoint was applied.
        dtype: what the layers computed in.
        text: label of the text with its hash or commit, without any path.
        tokens_digest: xxh3 of the token rows; figures with the same one are of the same data.
        notes: how much of the text was taken and in what form, one line each.
        against: comparison with the base; None if there was none.
        layer_errors: relative squared error of the hidden states after each decoder layer,
            `|h - h_base|^2 / |h_base|^2`, both run from the embedding on; None without a base, or
            where it has other layers or another hidden size, or one of both is rotated.
        worst: the worst-hit passages, the worst one first; empty without a base.
        tasks, generations, speed: where they were asked for.
        activation_bits: of an input's codes, on average over the multiplications in the decoder's
            linears; 16 where inputs are not quantized.
        cache_bits: stored in the KV cache for each value, scales and zeros counted; likewise.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int
    bits_per_byte: float | None
    bits_per_weight: float | None
    size_bytes: int
    adapter: bool
    dtype: str
    text: str
    tokens_digest: str
    notes: tuple[str, ...] = ()
    against: Divergence | None = None
    layer_errors: tuple[float, ...] | None = None
    worst: tuple[WorstPassage, ...] = ()
    tasks: tuple[TaskFigure, ...] = ()
    generations: tuple[Generation, ...] = ()
    speed: Speed | None = None
    activation_bits: float = SIXTEEN
    cache_bits: float = SIXTEEN

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; `Evaluation.from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """From what `as_dict` gave, lists for tuples.

        Raises:
            KeyError, TypeError: it is something else.
        """
        against, errors, speed = (values[k] for k in ("against", "layer_errors", "speed"))
        return cls(**{
            **values,
            "notes": tuple(values["notes"]),
            "against": None if against is None else Divergence(**{
                **against,
                "kl_edges": tuple(against["kl_edges"]),
                "kl_counts": tuple(against["kl_counts"]),
            }),
            "layer_errors": None if errors is None else tuple(errors),
            "worst": tuple(WorstPassage.from_dict(each) for each in values["worst"]),
            "tasks": tuple(TaskFigure(**each) for each in values["tasks"]),
            "generations": tuple(Generation(**each) for each in values["generations"]),
            "speed": None if speed is None else Speed(**speed),
        })  # fmt: skip

    def figures(self) -> dict[str, float]:
        """All numbers that are better lower or higher, by the names that rules and lists use."""
        found: dict[str, float | None] = {
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_weight": self.bits_per_weight,
            "activation_bits": self.activation_bits,
            "cache_bits": self.cache_bits,
            "size_bytes": self.size_bytes,
        }
        if (other := self.against) is not None:
            found |= {
                "kl_mean": other.kl_mean,
                "kl_median": other.kl_median,
                "kl_p99": other.kl_p99,
                "kl_max": other.kl_max,
                "top1_agreement": other.top1_agreement,
                "top5_agreement": other.top5_agreement,
            }
        if (speed := self.speed) is not None:
            found |= {
                "prefill_tokens_per_s": speed.prefill_tokens_per_s,
                "tokens_per_s": speed.decode_tokens_per_s,
                "host_bytes": speed.host_bytes,
                "device_bytes": speed.device_bytes,
            }
        found |= {f"{each.task}.{each.metric}": each.value for each in self.tasks}
        return {name: float(value) for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Passages:
    """The figures of an evaluation window by window: what confidence intervals are made from.

    Attributes:
        loss: sum over the predicted tokens of each window, nats: `[windows]` float64.
        tokens: predicted in each window.
        base_loss: the base's; None without one, as the following ones.
        kl: KL(base || this) per token, nats: `[windows, tokens]` float16.
        top1: tokens for which both think the same one most likely: `[windows]` int64.
        top5: sum of the shares of the base's five most likely tokens: `[windows]` float64.
    """

    loss: NDArray[np.float64]
    tokens: int
    base_loss: NDArray[np.float64] | None = None
    kl: NDArray[np.float16] | None = None
    top1: NDArray[np.int64] | None = None
    top5: NDArray[np.float64] | None = None
