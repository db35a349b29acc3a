"""A checkpoint's own tokenizer."""

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rilq.errors import CheckpointError, one_line
from rilq.formats.checkpoint import Checkpoint

_ANY_OF = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside the weights; no remote code is run, nothing is asked.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    names = checkpoint.side_files()
    if not any(name in names for name in _ANY_OF):
        raise CheckpointError(
            f"{checkpoint.source.label}: no {', '.join(_ANY_OF[:-1])} or {_ANY_OF[-1]}\n"
            "  put the model's tokenizer files beside its weights"
        )
    folder = [checkpoint.source.path(name).parent for name in names][0]
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as err:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"{checkpoint.source.label}: the tokenizer cannot be loaded: {one_line(err)}\n"
            "  check tokenizer.json and tokenizer_config.json, or download them again"
        ) from err


def check_vocabulary(tokens: Tensor, vocab_size: int, label: str) -> None:
    """That the embedding has a row for every token.

    Args:
        tokens: token ids, any shape.
        vocab_size: rows of the embedding.
        label: of the checkpoint, for the message.

    Raises:
        CheckpointError: it has not.
    """
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise CheckpointError(
            f"{label}: the tokenizer made token {largest}, but the embedding has {vocab_size} "
            "rows\n  the tokenizer and the weights do not belong together"
        )
