"""LLaMA-2-70B's own shapes on a GPU: each stage of a layer timed, memory, and 80 layers from it.

As many random layers as the disk holds go through the streaming pass with GPTQ and through steps of
training in each tier. Depths n and n/2 give what a layer takes, and what does not depend on layers:

    step(80) = step(n) + (80 - n) * (step(n) - step(n/2)) / (n - n/2), and so for memory
    pass(80) = 80 * max(read, write, rows * (teacher + student + hessians) + quantize)
    total    = pass(80) + updates * step(80)

`dry` runs the same code with tiny shapes on a CPU: its figures say nothing about a GPU.
"""

from __future__ import annotations

import copy
import gc
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from scale_checkpoint import HIDDEN, LAYERS, SEED, VOCABULARY, llama_config, write_checkpoint
from torch import Tensor

from rilq.converter.adapters import AdapterSpec
from rilq.converter.finish import QuantizedParts
from rilq.converter.job import Job
from rilq.converter.loss import Loss, discrepancy
from rilq.converter.options import ConvertOptions, Tier, Train
from rilq.converter.pipeline import prepare
from rilq.converter.quantizers import build_quantizer
from rilq.converter.stream import StreamingPass
from rilq.converter.stream_options import StreamOptions
from rilq.converter.student import Student
from rilq.converter.workdir import WorkDir, open_workdir
from rilq.formats.native import RilqConfig
from rilq.formats.packing import dequantize_packed, pack
from rilq.formats.shard_writer import write_tensors
from rilq.formats.spec import QuantSpec
from rilq.progress import SilentReporter

SPEC = QuantSpec(2, 64)
RANK = 16
STEPS = 3  # timed, after one to warm up
UPDATES, UPDATE_ROWS, ROWS = 400, 2, 256  # of the conversion that is extrapolated to
LIMIT = "24GB"
MOST_LAYERS = 8  # the more, the surer; each takes 1.7 GB of disk, and half a minute to make


@dataclass(frozen=True)
class Scale:
    """What is measured: LLaMA-2-70B, or its shape in small."""

    hidden: int
    vocabulary: int
    rows: int
    seqlen: int
    micro_batches: tuple[int, ...]
    layers: int
    limits: tuple[str | None, ...]
    device: str
    product: int  # tokens of the matrix product that is the measure


def _real(folder: Path) -> Scale:
    layer = 2 * HIDDEN * HIDDEN * 51 // 4  # 12.75 squares of the hidden size, in bfloat16
    outer = 2 * 2 * VOCABULARY * HIDDEN
    room = shutil.disk_usage(folder).free - 2 * outer - 8 * (1 << 30)  # states and the like
    layers = min(MOST_LAYERS, int(room / (1.5 * layer)))  # and the quantized layer
    assert layers >= 2, "the disk does not hold two layers: --folder on a larger one"
    return Scale(HIDDEN, VOCABULARY, 32, 512, (1, 2, 8), layers, (LIMIT, None), "cuda", 4096)


def _dry() -> Scale:
    return Scale(256, 1024, 4, 32, (1, 2), 2, (None,), "cpu", 64)


def measure(folder: Path, *, dry: bool) -> dict[str, Any]:
    """Everything, as JSON values; prints as it goes.

    Args:
        folder: where the checkpoint and all files are written.
        dry: tiny shapes on a CPU.
    """
    scale = _dry() if dry else _real(folder)
    print(
        f"{scale.layers} layers of hidden size {scale.hidden} of {LAYERS}, {scale.rows} rows of "
        f"{scale.seqlen} tokens, on {scale.device}" + ("; dry: not a measurement" if dry else "")
    )
    model = folder / "model"
    config = llama_config(
        scale.hidden, scale.layers, positions=scale.seqlen, vocabulary=scale.vocabulary
    )
    write_checkpoint(model, config, 64, scale.device)
    results: dict[str, Any] = {
        "dry": dry,
        "layers": scale.layers,
        "rows": scale.rows,
        "seqlen": scale.seqlen,
        "rates": _rates(scale),
        "passes": [],
        "steps": [],
    }
    _say("rates", results["rates"])
    for limit in scale.limits:
        with open_workdir(
            folder / f"work-{limit}", {}, {}, resume="never", report=SilentReporter()
        ) as work:
            job = prepare(_options(model, scale, limit), SilentReporter())
            results["passes"].append(_stream(scale, job, work, limit))
            _say("pass", results["passes"][-1])
            for step in _steps(scale, job, work, limit):
                results["steps"].append(step)
                _say("step", step)
    results["extrapolated"] = _extrapolated(results)
    _say(f"{LAYERS} layers", results["extrapolated"])
    return results


def _options(model: Path, scale: Scale, limit: str | None) -> ConvertOptions:
    return ConvertOptions(
        model=str(model),
        quantizer="gptq",
        clip="none",
        seqlen=scale.seqlen,
        nsamples=scale.rows,
        rank=RANK,
        train="adapters",
        device=scale.device,
        device_memory=limit,
        student="offload" if limit else "auto",
        output_dir=model.with_name("out"),
    )


