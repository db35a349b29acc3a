"""The model card: the front page of a repository on the Hub, and the metadata in its head.

A card says what is known and measured, and nothing of the machine that it comes from. What a person
has written stays: only the block between two marks is ours.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard

from rilq.errors import HubError, one_line
from rilq.evaluation.figures import Evaluation
from rilq.evaluation.loading import NATIVE, RUNTIMES, after_export, from_hub
from rilq.evaluation.recipes import in_parts, levels, most_bits
from rilq.formats.export.gguf import ADAPTER_FILE
from rilq.formats.export.kind import ExportOptions
from rilq.formats.hub_push import WEIGHTS, LocalFile
from rilq.formats.integer_base import INTEGER_FOLDER
from rilq.formats.lora import ADAPTER_FOLDER
from rilq.formats.verify import CARD, CARD_PLOT

_BEGIN = "<!-- rilq:begin: what follows is written anew at each push, up to rilq:end -->"
_END = "<!-- rilq:end -->"
_BLOCK = re.compile(r"<!-- rilq:begin.*?<!-- rilq:end -->", re.DOTALL)
_OURS = ", measured by rilq"  # ends the name of each of our metrics, to find them again
_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Base:
    """The checkpoint that ours was made from, as far as the world may know.

    Attributes:
        name: on the Hub; None for a local folder, whose name is nobody's business.
        commit: its commit hash there.
        metadata: of its own card; licence and language are taken over.
    """

    name: str | None = None
    commit: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    Attributes:
        endpoint, repo_id, revision: where it will lie.
        manifest: `rilq.json`.
        base: what the checkpoint was made from.
        files: all that is pushed but the card.
        figures: what was measured, of an export on the checkpoint that it was made from; None if
            nothing was.
        exports: the kinds that it can be exported to, and how.
    """

    endpoint: str
    repo_id: str
    revision: str
    manifest: Mapping[str, Any]
    base: Base
    files: Mapping[str, LocalFile]
    figures: Evaluation | None
    exports: Mapping[str, ExportOptions] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """ "native", or that of the export."""
        return str(self.manifest.get("export", {}).get("kind", NATIVE))


def card_metadata(card: str) -> dict[str, Any]:
    """The metadata of anybody's card.

    Raises:
        ValueError: it is not valid; or whatever the YAML parser raises.
    """
    return dict(ModelCard(card, ignore_metadata_errors=True).data.to_dict())


def make_card(facts: CardFacts, existing: str | None) -> str:
    """The card's text, the same for the same facts.

    Args:
        facts: what to say.
        existing: the repository's card; its text outside our block and its metadata stay, but for
            the base and our own figures.

    Raises:
        HubError: the metadata of the existing card is damaged.
    """
    block = f"{_BEGIN}\n\n{_body(facts)}\n{_END}"
    name = facts.repo_id.partition("/")[2]
    if existing is None:
        existing = f"---\n{{}}\n---\n\n# {name}\n\n{block}\n"
    try:
        card = ModelCard(existing)
    except Exception as err:  # a YAML parser's own kinds, or ValueError
        raise HubError(
            f"{facts.repo_id}/{CARD}: the metadata of this card cannot be read: {one_line(err)}\n"
            "  correct it on the Hub, then run the same command again"
        ) from err
    if _BLOCK.search(card.text):
        card.text = _BLOCK.sub(lambda _: block, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{block}\n"
    _fill(card.data, facts, name)
    return str(card)


# ---- metadata -----------------------------------------------------------------------------------


def _fill(data: Any, facts: CardFacts, name: str) -> None:
    """Complete a `ModelCardData`; a value that is there wins, unless it is a fact of ours."""
    if facts.base.name is not None:
        data.base_model = facts.base.name
        data["base_model_relation"] = "quantized"
    if data.license is None:
        for key in _LICENCE:
            data[key] = facts.base.metadata.get(key)
    if data.language is None:
        data.language = facts.base.metadata.get("language")
    runtime = RUNTIMES[facts.kind]
    if data.library_name in (None, *(each.library for each in RUNTIMES.values())):
        data.library_name = runtime.library
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    tags = ["rilq", *runtime.tags]
    if facts.kind not in ("dense", "gguf"):  # which store more bits than the recipe's
        tags.append(f"{most_bits(facts.manifest['recipe'])}-bit")
    data.tags = [*(data.tags or []), *(tag for tag in tags if tag not in (data.tags or []))]
    others = [r for r in data.eval_results or [] if not (r.metric_name or "").endswith(_OURS)]
    results = [*others, *_results(facts)]
    data.eval_results = results or None
    data.model_name = (data.model_name or name) if results else None


def _results(facts: CardFacts) -> list[EvalResult]:
    figures = facts.figures
    if figures is None:
        return []
    whose = "" if facts.kind == NATIVE else ", of the checkpoint that was exported"
    measured = {("perplexity", "Perplexity"): figures.perplexity}
    if figures.against is not None:
        measured |= {
            (
                "kl-divergence",
                "KL divergence from the base, nats per token",
            ): figures.against.kl_mean,
            ("agreement", "Top-1 agreement with the base"): figures.against.top1_agreement,
        }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=figures.text.partition("@")[0],
            dataset_name=figures.text,
            dataset_args={"context": figures.seqlen, "windows": figures.windows},
            metric_type=kind,
            metric_name=shown + whose + _OURS,
            metric_value=float(f"{value:.6g}"),
        )
        for (kind, shown), value in measured.items()
    ]


