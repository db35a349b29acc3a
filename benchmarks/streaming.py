#!/usr/bin/env python3
"""Memory, bytes and speed of streaming, each as a ratio to something measured in the same run.

Makes random Llama checkpoints (hidden 1024, intermediate 2816, vocabulary 8192; 8 and 32 layers)
and measures:

  memory    peak of `rilq convert --quantizer gptq --train none` above the interpreter's own
  bytes     read from the checkpoint, against its size
  teacher   the teacher pass (read, run, write) against transformers' own forward pass in memory
  step      a training step of the pooled adapter against one of a plain PEFT LoRA

    python benchmarks/streaming.py                  # all, about a quarter of an hour on 2 cores
    python benchmarks/streaming.py --only step
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import rilq
from rilq.calib.activations import ActivationStore, ActivationWriter
from rilq.converter.adapters import AdapterSpec
from rilq.converter.finish import QuantizedParts
from rilq.converter.layers import StreamedModel
from rilq.converter.loss import Loss, discrepancy
from rilq.converter.machine import large_blocks_returned
from rilq.converter.plan import STREAM_TOKENS
from rilq.converter.student import Student
from rilq.converter.workdir import WorkDir
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.native import RilqConfig
from rilq.formats.source import LocalFolder

SEED = 0
ROWS, SEQLEN = 16, 256
BATCH = STREAM_TOKENS // SEQLEN  # as `convert` does it
STEP_ROWS, STEP_TOKENS, STEPS = 2, 128, 10
CPU = torch.device("cpu")


def main() -> None:
    """Run the measurements and print one line each, then all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("memory", "teacher", "step"))
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(
        f"machine: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, transformers {transformers.__version__}, python "
        f"{platform.python_version()}, rilq {rilq.__version__}, seed {SEED}",
        flush=True,
    )
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        eight, deep = (make_checkpoint(folder, layers) for layers in (8, 32))
        if args.only in (None, "memory"):
            results |= measure_memory(folder, eight, deep)
        if args.only in (None, "teacher"):
            results |= measure_teacher(folder, eight)
        if args.only in (None, "step"):
            results |= measure_step(folder, eight)
    print(json.dumps({name: round(value, 4) for name, value in results.items()}))


def make_checkpoint(folder: Path, layers: int) -> Path:
    """A random bfloat16 Llama in shards of 100 MB, with a small tokenizer, and a text."""
    path = folder / f"llama-{layers}"
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        vocab_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=1024,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path, max_shard_size="100MB")
    write_tokenizer(path)
    write_text(folder / "text.txt", 2 * ROWS * SEQLEN)
    return path


def write_tokenizer(path: Path) -> None:
    """A tokenizer of single bytes."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(path)


def write_text(path: Path, tokens: int) -> None:
    """A text of so many random letters, a token each."""
    draw = torch.Generator().manual_seed(SEED)
    letters = torch.randint(97, 123, (tokens,), generator=draw).tolist()
    path.write_text("".join(map(chr, letters)))


# -- memory and bytes ------------------------------------------------------------------------------


# VmHWM counts from exec on; ru_maxrss would start from the parent's own size.
PEAK = """
import sys
from pathlib import Path
where, sys.argv = Path(sys.argv[1]), ["rilq", *sys.argv[2:]]
try:
    from rilq import cli
    import rilq.converter.pipeline
    sys.argv[1:] and cli.main()
finally:
    status = Path("/proc/self/status").read_text()
    where.write_text(status.partition("VmHWM:")[2].split()[0])
"""


def peak_of(arguments: list[str]) -> tuple[int, str]:
    """Peak resident bytes of `rilq ARGUMENTS` (of its imports if none), and its output."""
    with tempfile.NamedTemporaryFile() as peak:
        command = [sys.executable, "-c", PEAK, peak.name, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return int(Path(peak.name).read_text()) * 1024, done.stdout


def measure_memory(folder: Path, eight: Path, deep: Path) -> dict[str, float]:
    """Peak above an interpreter that has imported everything, for both depths; bytes read."""
    own, _ = peak_of([])
    peaks, read = {}, {}
    for path in (eight, deep):
        begun = time.perf_counter()
        peak, out = peak_of(convert_command(path, folder / f"{path.name}-out", folder / "text.txt"))
        told = json.loads(out)
        peaks[path.name] = peak - own
        size = sum(f.stat().st_size for f in path.glob("*.safetensors"))
        read[path.name] = told["bytes_read"] / size
        bound = told["plan"]["host_bytes"]
        print(
            f"{path.name}: {(peak - own) / 1e6:.0f} MB above the interpreter's {own / 1e6:.0f} MB; "
            f"the plan's bound {bound / 1e6:.0f} MB; read {read[path.name]:.4f} x the checkpoint; "
            f"{time.perf_counter() - begun:.0f} s",
            flush=True,
        )
    layer = sum(p.numel() for p in layer_parameters(eight)) * 4
    batch = BATCH * SEQLEN * 1024 * 4
    hessians = (3 * 1024**2 + 2816**2) * 4
    limit = 3 * layer + batch + hessians + 300e6
    return {
        "memory_32_over_8_layers": peaks["llama-32"] / peaks["llama-8"],
        "memory_over_limit": peaks["llama-32"] / limit,
        "bytes_read_over_size": max(read.values()),
    }


def convert_command(model: Path, out: Path, text: Path) -> list[str]:
    """The arguments of the command whose memory is measured."""
    return [
        *("convert", str(model)),
        *("--quantizer", "gptq", "--clip", "search", "--train", "none", "--dataset", str(text)),
        *("--nsamples", str(ROWS), "--seqlen", str(SEQLEN), "-o", str(out)),
        *("--quiet", "--json", "--no-report", "--keep-work", "--resume", "never"),
    ]


def layer_parameters(path: Path) -> list[torch.nn.Parameter]:
    """Parameters of one decoder layer, on the meta device."""
    config = LlamaConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return list(model.model.layers[0].parameters())


# -- the teacher pass ------------------------------------------------------------------------------


def measure_teacher(folder: Path, path: Path, repeats: int = 3) -> dict[str, float]:
    """Stream the teacher through files, and run the same rows in memory, in turn."""
    tokens = torch.randint(8192, (ROWS, SEQLEN), generator=torch.Generator().manual_seed(SEED))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ratios = []
    for _ in range(repeats):
        streamed = timed(lambda: stream_teacher(folder, path, tokens))
        memory = timed(lambda: run_in_memory(model, tokens))
        ratios.append(streamed / memory)
        print(f"teacher pass: streamed {streamed:.1f} s, in memory {memory:.1f} s", flush=True)
    return {"teacher_over_in_memory": statistics.median(ratios)}


@torch.no_grad()
def run_in_memory(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """transformers' own forward pass up to the final norm, in the same batches."""
    for batch in tokens.split(BATCH):
        model.model(input_ids=batch, use_cache=False)  # type: ignore[operator]


