"""What the streaming pass needs to know, and what it shows of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rilq.calib.activations import ActivationStore
from rilq.converter.initial import InitialAdapters
from rilq.converter.layer_method import LayerMethod
from rilq.converter.options import Target
from rilq.converter.quantizers import LayerQuantizer, Quantizer
from rilq.formats.spec import QuantSpec


@dataclass(frozen=True)
class StreamOptions:
    """What the streaming pass needs to know.

    Attributes:
        quantizer: of every quantized linear; or another method, which knows by itself which
            linears it quantizes and how.
        spec_for: full module name to spec; None leaves a linear as it is.
        batch_rows: calibration rows that run at once.
        train_rows: the first so many rows may be trained on, by quantizers that train.
        batch_size, micro_batch: rows of an update, and of one forward pass of it.
        seed: of the order of rows.
        target: what is cached for training: after the final norm, or before it.
        outer: embedding and head by module name, where they are quantized.
        initial: what adapters start from, to be found with the codes; None for what needs no data.
            The student's states are then those of the layers with their adapters.
        trains_experts: experts are among what a quantizer that trains a layer trains.
        more_bits: each linear is also quantized to these, and what that gains is measured.
        after_layer: told of every layer while it is still loaded; what it returns is kept with
            the layer's facts.
    """

    quantizer: Quantizer | LayerQuantizer | LayerMethod
    spec_for: Callable[[str], QuantSpec | None]
    batch_rows: int
    train_rows: int
    batch_size: int = 8
    micro_batch: int = 8
    seed: int = 42
    target: Target = "post-norm"
    outer: Mapping[str, QuantSpec] = field(default_factory=dict)
    initial: InitialAdapters | None = None
    trains_experts: bool = True
    more_bits: tuple[int, ...] = ()
    after_layer: Callable[[StreamedLayer], Mapping[str, Any] | None] | None = None


@dataclass(frozen=True)
class StreamedLayer:
    """A decoder layer that is quantized, still loaded.

    Attributes:
        tensors, saved: as read from the checkpoint, and as they are stored, by full name.
        inputs: what the student's layer was run on.
        wanted: the teacher's output.
    """

    index: int
    tensors: Mapping[str, Tensor]
    saved: dict[str, Tensor]
    inputs: ActivationStore
    wanted: ActivationStore
