"""What goes wrong around a conversion: one screen that names the culprit, and nothing lost."""

import fcntl
import json
import os
import pty
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rilq.converter import pipeline, workdir
from rilq.errors import RilqError
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder
from rilq.progress import SilentReporter

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def check_refused(ended: Any, *named: object, code: int = 2) -> None:
    """One screen without a traceback that names every one of `named`."""
    assert ended.code == code, ended
    assert ended.err.splitlines()[-1] and len(ended.err.splitlines()) < 40
    assert "Traceback" not in ended.err and ended.out == ""
    for word in named:
        assert str(word) in ended.err, (word, ended.err)


# -- calibration text ------------------------------------------------------------------------------

TEXTS: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("calib.txt", None, "calib.txt"),
    "empty": ("calib.txt", b"", "empty"),
    "only white space": ("calib.txt", b" \n\t\n" * 50, "calib.txt"),
    "too short": ("calib.txt", b"ten words of text are not enough for twelve rows", "needs 384"),
    "not UTF-8": ("calib.txt", b"caf\xe9 " * 2000, "UTF-8"),
    "JSON lines without the key": ("calib.jsonl", b'{"body": "words"}\n' * 50, "line 1"),
    "JSON lines that are not JSON": ("calib.jsonl", b'{"text": "words"}\nwords\n', "line 2"),
}


