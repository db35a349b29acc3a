"""Texts from outside, made fit for a message."""

from rilq.errors import one_line, printable


def test_printable_leaves_plain_text_alone() -> None:
    assert printable("model.layers.0.weight") == "model.layers.0.weight"


def test_printable_escapes_what_moves_the_cursor_and_cuts_what_is_long() -> None:
    assert printable("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n"
    assert printable("x" * 200, 5) == "xxxxx... (200 characters)"


def test_one_line_keeps_kind_and_all_lines_of_an_error() -> None:
    assert one_line(ValueError("first:\n  the reason")) == "ValueError: first: the reason"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
