"""Runs in an environment with llama-cpp-python: load a GGUF file as its users do, print JSON.

    python llama_cpp_logits.py MODEL.gguf ROWS.npy LOGITS.npy TEXT [ADAPTER.gguf]

Logits of every row; the tokens of the text; greedy tokens after the first row; the answer to a chat
message through the template in the file.
"""

import json
import sys

import llama_cpp
import numpy as np
from llama_cpp import llama_chat_format

GREEDY = 8


def main() -> None:
    """Load, compute, tokenize, generate, chat."""
    path, rows_file, out, text, *adapter = sys.argv[1:]
    model = llama_cpp.Llama(
        path,
        lora_path=adapter[0] if adapter else None,
        n_ctx=256,
        n_threads=1,
        logits_all=True,
        verbose=False,
    )
    rows, found = np.load(rows_file), []
    for row in rows:
        model.reset()
        model.eval(row.tolist())
        found.append(np.array(model.scores[: len(row)]))
    np.save(out, np.stack(found))
    tokens = rows[0].tolist()
    for _ in range(GREEDY):
        model.reset()
        model.eval(tokens)
        tokens.append(int(np.argmax(model.scores[len(tokens) - 1])))
    formatter = llama_chat_format.Jinja2ChatFormatter(
        template=model.metadata["tokenizer.chat_template"], bos_token="<s>", eos_token="</s>"
    )
    prompt = formatter(messages=[{"role": "user", "content": "the cat"}]).prompt
    answer = model.create_chat_completion(
        [{"role": "user", "content": "the cat"}], max_tokens=GREEDY, temperature=0
    )
    said = {
        "version": llama_cpp.__version__,
        "tokens": model.tokenize(text.encode(), add_bos=True, special=True),
        "greedy": tokens[len(rows[0]) :],
        "prompt": prompt,
        "answer": answer["choices"][0]["message"]["content"],
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