@pytest.mark.parametrize("fault", TEXTS)
def test_a_calibration_text_that_cannot_be_used_is_named(
    fault: str, tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    name, content, word = TEXTS[fault]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ended = run_cli(*arguments(tmp_path, dataset=tmp_path / name))
    check_refused(ended, tmp_path / name, word)
    assert not list(tmp_path.glob("out.rilq-work/*.safetensors"))  # no model work was begun


def test_after_a_refused_text_the_corrected_command_needs_no_other_work_folder(
    tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    check_refused(run_cli(*arguments(tmp_path, "--nsamples", 1000)), "--nsamples")
    assert run_cli(*arguments(tmp_path, "--quantizer", "rtn", "--rank", 0)).code == 0


# -- training --------------------------------------------------------------------------------------


def test_a_diverging_training_ends_with_the_last_good_state_kept(
    tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    ended = run_cli(*arguments(tmp_path, "--lr", "1e30", "--steps", 20, "--patience", 20))
    check_refused(ended, "training diverged", "smaller --lr than 1e+30", code=1)
    assert list(tmp_path.glob("out.rilq-work/train-*.safetensors"))
    assert not (tmp_path / "out").exists()


def test_a_training_that_came_to_nothing_is_not_published(
    tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    # Too short for three bad steps in a row: step 0 wins, and the NaN is no number in rilq.json.
    ended = run_cli(*arguments(tmp_path, "--lr", "1e30", "--steps", 2))
    assert ended.code == 0, ended.err
    quality = json.loads((tmp_path / "out" / "rilq.json").read_text())["quality"]
    assert quality["best_step"] == 0 and quality["history"][-1] == [2, None]


# -- options ---------------------------------------------------------------------------------------

BAD_OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bits": ("--bits 5", ("--bits 5", "2, 3, 4, 8")),
    "group size": ("--group-size 100", ("--group-size 100", "32, 64, 128")),
    "group size that does not divide": ("--group-size 128", ("--group-size 128", "q_proj (64)")),
    "quantizer": ("--quantizer awq", ("--quantizer awq", "rtn, lsq, hqq, gptq")),
    "recipe": ("--recipe slow", ("--recipe slow", "fast, default, best, paper")),
    "clip": ("--clip hard", ("--clip hard", "none, search, lsq")),
    "clip of no use": ("--quantizer lwc --clip lsq", ("--clip lsq", "lwc finds its own grid")),
    "layer steps": ("--layer-steps 0", ("--layer-steps 0", "at least 1")),
    "train": ("--train codes", ("--train codes", "none, adapters, scales, adapters+scales, all")),
    "nothing to train": ("--rank 0 --train adapters", ("--train adapters", "--rank 0")),
    "scales beside a lora": ("--adapter lora --train all", ("--train all", "--adapter pooled")),
    "loss": ("--loss mae", ("--loss mae", "mse, ce, kl", "0.5*mse+kl")),
    "loss weight": ("--loss 0*kl", ("--loss 0*kl",)),
    "target": ("--target last", ("--target last", "post-norm, pre-norm, logits")),
    "target of no use": ("--loss kl --target logits", ("--target logits", "has no mse")),
    "target that kl cannot use": (
        "--loss mse+kl --target pre-norm",
        ("--loss mse+kl", "use --target post-norm"),
    ),
    "schedule": ("--schedule cosine", ("--schedule cosine", "decay, constant")),
    "negative rank": ("--rank -1", ("--rank -1",)),
    "rank above the widths": ("--adapter lora --rank 33", ("--rank 33", "--adapter lora", "32")),
    "no number": ("--rank many", ("--rank",)),
    "alpha": ("--alpha 0", ("--alpha 0",)),
    "alpha nan": ("--alpha nan", ("--alpha nan",)),
    "learning rate": ("--lr -0.1", ("--lr -0.1",)),
    "scales learning rate": ("--scales-lr 0", ("--scales-lr 0.0",)),
    "steps": ("--steps 0", ("--steps 0", "at least 1")),
    "batch size": ("--batch-size 0", ("--batch-size 0",)),
    "validation": ("--val-every 0", ("--val-every 0",)),
    "validation share": ("--val-ratio 1", ("--val-ratio 1",)),
    "no row to train on": ("--val-ratio 0.99", ("--val-ratio 0.99",)),
    "rows": ("--nsamples 1", ("--nsamples 1", "at least 2")),
    "sequence length": ("--seqlen 129", ("--seqlen 129", "max_position_embeddings is 128")),
    "seed": ("--seed 99999999999999999999", ("--seed",)),
    "skip": ("--skip no_such_thing", ("--skip", "no_such_thing", "q_proj")),
    "bits for": ("--bits-for o_proj=5", ("--bits-for o_proj=5",)),
    "bits for without bits": ("--bits-for o_proj", ("--bits-for o_proj", "PATTERN=BITS")),
    "average bits": ("--avg-bits 4.5", ("--avg-bits 4.5", "between --bits (2) and 4")),
    "average bits nan": ("--avg-bits nan", ("--avg-bits nan", "between")),
    "average below the base": ("--bits 3 --avg-bits 2.5", ("--avg-bits 2.5", "--bits (3)")),
    "average and bits for": ("--avg-bits 3 --bits-for o_proj=4", ("--avg-bits", "--bits-for")),
    "average and closed form": (
        "--quantizer gptq --avg-bits 3 --adapter-init eora",
        ("--avg-bits", "--adapter-init eora"),
    ),
    "embedding": ("--embed-bits 3", ("--embed-bits 3", "16, 8, 4")),
    "head": ("--head-bits 2", ("--head-bits 2", "16, 8, 4")),
    "head twice": ("--head-bits 4 --skip lm_head", ("--head-bits 4", "--skip lm_head")),
    "shard size": ("--max-shard-size 5XB", ("5XB", "5GB")),
    "device": ("--device warp", ("--device warp", "--device cpu")),
    "dtype": ("--dtype float64", ("--dtype float64", "bfloat16")),
    "student": ("--student lazy", ("--student lazy", "dense, packed, offload")),
    "codes offloaded": ("--student offload --train all+codes", ("--train all+codes", "packed")),
    "device memory": ("--device-memory lots", ("'lots'", "5GB")),
    "device memory of a CPU": (
        "--device-memory 24GB",
        ("--device-memory 24GB", "cpu", "leave it out"),
    ),
    "resume": ("--resume maybe", ("--resume maybe", "auto, never, required")),
    "two at once": ("--bits 5 --rank -1", ("--bits 5", "--rank -1")),
    "no such option": ("--colour red", ("--colour",)),
}


@pytest.mark.parametrize("fault", BAD_OPTIONS)
def test_an_impossible_option_is_refused_before_anything_is_written(
    fault: str, tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    given, named = BAD_OPTIONS[fault]
    check_refused(run_cli(*arguments(tmp_path, *given.split())), *named)
    assert not list(tmp_path.iterdir())


# -- places ----------------------------------------------------------------------------------------


def test_an_output_in_the_source_folder_is_refused(
    tiny_llama: Path, tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    for output in (tiny_llama, tiny_llama / "out", tiny_llama.parent):
        ended = run_cli(*arguments(tmp_path, "-o", output, "--work-dir", tmp_path / "work"))
        check_refused(ended, output, "source folder", "--output-dir")
    assert not list(tmp_path.iterdir())


def test_a_work_folder_in_the_source_folder_is_refused(
    tiny_llama: Path, tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    for work in (tiny_llama, tiny_llama / "work"):
        ended = run_cli(*arguments(tmp_path, "--work-dir", work))
        check_refused(ended, work, "inside the source folder", "--work-dir")


def test_an_output_in_the_work_folder_is_refused(
    tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    ended = run_cli(*arguments(tmp_path, "--work-dir", tmp_path))
    check_refused(ended, tmp_path / "out", "inside the work folder", "--output-dir")


def test_an_output_folder_with_files_is_refused_and_keeps_them(
    tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    check_refused(run_cli(*arguments(tmp_path)), tmp_path / "out", "not empty")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, run_cli: Any, arguments: Any) -> None:
    (tmp_path / "out").write_text("mine")
    check_refused(run_cli(*arguments(tmp_path)), tmp_path / "out", "is a file")


def test_a_work_folder_with_other_files_is_refused(
    tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    ended = run_cli(*arguments(tmp_path, "--work-dir", tmp_path / "work"))
    check_refused(ended, tmp_path / "work", "thesis.txt", "--work-dir")
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("option", ["--output-dir", "--work-dir"])
def test_a_place_that_cannot_be_written_is_refused(
    option: str, tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    place = Path("/proc/rilq-test")  # nobody can make a folder there, not even root
    check_refused(run_cli(*arguments(tmp_path, option, place)), "/proc")
    assert not list(tmp_path.iterdir())


# -- volumes ---------------------------------------------------------------------------------------


def test_a_read_only_volume_is_refused(
    tmp_path: Path, run_cli: Any, arguments: Any, mount_tmpfs: Any, skip_without_mounts: Any
) -> None:
    volume = tmp_path / "volume"
    ended = run_cli(
        *arguments(tmp_path, "-o", volume / "out"), first=lambda: mount_tmpfs(volume, "ro")
    )
    skip_without_mounts(ended)
    check_refused(ended, volume / "out", "Read-only file system")


@pytest.mark.parametrize(
    ("option", "holds"), [("--output-dir", "the output"), ("--work-dir", "the work folder")]
)
def test_a_volume_that_is_too_small_is_refused_before_any_work(
    option: str,
    holds: str,
    tmp_path: Path,
    run_cli: Any,
    arguments: Any,
    mount_tmpfs: Any,
    skip_without_mounts: Any,
) -> None:
    volume = tmp_path / "volume"

    def first() -> None:
        mount_tmpfs(volume, "size=128k")
        workdir.reached = lambda point: os.kill(os.getpid(), signal.SIGKILL)  # work has begun

    more = ("--work-dir", tmp_path / "work", option, volume / "place")
    ended = run_cli(*arguments(tmp_path, *more), first=first)
    skip_without_mounts(ended)
    check_refused(ended, f"{volume}: ", f" needed for {holds}, 131 kB free")


@pytest.mark.parametrize("moment", ["rows:cleaned", "outer:cleaned", "train:cleaned"])
def test_a_volume_that_fills_up_is_named_and_the_rerun_finishes(
    moment: str,
    tmp_path: Path,
    in_child: Any,
    quick: Any,
    hashes: Any,
    mount_tmpfs: Any,
    skip_without_mounts: Any,
) -> None:
    """In one child, because its volume is gone with it."""
    volume, ballast = tmp_path / "volume", tmp_path / "volume" / "ballast"
    options = quick(tmp_path, output_dir=volume / "out")
    report = SilentReporter()

    def fill(point: str) -> None:
        if point == moment:
            with ballast.open("wb") as file, suppress(OSError):
                while True:
                    file.write(bytes(65536))

    def body() -> None:
        mount_tmpfs(volume, "size=16m")
        workdir.reached = fill
        try:
            pipeline.convert(pipeline.prepare(options, report), report)
        except RilqError as err:
            print(err)
        ballast.unlink()
        workdir.reached = lambda point: None
        pipeline.convert(pipeline.prepare(options, report), report)
        shutil.copytree(volume / "out", tmp_path / "copy")
        assert [p.name for p in volume.iterdir()] == ["out"]

    ended = in_child(body)
    skip_without_mounts(ended)
    assert ended.code == 0, ended.err
    assert f"{volume}/" in ended.out and "No space left on device" in ended.out
    clean = in_child(lambda: pipeline.convert(pipeline.prepare(quick(tmp_path), report), report))
    assert clean.code == 0 and hashes(tmp_path / "copy") == hashes(tmp_path / "out")


@pytest.mark.parametrize("limit", [1_000, 20_000, 90_000, 150_000])
def test_a_file_that_cannot_grow_is_named_and_the_rerun_finishes(
    limit: int, tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    more = ("--quantizer", "rtn", "--rank", 0, "--quiet")
    ended = run_cli(*arguments(tmp_path, *more), first=limited)
    check_refused(ended, tmp_path / "out.rilq-work", "File too large", "run the same command again")
    assert run_cli(*arguments(tmp_path, *more)).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_own_left_overs_are_removed_and_counted_and_those_of_others_stay(
    tmp_path: Path, convert: Any, quick: Any
) -> None:
    options = quick(tmp_path, quantizer="rtn", rank=0)
    assert convert(options, at=5).code == -signal.SIGKILL
    work = tmp_path / "out.rilq-work"
    ours = [".layer-0000.safetensors.0123456789abcdef.tmp", "teacher-0009.bin"]
    for name in [*ours, "thesis.txt"]:
        (work / name).write_text("x")
    report = convert(options)
    # The third is the unit that was being finished.
    assert report.code == 0 and f"{work}: removed 3 unfinished files" in report.err
    assert [p.name for p in work.iterdir()] == ["thesis.txt"]


# -- surroundings ----------------------------------------------------------------------------------

PLAIN = ("--quantizer", "rtn", "--rank", "0")


@pytest.mark.parametrize("number", [0, 1, 2], ids=["stdin", "stdout", "stderr"])
def test_a_closed_standard_stream_does_no_harm(
    number: int, tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    def close() -> None:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)  # as Python starts then

    ended = run_cli(*arguments(tmp_path, *PLAIN, "--json"), first=close)
    assert ended.code == 0, ended.err
    assert (tmp_path / "out" / "rilq.json").is_file()
    assert ended.out == "" if number == 1 else json.loads(ended.out)["already_done"] is False


def test_a_reader_that_goes_away_is_no_traceback(
    tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    def break_pipe() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)

    ended = run_cli(*arguments(tmp_path, command="plan"), first=break_pipe)
    assert ended.code == 1 and ended.err == ""


def test_a_terminal_of_20_columns_shows_progress(
    tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    shown = tmp_path / "shown"

    def narrow() -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 20, 0, 0))
        os.dup2(theirs, 2)

        def copy() -> None:  # else the terminal's buffer fills up
            with shown.open("wb", buffering=0) as file:
                while True:
                    file.write(os.read(ours, 4096))

        threading.Thread(target=copy, daemon=True).start()

    ended = run_cli(*arguments(tmp_path, *PLAIN), first=narrow)
    assert ended.code == 0 and (tmp_path / "out" / "rilq.json").is_file()
    assert b"layers" in shown.read_bytes() and b"Traceback" not in shown.read_bytes()


def test_the_locale_c_and_names_outside_ascii_do_no_harm(
    tmp_path: Path, tiny_llama: Path, arguments: Any
) -> None:
    """The real command: a locale is set when Python starts."""
    folder, output = tmp_path / "modèle 模型", tmp_path / "sortie é"
    shutil.copytree(tiny_llama, folder)
    process = subprocess.run(
        [sys.executable, "-m", "rilq", *arguments(tmp_path, *PLAIN, "-o", output, model=folder)],
        env={**os.environ, "LC_ALL": "C", "TZ": "Pacific/Kiritimati", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert b"Traceback" not in process.stderr
    assert (output / "rilq.json").is_file()


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_the_output_has_the_modes_that_the_umask_allows(
    mask: int, file: int, folder: int, tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    ended = run_cli(*arguments(tmp_path, *PLAIN), first=lambda: os.umask(mask) and None)
    assert ended.code == 0
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {file} and (tmp_path / "out").stat().st_mode & 0o777 == folder


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    """A copy of the tiny checkpoint, to be spoilt."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


def shard_of(model: Path, tensor: str) -> str:
    return Checkpoint.open(LocalFolder(model)).shard_of[tensor]


def edit_tensors(model: Path, tensor: str, edit: Callable[[dict[str, Any]], object]) -> str:
    """Rewrite the shard of a tensor; its name."""
    shard = shard_of(model, tensor)
    tensors = {k: v.clone() for k, v in load_file(model / shard).items()}
    edit(tensors)
    save_file(tensors, model / shard, {"format": "pt"})
    return shard


def edit_json(path: Path, **values: Any) -> str:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))
    return path.name


def truncated_shard(model: Path) -> tuple[str, ...]:
    shard = shard_of(model, UP_PROJ)
    os.truncate(model / shard, (model / shard).stat().st_size - 100)
    return (shard, "download")


def pointer_instead_of_shard(model: Path) -> tuple[str, ...]:
    shard = shard_of(model, UP_PROJ)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 150000\n"
    (model / shard).write_text(pointer)
    return (shard, "git lfs pull")


def not_a_number(model: Path) -> tuple[str, ...]:
    shard = edit_tensors(model, UP_PROJ, lambda t: t[UP_PROJ][3].fill_(float("nan")))
    return (UP_PROJ, shard, "64 of 8192")


def missing_tensor(model: Path) -> tuple[str, ...]:
    edit_tensors(model, UP_PROJ, lambda t: t.pop(UP_PROJ))
    return (UP_PROJ, "model.safetensors.index.json")


def missing_tensor_everywhere(model: Path) -> tuple[str, ...]:
    missing_tensor(model)
    index = model / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    del weights[UP_PROJ]
    edit_json(index, weight_map=weights)
    return (UP_PROJ,)


def missing_shard(model: Path) -> tuple[str, ...]:
    shard = shard_of(model, UP_PROJ)
    (model / shard).unlink()
    return (shard, "model.safetensors.index.json")


def path_out_of_the_folder(model: Path) -> tuple[str, ...]:
    index = model / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"] | {UP_PROJ: "../secret.safetensors"}
    edit_json(index, weight_map=weights)
    return ("../secret.safetensors", "outside")


def integer_weight(model: Path) -> tuple[str, ...]:
    shard = edit_tensors(model, UP_PROJ, lambda t: t.update({UP_PROJ: t[UP_PROJ].to(torch.int16)}))
    return (UP_PROJ, shard, "I16")


def already_quantized(model: Path) -> tuple[str, ...]:
    return (edit_json(model / "config.json", quantization_config={"quant_method": "gptq"}),
            "quantiz")  # fmt: skip


def remote_code(model: Path) -> tuple[str, ...]:
    edit_json(
        model / "config.json",
        model_type="curious",
        architectures=["CuriousForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_curious.CuriousForCausalLM"},
    )
    (model / "modeling_curious.py").write_text(f"open({str(model / 'MARKER')!r}, 'w')\n")
    return ("curious",)


def unknown_architecture(model: Path) -> tuple[str, ...]:
    edit_json(model / "config.json", model_type="t5", architectures=["T5Model"])
    return ("t5",)


def cut_config(model: Path) -> tuple[str, ...]:
    os.truncate(model / "config.json", 40)
    return ("config.json", "JSON")


def one_layer_too_many(model: Path) -> tuple[str, ...]:
    edit_json(model / "config.json", num_hidden_layers=3)
    return ("model.layers.2.",)


def pickles_only(model: Path) -> tuple[str, ...]:
    for path in [*model.glob("*.safetensors"), model / "model.safetensors.index.json"]:
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch MARKER'\ntR.")
    return ("pytorch_model.bin", "pickle")


def no_tokenizer(model: Path) -> tuple[str, ...]:
    (model / "tokenizer.json").unlink()
    return (str(model), "tokenizer.json")


CHECKPOINTS: list[Callable[[Path], tuple[str, ...]]] = [
    truncated_shard, pointer_instead_of_shard, not_a_number, missing_tensor,
    missing_tensor_everywhere, missing_shard, path_out_of_the_folder, integer_weight,
    already_quantized, remote_code, unknown_architecture, cut_config, one_layer_too_many,
    pickles_only, no_tokenizer,
]  # fmt: skip


@pytest.mark.parametrize("spoil", CHECKPOINTS, ids=lambda spoil: spoil.__name__)
def test_a_spoilt_checkpoint_is_refused_by_name_and_left_as_it_is(
    spoil: Callable[[Path], tuple[str, ...]],
    model: Path,
    tmp_path: Path,
    run_cli: Any,
    arguments: Any,
    hashes: Any,
) -> None:
    named = spoil(model)
    before = hashes(model)
    ended = run_cli(*arguments(tmp_path, "--quiet", model=model))
    check_refused(ended, *named)
    assert hashes(model) == before and not (tmp_path / "out").exists()


def test_a_width_that_no_group_size_divides_is_refused_with_the_legal_ones(
    tmp_path: Path, make_model: Any, run_cli: Any, arguments: Any
) -> None:
    model = make_model(tmp_path / "model", intermediate_size=96)
    ended = run_cli(*arguments(tmp_path, "--group-size", 64, model=model))
    check_refused(ended, "--group-size 64", "down_proj (96)", "use --group-size 32")


def test_code_in_a_checkpoint_that_does_not_need_it_is_never_run(
    model: Path, tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    edit_json(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    (model / "modeling_x.py").write_text(f"open({str(model / 'MARKER')!r}, 'w')\n")
    assert run_cli(*arguments(tmp_path, *PLAIN, model=model)).code == 0
    assert not (model / "MARKER").exists()
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


def test_states_that_overflow_name_layer_row_and_dtype_and_a_wider_one_begins_anew(
    model: Path, tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    for name in (UP_PROJ, UP_PROJ.replace("up_proj", "down_proj")):
        edit_tensors(model, name, lambda tensors, name=name: tensors[name].mul_(3000))
    command = arguments(tmp_path, *PLAIN, model=model)
    ended = run_cli(*command, "--dtype", "float16")
    check_refused(ended, "decoder layer 1: activations of row 0", "--dtype bfloat16", code=1)
    check_refused(run_cli(*command), "--dtype: 'float16' there, 'float32' now", "--resume never")
    assert run_cli(*command, "--resume", "never").code == 0


@pytest.mark.parametrize(
    ("quantizer", "named"),
    [
        ("gptq", "model.layers.1.mlp.gate_proj: Hessian"),
        ("blockap", "model.layers.1: blockap: the layer's error is not finite"),
    ],
)
def test_sums_of_squares_that_overflow_name_where(
    quantizer: str, named: str, model: Path, tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    # Inputs near 1e19: they and all that follows fit into float32, their squares do not.
    norm = "model.layers.1.post_attention_layernorm.weight"
    edit_tensors(model, norm, lambda tensors: tensors[norm].mul_(3e18))
    ended = run_cli(*arguments(tmp_path, "--quantizer", quantizer, model=model))
    check_refused(ended, named, "try --dtype float32 or bfloat16", code=1)


def test_no_question_is_asked_on_standard_input(
    model: Path, tmp_path: Path, run_cli: Any, arguments: Any
) -> None:
    remote_code(model)
    (tmp_path / "answers").write_text("y\n" * 100)
    answers = os.open(tmp_path / "answers", os.O_RDONLY)
    ended = run_cli(*arguments(tmp_path, model=model), first=lambda: os.dup2(answers, 0) and None)
    read = os.lseek(answers, 0, os.SEEK_CUR)  # the child shares the position
    os.close(answers)
    assert ended.code == 2 and read == 0 and not (model / "MARKER").exists()