# ---- text ---------------------------------------------------------------------------------------


def _body(facts: CardFacts) -> str:
    sections = (_summary, _figures, _use, _recipe, _calibration, _checksums)
    return "\n".join(f"{section(facts)}\n" for section in sections)


def _summary(facts: CardFacts) -> str:
    manifest, recipe, base = facts.manifest, facts.manifest["recipe"], facts.base
    origin = "A model that is not on the Hub,"
    if base.name is not None:
        origin = f"[{base.name}]({facts.endpoint}/{base.name}) (commit `{base.commit}`)"
    made = "(RILQ, [arXiv:2412.01129](https://arxiv.org/abs/2412.01129))."
    if facts.kind != NATIVE:
        export, apart = manifest["export"], manifest["export"]["logit_difference"]
        return (
            f"{origin} with the linears of its decoder layers quantized to {recipe['bits']} bits "
            f"in groups of {recipe['group_size']}, exported for {RUNTIMES[facts.kind].title}, "
            f"{_megabytes(_weights(facts))}. Made by rilq {export['rilq']} {made}\n\n"
            f"Read back and run over {apart['tokens']} tokens of `{export['text']}`, its logits "
            f"differ from those of the checkpoint that was exported by at most "
            f"{apart['largest']:.2g}, and by {apart['mean']:.2g} on average; their standard "
            f"deviation is {apart['spread']:.3g}."
        )
    if in_parts(recipe):
        return (
            f"{origin} in {recipe['low_bits']} bits by `--method {recipe['method']}` "
            "([ResQ](https://arxiv.org/abs/2412.14363) and its baselines): the weights of its "
            "decoder's linears, their inputs, keys and values are all quantized "
            f"({levels(recipe)}). It takes {manifest['bits_per_weight']:.2f} bits per weight with "
            f"scales, {manifest['activation_bits']:.2f} per activation, "
            f"{manifest['cache_bits']:.2f} per value in the KV cache with scales, "
            f"{manifest['bits_per_parameter']:.2f} per parameter of the whole file, "
            f"{_megabytes(_weights(facts))}. Made by rilq {manifest['versions']['rilq']}."
        )
    return (
        f"{origin} in {recipe['bits']} bits: the linears of its decoder layers are quantized in "
        f"groups of {recipe['group_size']}, "
        f"{manifest['bits_per_weight']:.2f} bits per weight with scales and zero-points, "
        f"{manifest['bits_per_parameter']:.2f} per parameter of the whole file, "
        f"{_megabytes(_weights(facts))}. Made by rilq {manifest['versions']['rilq']} {made}"
    )


