"""Hidden states on disk: what is read is what was written, and nothing partial is ever there."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from rilq.calib import activations
from rilq.calib.activations import ActivationStore, ActivationWriter, part_path, prefetch
from rilq.errors import OutputError, RilqError

SHAPE = (5, 3, 4)


def _values(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=draw).to(dtype)


def _write(path: Path, values: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    rows, seq_len, hidden = values.shape
    with ActivationWriter(path, (rows, seq_len, hidden), dtype or values.dtype) as writer:
        for batch in values.split(2):
            writer.append(batch)
    return writer.digest


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """Five rows of float32, complete."""
    _write(tmp_path / "h", _values())
    return ActivationStore(tmp_path / "h", SHAPE, torch.float32)


@pytest.fixture
def parted(tmp_path: Path) -> ActivationStore:
    """The same five rows in files of two, one and two rows."""
    starts = (0, 2, 3)
    for start, stop in zip(starts, (2, 3, 5), strict=True):
        _write(part_path(tmp_path / "h.bin", start, 3), _values()[start:stop])
    return ActivationStore(tmp_path / "h.bin", SHAPE, torch.float32, starts=starts)


def test_rows_in_several_files_read_as_in_one(parted: ActivationStore) -> None:
    for start in range(6):
        for stop in range(start, 6):
            assert torch.equal(parted.read(start, stop), _values()[start:stop])
    for size in range(1, 6):
        assert torch.equal(torch.cat([b for _, b in parted.batches(size)]), _values())
    assert torch.equal(parted.gather([4, 0, 2, 3, 0]), _values()[[4, 0, 2, 3, 0]])


def test_a_missing_file_of_several_is_named(parted: ActivationStore) -> None:
    gone = part_path(parted.path, 2, 3)
    gone.unlink()
    with pytest.raises(RilqError, match=str(gone)):
        parted.read(0, 5)


def test_a_bad_row_has_its_number_among_all(tmp_path: Path) -> None:
    values = _values()[3:]
    values[1, 0, 0] = float("nan")
    writer = ActivationWriter(tmp_path / "h", (2, 3, 4), torch.float32, first_row=3)
    with pytest.raises(RilqError, match="activations of row 4 hold NaN"), writer:
        writer.append(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_read_gives_back_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    values = _values(dtype)
    _write(tmp_path / "h", values)
    assert torch.equal(ActivationStore(tmp_path / "h", SHAPE, dtype).read(0, 5), values)


def test_file_is_flat_little_endian(tmp_path: Path) -> None:
    values = torch.tensor([[[1.0, -2.0]], [[0.5, 3.0]]], dtype=torch.bfloat16)
    _write(tmp_path / "h", values)
    # bfloat16 is the upper half of float32: 1.0 is 0x3f80, -2.0 0xc000, 0.5 0x3f00, 3.0 0x4040.
    assert (tmp_path / "h").read_bytes() == bytes.fromhex("803f00c0003f4040")


def test_batches_are_converted_to_the_stored_dtype(tmp_path: Path) -> None:
    _write(tmp_path / "h", _values(), torch.bfloat16)
    stored = ActivationStore(tmp_path / "h", SHAPE, torch.bfloat16).read(0, 5)
    assert torch.equal(stored, _values().to(torch.bfloat16))


def test_non_contiguous_batch_with_gradient_is_written_in_order(tmp_path: Path) -> None:
    values = _values().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    _write(tmp_path / "h", values)
    assert torch.equal(ActivationStore(tmp_path / "h", SHAPE, torch.float32).read(0, 5), values)


def test_digest_is_xxh3_of_the_file_and_verifies(tmp_path: Path, store: ActivationStore) -> None:
    digest = _write(tmp_path / "h", _values())
    assert digest == xxhash.xxh3_128_hexdigest((tmp_path / "h").read_bytes()) == store.digest()
    assert store.verify(digest)


def test_digest_before_the_end_is_refused(tmp_path: Path) -> None:
    with ActivationWriter(tmp_path / "h", SHAPE, torch.float32) as writer:
        writer.append(_values())
        with pytest.raises(ValueError, match="complete"):
            _ = writer.digest


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    with ActivationWriter(tmp_path / "h", SHAPE, torch.float32) as writer:
        writer.append(_values())
        assert not (tmp_path / "h").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["h"]


def test_exception_in_the_block_leaves_the_older_file(tmp_path: Path) -> None:
    digest = _write(tmp_path / "h", _values())
    with (
        pytest.raises(KeyboardInterrupt),
        ActivationWriter(tmp_path / "h", SHAPE, torch.float32) as writer,
    ):
        writer.append(_values() + 1)
        raise KeyboardInterrupt
    assert ActivationStore(tmp_path / "h", SHAPE, torch.float32).verify(digest)
    assert [path.name for path in tmp_path.iterdir()] == ["h"]


def test_batches_wait_to_be_written_up_to_a_bound_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, begun, appended = threading.Event(), threading.Event(), []
    row = _values()[:1]
    monkeypatch.setattr(activations, "WRITE_BEHIND", 2 * row.nbytes)

    class Slow(ActivationWriter):
        def _write(self, *args: Any) -> None:
            begun.set()
            assert go.wait(10)
            super()._write(*args)

    def write() -> None:
        with Slow(tmp_path / "h", SHAPE, torch.float32) as writer:
            for each in _values().split(1):
                writer.append(each)
                appended.append(len(writer._behind))

    thread = threading.Thread(target=write)
    thread.start()
    assert begun.wait(10)
    time.sleep(0.05)
    assert appended == [1, 2]  # one in the writing thread's hands, one behind it
    go.set()
    thread.join(10)
    assert torch.equal(ActivationStore(tmp_path / "h", SHAPE, torch.float32).read(0, 5), _values())


def test_a_full_disk_met_in_the_background_is_named(tmp_path: Path) -> None:
    class Full(ActivationWriter):
        def _write(self, *args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(OutputError, match=f"{tmp_path / 'h'}: cannot be written: No space left"),
        Full(tmp_path / "h", SHAPE, torch.float32) as writer,
    ):
        writer.append(_values())
    assert not list(tmp_path.iterdir())
    assert not [t for t in threading.enumerate() if t.name.startswith("rilq-write")]


def test_what_is_written_reaches_the_disk_while_more_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(activations, "_SYNC", 2 * _values()[:1].nbytes)
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    with ActivationWriter(tmp_path / "h", SHAPE, torch.float32) as writer:
        for each in _values().split(1):
            writer.append(each)
    assert synced[:3] == [96, 192, 240]  # after two rows, after two more, and at the end


def test_too_few_rows_leave_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RilqError, match="layer 3: 4 rows of activations instead of 5"),
        ActivationWriter(tmp_path / "h", SHAPE, torch.float32, "layer 3") as writer,
    ):
        writer.append(_values()[:4])
    assert not list(tmp_path.iterdir())


def test_too_many_rows_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(RilqError, match="more than 5 rows"),
        ActivationWriter(tmp_path / "h", SHAPE, torch.float32) as writer,
    ):
        writer.append(_values())
        writer.append(_values()[:1])
    assert not list(tmp_path.iterdir())


def test_other_row_shape_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"\(5, 4, 3\)"),
        ActivationWriter(tmp_path / "h", SHAPE, torch.float32) as writer,
    ):
        writer.append(_values().transpose(1, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_value_names_label_and_row(tmp_path: Path, bad: float) -> None:
    values = _values()
    values[3, 1, 2] = bad
    with (
        pytest.raises(RilqError, match="layer 7: activations of row 3 hold NaN or infinity"),
        ActivationWriter(tmp_path / "h", SHAPE, torch.float32, "layer 7") as writer,
    ):
        writer.append(values[:2])
        writer.append(values[2:])
    assert not list(tmp_path.iterdir())


def test_overflow_in_the_stored_dtype_is_found(tmp_path: Path) -> None:
    values = _values()
    values[4, 0, 0] = 70000.0  # float16 ends at 65504
    with pytest.raises(RilqError, match="row 4 .* in float16 .*\n.*bfloat16"):
        _write(tmp_path / "h", values, torch.float16)


def test_sum_that_overflows_is_no_error(tmp_path: Path) -> None:
    values = torch.full(SHAPE, torch.finfo(torch.float32).max)
    _write(tmp_path / "h", values)
    assert torch.equal(ActivationStore(tmp_path / "h", SHAPE, torch.float32).read(0, 5), values)


def test_read_gives_a_range_and_gather_any_order(store: ActivationStore) -> None:
    assert torch.equal(store.read(1, 3), _values()[1:3])
    assert store.read(2, 2).shape == (0, 3, 4)
    assert torch.equal(store.gather([4, 0, 0, 2]), _values()[[4, 0, 0, 2]])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 6)])
def test_range_outside_the_rows_is_refused(store: ActivationStore, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="of 5"):
        store.read(start, stop)


def test_index_outside_the_rows_is_refused(store: ActivationStore) -> None:
    with pytest.raises(ValueError, match=r"\[5, -1\] of 5"):
        store.gather([0, 5, -1])


def test_batches_cover_all_rows_in_order(store: ActivationStore) -> None:
    starts, batches = zip(*store.batches(2), strict=True)
    assert starts == (0, 2, 4)
    assert torch.equal(torch.cat(batches), _values())


def test_store_without_rows_works(tmp_path: Path) -> None:
    with ActivationWriter(tmp_path / "h", (0, 3, 4), torch.bfloat16) as writer:
        writer.append(torch.empty(0, 3, 4))
    empty = ActivationStore(tmp_path / "h", (0, 3, 4), torch.bfloat16)
    assert empty.verify(writer.digest)
    assert list(empty.batches(2)) == []


@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "flipped", "empty"])
def test_every_damage_is_found(store: ActivationStore, damage: str) -> None:
    digest = store.digest()
    content = store.path.read_bytes()
    if damage == "missing":
        store.path.unlink()
    else:
        flipped = content[:100] + bytes([content[100] ^ 1]) + content[101:]
        changed = {"cut": content[:-1], "longer": content + b"\0", "flipped": flipped, "empty": b""}
        store.path.write_bytes(changed[damage])
    assert not store.verify(digest)


def test_short_file_is_named_on_read(store: ActivationStore) -> None:
    store.path.write_bytes(store.path.read_bytes()[:-1])
    assert torch.equal(store.read(0, 4), _values()[:4])
    with pytest.raises(RilqError, match=f"{store.path}: ends after 239 bytes instead of 240"):
        store.read(4, 5)


def test_missing_file_is_named_on_read(tmp_path: Path) -> None:
    with pytest.raises(RilqError, match="gone: activations cannot be read"):
        ActivationStore(tmp_path / "gone", SHAPE, torch.float32).read(0, 1)


def test_damage_surfaces_from_the_background_thread(store: ActivationStore) -> None:
    store.path.write_bytes(store.path.read_bytes()[:-1])
    batches = store.batches(2)
    assert [next(batches)[0], next(batches)[0]] == [0, 2]
    with pytest.raises(RilqError, match="ends after"):
        next(batches)


def test_delete_removes_the_file_and_may_be_repeated(store: ActivationStore) -> None:
    store.delete()
    store.delete()
    assert not store.path.exists()


def _prefetch_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("rilq-prefetch")]


def _recording(count: int, done: list[int]) -> Iterator[Callable[[], int]]:
    def reading(number: int) -> Callable[[], int]:
        def read() -> int:
            done.append(number)
            return number

        return read

    return (reading(number) for number in range(count))


def test_prefetch_reads_exactly_one_ahead() -> None:
    done: list[int] = []
    results = prefetch(_recording(5, done))
    assert done == []
    assert next(results) == 0
    deadline = time.monotonic() + 10
    while len(done) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)  # a third read would show by now
    assert done == [0, 1]
    assert list(results) == [1, 2, 3, 4]


def test_prefetch_left_early_ends_its_thread() -> None:
    for result in prefetch(_recording(5, [])):
        if result == 1:
            assert _prefetch_threads()
            break
    assert not _prefetch_threads()


def test_prefetch_raises_an_error_when_its_turn_comes() -> None:
    def fail() -> int:
        raise RilqError("disk gone")

    results = prefetch([lambda: 1, fail, lambda: 3])
    assert next(results) == 1
    with pytest.raises(RilqError, match="disk gone"):
        next(results)
    assert not _prefetch_threads()
