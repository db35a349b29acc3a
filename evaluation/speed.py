"""Speed and memory of a checkpoint loaded whole, measured in a process that does nothing else.

`measure_speed` starts `python -m rilq.evaluation.speed` and reads its figures.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from rilq.errors import InputError, printable
from rilq.evaluation.figures import Speed
from rilq.evaluation.whole import Place, load
from rilq.progress import Reporter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROMPT_TOKENS, NEW_TOKENS = 512, 64
REPETITIONS = 3
BUDGET = 20.0  # seconds after which no repetition begins, and one that runs is cut short


def measure_speed(place: Place, report: Reporter) -> Speed | None:
    """Load the checkpoint in a process of its own, and time it; None, with a warning, if it fails.

    Args:
        place: the checkpoint, and where it is to run.
        report: receives a stage, and why there are no figures.
    """
    report.stage("speed")
    try:
        place.check_room("speed")
    except InputError as err:
        report.note(f"not measured: {str(err).splitlines()[0]}")
        return None
    asked = json.dumps(asdict(place))
    finished = subprocess.run(
        [sys.executable, "-m", "rilq.evaluation.speed", asked],
        capture_output=True,
        text=True,
        errors="replace",
        # The current folder may hold modules of any name; they are not to be imported.
        env={
            "OMP_WAIT_POLICY": "PASSIVE",  # as the commands set it
            **os.environ,
            "PYTHONSAFEPATH": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        },
    )
    if finished.returncode != 0:
        said = finished.stderr.strip().splitlines() or ["it said nothing"]
        why = f"ended with {finished.returncode}: {printable(said[-1], 400)}"
        report.warn(f"speed and memory were not measured: the process that did it {why}")
        return None
    return Speed(**json.loads(finished.stdout.splitlines()[-1]))


# ---- in the process of its own ------------------------------------------------------------------


def measure_here(place: Place) -> Speed:
    """Load, warm up and time; meant for a fresh process, whose peak memory it reads.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    _import_all(place)
    before = psutil.Process().memory_info().rss
    _forget_peak()
    started = time.perf_counter()
    model, _ = load(place.model, revision=place.revision, device=place.device, dtype=place.dtype)
    _synchronize()
    load_seconds = time.perf_counter() - started
    timings = _time(model)
    return Speed(
        prefill_tokens_per_s=statistics.median(each.prefill for each in timings),
        decode_tokens_per_s=statistics.median(each.decode for each in timings),
        prompt_tokens=timings[0].prompt_tokens,
        new_tokens=max(each.new_tokens for each in timings),
        host_bytes=max(0, _peak() - before),
        device_bytes=_device_peak() if model.device.type == "cuda" else None,
        load_seconds=load_seconds,
        device=_device_name(model),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _import_all(place: Place) -> None:
    """What loading would import and initialise, so that it does not count as the model's memory."""
    config = AutoConfig.from_pretrained(place.model, revision=place.revision)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    torch.ones(64, 64) @ torch.ones(64, 64)


class Clock(BaseStreamer):
    """Notes when the prompt goes in and when each token comes out, as `generate` tells it.

    What it is given lies on the host, so a GPU has finished the token by then.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Note the time; `value` holds the prompt's tokens at the first call, then one token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing: the last token's time is the end."""


class OutOfTime(StoppingCriteria):
    """Ends a generation after `seconds`, but not before its second token."""

    def __init__(self, seconds: float, prompt_tokens: int) -> None:
        self.until = time.perf_counter() + seconds
        self.least = prompt_tokens + 2

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        over = time.perf_counter() > self.until and input_ids.shape[1] >= self.least
        return torch.full((input_ids.shape[0],), over, device=input_ids.device)


@dataclass(frozen=True)
class Timing:
    """One generation: tokens per second of the prompt, and of what came after its first token."""

    prefill: float
    decode: float
    prompt_tokens: int
    new_tokens: int


def _time(model: PreTrainedModel | PeftModel) -> list[Timing]:
    """Several generations after a short one to warm up."""
    positions = getattr(model.config, "max_position_embeddings", None) or PROMPT_TOKENS + NEW_TOKENS
    # Of a very short context the prompt gets most.
    new = min(NEW_TOKENS, max(2, positions // 4))
    prompt = min(PROMPT_TOKENS, positions - new)
    started = time.perf_counter()
    _generate(model, prompt, 2, BUDGET)
    found: list[Timing] = []
    while len(found) < REPETITIONS:
        left = BUDGET - (time.perf_counter() - started)
        if found and left <= 0:
            break
        found.append(_generate(model, prompt, new, max(left, 0.0)))
    return found


@torch.no_grad()
def _generate(
    model: PreTrainedModel | PeftModel, prompt_tokens: int, new_tokens: int, seconds: float
) -> Timing:
    # The speed does not depend on which tokens they are.
    prompt = torch.arange(prompt_tokens, device=model.device)[None] % model.config.vocab_size
    clock = Clock()
    generate: Any = model.generate  # of a union of classes, and typed in none
    generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        ),
        stopping_criteria=StoppingCriteriaList([OutOfTime(seconds, prompt_tokens)]),
        streamer=clock,
    )
    begin, first, *later = clock.times
    return Timing(
        prefill=prompt_tokens / (first - begin),
        decode=len(later) / (later[-1] - first),
        prompt_tokens=prompt_tokens,
        new_tokens=len(later) + 1,
    )


def _device_name(model: PreTrainedModel | PeftModel) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{model.device.type}, {torch.get_num_threads()} threads"


def _device_peak() -> int:
    return sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_peak() -> None:
    """Let the peak begin at what is resident now; Linux only."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Peak resident memory of this process, bytes."""
    with suppress(OSError, IndexError):
        # Not ru_maxrss, which on Linux starts from the parent's own size.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(Place(**json.loads(sys.argv[1]))))))
