"""A Hub on this machine, and conversions to push to it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from upload_hub import UploadHub, serving

from rilq.converter import pipeline
from rilq.converter.options import ConvertOptions
from rilq.evaluation.figures import Divergence, Evaluation
from rilq.evaluation.push import PushOptions, PushResult, push
from rilq.formats.hub_requests import Patience
from rilq.progress import SilentReporter

REPO = "org/tiny-w2"
QUICK = Patience(delays=(0.01,) * 6)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    """An empty Hub, and a client in this process that uses it with the token of a writer."""
    with serving(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A text of 3 kB, to convert with and to measure on."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text[:3000])
    return path


@pytest.fixture(scope="module")
def converted(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, words: Path
) -> tuple[Path, Path]:
    """Two conversions of tiny_llama: rounded, in one shard and in several."""
    folders = []
    for size in ("5GB", "40kB"):
        options = ConvertOptions(
            model=str(tiny_llama),
            dataset=(str(words),),
            quantizer="rtn",
            rank=0,
            group_size=32,
            nsamples=4,
            seqlen=32,
            max_shard_size=size,
            device="cpu",
            output_dir=tmp_path_factory.mktemp("converted") / "tiny-w2",
        )
        job = pipeline.prepare(options, SilentReporter())
        folders.append(pipeline.convert(job, SilentReporter()).output)
    return folders[0], folders[1]


@pytest.fixture
def folder(converted: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(converted[0], tmp_path / "here" / "tiny-w2"))


@pytest.fixture
def measured(tiny_llama: Path, words: Path) -> dict[str, Any]:
    """Options that have perplexity measured; without them a push costs half the time."""
    return {"text": str(words), "seqlen": 32, "base": str(tiny_llama), "force": False}


@pytest.fixture
def try_push(folder: Path, words: Path) -> Callable[..., PushResult]:
    """A function that pushes the folder, unmeasured unless the options say otherwise."""

    def run(
        report: SilentReporter = SilentReporter(),  # noqa: B008 - stateless
        source: Path = folder,
        **options: Any,
    ) -> PushResult:
        usual = {"text": str(words), "force": True, "device": "cpu"}
        return push(source, PushOptions(REPO, **{**usual, **options}), report, patience=QUICK)

    return run


@pytest.fixture(scope="session")
def make_evaluation() -> Callable[..., Evaluation]:
    """`make_evaluation(perplexity, **fields)`: one of 30 windows against a base."""

    def make(perplexity: float, **fields: Any) -> Evaluation:
        usual: dict[str, Any] = {
            "tokens": 120,
            "windows": 30,
            "seqlen": 5,
            "bits_per_byte": None,
            "bits_per_weight": 2.5,
            "size_bytes": 2_000_000,
            "adapter": False,
            "dtype": "float32",
            "text": "heldout.txt@xxh3:12ab",
            "tokens_digest": "5d41",
            "against": Divergence(
                0.2, 0.1, 1.0, 2.0, 0.9, 0.8, 10.0, kl_edges=(0.1, 3.0), kl_counts=(120,)
            ),
        }
        return Evaluation(perplexity, **{**usual, **fields})

    return make
