"""Text into rows: exact, reproducible, shared by weight, and every bad text is named."""

import gzip
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rilq.calib import hub_stream, sources, texts
from rilq.calib.dataset import Rows, _rows, calibration_rows, evaluation_rows
from rilq.calib.sources import DataSource, parse_source
from rilq.errors import DatasetError, OptionError

Tok = PreTrainedTokenizerBase


@pytest.fixture
def special(tokenizer: Tok) -> Tok:
    """The same tokenizer, but putting `<s>` (0) before and `</s>` (1) after every text."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
    )
    copy.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return copy


def _file(folder: Path, text: str | bytes, name: str = "a.txt") -> DataSource:
    content = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(content)
    return DataSource(str(folder / name))


def _lines(folder: Path, records: list[Any], name: str = "a.jsonl") -> DataSource:
    return _file(folder, "".join(json.dumps(record) + "\n" for record in records), name)


def _ids(tokenizer: Tok, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _calibrate(source: DataSource, tokenizer: Tok, rows: int | None = 8, **options: Any) -> Rows:
    given = {"seqlen": 16, "seed": 0, **options}
    return calibration_rows([source], tokenizer, nsamples=rows, **given)


def _windows(rows: Rows) -> set[tuple[int, ...]]:
    return {tuple(row) for row in rows.tokens.tolist()}


# ---- the command line's syntax ----


@pytest.mark.parametrize(
    ("text", "location", "weight"),
    [
        ("c4", "c4", 1.0),
        ("c4=0.7", "c4", 0.7),
        ("a=b.txt=2", "a=b.txt", 2.0),
        ("a=b.txt", "a=b.txt", 1.0),
        ("owner/name=3e-1", "owner/name", 0.3),
    ],
)
def test_source_is_a_location_and_a_weight(text: str, location: str, weight: float) -> None:
    assert parse_source(text) == DataSource(location, weight)


def test_existing_path_with_equals_sign_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run=2").write_text("x")
    assert parse_source("run=2") == DataSource("run=2", 1.0)


@pytest.mark.parametrize("text", ["c4=0", "c4=-1", "c4=nan", "c4=inf", "=0.5", "", " "])
def test_source_without_location_or_with_bad_weight_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--dataset"):
        parse_source(text)


# ---- evaluation ----


def test_plain_text_is_one_document_without_specials(
    tmp_path: Path, special: Tok, text: str
) -> None:
    rows = evaluation_rows(_file(tmp_path, text), special, seqlen=17)
    ids = _ids(special, text)
    count = len(ids) // 17
    assert len(ids) % 17, "the last partial window must be there to be dropped"
    assert rows.tokens.dtype == torch.int64
    assert rows.tokens.flatten().tolist() == ids[: count * 17]


def test_documents_keep_their_specials_and_are_joined(tmp_path: Path, special: Tok) -> None:
    texts = [f"the small dog ran {number} times." for number in range(200)]
    source = _lines(tmp_path, [{"text": text} for text in texts])
    rows = evaluation_rows(source, special, seqlen=16)
    ids = [i for text in texts for i in (0, *_ids(special, text), 1)]
    assert rows.tokens.flatten().tolist() == ids[: len(rows.tokens) * 16]
    assert len(rows.tokens) == len(ids) // 16


@pytest.mark.parametrize("seqlen", [5, 16, 33])
def test_bytes_are_those_of_the_text_in_the_windows(
    tmp_path: Path, special: Tok, seqlen: int
) -> None:
    texts = [f"the café number {number} was naïve." for number in range(40)]
    rows = evaluation_rows(_lines(tmp_path, [{"text": t} for t in texts]), special, seqlen=seqlen)
    spelled = special.decode(rows.tokens.flatten().tolist(), skip_special_tokens=True).encode()
    assert rows.text_bytes == len(spelled)
    assert "".join(texts).encode().startswith(spelled) and len(spelled) > 1000


def test_bytes_of_a_text_that_is_cut_to_be_tokenized_are_all_counted(
    tmp_path: Path, tokenizer: Tok, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _file(tmp_path, text.replace(". ", ".\n\n"))
    whole = evaluation_rows(source, tokenizer, seqlen=16)
    assert whole.text_bytes == len(tokenizer.decode(whole.tokens.flatten().tolist()).encode())
    monkeypatch.setattr(texts, "_PIECE", 700)
    assert evaluation_rows(source, tokenizer, seqlen=16).text_bytes == whole.text_bytes


def test_notes_say_how_the_windows_lie(tmp_path: Path, tokenizer: Tok, text: str) -> None:
    rows = evaluation_rows(_file(tmp_path, text), tokenizer, seqlen=16)
    expected = f"{rows.sources[0]}: {len(rows.tokens)} windows of 16 tokens that do not overlap"
    assert rows.notes == (expected,)


def test_text_shorter_than_a_window_says_what_it_has(tmp_path: Path, tokenizer: Tok) -> None:
    have = len(_ids(tokenizer, "the dog"))
    with pytest.raises(DatasetError, match=rf"a\.txt: has {have} tokens, needs 2048 "):
        evaluation_rows(_file(tmp_path, "the dog"), tokenizer, seqlen=2048)


def test_long_text_is_cut_where_tokens_end(
    tmp_path: Path, tokenizer: Tok, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _file(tmp_path, text.replace(". ", ".\n\n"))
    whole = evaluation_rows(source, tokenizer, seqlen=16)
    monkeypatch.setattr(texts, "_PIECE", 700)
    pieces = list(texts.pieces([text]))
    assert max(map(len, pieces)) <= 700 and "".join(pieces) == text
    assert evaluation_rows(source, tokenizer, seqlen=16).digest == whole.digest


def test_long_document_keeps_its_specials_at_both_ends(
    tmp_path: Path, special: Tok, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _lines(tmp_path, [{"text": text}, {"text": "the end."}])
    whole = evaluation_rows(source, special, seqlen=7)
    monkeypatch.setattr(texts, "_PIECE", 700)
    assert evaluation_rows(source, special, seqlen=7).digest == whole.digest
    assert int((whole.tokens == 0).sum()) == 2, "one <s> for each document"


def test_text_without_any_space_is_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_PIECE", 10)
    assert [len(piece) for piece in texts.pieces(["x" * 15, "x" * 10])] == [10, 10, 5]


def test_text_longer_than_the_model_warns_nobody(
    tmp_path: Path, tokenizer: Tok, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    short = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, model_max_length=8
    )
    evaluation_rows(_file(tmp_path, text), short, seqlen=16)
    assert "longer than" not in caplog.text


# ---- calibration ----


def test_same_seed_gives_the_same_rows_and_another_gives_others(
    tmp_path: Path, tokenizer: Tok, text: str
) -> None:
    source = _file(tmp_path, text)
    first, again = _calibrate(source, tokenizer), _calibrate(source, tokenizer)
    assert torch.equal(first.tokens, again.tokens) and first.digest == again.digest
    assert _calibrate(source, tokenizer, seed=1).digest != first.digest


def test_digest_depends_on_the_shape(tmp_path: Path, tokenizer: Tok, text: str) -> None:
    ids = _ids(tokenizer, text)
    even = str(tokenizer.decode(ids[:64]))
    digests = {
        evaluation_rows(_file(tmp_path, even), tokenizer, seqlen=length).digest
        for length in (16, 32)
    }
    assert len(digests) == 2


def test_global_generators_are_not_touched(tmp_path: Path, tokenizer: Tok, text: str) -> None:
    before = torch.get_rng_state(), random.getstate()
    _calibrate(_file(tmp_path, text), tokenizer)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_rows_are_windows_spread_over_the_whole_text(
    tmp_path: Path, tokenizer: Tok, text: str
) -> None:
    source = _file(tmp_path, text)
    every = [tuple(row) for row in evaluation_rows(source, tokenizer, seqlen=16).tokens.tolist()]
    rows = len(every) // 8 + 1  # the whole text is within the 8 times that are read
    places = sorted(every.index(row) for row in _windows(_calibrate(source, tokenizer, rows)))
    assert len(places) == rows
    parts = [len(every) * part // rows for part in range(rows + 1)]
    assert all(parts[i] <= place < parts[i + 1] for i, place in enumerate(places))


def test_order_of_the_rows_is_shuffled(tmp_path: Path, tokenizer: Tok, text: str) -> None:
    source = _file(tmp_path, text)
    every = [tuple(row) for row in evaluation_rows(source, tokenizer, seqlen=16).tokens.tolist()]
    places = [every.index(tuple(row)) for row in _calibrate(source, tokenizer, 40).tokens.tolist()]
    assert places != sorted(places)
    assert max(places[-10:]) - min(places[-10:]) > len(every) // 4, "the last rows validate"


def test_too_many_rows_asked_says_have_and_need(tmp_path: Path, tokenizer: Tok, text: str) -> None:
    have = len(_ids(tokenizer, text))
    with pytest.raises(DatasetError) as caught:
        _calibrate(_file(tmp_path, text), tokenizer, 9999)
    assert f"has {have} tokens, needs {9999 * 16} (9999 rows of 16)" in str(caught.value)
    assert f"--nsamples {have // 16}" in str(caught.value)


def test_default_takes_what_there_is_and_says_so(tmp_path: Path, tokenizer: Tok, text: str) -> None:
    count = len(_ids(tokenizer, text)) // 64
    assert 8 <= count < 320
    rows = _calibrate(_file(tmp_path, text), tokenizer, None, seqlen=64)
    assert len(rows.tokens) == count
    assert len(rows.notes) == 1 and f"{count} rows of 64 tokens, not 320" in rows.notes[0]


def test_default_takes_320_of_a_longer_text(tmp_path: Path, tokenizer: Tok, text: str) -> None:
    rows = _calibrate(_file(tmp_path, text), tokenizer, None, seqlen=8)
    assert rows.tokens.shape == (320, 8) and rows.notes == ()


def test_default_needs_eight_rows(tmp_path: Path, tokenizer: Tok, text: str) -> None:
    with pytest.raises(DatasetError, match=r"needs 16000 \(8 rows of 2000\)"):
        _calibrate(_file(tmp_path, text), tokenizer, None, seqlen=2000)


def test_sources_share_rows_by_weight(tmp_path: Path, tokenizer: Tok, text: str) -> None:
    cat = _file(tmp_path, "cat " * 1000, "cat.txt").location
    dog = _file(tmp_path, "dog " * 1000, "dog.txt").location
    rows = calibration_rows(
        [DataSource(cat, 2.0), DataSource(dog, 1.0)], tokenizer, nsamples=10, seqlen=16, seed=0
    )
    dog_ids = set(_ids(tokenizer, " dog dog")) - set(_ids(tokenizer, " cat cat"))
    of_dog = [bool(dog_ids & set(row)) for row in rows.tokens.tolist()]
    assert sum(of_dog) == 3  # 6.67 and 3.33: the row left over goes to the larger remainder
    assert of_dog != sorted(of_dog), "the sources are mixed"


def test_source_with_too_small_a_weight_is_noted(tmp_path: Path, tokenizer: Tok, text: str) -> None:
    sources = [_file(tmp_path, text), DataSource(_file(tmp_path, text, "b.txt").location, 0.001)]
    rows = calibration_rows(sources, tokenizer, nsamples=8, seqlen=16, seed=0)
    assert len(rows.tokens) == 8
    assert len(rows.notes) == 1 and rows.notes[0].startswith("b.txt@")


def test_calibration_reads_a_bounded_part_of_a_file(
    tmp_path: Path, tokenizer: Tok, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _file(tmp_path, text.encode() * 100 + b"\xff")
    monkeypatch.setattr(texts, "_PIECE", 4000)
    monkeypatch.setattr(sources, "_CHUNK", 4000)
    assert len(_calibrate(source, tokenizer).tokens) == 8  # never comes to the bad last byte


def test_labels_hold_the_content_hash_and_no_path(
    tmp_path: Path, tokenizer: Tok, text: str
) -> None:
    one = _calibrate(_file(tmp_path, text), tokenizer).sources
    two = _calibrate(_file(tmp_path, text + " end"), tokenizer).sources
    assert one != two
    assert all(label.startswith("a.txt@xxh3:") for label in one + two)


@pytest.mark.parametrize(("rows", "seqlen"), [(0, 16), (-1, 16), (8, 1), (8, 0)])
def test_no_rows_or_no_tokens_is_an_option_error(
    tmp_path: Path, tokenizer: Tok, rows: int, seqlen: int
) -> None:
    with pytest.raises(OptionError):
        _calibrate(_file(tmp_path, "the dog"), tokenizer, rows, seqlen=seqlen)


# ---- mode "documents" ----


def test_documents_mode_takes_one_window_of_each_long_document(
    tmp_path: Path, special: Tok
) -> None:
    long = [" ".join([word] * 60) for word in ("cat", "dog", "bird", "house")]
    texts = ["the cat", *long, "a dog"]
    source = _lines(tmp_path, [{"text": text} for text in texts])
    rows = _calibrate(source, special, 4, mode="documents")
    whole = [[0, *_ids(special, text), 1] for text in long]
    for row in rows.tokens.tolist():
        inside = [
            number
            for number, ids in enumerate(whole)
            if any(ids[at : at + 16] == row for at in range(len(ids) - 15))
        ]
        assert len(inside) == 1
        whole[inside[0]] = []  # no other row comes from it


def test_documents_mode_counts_long_documents(tmp_path: Path, tokenizer: Tok, text: str) -> None:
    source = _lines(tmp_path, [{"text": text}, {"text": "the dog"}, {"text": text}])
    with pytest.raises(DatasetError, match="has 2 documents longer than 16 tokens, needs 8"):
        _calibrate(source, tokenizer, mode="documents")


def test_documents_mode_refuses_plain_text(tmp_path: Path, tokenizer: Tok, text: str) -> None:
    with pytest.raises(DatasetError, match=r"(?s)one document.*--rows packed"):
        _calibrate(_file(tmp_path, text), tokenizer, mode="documents")


# ---- kinds of files ----


def test_parquet_gives_the_same_rows_as_json_lines(tmp_path: Path, special: Tok, text: str) -> None:
    texts = text.split(".")
    parquet.write_table(
        pyarrow.table({"n": range(len(texts)), "body": texts}), tmp_path / "a.parquet"
    )
    lines = _lines(tmp_path, [{"body": text} for text in texts])
    one = evaluation_rows(
        DataSource(str(tmp_path / "a.parquet")), special, seqlen=16, text_key="body"
    )
    assert one.digest == evaluation_rows(lines, special, seqlen=16, text_key="body").digest


def test_parquet_without_the_column_names_its_columns(tmp_path: Path, tokenizer: Tok) -> None:
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="no text under 'text'; keys: 'body', 'n'"):
        _calibrate(DataSource(str(tmp_path / "a.parquet")), tokenizer)


def test_damaged_parquet_is_named(tmp_path: Path, tokenizer: Tok) -> None:
    with pytest.raises(DatasetError, match=r"a\.parquet: cannot be read as parquet"):
        _calibrate(_file(tmp_path, b"PAR1 nonsense", "a.parquet"), tokenizer)


def test_messages_go_through_the_chat_template_once(tmp_path: Path, special: Tok) -> None:
    special.chat_template = (
        "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}</s>"
    )
    chat = [{"role": "user", "content": "see the cat"}, {"role": "assistant", "content": "red."}]
    rows = evaluation_rows(_lines(tmp_path, [{"messages": chat}]), special, seqlen=8)
    ids = [0, *_ids(special, "user: see the cat\nassistant: red.\n"), 1]
    assert rows.tokens.flatten().tolist() == ids[: len(ids) // 8 * 8]


def test_texts_and_messages_may_be_mixed(tmp_path: Path, special: Tok) -> None:
    special.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = {"messages": [{"role": "user", "content": "the cat sang."}]}
    source = _lines(tmp_path, [chat, {"text": "a red dog."}, chat])
    rows = evaluation_rows(source, special, seqlen=2)
    said = _ids(special, "the cat sang.")
    ids = [*said, 0, *_ids(special, "a red dog."), 1, *said]
    assert rows.tokens.flatten().tolist() == ids[: len(ids) // 2 * 2]


def test_messages_without_a_template_are_refused(tmp_path: Path, tokenizer: Tok) -> None:
    source = _lines(tmp_path, [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(DatasetError, match="line 1: .* no chat template"):
        _calibrate(source, tokenizer)


def test_messages_that_the_template_refuses_name_the_line(tmp_path: Path, special: Tok) -> None:
    special.chat_template = "{{ raise_exception('roles must alternate') }}"
    source = _lines(tmp_path, [{"text": "a"}, {"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(DatasetError, match="line 2: .*roles must alternate"):
        _calibrate(source, special)


# ---- faults ----


def test_missing_file_is_named(tmp_path: Path, tokenizer: Tok) -> None:
    with pytest.raises(DatasetError, match=r"gone\.txt: no such file"):
        _calibrate(DataSource(str(tmp_path / "gone.txt")), tokenizer)


def test_relative_missing_file_is_not_looked_up_on_the_hub(tokenizer: Tok) -> None:
    with pytest.raises(DatasetError, match=r"data/gone\.jsonl: no such file"):
        _calibrate(DataSource("data/gone.jsonl"), tokenizer)


def test_second_source_is_checked_before_the_first_is_read(tmp_path: Path, tokenizer: Tok) -> None:
    sources = [_file(tmp_path, b"\xff" * 1000), DataSource(str(tmp_path / "gone.txt"))]
    with pytest.raises(DatasetError, match="no such file"):
        calibration_rows(sources, tokenizer, nsamples=8, seqlen=16, seed=0)


def test_folder_is_refused(tmp_path: Path, tokenizer: Tok) -> None:
    with pytest.raises(DatasetError, match="not a regular file"):
        _calibrate(DataSource(str(tmp_path)), tokenizer)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b""),
        ("a.jsonl", b""),
        ("a.txt", b" \n\t\r\n" * 100),
        ("a.jsonl", b"\n\n\n"),
        ("a.jsonl", b'{"text": " "}\n{"text": null}\n'),
        ("a.txt", b"\xef\xbb\xbf"),
    ],
)
def test_file_without_text_is_named(
    tmp_path: Path, tokenizer: Tok, name: str, content: bytes
) -> None:
    with pytest.raises(DatasetError, match=rf"{name}: (is empty|holds no text)"):
        _calibrate(_file(tmp_path, content, name), tokenizer)


@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
def test_other_encoding_names_line_and_byte(
    tmp_path: Path, tokenizer: Tok, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    source = _file(tmp_path, "first\r\nsécond\nthird ".encode() + "é!".encode("latin1"))
    with pytest.raises(DatasetError, match=r"a\.txt line 3: .*byte 0xe9 at offset 21\)"):
        _calibrate(source, tokenizer)


def test_other_encoding_in_json_names_line_and_byte(tmp_path: Path, tokenizer: Tok) -> None:
    source = _file(tmp_path, b'{"text": "a"}\n{"text": "\xe9"}\n', "a.jsonl")
    with pytest.raises(DatasetError, match=r"line 2: is not UTF-8 \(byte 0xe9 at offset 24\)"):
        _calibrate(source, tokenizer)


@pytest.mark.parametrize("line", ['{"text": ', "[1, 2]", '"text"', "[" * 100_000])
def test_line_that_is_no_record_is_named(tmp_path: Path, tokenizer: Tok, line: str) -> None:
    source = _file(tmp_path, f'{{"text": "a"}}\n\n{line}\n', "a.jsonl")
    with pytest.raises(DatasetError, match="line 3: is not a JSON object"):
        _calibrate(source, tokenizer)


@pytest.mark.parametrize("record", [{"body": "x"}, {"text": 5}, {}])
def test_record_without_text_names_the_line(
    tmp_path: Path, tokenizer: Tok, record: dict[str, Any]
) -> None:
    with pytest.raises(DatasetError, match=r"(?s)line 2: no text under 'text'.*--text-key"):
        _calibrate(_lines(tmp_path, [{"text": "a"}, record]), tokenizer)


def test_line_ends_and_byte_order_mark_change_nothing(
    tmp_path: Path, tokenizer: Tok, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_CHUNK", 5)  # line ends and the mark fall across reads
    unix = text[:2000].replace(". ", ".\n")
    windows = b"\xef\xbb\xbf" + unix.replace("\n", "\r\n").encode()
    expected = evaluation_rows(_file(tmp_path, unix), tokenizer, seqlen=16).digest
    assert evaluation_rows(_file(tmp_path, windows), tokenizer, seqlen=16).digest == expected


def test_byte_order_mark_and_windows_lines_in_json(tmp_path: Path, tokenizer: Tok) -> None:
    unix = '{"text": "the cat ran over the house."}\n' * 3
    windows = b"\xef\xbb\xbf" + unix.replace("\n", "\r\n").encode()
    expected = evaluation_rows(_file(tmp_path, unix, "a.json"), tokenizer, seqlen=4).digest
    source = _file(tmp_path, windows, "b.json")
    assert evaluation_rows(source, tokenizer, seqlen=4).digest == expected


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_nul_bytes_are_text(tmp_path: Path, tokenizer: Tok, name: str) -> None:
    raw = "the\0dog" * 30
    content = raw if name == "a.txt" else f'{{"text": "{raw}"}}'
    rows = evaluation_rows(_file(tmp_path, content, name), tokenizer, seqlen=8)
    ids = _ids(tokenizer, raw)
    assert rows.tokens.flatten().tolist() == ids[: len(ids) // 8 * 8]


def test_half_a_surrogate_pair_in_json_is_text(tmp_path: Path, tokenizer: Tok) -> None:
    source = _file(tmp_path, '{"text": "the \\ud83d dog ran over the house"}', "a.jsonl")
    assert len(evaluation_rows(source, tokenizer, seqlen=4).tokens)


# ---- the Hub ----


@pytest.mark.parametrize("name", ["c4", "wikitext2", "owner/name"])
def test_hub_in_offline_mode_fails_at_once_in_one_line(tokenizer: Tok, name: str) -> None:
    began = time.monotonic()
    with pytest.raises(DatasetError, match="offline.*--dataset FILE") as caught:
        _calibrate(DataSource(name), tokenizer)
    assert time.monotonic() - began < 10  # the client's own retries take 23 s
    assert "\n" not in str(caught.value)


def test_stream_that_falls_silent_is_given_up() -> None:
    silent = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        silent.wait(30)

    stream = hub_stream._patient(items(), seconds=0.1)
    assert next(stream) == 1
    with pytest.raises(TimeoutError, match="no answer"):
        next(stream)
    silent.set()


def test_stream_gives_all_items_and_the_error_after_them() -> None:
    def items() -> Iterator[int]:
        yield from range(200)
        raise ConnectionError("reset")

    got = []
    with pytest.raises(ConnectionError, match="reset"):
        for item in hub_stream._patient(items(), seconds=30):
            got.append(item)
    assert got == list(range(200))


COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRAIN = "en/c4-train.00000-of-01024.json.gz"
VALIDATION = "en/c4-validation.00000-of-00008.json.gz"


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as the `datasets` library asks for one data file."""

    shards: ClassVar[dict[str, bytes]] = {}
    busy = 1  # requests for a shard to turn away

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": "1" * 40}
            for name, content in self.shards.items()
        ]
        shard = path.partition(f"/resolve/{COMMIT}/")[2]
        about = "/api/datasets/allenai/c4"
        if path.endswith(tuple(self.shards)) and _Hub.busy:
            _Hub.busy -= 1
            self._send(b"", 503)
        elif shard in self.shards:
            self._send(self.shards[shard])
        elif "/tree/" in path or "/paths-info/" in path:
            self._send(json.dumps(entries).encode())
        elif path in (about, f"{about}/revision/{COMMIT}"):  # the stream must be pinned
            facts = {
                "id": "allenai/c4",
                "sha": COMMIT,
                "siblings": [{"rfilename": n} for n in self.shards],
            }
            self._send(json.dumps(facts).encode())
        else:
            self._send(b"{}", 404, {"X-Error-Code": "EntryNotFound"})

    def _send(self, body: bytes, status: int = 200, extra: dict[str, str] | None = None) -> None:
        asked = self.headers.get("Range")
        if asked and status == 200:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            body, status = body[int(first) : int(last) + 1 if last else None], 206
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "ETag": '"1"', "X-Repo-Commit": COMMIT}
        for name, value in {**headers, **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


CLIENT = """
import sys
from transformers import AutoTokenizer
from rilq.calib.dataset import calibration_rows, evaluation_rows
from rilq.calib.sources import DataSource
from rilq.errors import DatasetError
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = calibration_rows([DataSource("c4")], tokenizer, nsamples=8, seqlen=16, seed=0)
print(rows.sources[0], tuple(rows.tokens.shape))
for seqlen in (16, 64):
    rows = evaluation_rows(DataSource("c4"), tokenizer, seqlen=seqlen)
    print(len(rows.tokens), rows.digest, rows.text_bytes, *rows.notes, sep="|")
try:
    calibration_rows([DataSource("owner/none")], tokenizer, nsamples=8, seqlen=16, seed=0)
except DatasetError as err:
    print(err)
"""


def test_c4_streams_from_the_hub_without_noise(
    tmp_path: Path, tokenizer: Tok, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(json.dumps({"text": part}) + "\n" for part in text.split("."))
    monkeypatch.setattr(_Hub, "busy", 1)
    documents = [f"the cat {number}" for number in range(1300)]
    held_out = "".join(json.dumps({"text": each}) + "\n" for each in documents)
    shards = {TRAIN: gzip.compress(lines.encode()), VALIDATION: gzip.compress(held_out.encode())}
    monkeypatch.setattr(_Hub, "shards", shards)
    tokenizer.save_pretrained(tmp_path / "model")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(tmp_path / "model")],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=120,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    first, *evaluated, last = done.stdout.splitlines()
    assert first == f"allenai/c4@{COMMIT[:12]}:train (8, 16)"
    assert last.startswith("owner/none: cannot be read from the Hub")
    assert _Hub.busy == 0 and done.stderr == "", "the retry is not talked about"
    _check_form(evaluated, tokenizer, documents)


def _check_form(lines: list[str], tokenizer: Tok, documents: list[str]) -> None:
    """What GPTQ's code takes of C4: the first 1100 documents with a space between, 256 windows."""
    ids = _ids(tokenizer, " ".join(documents[:1100]))
    for line, seqlen, most in zip(lines, (16, 64), (256, 1000), strict=True):
        windows, digest, size, first, form = line.split("|")
        count = min(most, len(ids) // seqlen)
        expected = torch.tensor(ids[: count * seqlen]).view(count, seqlen)
        assert (int(windows), digest) == (count, _rows(expected, [], []).digest)
        assert int(size) == len(tokenizer.decode(expected.flatten().tolist()).encode())
        assert first.startswith(f"allenai/c4@{COMMIT[:12]}:validation: ")
        assert first.endswith(f"{count} windows of {seqlen} tokens that do not overlap")
        assert ("the first" in first) == (count == 256)
        assert "windows of 2048 tokens" in form
