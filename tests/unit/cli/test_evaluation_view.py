"""What a terminal shows of an evaluation: text from models and files is text and nothing else."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from rilq.cli.evaluation_view import evaluation_view
from rilq.evaluation.figures import (
    Divergence,
    Evaluation,
    Generation,
    PassageToken,
    Speed,
    TaskFigure,
    WorstPassage,
)

HOSTILE = "[bold red]x[/] \x1b[2J\r<script>alert(1)</script>\n[/nothing]"
PLAIN = Evaluation(
    perplexity=12.5,
    tokens=620,
    windows=20,
    seqlen=32,
    bits_per_byte=None,
    bits_per_weight=2.5,
    size_bytes=911_000,
    adapter=False,
    dtype="float32",
    text="words.txt@xxh3:00",
    tokens_digest="00",
)
COMPARED = replace(
    PLAIN,
    against=Divergence(0.6, 0.4, 3.6, 9.0, 0.487, 0.551, 10.0, (0.0, 1.0), (620,)),
    layer_errors=(0.1, 0.5, 0.3),
    worst=(
        WorstPassage(
            window=3,
            start=7,
            tokens=tuple(PassageToken(t, k) for t, k in ((" a", 0.1), (HOSTILE, 9.0), (" b", 0.2))),
            worst=1,
            base_choice=HOSTILE,
            choice=" c",
        ),
    ),
)


def shown(found: Evaluation, model: str = "made/model", **options: bool) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80, highlight=False, **options).print(evaluation_view(model, found))
    return stream.getvalue()


def test_a_plain_evaluation_is_a_few_lines_without_empty_rows() -> None:
    lines = shown(PLAIN).splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [
        "made/model", "text", "windows", "perplexity", "bits per weight", "size"
    ]  # fmt: skip
    assert "None" not in shown(PLAIN)


def test_a_comparison_shows_the_base_its_ratio_and_the_worst_layer() -> None:
    text = re.sub(r"\s+", " ", shown(COMPARED))
    assert "12.5000 base 10.0000, ratio 1.2500" in text
    assert "mean 0.6000, median 0.4000, 99 % 3.6000, max 9.0000 nats" in text
    assert "48.70%, of the top five 55.10%" in text
    assert "0.1 after the first, 0.3 after the last; most after layer 1, 0.5" in text


@pytest.mark.parametrize("force_terminal", [False, True])
def test_markup_and_control_characters_in_texts_are_shown_and_not_obeyed(
    force_terminal: bool,
) -> None:
    found = replace(
        COMPARED,
        text=HOSTILE,
        generations=(Generation(HOSTILE, HOSTILE, f"x{HOSTILE}", 0, ""),),
        tasks=(TaskFigure("[red]t[/]", "1", "acc", 0.5, None, 0, 9, True),),
    )
    text = shown(found, HOSTILE, force_terminal=force_terminal, no_color=True)
    assert "\x1b[2J" not in text and "\r" not in text
    assert r"[bold red]x[/] \x1b[2J\r<script>alert(1)</script>\n" in text
    assert "[red]t[/]" in text


def test_the_worst_token_is_marked_and_its_place_is_that_in_the_window() -> None:
    text = shown(COMPARED)
    assert "window 3, token 8: KL 9" in text
    assert "»[bold red]x[/]" in text.replace("\n", "")
    assert "« b" in text


def test_continuations_are_marked_where_they_part() -> None:
    found = replace(PLAIN, generations=(Generation("the", " cat sat", " cat ran", 1, " cat "),))
    text = shown(found)
    assert "token 2 is the first that differs" in text
    assert "base    cat »ran" in text and "model   cat »sat" in text
    same = replace(PLAIN, generations=(Generation("the", " cat", " cat", None, " cat"),))
    assert "the same tokens" in shown(same) and "»" not in shown(same)
    alone = replace(PLAIN, generations=(Generation("the", " cat", None, None, " cat"),))
    assert "base" not in shown(alone) and "differs" not in shown(alone)


def test_memory_of_a_gpu_is_shown_where_there_is_one() -> None:
    speed = Speed(1234.5, 20.25, 512, 64, 2_000_000, None, 1.5, "cpu, 2 threads", "bfloat16")
    assert "2 MB host; loaded in 1.5 s" in shown(replace(PLAIN, speed=speed))
    speed = replace(speed, device_bytes=3_000_000_000)
    text = shown(replace(PLAIN, speed=speed))
    assert "2 MB host, 3 GB GPU" in text
    assert "prefill 1,234.5 tokens/s (512 tokens), decode 20.2 tokens/s" in text


def test_no_line_is_wider_than_the_terminal() -> None:
    tasks = (TaskFigure("a_task_with_a_long_name" * 4, "1", "acc", 0.5, 0.1, 5, 99_999, True),)
    wide = replace(COMPARED, tasks=tasks, text="word " * 40)
    assert max(map(len, shown(wide).splitlines())) <= 80


def test_bits_of_activations_and_cache_are_shown_where_they_are_not_sixteen() -> None:
    assert "bits when it runs" not in shown(PLAIN)
    four = shown(replace(PLAIN, activation_bits=4.4375, cache_bits=5.0))
    assert "4.44 per activation, 5.00 per cached value" in four