def _say(what: str, figures: dict[str, Any]) -> None:
    shown = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )
    print(f"{what}: {', '.join(shown)}", flush=True)


# -- what the machine can do -----------------------------------------------------------------------


def _rates(scale: Scale) -> dict[str, float]:
    """A matrix product in the compute dtype, a copy, and the kernel that dequantizes."""
    device = torch.device(scale.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    wide = scale.hidden * 7 // 2
    x = torch.randn(scale.product, scale.hidden, device=device).to(dtype)
    w = torch.randn(wide, scale.hidden, device=device).to(dtype)
    copy_of = torch.empty_like(w)
    draw = torch.Generator().manual_seed(SEED)
    codes = torch.randint(4, (wide, scale.hidden), generator=draw, dtype=torch.uint8)
    words = pack(codes, SPEC.bits).to(device)
    groups = (wide, scale.hidden // SPEC.group_size)
    grid = torch.rand(groups, device=device).half()
    moved = words.nbytes + 2 * grid.nbytes + w.nbytes
    product = _seconds(lambda: x @ w.T, device)
    copied = _seconds(lambda: copy_of.copy_(w), device)
    kernel = _seconds(lambda: dequantize_packed(words, grid, grid, SPEC.bits, dtype=dtype), device)
    return {
        "product_tflops": 2 * x.numel() * wide / product / 1e12,
        "copy_gbs": 2 * w.nbytes / copied / 1e9,
        "dequantize_gbs": moved / kernel / 1e9,
        "dequantize_over_copy": moved / kernel / (2 * w.nbytes / copied),
    }


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median of single calls."""
    work()
    times = []
    for _ in range(repeats):
        begun = _now(device)
        work()
        times.append(_now(device) - begun)
    return statistics.median(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _peaks(device: torch.device, into: dict[str, Any]) -> Iterator[None]:
    """Peaks of the device's memory, and of the host's (VmHWM, mapped files in it), in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield
    status = Path("/proc/self/status").read_text()
    into["host_bytes"] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    if device.type == "cuda":
        into["device_bytes"] = torch.cuda.max_memory_reserved(device)


# -- the streaming pass ----------------------------------------------------------------------------


class TimedPass(StreamingPass):
    """A pass that adds up the seconds of each stage, over all layers."""

    def timed(self, stage: str, work: Callable[[], Any]) -> Any:
        """Call `work`, and count its seconds."""
        begun = _now(self.streamed.device)
        found = work()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + _now(self.streamed.device) - begun
        return found

    @property
    def seconds(self) -> dict[str, float]:
        """By stage."""
        return self.__dict__.setdefault("_seconds", {})  # type: ignore[no-any-return]

    def _propagate(self, *args: Any) -> Any:
        return self.timed("teacher", lambda: super(TimedPass, self)._propagate(*args))

    def _propagate_compared(self, *args: Any) -> Any:
        return self.timed("student", lambda: super(TimedPass, self)._propagate_compared(*args))

    def _quantizing(self, *args: Any) -> Any:
        layer: Any = super()._quantizing(*args)
        hessian, quantize = layer._hessian, layer.quantize
        layer._hessian = lambda linear: self.timed("hessians", lambda: hessian(linear))
        layer.quantize = lambda: self.timed("quantize", quantize)
        return layer


def _stream(scale: Scale, job: Job, work: WorkDir, limit: str | None) -> dict[str, Any]:
    """The pass over all layers; seconds of each stage for one layer and all rows."""
    streamed, layers = job.streamed, scale.layers
    draw = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(scale.vocabulary, (scale.rows, scale.seqlen), generator=draw)
    options = StreamOptions(
        build_quantizer("gptq", clip="none"),
        lambda name: SPEC,
        batch_rows=job.plan.choices.batch_rows,
        train_rows=scale.rows,
    )
    stage = TimedPass(job.checkpoint, streamed, tokens, work, options, SilentReporter())
    result: dict[str, Any] = {"device_memory": limit, "batch_rows": options.batch_rows}
    with _peaks(streamed.device, result):
        begun = _now(streamed.device)
        stage.run(targets=True)
        result["seconds_with_outer"] = _now(streamed.device) - begun
    stage.seconds["quantize"] -= stage.seconds["hessians"]  # which it asks for
    result |= {f"{name}_s": value / layers for name, value in stage.seconds.items()}
    last = streamed.layer_names(layers - 1)
    streamed.unload()
    result["read_s"] = _read_seconds(job, last, streamed.device)
    saved = load_file(work.file(f"layer-{layers - 1:04d}.safetensors"))
    begun = time.perf_counter()
    write_tensors(work.file("again.safetensors"), saved)
    result["write_s"] = time.perf_counter() - begun
    values = job.checkpoint.nbytes(last) // 2
    attention = 2 * scale.seqlen * scale.hidden  # causal: half of both products, per token
    flops = (2 * values + attention) * scale.rows * scale.seqlen
    result["teacher_tflops"] = flops / result["teacher_s"] / 1e12
    result["planned_device_bytes"] = job.plan.device_bytes
    result["planned_host_bytes"] = job.plan.host_bytes
    return result


def _read_seconds(job: Job, names: list[str], device: torch.device) -> float:
    """To read one layer, hash and check it, and copy it to the device; from the page cache."""
    begun = _now(device)
    for tensor in job.checkpoint.read(names).values():
        tensor.to(device)
    return _now(device) - begun


# -- training --------------------------------------------------------------------------------------


def _steps(scale: Scale, job: Job, work: WorkDir, limit: str | None) -> Iterator[dict[str, Any]]:
    """Steps of all tiers and micro-batches, or of offload alone where memory is limited."""
    tiers: tuple[Tier, ...] = ("offload",) if limit else ("dense", "packed", "offload")
    cases: list[tuple[Tier, Train, int]] = [
        (tier, "adapters", micro) for tier in tiers for micro in scale.micro_batches
    ]
    cases += [(tier, "adapters+scales", 1) for tier in tiers if tier != "dense"]
    for tier, train, micro in cases:
        result = {"device_memory": limit, "tier": tier, "train": train, "micro_batch": micro}
        try:
            yield result | _step(scale, job, work, tier, train, micro)
        except torch.OutOfMemoryError as err:
            yield result | {"failed": str(err).splitlines()[0]}


def _step(
    scale: Scale, job: Job, work: WorkDir, tier: Tier, train: Train, micro: int
) -> dict[str, Any]:
    """Seconds and memory of an update at two depths, and at 80 layers from them."""
    found = {}
    for depth in (scale.layers, scale.layers // 2):
        found[depth] = _step_at(scale, job, work, tier, train, micro, depth)
    deep, half = found[scale.layers], found[scale.layers // 2]
    result: dict[str, Any] = {"seconds": deep["seconds"]}
    for name, value in deep.items():
        each = (value - half[name]) / (scale.layers - scale.layers // 2)
        result[f"{name}_per_layer"] = each
        result[f"{name}_{LAYERS}"] = value + (LAYERS - scale.layers) * each
    values = job.checkpoint.nbytes(job.streamed.layer_names(0)) // 2
    # Forward, forward again in the backward pass, gradients of inputs; the weights are frozen.
    flops = 3 * 2 * values * micro * scale.seqlen
    result["tflops_per_layer"] = flops / max(1e-9, result["seconds_per_layer"]) / 1e12
    return result


def _step_at(
    scale: Scale, job: Job, work: WorkDir, tier: Tier, train: Train, micro: int, depth: int
) -> dict[str, float]:
    config = copy.deepcopy(job.streamed.config)
    config.num_hidden_layers = depth
    parts, device = QuantizedParts(work, layers=depth), job.streamed.device
    draw = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(scale.vocabulary, (micro, scale.seqlen), generator=draw).to(device)
    target = torch.randn(micro, scale.seqlen, scale.hidden, generator=draw).to(device)
    result: dict[str, float] = {}
    with _peaks(device, result):
        student = Student(
            config,
            RilqConfig(SPEC.bits, SPEC.group_size),
            read_layer=parts.layer,
            outer=parts.outer(),
            train=train,
            adapters=AdapterSpec("pooled", RANK, float(RANK), SEED),
            tier=tier,
            dtype=job.streamed.dtype,
            device=device,
        )
        update = _update(student, tokens, target)
        update()
        times = []
        for _ in range(STEPS):
            begun = _now(device)
            update()
            times.append(_now(device) - begun)
        result["seconds"] = statistics.median(times)
        del student, update
    return result


def _update(student: Student, tokens: Tensor, target: Tensor) -> Callable[[], None]:
    """Loss, gradients, and an update by Adam."""
    of_host = [p for p in student.trained.values() if p.device != student.device]
    others = [p for p in student.trained.values() if p.device == student.device]
    optimizers = [torch.optim.Adam(others, lr=1e-4, foreach=True)]
    if of_host:
        optimizers.append(torch.optim.Adam(of_host, lr=1e-4, fused=True))

    def update() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = discrepancy(student, tokens, target, Loss(mse=0.0, ce=0.0, kl=1.0))
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()

    return update


# -- all layers ------------------------------------------------------------------------------------


def _extrapolated(results: dict[str, Any]) -> dict[str, Any]:
    """The formulas of this module's docstring, for 256 rows and 400 updates of 2 rows."""
    one = results["passes"][-1]
    share = ROWS / results["rows"]
    computing = share * (one["teacher_s"] + one["student_s"] + one["hessians_s"])
    computing += one["quantize_s"]
    whole_pass = LAYERS * max(one["read_s"], one["write_s"], computing)
    found: dict[str, Any] = {"pass_s": whole_pass}
    for step in results["steps"]:
        if step["micro_batch"] == UPDATE_ROWS and step["device_memory"] is None:
            if (seconds := step.get(f"seconds_{LAYERS}")) is not None:
                found[f"{step['tier']}_minutes"] = (whole_pass + UPDATES * seconds) / 60
    return found