@torch.no_grad()
@large_blocks_returned()  # as the streaming pass does
def stream_teacher(folder: Path, path: Path, tokens: torch.Tensor) -> None:
    """What the streaming pass does for the teacher: read, run, write, layer by layer."""
    checkpoint = Checkpoint.open(LocalFolder(path))
    streamed = StreamedModel(checkpoint, dtype=torch.float32, device=CPU)
    streamed.load_outer(checkpoint.read(streamed.outer_names()))
    streamed.prepare(tokens.shape[1])
    shape = (*tokens.shape, streamed.config.hidden_size)
    store = ActivationStore(folder / "teacher-0.bin", shape, torch.float32)
    with ActivationWriter(store.path, shape, torch.float32, label="the embedding") as writer:
        for batch in tokens.split(BATCH):
            writer.append(streamed.embed(batch))
    for index in range(len(streamed.layers)):
        target = ActivationStore(folder / f"teacher-{index + 1}.bin", shape, torch.float32)
        tensors = checkpoint.read(streamed.layer_names(index))
        with (
            streamed.loaded(index, tensors),
            ActivationWriter(target.path, shape, torch.float32, label=f"layer {index}") as writer,
        ):
            for _, hidden in store.batches(BATCH):
                writer.append(streamed.run(index, hidden))
        store.delete()
        store = target
    store.delete()


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# -- a training step -------------------------------------------------------------------------------


def measure_step(folder: Path, path: Path) -> dict[str, float]:
    """Alternate steps of both, same rows, loss, rank, dtype and activation checkpointing.

    Adapters alone with the paper's loss, as PEFT has them: not the default recipe.
    """
    pooled = pooled_step(folder, path)
    plain = lora_step(path)
    pooled(), plain()  # warm up
    times: dict[str, list[float]] = {"pooled": [], "plain": []}
    for _ in range(STEPS):
        times["pooled"].append(timed(pooled))
        times["plain"].append(timed(plain))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"training step: pooled {medians['pooled']:.2f} s, plain LoRA {medians['plain']:.2f} s")
    return {"pooled_step_over_lora_step": medians["pooled"] / medians["plain"]}


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows and made-up targets."""
    draw = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(8192, (STEP_ROWS, STEP_TOKENS), generator=draw)
    return tokens, torch.randn(STEP_ROWS, STEP_TOKENS, 1024, generator=draw)


def pooled_step(folder: Path, path: Path) -> Callable[[], None]:
    """A step of rilq's student in the dense tier, on the 8-layer model quantized by `convert`."""
    work = folder / "llama-8-out.rilq-work"
    if not work.exists():
        peak_of(convert_command(path, folder / "llama-8-out", folder / "text.txt"))
    parts = QuantizedParts(WorkDir(work, {}, []), layers=8)
    student = Student(
        LlamaConfig.from_pretrained(path),
        RilqConfig(2, 64),
        read_layer=parts.layer,
        outer=parts.outer(),
        train="adapters",
        adapters=AdapterSpec("pooled", 16, 16.0, SEED),
        tier="dense",
        dtype=torch.float32,
        device=CPU,
    )
    return stepper(
        list(student.trained.values()),
        lambda tokens, target: discrepancy(student, tokens, target, Loss()),
    )


def lora_step(path: Path) -> Callable[[], None]:
    """A step of transformers' model with PEFT's LoRA on every linear of every decoder layer."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=names)).train()
    final: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: final.append(args[0]))

    def loss(tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        final.clear()
        logits = lora(input_ids=tokens, use_cache=False).logits.float()
        next_token = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return 0.5 * F.mse_loss(final[0].float(), target) + 0.5 * next_token

    return stepper([p for p in lora.parameters() if p.requires_grad], loss)


def stepper(
    parameters: list[torch.nn.Parameter],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[], None]:
    """One update with the paper's loss, as `loss` has it for tokens and targets, and Adam."""
    tokens, target = example()
    optimizer = torch.optim.Adam(parameters, lr=1e-4, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        loss(tokens, target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
