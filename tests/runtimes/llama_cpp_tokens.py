"""Runs in an environment with llama-cpp-python: the tokens of some texts, as JSON.

python llama_cpp_tokens.py VOCABULARY.gguf TEXTS.json
"""

import json
import sys
from pathlib import Path

import llama_cpp


def main() -> None:
    """Load the vocabulary alone, tokenize."""
    path, texts = sys.argv[1:]
    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    print(
        json.dumps(
            [
                model.tokenize(text.encode(), add_bos=True, special=True)
                for text in json.loads(Path(texts).read_text())
            ]
        )
    )


if __name__ == "__main__":
    main()
