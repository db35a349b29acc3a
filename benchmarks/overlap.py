#!/usr/bin/env python3
"""How far reading, computing and writing of the streaming pass overlap, on a slow disk.

Streams a random Llama (hidden 256, intermediate 704, 16 layers, bfloat16) through `StreamingPass`
three times in each of a few rounds:

  computing   with the checkpoint in the page cache
  reading     all layers one after the other, and nothing else
  both        the pass as it is

In "reading" and "both" each read of a layer sleeps as long as the pass took for a layer in
"computing", so that reading takes as long as computing: a loop without overlap would need the sum.

    python benchmarks/overlap.py                    # a few minutes on 2 cores
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import rilq
from rilq.converter.layers import StreamedModel
from rilq.converter.plan import STREAM_TOKENS
from rilq.converter.quantizers import build_quantizer
from rilq.converter.stream import StreamingPass, StreamOptions
from rilq.converter.workdir import open_workdir
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder
from rilq.formats.spec import QuantSpec
from rilq.progress import SilentReporter

SEED = 0
LAYERS, ROWS, SEQLEN, VOCABULARY = 16, 16, 128, 1024


class SlowCheckpoint(Checkpoint):
    """A checkpoint on a slow disk: every read takes `delay` seconds more, in which others work."""

    delay = 0.0

    def read(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """As `Checkpoint.read`, later."""
        time.sleep(self.delay)  # without the interpreter's lock, as a disk would
        return super().read(*args, **kwargs)


def main() -> None:
    """Run the measurements and print one line for each round, then the medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    transformers.utils.logging.disable_progress_bar()
    print(
        f"machine: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, transformers {transformers.__version__}, python "
        f"{platform.python_version()}, rilq {rilq.__version__}, seed {SEED}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder / "llama")
        stream(folder, delay=0.0)  # everything is warm afterwards
        measured = [measure(folder) for _ in range(rounds)]
    print(json.dumps({k: round(statistics.median(m[k] for m in measured), 4) for k in measured[0]}))


def measure(folder: Path) -> dict[str, float]:
    """One round: seconds of each stage alone and of all together, and their ratios."""
    computing = stream(folder, delay=0.0)
    delay = computing / LAYERS
    reading = read(folder, delay)
    both = stream(folder, delay)
    ratio, without = both / max(computing, reading), (computing + reading) / max(computing, reading)
    print(
        f"computing {computing:.2f} s, reading {reading:.2f} s, together {both:.2f} s: "
        f"{ratio:.3f} x the longer one; one after the other {without:.3f} x",
        flush=True,
    )
    return {"overlapped_over_longest": ratio, "in_turn_over_longest": without}


def make_checkpoint(path: Path) -> None:
    """A random bfloat16 Llama."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        vocab_size=VOCABULARY,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQLEN,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)


def open_checkpoint(folder: Path, delay: float) -> SlowCheckpoint:
    """The checkpoint, read slowly."""
    checkpoint = SlowCheckpoint.open(LocalFolder(folder / "llama"))
    assert isinstance(checkpoint, SlowCheckpoint), "open makes what it is called on"
    checkpoint.delay = delay
    return checkpoint


def read(folder: Path, delay: float) -> float:
    """Seconds to read every layer."""
    checkpoint = open_checkpoint(folder, delay)
    streamed = StreamedModel(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    begun = time.perf_counter()
    for names in streamed.reading_steps()[1:]:
        checkpoint.read(names)
    return time.perf_counter() - begun


def stream(folder: Path, delay: float) -> float:
    """Seconds of the decoder layers of a streaming pass that quantizes with GPTQ."""
    checkpoint = open_checkpoint(folder, 0.0)
    streamed = StreamedModel(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    draw = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(VOCABULARY, (ROWS, SEQLEN), generator=draw)
    options = StreamOptions(
        build_quantizer("gptq", clip="none"),
        lambda name: QuantSpec(2, 64),
        batch_rows=STREAM_TOKENS // SEQLEN,
        train_rows=ROWS,
    )
    report = SilentReporter()
    with open_workdir(folder / "work", {}, {}, resume="never", report=report) as work:
        stage = TimedLayers(checkpoint, streamed, tokens, work, options, report)
        stage.delay = delay
        stage.run(targets=False)
    shutil.rmtree(folder / "work")
    return stage.seconds


class TimedLayers(StreamingPass):
    """A pass that takes the time of its decoder layers, and slows the checkpoint down for them."""

    checkpoint: SlowCheckpoint
    delay, seconds = 0.0, 0.0

    def _layers(self, done: int, reader: Any) -> None:
        begun = time.perf_counter()
        super()._layers(done, reader)
        self.seconds = time.perf_counter() - begun

    def _outer(self, advance: Any) -> None:
        super()._outer(advance)
        self.checkpoint.delay = self.delay


if __name__ == "__main__":
    main()