def _figures(facts: CardFacts) -> str:
    figures, quality = facts.figures, facts.manifest["quality"]
    bits = most_bits(facts.manifest["recipe"])
    compared = figures.against if figures else None
    perplexities = (
        compared.base_perplexity if compared else None,
        figures.perplexity if figures else None,
    )
    rows = [["full precision", _figure(perplexities[0]), "0" if compared else "", ""]]
    trained = quality.get("validation_loss_merged", quality.get("validation_loss"))
    if trained is not None:
        before = quality["validation_loss_before"]
        rows.append([f"{bits}-bit, before RILQ", "", "", _figure(before)])
    rows.append([
        f"{bits}-bit, " + ("this model" if facts.kind == NATIVE else "before the export"),
        _figure(perplexities[1]),
        _figure(compared.kl_mean if compared else None),
        _figure(trained),
    ])  # fmt: skip
    text = "## Figures\n\n" + _table(
        ["model", "perplexity", "KL from full precision", "validation loss of the training"], rows
    )
    if CARD_PLOT in facts.files:
        text += f"\n\n![validation loss of the training]({CARD_PLOT})"
    if figures is None:
        return text + "\n\nPerplexity was not measured."
    text += (
        f"\n\nPerplexity and KL (nats per token) on `{figures.text}`: {figures.windows} windows of "
        f"{figures.seqlen} tokens that do not overlap, {figures.tokens} predicted tokens, computed "
        f"in {figures.dtype} by `rilq eval`."
    )
    if compared is not None:
        text += (
            f" Both models think the same token most likely for {compared.top1_agreement:.1%} of "
            "them."
        )
    return text


def _use(facts: CardFacts) -> str:
    branch = None if facts.revision == "main" else facts.revision
    places = [f"{ADAPTER_FOLDER}/", ADAPTER_FILE]
    integer = [f"{ADAPTER_FOLDER}/", f"{INTEGER_FOLDER}/{ADAPTER_FOLDER}/"]
    direct = from_hub(facts.kind, facts.repo_id, revision=branch, adapter=_beside(facts, places))
    text = f"## Use\n\nWith {RUNTIMES[facts.kind].needs} installed:\n\n{direct}"
    if not facts.exports:
        return text
    text += (
        "\n\nOther runtimes load exports of it, which `rilq export` makes from this repository and "
        "compares with it."
    )
    for kind, options in facts.exports.items():
        needed = {"gguf": places, "gptq": integer, "compressed-tensors": integer}.get(kind, [])
        commands = after_export(
            kind,
            facts.repo_id,
            revision=branch,
            dtype=None if options.dtype == torch.float16 else "bf16",
            adapter=_beside(facts, needed),
        )
        text += f"\n\n### {RUNTIMES[kind].title}\n\nNeeds {RUNTIMES[kind].needs}.\n\n{commands}"
    return text


def _beside(facts: CardFacts, places: Sequence[str]) -> bool:
    """Whether an adapter lies in one of the places."""
    return any(name.startswith(tuple(places)) for name in facts.files)


def _recipe(facts: CardFacts) -> str:
    recipe = {k: v for k, v in facts.manifest["recipe"].items() if v not in (None, [], {})}
    versions = ", ".join(f"{name} {v}" for name, v in sorted(facts.manifest["versions"].items()))
    return (
        "## Recipe\n\n```json\n"
        + json.dumps(recipe, indent=2, sort_keys=True)
        + f"\n```\n\nMade with {versions}, computing in {facts.manifest['compute_dtype']}."
    )


def _calibration(facts: CardFacts) -> str:
    data = facts.manifest["calibration"]
    sources = ", ".join(f"`{source}`" for source in data["sources"])
    return (
        f"## Calibration data\n\n{sources}: {data['rows']} rows of {data['seqlen']} tokens; xxh3 "
        f"of the tokens `{data['digest']}`."
    )


def _checksums(facts: CardFacts) -> str:
    weights = _weights(facts)
    rows = [[f"`{n}`", f"{f.size}", f"`{f.sha256}`"] for n, f in sorted(weights.items())]
    return (
        "## Checksums\n\n"
        + _table(["file", "bytes", "sha256"], rows)
        + "\n\nA checksum of every tensor is in `rilq.json`; `rilq verify` checks them."
    )


def _weights(facts: CardFacts) -> dict[str, LocalFile]:
    return {n: file for n, file in facts.files.items() if n.endswith(WEIGHTS)}


def _megabytes(files: Mapping[str, LocalFile]) -> str:
    return f"{sum(file.size for file in files.values()) / 1e6:,.2f} MB of weights"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
