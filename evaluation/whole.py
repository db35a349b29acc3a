"""A checkpoint loaded whole by transformers, as its users load it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from rilq.errors import CheckpointError, InputError, one_line
from rilq.formats.checkpoint import SOURCE_DTYPES, Checkpoint
from rilq.formats.fp8 import METHOD, open_source_checkpoint
from rilq.formats.hub import open_source
from rilq.formats.lora import ADAPTER_FOLDER
from rilq.progress import gigabytes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Above the weights: activations, the cache of keys and values, and one dequantized linear.
HEADROOM = 1.1


def load(
    model: str | Path, *, revision: str | None = None, device: str = "auto", **options: Any
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a checkpoint, converted or not, with transformers; for generation and fine-tuning.

    A LoRA that lies beside a converted checkpoint is attached by PEFT. Of a source in block-wise
    FP8 the dequantized weights are loaded, those that a conversion sees.

    Args:
        model: a folder, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub.
        device: "auto", "cpu", "cuda", "cuda:1"; "auto" spreads over what there is.
        options: further ones of `AutoModelForCausalLM.from_pretrained`, such as `dtype`.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        quantization = getattr(config, "quantization_config", None)
        if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
            loaded: PreTrainedModel | PeftModel = _load_dequantized(
                model, config, revision=revision, device_map=device, **options
            )
        else:
            loaded = AutoModelForCausalLM.from_pretrained(
                model, revision=revision, device_map=device, trust_remote_code=False, **options
            )
    except (OSError, ValueError) as err:
        raise CheckpointError(
            f"{model}: transformers cannot load it: {one_line(err)}\n"
            "  give the folder of a checkpoint, or owner/name on the Hub"
        ) from err
    adapter = Path(model) / ADAPTER_FOLDER
    if adapter.is_dir():
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded.eval(), tokenizer


def _load_dequantized(
    model: str | Path, config: PretrainedConfig, *, revision: str | None, **options: Any
) -> PreTrainedModel:
    """Of a source in FP8: transformers' own dequantization refuses blocks that the edges cut."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # typed as pairs
    if kind is None:
        raise ValueError(f"{config.model_type} is not a causal language model")
    del config.quantization_config
    checkpoint = open_source_checkpoint(open_source(str(model), revision=revision))
    loaded: PreTrainedModel = kind.from_pretrained(
        None,
        config=config,
        state_dict={name: _Tensor(checkpoint, name) for name in checkpoint.tensors},
        trust_remote_code=False,
        **options,
    )
    with suppress(OSError):  # a checkpoint may have none
        loaded.generation_config = GenerationConfig.from_pretrained(
            model, revision=revision or "main"
        )
    return loaded


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a checkpoint that transformers reads, by a slice, when it comes to it."""

    checkpoint: Checkpoint
    name: str

    def __getitem__(self, _all: object) -> Tensor:
        return self.checkpoint.read([self.name])[self.name]


@dataclass(frozen=True)
class Place:
    """A checkpoint that can be loaded, and where and how.

    Attributes:
        model: a folder, or `owner/name` on the Hub.
        revision: of that name.
        device: as of `load`.
        dtype: of the weights; "auto" as they are stored.
    """

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    @contextmanager
    def loaded(self) -> Iterator[tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]]:
        """Model and tokenizer; the memory is free again afterwards, if nobody keeps the model.

        Raises:
            CheckpointError: transformers cannot load it.
        """
        with bars_hidden():
            found = load(self.model, revision=self.revision, device=self.device, dtype=self.dtype)
        try:
            yield found
        finally:
            del found
            gc.collect()  # modules and their hooks refer to each other
            torch.cuda.empty_cache()

    def check_room(self, wanted_for: str) -> Checkpoint:
        """That its weights fit into the memory that is free now; only headers are read.

        Args:
            wanted_for: what cannot be done otherwise, for the message.

        Returns:
            The checkpoint, opened.

        Raises:
            InputError: they do not, or it cannot be opened.
        """
        source = open_source(self.model, revision=self.revision)
        # int32: the packed codes of a converted checkpoint.
        checkpoint = open_source_checkpoint(source, dtypes=SOURCE_DTYPES | {torch.int32})
        needed, free = int(self._bytes(checkpoint) * HEADROOM), free_memory(self.device)
        if needed > free:
            raise InputError(
                f"{wanted_for}: {self.model} has to be in memory as a whole, which takes about "
                f"{gigabytes(needed)}; {gigabytes(free)} are free\n"
                f"  leave {wanted_for} out, or use a machine with more memory; perplexity and the "
                "comparison with a base stream the layers and do not need it"
            )
        return checkpoint

    def _bytes(self, checkpoint: Checkpoint) -> int:
        if self.dtype == "auto":
            return checkpoint.total_bytes
        size = getattr(torch, self.dtype).itemsize
        return sum(
            each.nbytes * size // each.dtype.itemsize
            if each.dtype.is_floating_point
            else each.nbytes
            for each in checkpoint.tensors.values()
        )


def free_memory(device: str) -> int:
    """Bytes in which `load` can put a model: of the GPU, of all and the host for "auto"."""
    host = int(psutil.virtual_memory().available)
    if device == "cpu" or not torch.cuda.is_available():
        return host
    if device == "auto":
        gpus = range(torch.cuda.device_count())
        return host + sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    return torch.cuda.mem_get_info(torch.device(device))[0]


@contextmanager
def bars_hidden() -> Iterator[None]:
    """Without the progress bars that datasets and transformers draw over the caller's own."""
    import datasets
    from transformers.utils import logging

    shown = datasets.is_progress_bar_enabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown[0]:
            datasets.enable_progress_bars()
        if shown[1]:
            logging.enable_progress_bar()
