"""A finished folder loaded as its users will load it: with transformers, to write a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rilq.errors import CheckpointError, RilqError, one_line

PROMPT = "The"
NEW_TOKENS = 8


def check_generates(folder: Path) -> None:
    """Load a checkpoint with transformers and generate from it, greedily.

    Raises:
        CheckpointError: it does not load, computes NaN or infinity, or generates nothing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import rilq  # noqa: F401  (teaches transformers the format)

    logging.disable_progress_bar()
    try:
        # Told not to, transformers asks on the terminal whether to run a checkpoint's code.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, device_map="auto"
        )
        prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
        with torch.no_grad():
            finite = bool(model(**prompt).logits.isfinite().all())
            tokens = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    except RilqError:
        raise
    except Exception as err:  # whatever transformers meets
        raise CheckpointError(
            f"{folder}: does not load with transformers: {one_line(err)}\n"
            "  run `rilq verify`, or convert the model again"
        ) from err
    if not finite or tokens.shape[1] <= prompt["input_ids"].shape[1]:
        what = "generates nothing" if finite else "computes NaN or infinity"
        raise CheckpointError(f"{folder}: {what}\n  convert the model again, with --dtype float32")
