"""A conversion straight from a Hub, with the real client in a real process."""

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save

from rilq import cli
from rilq.converter import workdir

SERVER = Path(__file__).parents[1] / "unit" / "formats" / "local_hub.py"
REPO = "org/tiny"
DEEP = "org/deep"


@pytest.fixture
def hub(tiny_llama: Path) -> Iterator[Any]:
    """A local Hub that holds tiny_llama, with a pickle beside its shards."""
    spec = importlib.util.spec_from_file_location("local_hub", SERVER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["local_hub"] = module
    spec.loader.exec_module(module)
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    with module.LocalHub() as server:
        server.add(REPO, {**files, "pytorch_model.bin": b"not to be fetched"})
        yield server
    del sys.modules["local_hub"]


@pytest.fixture(scope="session")
def deep_llama(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """A Llama of six decoder layers in seven shards or so, most of which hold parts of two."""
    folder = tmp_path_factory.mktemp("models") / "deep-llama"
    return make_model(folder, max_shard_size="180KB", num_hidden_layers=6)


@pytest.fixture
def deep_hub(hub: Any, deep_llama: Path) -> Any:
    """The Hub, with deep_llama too."""
    hub.add(DEEP, {path.name: path.read_bytes() for path in deep_llama.iterdir()})
    return hub


QUICK = ("--quantizer", "rtn", "--rank", 0)


@pytest.fixture
def from_hub(
    deep_hub: Any, tmp_path: Path, arguments: Callable[..., list[str]], run_cli: Callable[..., Any]
) -> Callable[..., Any]:
    """A quick conversion of the Hub's deep_llama in a forked child; waits are cut short."""

    def run(*more: object, first: Callable[[], None] | None = None, **options: Any) -> Any:
        def use_the_hub() -> None:
            use_hub(deep_hub, tmp_path / "hf")
            if first is not None:
                first()

        words = arguments(tmp_path, *QUICK, *more, model=Path(DEEP), **options)
        return run_cli(*words, first=use_the_hub)

    return run


@pytest.fixture
def start_on_hub(
    deep_hub: Any,
    tmp_path: Path,
    arguments: Callable[..., list[str]],
    start_child: Callable[..., Any],
) -> Callable[..., Any]:
    """As `from_hub`; returns the running child."""

    def start(*more: object) -> Any:
        def command() -> None:
            use_hub(deep_hub, tmp_path / "hf")
            sys.argv = ["rilq", *arguments(tmp_path, *QUICK, *more, model=Path(DEEP))]
            cli.main()

        return start_child(command)

    return start


def wait_for_part(folder: Path, size: int) -> None:
    """Until so many bytes of some shard have arrived."""
    sizes: list[int] = []
    while size not in sizes:
        time.sleep(0.01)
        with suppress(OSError):  # it came and went
            sizes = [path.stat().st_size for path in folder.rglob("*.part")]


def use_hub(hub: Any, home: Path) -> None:
    """Point this process's client to the local Hub, as the environment does for a new process."""
    constants.HF_HUB_OFFLINE = False
    constants.ENDPOINT = hub.url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = str(home / "hub")
    constants.HF_TOKEN_PATH = str(home / "token")
    os.environ["NO_PROXY"] = "127.0.0.1"
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(seconds / 100)  # between attempts, the client's too


@pytest.fixture(scope="module")
def kept_hashes() -> dict[str, str]:
    """What `folder_hashes` finds, once for all tests here."""
    return {}


@pytest.fixture
def folder_hashes(
    kept_hashes: dict[str, str],
    deep_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
    arguments: Callable[..., list[str]],
    run_cli: Callable[..., Any],
    hashes: Callable[[Path], dict[str, str]],
) -> dict[str, str]:
    """What the same conversion of the folder gives; rilq.json, which names the source, left out."""
    if not kept_hashes:
        folder = tmp_path_factory.mktemp("local")
        assert run_cli(*arguments(folder, *QUICK, model=deep_llama)).code == 0
        kept_hashes |= without_manifest(hashes(folder / "out"))
    return kept_hashes


def without_manifest(found: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in found.items() if name != "rilq.json"}


class ShardWatch:
    """Looks at a folder all the time: how many shards there are at most, whole or in part."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.most_bytes, self.looks = folder, 0, 0, 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def look(self) -> None:
        while not self.stop.wait(0.0005):
            sizes: dict[str, int] = {}
            with suppress(OSError):
                for entry in os.scandir(self.folder):
                    with suppress(OSError):
                        sizes[Path(entry).stem] = entry.stat().st_size
            self.looks += 1
            self.most = max(self.most, len(sizes))
            self.most_bytes = max(self.most_bytes, sum(sizes.values()))

    def __enter__(self) -> "ShardWatch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def shards_in(folder: Path) -> list[Path]:
    """Files of weights, whole or in part."""
    return [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".part")]


def test_a_bad_network_and_three_shards_of_disk_give_the_bytes_that_the_folder_gives(
    deep_hub: Any,
    from_hub: Callable[..., Any],
    tmp_path: Path,
    deep_llama: Path,
    folder_hashes: dict[str, str],
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    deep_hub.fail_every({"fail": 2, "reset": 3, "corrupt": 5, "429": 4})
    shards = list(deep_llama.glob("*.safetensors"))
    assert len(shards) >= 6
    with ShardWatch(tmp_path / "out.rilq-work" / "source") as watch:
        ended = from_hub("--evict")
    assert ended.code == 0, ended.err
    assert without_manifest(hashes(tmp_path / "out")) == folder_hashes
    assert 1 < watch.most <= 3, watch.looks
    assert not shards_in(tmp_path / "hf")  # the user's cache stays without weights
    assert not (tmp_path / "out.rilq-work").exists()


def killed_at(call: int) -> Callable[[], None]:
    """For `first`: kill -9 at the `call`-th commit point of the child."""

    def arrange() -> None:
        calls = itertools.count(1)

        def reached(_point: str) -> None:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)

        workdir.reached = reached

    return arrange


def bytes_of_shards(hub: Any, folder: Path) -> dict[str, int]:
    """What the CDN sent of each shard besides its header, in multiples of the shard's size."""
    sent = {
        path.name: sum(
            request.sent
            for request in hub.got(f"GET /{path.name}/")
            if request.origin == "cdn" and request.range != "bytes=0-65535"
        )
        / path.stat().st_size
        for path in folder.glob("*.safetensors")
    }
    return {name: round(times, 3) for name, times in sent.items()}


@pytest.mark.parametrize(
    ("rotate", "call"), [((), 8), (("--rotate",), 17)], ids=["plain", "rotated"]
)
def test_killed_again_and_again_only_the_shard_in_flight_is_fetched_twice(
    rotate: tuple[str, ...],
    call: int,
    deep_hub: Any,
    from_hub: Callable[..., Any],
    tmp_path: Path,
    deep_llama: Path,
    arguments: Callable[..., list[str]],
    run_cli: Callable[..., Any],
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    with ShardWatch(tmp_path / "out.rilq-work" / "source") as watch:
        kills = 0
        while (ended := from_hub("--evict", *rotate, first=killed_at(call))).code != 0:
            kills += 1
            assert ended.code == -signal.SIGKILL and kills < 20, ended.err
    assert kills > 1 and watch.most <= 3
    # These shards fit into a socket's buffer, so one may have been sent whole, but not yet read.
    sent = bytes_of_shards(deep_hub, deep_llama).values()
    assert sum(sent) - len(sent) <= kills
    (tmp_path / "local").mkdir()
    local = arguments(tmp_path / "local", *QUICK, *rotate, model=deep_llama)
    assert run_cli(*local).code == 0
    expected = without_manifest(hashes(tmp_path / "local" / "out"))
    assert without_manifest(hashes(tmp_path / "out")) == expected


def test_a_stored_head_that_is_the_embedding_is_not_asked_for_again(
    deep_hub: Any,
    deep_llama: Path,
    tmp_path: Path,
    make_model: Callable[..., Path],
    from_hub: Callable[..., Any],
) -> None:
    tied = make_model(tmp_path / "tied", num_hidden_layers=3, tie_word_embeddings=True)
    tensors = load_file(tied / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    files = {p.name: p.read_bytes() for p in tied.iterdir() if p.name != "model.safetensors"}
    shards = {f"{n:02}.safetensors": t for n, t in enumerate([head, tensors])}
    weight_map = {name: shard for shard, each in shards.items() for name in each}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    deep_hub.add(DEEP, {**files, **{name: save(each) for name, each in shards.items()}})
    assert from_hub("--evict", first=killed_at(20)).code == -signal.SIGKILL
    assert from_hub("--evict").code == 0
    whole = [r for r in deep_hub.got("GET /00.safetensors") if r.origin == "cdn"]
    assert len(whole) == 2  # its header, and once the head to compare


@pytest.mark.parametrize("mode", [(), ("--evict",)], ids=["cache", "evict"])
def test_kill_9_in_a_download_costs_only_the_bytes_in_flight(
    mode: tuple[str, ...],
    deep_hub: Any,
    from_hub: Callable[..., Any],
    start_on_hub: Callable[..., Any],
    tmp_path: Path,
    deep_llama: Path,
    folder_hashes: dict[str, str],
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    third = sorted(deep_llama.glob("*.safetensors"))[2]
    half = third.stat().st_size // 2
    deep_hub.fail_next("stall", on=f"GET /{third.name}/.* whole")

    child = start_on_hub(*mode)
    wait_for_part(tmp_path, half)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
    assert from_hub(*mode).code == 0
    asked = [r.range for r in deep_hub.got(f"GET /{third.name}/") if r.range != "bytes=0-65535"]
    assert asked == [None, f"bytes={half}-{third.stat().st_size - 1}"]
    assert without_manifest(hashes(tmp_path / "out")) == folder_hashes
    assert not list(tmp_path.rglob("*.part"))


def check_unmapped() -> None:
    """That no deleted shard still takes room because a tensor of it is held."""
    deleted = [line for line in Path("/proc/self/maps").read_text().splitlines()
               if "/source/" in line and line.endswith("(deleted)")]  # fmt: skip
    assert not deleted, deleted


def test_max_disk_bounds_the_bytes_of_the_source(
    from_hub: Callable[..., Any],
    tmp_path: Path,
    deep_llama: Path,
    folder_hashes: dict[str, str],
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    def first() -> None:
        workdir.reached = lambda _point: check_unmapped()

    with ShardWatch(tmp_path / "out.rilq-work" / "source") as watch:
        ended = from_hub("--max-disk", "400kB", first=first)
    assert ended.code == 0, ended.err
    assert 0 < watch.most_bytes <= 400_000
    assert without_manifest(hashes(tmp_path / "out")) == folder_hashes


def test_the_plan_counts_the_disk_of_each_mode(
    from_hub: Callable[..., Any], deep_hub: Any, deep_llama: Path, tmp_path: Path
) -> None:
    def needed(*mode: object) -> int:
        ended = from_hub(*mode, "--json", command="plan")
        assert ended.code == 0, ended.err
        return sum(disk["needed"] for disk in json.loads(ended.out)["disks"])

    sizes = sorted(path.stat().st_size for path in deep_llama.glob("*.safetensors"))
    whole = needed()
    assert whole - needed("--evict") == sum(sizes[:-3])
    assert whole - needed("--max-disk", "400kB") == sum(sizes) - 400_000
    assert not shards_in(tmp_path)  # nothing but headers was fetched


def test_shards_in_the_users_cache_are_used_from_there_and_stay(
    from_hub: Callable[..., Any],
    deep_hub: Any,
    tmp_path: Path,
    deep_llama: Path,
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    assert from_hub("-o", tmp_path / "first").code == 0
    planned = from_hub(command="plan")
    assert planned.code == 0 and "downloads" not in planned.out
    before, sent = hashes(tmp_path / "hf"), len(deep_hub.got("GET /model-"))
    with ShardWatch(tmp_path / "out.rilq-work" / "source") as watch:
        assert from_hub("--evict").code == 0
    assert watch.most == 0 and len(deep_hub.got("GET /model-")) == sent
    assert hashes(tmp_path / "hf") == before


def test_a_local_folder_is_never_evicted(
    tmp_path: Path, run_cli: Callable[..., Any], arguments: Callable[..., list[str]]
) -> None:
    ended = run_cli(*arguments(tmp_path, *QUICK, "--max-disk", "1kB"))
    assert ended.code == 0 and "local folder" in ended.err
    # That the folder is as it was, a fixture of all tests here checks.


def test_a_shard_that_cannot_be_had_is_named_and_what_came_before_it_is_kept(
    deep_hub: Any,
    from_hub: Callable[..., Any],
    deep_llama: Path,
) -> None:
    fifth = sorted(deep_llama.glob("*.safetensors"))[4].name
    deep_hub.fail_next("404", 100, on=f"GET /{fifth}/.* whole")
    ended = from_hub("--evict")
    assert ended.code == 2 and "Traceback" not in ended.err
    assert f"rilq: {DEEP}/{fifth}: " in ended.err
    deep_hub.faults.clear()
    resumed = from_hub("--evict")
    assert resumed.code == 0 and "continuing after 'layer " in resumed.err
    assert max(bytes_of_shards(deep_hub, deep_llama).values()) == 1


@pytest.mark.parametrize("mode", [(), ("--evict",)], ids=["cache", "evict"])
def test_ctrl_c_in_a_stalled_download_stops_at_once_and_goes_on_later(
    mode: tuple[str, ...],
    deep_hub: Any,
    start_on_hub: Callable[..., Any],
    from_hub: Callable[..., Any],
    tmp_path: Path,
    deep_llama: Path,
) -> None:
    first = sorted(deep_llama.glob("*.safetensors"))[0]
    deep_hub.fail_next("stall", on=f"GET /{first.name}/.* whole")

    child = start_on_hub(*mode)
    wait_for_part(tmp_path, first.stat().st_size // 2)
    os.kill(child.pid, signal.SIGINT)
    started = time.monotonic()
    ended = child.wait()
    assert ended.code == 75 and "SIGINT" in ended.err and "Traceback" not in ended.err
    assert time.monotonic() - started < 5
    assert from_hub(*mode).code == 0
    assert max(bytes_of_shards(deep_hub, deep_llama).values()) == 1


def test_a_cache_on_a_volume_that_is_too_small_is_refused_before_any_download(
    from_hub: Callable[..., Any],
    deep_hub: Any,
    tmp_path: Path,
    mount_tmpfs: Callable[[Path, str], None],
    skip_without_mounts: Callable[[Any], None],
) -> None:
    ended = from_hub(first=lambda: mount_tmpfs(tmp_path / "hf", "size=512k"))
    skip_without_mounts(ended)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert f"rilq: {tmp_path / 'hf'}" in ended.err and "needed for downloads" in ended.err
    assert "HF_HOME" in ended.err
    assert not [r for r in deep_hub.got("GET /model-") if r.range is None and r.origin == "cdn"]


def test_a_branch_that_moves_between_two_runs_changes_nothing(
    from_hub: Callable[..., Any],
    deep_hub: Any,
    deep_llama: Path,
    tmp_path: Path,
    folder_hashes: dict[str, str],
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    assert from_hub("--evict", first=killed_at(10)).code == -signal.SIGKILL
    before = deep_hub.repositories[DEEP].branches["main"]
    deep_hub.add(DEEP, {p.name: p.read_bytes()[::-1] for p in deep_llama.iterdir()})
    ended = from_hub("--evict")
    assert ended.code == 0 and f"is commit {before}" in ended.err, ended.err
    assert without_manifest(hashes(tmp_path / "out")) == folder_hashes
    source = json.loads((tmp_path / "out" / "rilq.json").read_text())["source"]
    assert source["commit"] == before


def test_a_stopped_evaluation_goes_on_with_the_commits_that_it_began_with(
    run_cli: Callable[..., Any], deep_hub: Any, deep_llama: Path, calib: Path, tmp_path: Path
) -> None:
    def evaluate(model: object, first: Callable[[], None] | None = None) -> Any:
        def use_the_hub() -> None:
            use_hub(deep_hub, tmp_path / "hf")
            if first is not None:
                first()

        places = ("--work-dir", tmp_path / "work", "--device", "cpu", "--json")
        words = ("--text", calib, "--seqlen", 32, "--against", DEEP, *places)
        return run_cli("eval", model, *words, first=use_the_hub)

    assert evaluate(DEEP, first=killed_at(20)).code == -signal.SIGKILL
    deep_hub.add(DEEP, {p.name: p.read_bytes()[::-1] for p in deep_llama.iterdir()})
    ended = evaluate(DEEP)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["against"]["kl_max"], found["layer_errors"]) == (0, [0] * 6)
    local = run_cli("eval", deep_llama, "--text", calib, "--seqlen", 32, "--json",
                    "--device", "cpu", "--work-dir", tmp_path / "work")  # fmt: skip
    assert json.loads(local.out)["perplexity"] == found["perplexity"]


@pytest.mark.parametrize("mode", [(), ("--evict",)], ids=["cache", "evict"])
def test_a_repository_deleted_once_all_layers_are_done_is_not_missed(
    mode: tuple[str, ...],
    from_hub: Callable[..., Any],
    deep_hub: Any,
    tmp_path: Path,
    folder_hashes: dict[str, str],
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    assert from_hub(*mode, first=killed_at(40)).code == -signal.SIGKILL
    deep_hub.repositories.clear()
    ended = from_hub(*mode)
    assert ended.code == 0 and "warning: org/deep: is not on" in ended.err, ended.err
    assert without_manifest(hashes(tmp_path / "out")) == folder_hashes


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ((), r"the cache lacks \d files of commit .*: model-0000\d-of-00007.safetensors"),
        (("--evict",), r"org/deep/model-0000\d-of-00007.safetensors: not in the cache"),
    ],
    ids=["cache", "evict"],
)
def test_a_repository_deleted_before_all_was_fetched_says_what_is_missing(
    mode: tuple[str, ...],
    words: str,
    from_hub: Callable[..., Any],
    deep_hub: Any,
) -> None:
    assert from_hub(*mode, first=killed_at(9)).code == -signal.SIGKILL
    deep_hub.repositories.clear()
    ended = from_hub(*mode)
    assert ended.code == 2 and re.search(words, ended.err), ended.err


def test_the_token_is_in_no_file_and_no_line_and_never_at_the_cdn(
    from_hub: Callable[..., Any], deep_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep_hub.repositories[DEEP].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    deep_hub.fail_every({"fail": 3, "429": 7})
    ended = from_hub("--evict", "--keep-work", "--log-file", tmp_path / "log")
    assert ended.code == 0, ended.err
    requests = {origin: [r for r in deep_hub.requests if r.origin == origin] for origin in
                ("hub", "cdn")}  # fmt: skip
    assert len(requests["cdn"]) > 10 and not any(r.authorized for r in requests["cdn"])
    assert all(r.authorized for r in requests["hub"])
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"hf_member" in content for content in [*written, ended.err.encode()])


@pytest.fixture
def run_on_hub(
    hub: Any, tmp_path: Path, arguments: Callable[..., list[str]], tiny_llama: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_on_hub(*more options)`: the command with the Hub's model in the place of the folder."""

    def run(*more: object, command: str = "convert") -> subprocess.CompletedProcess[str]:
        words = arguments(tmp_path, *more, command=command)
        words = [REPO if word == str(tiny_llama) else word for word in words]
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return subprocess.run(
            [sys.executable, "-m", "rilq", *words], capture_output=True, text=True, env=environment
        )

    return run


def test_hub_model_gives_the_bytes_that_the_folder_gives(
    run_on_hub: Callable[..., subprocess.CompletedProcess[str]],
    hub: Any,
    tmp_path: Path,
    run_cli: Callable[..., Any],
    arguments: Callable[..., list[str]],
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    hub.fail_next("reset", on=f"GET /{REPO}/resolve")
    ended = run_on_hub()
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "local").mkdir()
    assert run_cli(*arguments(tmp_path / "local")).code == 0
    from_hub, from_folder = hashes(tmp_path / "out"), hashes(tmp_path / "local" / "out")
    assert from_hub.pop("rilq.json") != from_folder.pop("rilq.json")  # it names the source
    assert from_hub == from_folder
    source = json.loads((tmp_path / "out" / "rilq.json").read_text())["source"]
    assert source["name"] == REPO and len(source["commit"]) == 40
    assert not any("pytorch_model.bin" in str(p) for p in (tmp_path / "hf").rglob("*"))


def test_unknown_revision_is_one_line_with_a_remedy(from_hub: Callable[..., Any]) -> None:
    ended = from_hub("--revision", "nowhere")
    assert ended.code == 2 and len(ended.err.splitlines()) == 1
    assert "has no revision nowhere; its branches and tags are listed at" in ended.err


def test_compare_takes_the_base_that_the_manifest_names_from_the_hub(
    from_hub: Callable[..., Any],
    deep_hub: Any,
    tmp_path: Path,
    calib: Path,
    run_cli: Callable[..., Any],
) -> None:
    converted = from_hub()
    assert converted.code == 0, converted.err
    ended = run_cli(
        *("compare", DEEP, tmp_path / "out", "--text", calib, "--seqlen", 32, "--device", "cpu"),
        *("--db", tmp_path / "rilq.db", "--json"),
        first=lambda: use_hub(deep_hub, tmp_path / "hf"),
    )
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["baseline"]["label"] == f"{DEEP} (run 1)"
    assert told["baseline"]["figures"]["kl_max"] == 0.0
    assert told["candidates"][0]["figures"]["kl_mean"] > 0


@pytest.mark.slow
def test_several_processes_fetch_each_shard_once(
    deep_hub: Any, tmp_path: Path, arguments: Any, together: Any, deep_llama: Path
) -> None:
    words = arguments(tmp_path, *QUICK, model=Path(DEEP))
    ended = together(2, words, act=lambda: use_hub(deep_hub, tmp_path / "hf"))
    assert [each.code for each in ended] == [0, 0], ended
    heads = 2**16  # bytes that are asked for to read a header, by every process
    whole = [r.path for r in deep_hub.requests if r.origin == "cdn" and r.sent > heads]
    assert len(whole) == len(set(whole)) == len(list(deep_llama.glob("*.safetensors")))


def test_the_two_passes_of_resq_fetch_every_shard_twice_and_keep_three(
    deep_hub: Any,
    tmp_path: Path,
    deep_llama: Path,
    calib: Path,
    run_cli: Callable[..., Any],
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    def convert(model: object, folder: Path, *more: object, first: Any = None) -> Any:
        quick = "--method resq --nsamples 4 --seqlen 16 --device cpu --no-report".split()
        places = ("--dataset", calib, "-o", folder / "out")
        return run_cli("convert", model, *quick, *places, *more, first=first)

    def hub(call: int) -> Callable[[], None]:
        def arrange() -> None:
            use_hub(deep_hub, tmp_path / "hf")
            killed_at(call)()

        return arrange

    with ShardWatch(tmp_path / "out.rilq-work" / "source") as watch:
        stopped = convert(DEEP, tmp_path, "--evict", first=hub(14))  # in the first pass
        assert stopped.code == -signal.SIGKILL
        ended = convert(DEEP, tmp_path, "--evict", first=hub(10**6))
    assert ended.code == 0, ended.err
    assert 1 < watch.most <= 3, watch.looks
    sent = bytes_of_shards(deep_hub, deep_llama).values()
    assert min(sent) >= 2 and sum(sent) <= 2 * len(sent) + 2  # and what was in flight when killed
    (tmp_path / "local").mkdir()
    assert convert(deep_llama, tmp_path / "local").code == 0
    expected = without_manifest(hashes(tmp_path / "local" / "out"))
    assert without_manifest(hashes(tmp_path / "out")) == expected
