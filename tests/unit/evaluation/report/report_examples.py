"""A checkpoint of which everything is known, some of it hostile; for the tests of the report."""

from rilq.evaluation.figures import (
    Divergence,
    Evaluation,
    Generation,
    PassageToken,
    Speed,
    TaskFigure,
    WorstPassage,
)
from rilq.evaluation.report.subject import FileSum, Subject
from rilq.records.run import LayerFigure, LossPoint, Run, Sample, Stage

HOSTILE = "</style><script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>\"$x$"
EDGES = tuple(10 ** (exponent / 4) for exponent in range(-16, 9))


def evaluation(perplexity: float = 19.5, bits: float = 2.5, **changes: object) -> Evaluation:
    """With a base, worst passages, tasks, generations and speed."""
    tokens = [("The", 0.01), (" city", 0.2), (HOSTILE, 4.9), (" was", 0.7), ("\n", 1.3), ("x", 2.0)]
    values: dict[str, object] = {
        "perplexity": perplexity,
        "tokens": 2550,
        "windows": 10,
        "seqlen": 256,
        "bits_per_byte": 1.59,
        "bits_per_weight": bits,
        "size_bytes": int(bits * 1e6),
        "adapter": False,
        "dtype": "float32",
        "text": "heldout.txt@xxh3:692b4708",
        "tokens_digest": "3c68a7f5",
        "against": Divergence(
            *(0.117, 0.064, 0.842, 3.59, 0.785, 0.792, 17.31),
            kl_edges=EDGES,
            kl_counts=tuple(range(23)) + (0,),
        ),
        "layer_errors": (0.04, 0.05, 0.11),
        "worst": (WorstPassage(3, 40, tuple(PassageToken(*t) for t in tokens), 2, " the", " <b>"),),
        "tasks": (TaskFigure("winogrande", "1", "acc", 0.61, 0.012, 0, 1267, True),),
        "generations": (
            Generation(" The city", " of Rome was <b>", " of Rome is old", 3, " of Rome"),
        ),
        "speed": Speed(410.0, 35.2, 128, 64, 210_000_000, None, 1.2, "cpu", "float32"),
    }
    return Evaluation(**{**values, **changes})  # type: ignore[arg-type]


def run(**changes: object) -> Run:
    """A conversion with stages, memory and disk."""
    values: dict[str, object] = {
        "id": 1,
        "command": "convert",
        "started": 1_790_000_000.0,
        "seconds": 41.0,
        "state": "done",
        "model": "model",
        "checkpoint": "model-w2g64-rilq",
        "place": "/somewhere/model-w2g64-rilq",
        "machine": {"cpu": "Some CPU", "cores": 2},
        "figures": {"bits_per_weight": 2.5},
        "stages": (
            Stage("layers", 0.0, 30.0, 600_000_000, None, 58_000_000_000),
            Stage("train", 30.0, 10.0, 610_000_000, 20_000_000, 57_000_000_000),
        ),
        "samples": tuple(
            Sample(5.0 * i, 500_000_000 + i * 10_000_000, 20_000_000, 58_000_000_000 - i * 10**8)
            for i in range(9)
        ),
        "losses": tuple(
            LossPoint(kind, term, step, 1.0 / (step + weight))
            for kind in ("train", "validation")
            for weight, term in enumerate(("total", "mse", "ce", "kl"), start=1)
            for step in (0, 50, 100)
        ),
        "layers": tuple(LayerFigure(i, 0.01 * (i + 1), 2.5) for i in range(3)),
    }
    return Run(**{**values, **changes})  # type: ignore[arg-type]


def subject(name: str = "model-w2g64-rilq", **changes: object) -> Subject:
    """With everything that a report can show."""
    made = run()
    values: dict[str, object] = {
        "name": name,
        "model": "model",
        "started": made.started,
        "recipe": {"bits": 2, "group_size": 64, "quantizer": "blockap", "rank": 16, "loss": "kl"},
        "calibration": {"sources": ["calib.txt@xxh3:8a52"], "rows": 296},
        "versions": {"rilq": "0.1.0", "torch": "2.13.0"},
        "machine": made.machine,
        "bits_per_weight": 2.5,
        "size_bytes": 911_128,
        "quality": {"merge_max_logit_difference": 0.0117},
        "expert_tokens": (None, (12, 480.5, 2210)),
        "experts_without_data": {f"model.layers.1.mlp.experts.3.{HOSTILE}": 12},
        "evaluations": (evaluation(),),
        "losses": made.losses,
        "layers": made.layers,
        "runs": (made,),
        "files": (FileSum("model.safetensors", 911_128, "3c2a4e01a67e3f30"),),
    }
    return Subject(**{**values, **changes})  # type: ignore[arg-type]
