"""Records of a dataset on the Hub, streamed from one pinned commit."""

import logging
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from rilq.calib.texts import Record
from rilq.errors import DatasetError, one_line

T = TypeVar("T")

_PATIENCE = 60.0  # seconds to wait for the Hub's next document
_AHEAD = 64  # records fetched before they are wanted


@dataclass(frozen=True)
class HubSet:
    """What `datasets.load_dataset` is asked for, and what is made of it.

    Attributes:
        between: what joins all records to one document; None keeps them apart.
        first: so many records are taken; None for all.
        form: that, for people.
    """

    name: str
    split: str = "train"
    config: str | None = None
    file: str | None = None
    between: str | None = None
    first: int | None = None
    form: str = ""


def find_commit(name: str) -> str:
    """The commit of a Hub dataset: pins the stream, and fails quickly without a network.

    Raises:
        DatasetError: there is no such dataset, or no network.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, timeout=_PATIENCE / 4).sha)
    except Exception as err:  # httpx, httpx2, requests or the Hub's own, as versions go by
        raise _hub_failure(name, err) from err


def hub_records(hub: HubSet, revision: str) -> Iterator[Record]:
    """The records of a dataset at one commit, read ahead while they are used.

    Raises:
        DatasetError: it cannot be read, or the Hub gives no answer for a minute.
    """
    with _quiet_hub():
        try:
            records = islice(_patient(_stream(hub, revision), _PATIENCE), hub.first)
            for number, record in enumerate(records, 1):
                yield f"{hub.name} record {number}", record
        except Exception as err:  # any exception of datasets, fsspec, pyarrow or the HTTP client
            raise _hub_failure(hub.name, err) from err


def _stream(hub: HubSet, revision: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    files = {hub.split: hub.file} if hub.file else None
    yield from datasets.load_dataset(
        hub.name,
        hub.config,
        data_files=files,
        split=hub.split,
        revision=revision,
        streaming=True,
    )


def _hub_failure(name: str, err: Exception) -> DatasetError:
    return DatasetError(
        f"{name}: cannot be read from the Hub ({one_line(err)}); "
        "check the name and the network, or give a local file: --dataset FILE"
    )


def _patient(items: Iterable[T], seconds: float) -> Iterator[T]:
    """The same items, read ahead on a thread; TimeoutError if the next one takes too long.

    The client libraries retry for minutes and have no switch for it; a daemon thread may be left
    behind in such a wait without holding up the program's end.
    """
    ready: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue(maxsize=_AHEAD)
    stop = threading.Event()

    def deliver(item: T | None, error: Exception | None) -> None:
        while not stop.is_set():
            try:
                return ready.put((item, error), timeout=0.2)
            except queue.Full:
                continue

    def pump() -> None:
        try:
            for item in items:
                deliver(item, None)
                if stop.is_set():
                    return
            deliver(None, None)
        except Exception as err:  # raised again where the items are wanted
            deliver(None, err)

    threading.Thread(target=pump, name="rilq-hub", daemon=True).start()
    try:
        while True:
            item, error = ready.get(timeout=seconds)
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    except queue.Empty as err:
        raise TimeoutError(f"no answer for {seconds:.0f} s") from err
    finally:
        stop.set()


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """No progress bars and no retry messages of the client libraries; what was set comes back."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    bars = datasets.are_progress_bars_disabled()
    levels = [(log, log.get_verbosity()) for log in (datasets.logging, hub_logging)]
    datasets.disable_progress_bars()
    for log, _ in levels:
        log.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in levels:
            log.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
