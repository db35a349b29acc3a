"""What a plan counts of the memory of training, against what torch keeps."""

from pathlib import Path

import pytest
import torch
from student_examples import make_student, write_layers
from torch import Tensor

from rilq.converter.layers import StreamedModel
from rilq.converter.options import ConvertOptions, Train
from rilq.converter.plan.linears import planned_linears
from rilq.converter.plan.memory import PAGE, process_bytes
from rilq.converter.plan.sizes import Sizes
from rilq.converter.student import Student
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder

SEQLEN = 32


def kept_by(student: Student, rows: int) -> int:
    """Bytes of the blocks that a forward pass keeps for its backward pass, parameters apart."""
    own = {t.untyped_storage().data_ptr() for t in [*student.parameters(), *student.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.arange(rows * SEQLEN).view(rows, SEQLEN)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student.states(tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("train", "adapter"), [("adapters", "pooled"), ("adapters", "lora"), ("all", "pooled")]
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo2", "phi3"])
def test_activations_are_those_that_a_layer_keeps(
    model_type: str, train: Train, adapter: str, dtype: str, make_model, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", model_type, intermediate_size=224)
    write_layers(model, tmp_path, 2)
    computed = getattr(torch, dtype)
    student = make_student(
        model, tmp_path, "dense", train, kind=adapter, dtype=computed, recompute=False
    )
    row = kept_by(student, 5) - kept_by(student, 4)  # without what does not depend on rows
    checkpoint = Checkpoint.open(LocalFolder(model))
    streamed = StreamedModel(checkpoint, dtype=computed, device=torch.device("meta"))
    options = ConvertOptions(str(model), group_size=32, train=train, adapter=adapter)  # type: ignore[arg-type]
    linears = tuple(planned_linears(streamed, options))
    sizes = Sizes.of(streamed, linears, (), options, 8, SEQLEN)
    inputs = sizes.trains_scales or not sizes.pooled
    planned = sizes.layers * sizes.kept_bytes(SEQLEN, computed.itemsize, inputs=inputs)
    assert 0.85 * row < planned < 1.3 * row


def test_a_process_takes_no_less_than_drawing_its_page() -> None:
    assert process_bytes(0, 0) == PAGE
    assert process_bytes(1 << 30, 1) > process_bytes(1 << 30, 0) > (1 << 30)
