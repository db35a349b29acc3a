#!/usr/bin/env python3
"""How far reading, computing and writing of the streaming pass overlap, on a slow disk.

Streams a random Llama (hidden 256, intermediate 704, 24 layers, bfloat16) through `StreamingPass`
with GPTQ. Each round measures

  computing   the pass with the checkpoint in the page cache and its work folder in memory
  reading     all layers, one after the other
  writing     as many hidden states and tensors as the pass writes, one file after the other
  together    the pass, slowly read and on the disk

In "reading" and "together" each read of a layer sleeps as long as "computing" took for a layer, so
that reading takes as long as computing: a loop without overlap would need the sum of all three.
The last ratio counts the computing of "together" itself, its time less that spent waiting for the
reader: on a machine with other work, times of two runs are hardly comparable.

    python benchmarks/overlap.py                    # minutes on 2 cores
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import rilq
from rilq.calib.activations import ActivationWriter
from rilq.converter.layers import StreamedModel
from rilq.converter.plan import STREAM_TOKENS
from rilq.converter.quantizers import build_quantizer
from rilq.converter.stream import StreamingPass
from rilq.converter.stream_options import StreamOptions
from rilq.converter.workdir import open_workdir
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.shard_writer import write_tensors
from rilq.formats.source import LocalFolder
from rilq.formats.spec import QuantSpec
from rilq.progress import SilentReporter

SEED = 0
LAYERS, ROWS, SEQLEN, VOCABULARY = 24, 16, 128, 1024
HIDDEN, INTERMEDIATE = 256, 704
MEMORY = Path("/dev/shm")  # a folder without a disk, where there is one


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
        stream(folder, folder, delay=0.0)  # everything is warm afterwards
        measured = [measure(folder) for _ in range(rounds)]
    print(json.dumps({k: round(statistics.median(m[k] for m in measured), 4) for k in measured[0]}))


def measure(folder: Path) -> dict[str, float]:
    """One round: seconds of each stage alone and of all together, as ratios to the longest."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as memory:
        computing = stream(folder, Path(memory), delay=0.0).seconds
    delay = computing / LAYERS
    alone = {"computing": computing, "reading": read(folder, delay), "writing": write(folder)}
    slow, longest = stream(folder, folder, delay), max(alone.values())
    print(
        ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in alone.items())
        + f", together {slow.seconds:.2f} s, {slow.waited:.2f} s of them waiting for the "
        f"reader: {slow.seconds / longest:.3f} x the longest; one after the other "
        f"{sum(alone.values()) / longest:.3f} x",
        flush=True,
    )
    busiest = max(alone["reading"], slow.seconds - slow.waited)
    return {
        "together_over_longest": slow.seconds / longest,
        "in_turn_over_longest": sum(alone.values()) / longest,
        "together_over_longest_of_the_same_run": slow.seconds / busiest,
    }


def make_checkpoint(path: Path) -> None:
    """A random bfloat16 Llama."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
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


def write(folder: Path) -> float:
    """Seconds to write what the pass writes of every layer."""
    states = torch.randn(ROWS, SEQLEN, HIDDEN)
    weights = HIDDEN * (3 * HIDDEN + 3 * INTERMEDIATE)
    quantized = {"weight": torch.zeros(weights * 5 // 16, dtype=torch.uint8)}  # 2.5 bits each
    begun = time.perf_counter()
    for _ in range(LAYERS):
        for who in ("teacher", "student"):
            path, shape = folder / f"{who}.bin", (ROWS, SEQLEN, HIDDEN)
            with ActivationWriter(path, shape, torch.float32) as writer:
                for batch in states.split(STREAM_TOKENS // SEQLEN):
                    writer.append(batch)
        write_tensors(folder / "layer.safetensors", quantized)
    return time.perf_counter() - begun


def stream(folder: Path, work_folder: Path, delay: float) -> "TimedLayers":
    """A streaming pass that quantizes with GPTQ, when it is done."""
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
    with open_workdir(work_folder / "work", {}, {}, resume="never", report=report) as work:
        stage = TimedLayers(checkpoint, streamed, tokens, work, options, report)
        stage.delay = delay
        stage.run(targets=False)
    shutil.rmtree(work_folder / "work")
    return stage


class TimedLayers(StreamingPass):
    """A pass that slows the checkpoint down for its decoder layers, and takes their time.

    Attributes:
        seconds: of the decoder layers, `waited` among them.
        waited: seconds for the reader.
    """

    checkpoint: SlowCheckpoint
    delay, seconds, waited = 0.0, 0.0, 0.0

    def _layers(self, done: int, reader: Any) -> None:
        reader.take = self._timed(reader.take)
        begun = time.perf_counter()
        super()._layers(done, reader)
        self.seconds = time.perf_counter() - begun

    def _timed(self, take: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> Any:
            begun = time.perf_counter()
            tensors = take()
            self.waited += time.perf_counter() - begun
            return tensors

        return timed

    def _outer(self, advance: Any) -> None:
        super()._outer(advance)
        self.checkpoint.delay = self.delay


if __name__ == "__main__":
    main()
