"""Train a Llama of the demo model's kind from a text file.

    python examples/demo/train.py TEXT OUT               # the demo's sizes: about an hour on a CPU
    python examples/demo/train.py TEXT OUT --steps 20    # a smoke run

Makes a byte-level BPE tokenizer, a `LlamaForCausalLM` in bfloat16 shards, and both configs.
"""

import argparse
import math
import re
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# GPT-2's pattern, but digits one by one and WikiText's ` <unk>` kept whole.
SPLIT = r" ?<unk>|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}<]+| ?<|\s+(?!\S)|\s+"
# A WikiText article opens with a line ` = Title = ` between blank ones.
ARTICLE = r"\n(?= *\n = [^=\n]+ = *\n *\n)"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("text", type=Path, help="UTF-8 text to learn from")
    add("out", type=Path, help="folder for the checkpoint")
    add("--boundary", default=ARTICLE, help="regular expression that separates documents")
    add("--vocab", type=int, default=1024)
    add("--hidden", type=int, default=128)
    add("--intermediate", type=int, default=384)
    add("--layers", type=int, default=6)
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, default=2)
    add("--context", type=int, default=512, help="tokens in a training row")
    add("--batch", type=int, default=8, help="rows in a step")
    add("--steps", type=int, default=3500)
    add("--warmup", type=int, default=150)
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.1)
    add("--shard-size", default="800KB")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def train_tokenizer(documents: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `documents`; decoding gives the text back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama of the sizes asked for."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.to(args.device)
    return model


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine from `args.lr` to one hundredth of it."""
    peak: float = args.lr
    warmup: int = min(args.warmup, args.steps // 10 + 1)  # a smoke run warms up too
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, args.steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: LlamaForCausalLM, tokens: Tensor, args: argparse.Namespace) -> None:
    """AdamW on random rows of `tokens` `[n]` int64; prints the mean loss as it goes."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    every = max(1, args.steps // 20)
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        starts = torch.randint(0, len(tokens) - args.context + 1, (args.batch,))
        rows = torch.stack([tokens[s : s + args.context] for s in starts.tolist()])
        rows = rows.to(args.device)  # [batch, context]
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == args.steps:
            recent = losses[-every:]
            seconds = time.monotonic() - started
            print(f"step {step + 1}  loss {sum(recent) / len(recent):.3f}  {seconds:.0f} s")


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, tokens: Tensor, args: argparse.Namespace) -> float:
    """Mean loss over the whole rows of `tokens` `[n]`."""
    model.eval()
    rows = tokens[: len(tokens) // args.context * args.context].view(-1, args.context)
    losses = [model(input_ids=r, labels=r).loss * len(r) for r in rows.to(args.device).split(8)]
    return float(sum(losses)) / len(rows)


def main() -> None:
    """Tokenize, train, save."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    documents = re.split(args.boundary, args.text.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(documents, args.vocab)
    encoded = [tokenizer(BOS + d, verbose=False).input_ids for d in documents]
    tokens = torch.tensor([token for ids in encoded for token in ids])  # [n]
    held_out = max(args.context, len(tokens) // 100)
    if len(tokens) < held_out + args.context:
        raise SystemExit(f"{args.text}: {len(tokens)} tokens, need {held_out + args.context}")
    model = build_model(args, tokenizer)
    print(f"{len(documents)} documents, {len(tokens)} tokens, {model.num_parameters()} parameters")
    train(model, tokens[:-held_out], args)
    print(f"validation loss {validation_loss(model, tokens[-held_out:], args):.3f}")
    model.to(torch.bfloat16).save_pretrained(args.out, max_shard_size=args.shard_size)
    tokenizer.model_max_length = args.context
    tokenizer.save_pretrained(args.out)
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
