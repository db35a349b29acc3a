"""`--student offload`: a job goes on in that tier, and its memory does not grow with layers."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from rilq.converter import pipeline, training_stage, workdir
from rilq.converter.options import ConvertOptions
from rilq.converter.plan import Plan
from rilq.formats.native import native_tensors
from rilq.formats.spec import QuantizedLinear, QuantSpec
from rilq.progress import SilentReporter


def convert(options: ConvertOptions) -> None:
    pipeline.convert(pipeline.prepare(options, SilentReporter()), SilentReporter())


def test_a_stopped_job_goes_on_in_the_tier_that_was_chosen_for_it(
    tmp_path: Path, in_child: Any, quick: Any
) -> None:
    options = quick(tmp_path)
    make_plan, student = pipeline.make_plan, training_stage.Student

    def begin() -> None:
        def small_machine(*given: Any, **more: Any) -> Plan:
            plan = make_plan(*given, **more)
            assert plan.choices.student == "dense"
            return replace(plan, choices=replace(plan.choices, student="offload", recompute=True))

        def reached(point: str) -> None:
            if point == "train:committed":
                os.kill(os.getpid(), signal.SIGKILL)

        pipeline.make_plan, workdir.reached = small_machine, reached  # type: ignore[assignment]
        convert(options)

    def go_on() -> None:
        def watched(*given: Any, tier: str, **more: Any) -> Any:
            print("tier", tier)
            return student(*given, tier=tier, **more)  # type: ignore[arg-type]

        training_stage.Student = watched  # type: ignore[assignment,misc]
        convert(options)

    assert in_child(begin).code == -signal.SIGKILL
    ended = in_child(go_on)
    assert ended.code == 0, ended.err
    assert ended.out.split("\n")[:-1] == ["tier offload"] * 2  # in training, and merged


# -- memory ----------------------------------------------------------------------------------------

WIDTH, ROWS = 1024, 32  # a layer of 8 bits has 20 MB

# Prints the growth of private memory over a training step, at its highest.
STEP = """
import sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
from student_examples import read_layers
from transformers import AutoConfig
from safetensors.torch import load_file
from rilq.converter import student as module
from rilq.converter.adapters import AdapterSpec
from rilq.converter.machine import large_blocks_returned
from rilq.converter.offload import in_host_memory
from rilq.formats.native import RilqConfig
torch.set_num_threads(1)
folder, how = Path(sys.argv[1]), sys.argv[2]

def private():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])

if how == "kept":
    module.elsewhere = in_host_memory
before, highest, done = private(), 0, threading.Event()

def watch():
    global highest
    while not done.is_set():
        highest = max(highest, private())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
with large_blocks_returned():  # as the training does
    student = module.Student(
        AutoConfig.from_pretrained(folder), RilqConfig(8, 64), read_layer=read_layers(folder),
        outer=load_file(folder / "outer.safetensors"), train="adapters",
        adapters=AdapterSpec("pooled", 1, 1.0, seed=0), tier="offload", dtype=torch.float32,
        device=torch.device("cpu"),
    )
    student.states(torch.zeros(1, 8, dtype=torch.int64))[1].sum().backward()
done.set()
print(highest - before)
"""


def write_wide_model(folder: Path, layers: int) -> Path:
    """A Llama of width 1024 in 8 bits, of few tokens; codes and scales of no meaning."""
    config: PretrainedConfig = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=WIDTH, intermediate_size=4 * WIDTH,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    config.save_pretrained(folder)
    shapes = {f"self_attn.{n}_proj": (WIDTH, WIDTH) for n in "qkvo"}
    shapes |= {f"mlp.{n}_proj": (4 * WIDTH, WIDTH) for n in ("gate", "up")}
    shapes["mlp.down_proj"] = (WIDTH, 4 * WIDTH)
    norms = ("input_layernorm", "post_attention_layernorm")
    for index in range(layers):
        tensors = {f"{n}.weight": torch.ones(WIDTH) for n in norms}
        for name, (rows, columns) in shapes.items():
            codes = torch.zeros(rows, columns, dtype=torch.uint8)
            grid = torch.ones(2, rows, columns // 64).half()
            tensors |= native_tensors(name, QuantizedLinear(codes, *grid, QuantSpec(8, 64)))
        named = {f"model.layers.{index}.{n}": t.contiguous() for n, t in tensors.items()}
        save_file(named, folder / f"layer-{index}.safetensors")
    outer = {"model.embed_tokens.weight": torch.ones(64, WIDTH), "model.norm.weight": norms_of(1)}
    save_file({**outer, "lm_head.weight": torch.ones(64, WIDTH)}, folder / "outer.safetensors")
    return folder


def norms_of(value: float) -> torch.Tensor:
    return torch.full((WIDTH,), value)


@pytest.fixture(scope="module")
def growth(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], float]:
    """`growth(layers, how)`: private memory of a training step, in MB."""

    def measure(layers: int, how: str) -> float:
        folder = write_wide_model(tmp_path_factory.mktemp("wide"), layers)
        examples = Path(__file__).parents[1] / "unit" / "converter"
        command = [sys.executable, "-c", STEP, str(folder), how, str(examples)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for path in folder.glob("layer-*"):
            path.unlink()
        return int(done.stdout) / 1024

    return measure


@pytest.mark.slow
def test_private_memory_does_not_grow_with_layers(growth: Callable[[int, str], float]) -> None:
    layer = 16.5 * WIDTH**2 / 1e6  # MB of codes
    few, many = growth(4, "mapped"), growth(16, "mapped")
    assert many - few < 2 * layer, f"{few:.0f} MB with 4 layers, {many:.0f} MB with 16"
    # What would grow does: the same layers kept in private memory.
    assert growth(16, "kept") - many > 8 * layer
