"""What surrounds a command: a closed pipe, a full disk, a read-only base folder, no home folder, mistyped flags."""

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import refused
from stubs import TINY

from nanochat import common
from nanochat.common import UserError, get_base_dir
from nanochat.cpu import kernels
from nanochat.report import record_stage
from nanochat.tokenizer import get_tokenizer
from scripts import base_eval, base_train, chat_cli, chat_sft, contamination, report, tok_train

ROOT = Path(__file__).parents[1]
TOK_TRAIN = [sys.executable, "-u", "-m", "scripts.tok_train", "--vocab-size=270"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"some words {i}"}) + "\n" for i in range(200)))
    return path


# ---------------------------------------------------------------------------------------------------
# Output


@pytest.mark.parametrize("stream", ["stdout", "stderr", "both"])
def test_a_closed_pipe_loses_output_only(stream: str, texts: Path, base: Path) -> None:
    read, write = os.pipe()
    os.close(read)  # as if `head` had left before the first line
    pipes: dict[str, Any] = {"stdout": write, "stderr": write} if stream == "both" else {stream: write}
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base)}
    (texts.parent / "empty.txt").touch()  # for a warning
    command = [*TOK_TRAIN, f"--data={texts},{texts.parent / 'empty.txt'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, **{"stdout": -1, "stderr": -1, **pipes})
    os.close(write)
    assert done.returncode == 0 and get_tokenizer().get_vocab_size() == 270
    assert b"BrokenPipe" not in (done.stderr or b"") and b"Traceback" not in (done.stderr or b"")
    assert (b"saved" in (done.stdout or b"")) == (stream == "stderr")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_ends_the_log_only(texts: Path, base: Path) -> None:
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base)}
    with open("/dev/full", "w") as full:
        command = [*TOK_TRAIN, f"--data={texts}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and get_tokenizer().get_vocab_size() == 270
    assert done.stderr.count("output is lost") == 1


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_unbuffered_output_stays_unbuffered(flags: list[str]) -> None:
    program = (
        "import os, sys; from nanochat.common.output import failsafe_output\n"
        "with failsafe_output(): print('said', end='', file=sys.stderr); print('out', end=''); os._exit(0)"
    )
    done = subprocess.run([sys.executable, *flags, "-c", program], cwd=ROOT, env=buffered(), capture_output=True)
    assert (done.stdout + done.stderr == b"outsaid") == bool(flags)


def buffered() -> dict[str, str]:
    """The environment without PYTHONUNBUFFERED."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


# ---------------------------------------------------------------------------------------------------
# The base folder


def make_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a read-only disk appears, also to root."""
    real = os.access
    monkeypatch.setattr(common.os, "access", lambda path, mode: not mode & os.W_OK and real(path, mode))


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_a_read_only_base_folder_can_be_read_from(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record_stage(copied, "tokenizer", {"hash": "x"})
    make_read_only(monkeypatch)
    before = snapshot(copied)
    assert chat_cli.main(["-i", "base", "-p", "some", "--device-type=cpu", "--max-tokens=4"]) == 0
    assert base_eval.main(["--eval=sample", "--device-type=cpu"]) == 0
    assert report.main([]) == 0
    output = capsys.readouterr()
    assert "read-only" in output.out and "not recorded" in output.err
    assert snapshot(copied) == before
    error = refused(tok_train.main, ["--data=starter"], capsys)
    assert "NANOCHAT_BASE_DIR" in error and snapshot(copied) == before


def test_reading_creates_no_base_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "none"))
    for call in (lambda: chat_cli.main(["-p", "x", "--device-type=cpu"]), lambda: report.main([]), get_tokenizer):
        with pytest.raises(UserError, match="none"):
            call()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("given", ["", "~nobody-by-this-name/x"])
def test_no_home_folder_is_one_line(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", given)
    for to_write in (True, False):
        with pytest.raises(UserError, match="NANOCHAT_BASE_DIR"):
            get_base_dir(to_write)


def test_kernels_that_cannot_be_kept_say_where_they_could(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_KERNELS_DIR", raising=False)
    monkeypatch.setattr(kernels, "kernels_enabled", lambda: True)
    monkeypatch.setattr(kernels, "build", refuse)
    make_read_only(monkeypatch)
    assert kernels.library.__wrapped__() is None
    assert "NANOCHAT_KERNELS_DIR" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--depht=4"], ["--depht", "--depth"]),
        (["--keep_lst", "4"], ["--keep-last"]),
        (["--dat=x"], ["--data"]),
        (["--no-resum"], ["--no-resume"]),
        (["--depth=two"], ["--depth", "whole number", "'two'"]),
        (["--minutes=soon"], ["--minutes", "number", "'soon'"]),
        (["--compile=maybe"], ["--compile", "auto", "maybe"]),
        (["--fp8=yes"], ["--fp8", "--no-fp8"]),
        (["--depth"], ["--depth", "value"]),
    ],
)
def test_wrong_flags_are_named_with_the_right_one(
    flags: list[str], words: list[str], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(base_train.main, flags, capsys)
    assert all(word in error for word in words) and len(error) < 120
    assert "invalid literal" not in error and "could not convert" not in error


def test_an_unknown_home_folder_in_a_path_is_one_line(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "~nobody-x/a.txt" in refused(tok_train.main, ["--data=~nobody-x/a.txt"], capsys)
    assert "~" in refused(chat_sft.main, ["--data=~nobody-x/a.jsonl", "--device-type=cpu"], capsys)
    monkeypatch.setenv("NANOCHAT_DATASETS_DIR", "~nobody-x/sets")
    assert "~" in refused(contamination.main, ["--data=starter"], capsys)


def test_nothing_similar_is_suggested_for_a_flag_of_another_script(base: Path, capsys) -> None:
    assert "mean" not in refused(base_train.main, ["--vocab-size=300"], capsys)


def test_a_bad_dtype_names_its_variable(copied: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "bf16")
    for main in (lambda argv: base_train.main([*TINY, *argv]), base_eval.main):
        error = refused(main, ["--device-type=cpu"], capsys)
        assert "NANOCHAT_DTYPE" in error and "bfloat16" in error and "bf16" in error


def test_benchmarks_that_are_missing_are_listed_one_a_line(base: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def unavailable(name: str, split: str) -> None:
        raise UserError(f"data set {name} is not available; connect to the internet")

    monkeypatch.setattr(contamination, "hub_texts", unavailable)
    capsys.readouterr()
    with pytest.raises(UserError, match="NANOCHAT_DATASETS_DIR") as caught:
        contamination.main(["--data=starter"])
    assert len(str(caught.value)) < 200 and capsys.readouterr().out.count("left out: ") > 3
