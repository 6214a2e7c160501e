"""User errors end in one clear line and exit code 2."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from cli_helpers import refused
from stubs import TINY

from nanochat.common import UserError
from nanochat.common.ranges import Range, check_ranges
from scripts import (
    _cli,
    base_eval,
    base_train,
    chat_cli,
    chat_eval,
    chat_rl,
    chat_sft,
    chat_web,
    stages,
    tok_train,
)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--depth=0"], "--depth"),
        (["--depth=many"], "--depth"),
        (["--depht=4"], "--depht"),
        (["--n-embd=20"], "--n-embd=20"),
        (["--n-head=3", "--n-embd=16"], "n_head=3"),
        (["--n-embd=16", "--n-head=2", "--n-kv-head=3"], "n_kv_head=3"),
        (["--max-seq-len=1"], "--max-seq-len"),
        (["--window-pattern=SXL"], "window_pattern"),
        (["--recipe=plain", "--window-pattern=SSSL"], "--recipe=plain,window_pattern=SSSL"),
        (["--num-iterations=0"], "--num-iterations"),
        (["--num-iterations=1" + "0" * 30], "--num-iterations"),
        (["--num-iterations=-1", "--minutes=1e300"], "large"),
        (["--keep-last=-5"], "keep-last"),
        (["--device-batch-size=0"], "--device-batch-size"),
        (["--minutes=nan"], "--minutes"),
        (["--minutes=0"], "--minutes"),
        (["--minutes=-5"], "--minutes"),
        (["--core-metric-max-per-task=0"], "--core-metric-max-per-task"),
        (["--matrix-lr=inf"], "--matrix-lr"),
        (["--warmdown-ratio=2"], "--warmdown-ratio"),
        (["--adam-beta1=1.0"], "--adam-beta1"),
        (["--lr-scale=-1"], "--lr-scale"),
        (["--matrix-lr=-0.02"], "--matrix-lr"),
        (["--warmup-ratio=5"], "--warmup-ratio"),
        (["--model-tag=a\udcff"], "model tag"),
        (["--model-tag=" + "x" * 300], "model tag"),
        (["--seed=-1"], "--seed"),
        (["--n-head=0"], "--n-head"),
        (["--n-embd=0"], "--n-embd"),
        (["--n-kv-head=-2"], "--n-kv-head"),
        (["--target-flops=-3"], "--target-flops"),
        (["--target-param-data-ratio=0"], "--target-param-data-ratio"),
        (["--eval-tokens=0"], "--eval-tokens"),
        (["--save-every=-5"], "--save-every"),
        (["--total-batch-size=0"], "--total-batch-size"),
        (["--device-type=abacus"], "--device-type"),
        (["--recipe=new"], "--recipe"),
        (["--compile=maybe"], "--compile"),
        (["--data=/no/such/place.txt"], "/no/such/place.txt"),
        (["--data="], "--data="),
        (["--data=fineweb-edu"], "nanochat.dataset"),
        (["--fp8"], "--fp8"),
        (["--resume-from-step=77"], "77"),
        (["--init-from=unknown"], "unknown"),
    ],
)
def test_base_train(flags: list[str], part: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [] if any(f.startswith("--data") for f in flags) else [f"--data={copied / 'text.jsonl'}"]
    assert part in refused(base_train.main, [*TINY, *data, *flags], capsys)


@pytest.mark.parametrize(("content", "part"), [(b"", "empty"), (b"fine\nbad \xff byte\n" * 3, "UTF-8")])
def test_bad_text(content: bytes, part: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "mine.txt"
    path.write_bytes(content)
    error = refused(base_train.main, [*TINY, f"--data={path}"], capsys)
    assert "mine.txt" in error and part.lower() in error.lower()


def test_parquet_without_text(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"title": ["a", "b"]}), copied / "titles.parquet")
    error = refused(tok_train.main, [f"--data={copied / 'titles.parquet'}"], capsys)
    assert "titles.parquet" in error and "title" in error


def test_vocabulary_too_small(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "265" in refused(tok_train.main, ["--data=starter", "--vocab-size=264"], capsys)


def test_no_tokenizer_yet(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tok_train" in refused(base_train.main, [*TINY, "--data=starter"], capsys)


def test_no_checkpoint_yet(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main in (base_eval.main, chat_sft.main, chat_eval.main):
        error = refused(main, ["--device-type=cpu"], capsys)
        assert "base_train" in error or "chat_sft" in error


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short])
def test_damaged_checkpoint(damage, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(copied / "base_checkpoints" / "tiny" / "000001" / "model.safetensors")
    error = refused(base_eval.main, ["--device-type=cpu", "--step=1"], capsys)
    assert "model.safetensors" in error


def test_another_tokenizer(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copied / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"wholly other words {i}"}) + "\n" for i in range(99)))
    tok_train.main([f"--data={other}", "--vocab-size=270"])
    flags = [*TINY, f"--data={copied / 'text.jsonl'}", "--model-tag=next", "--init-from=tiny"]
    assert "tokenizer" in refused(base_train.main, flags, capsys)


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs /proc")
def test_unwritable_base_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "/proc/self/nanochat")  # not even root can write there
    error = refused(tok_train.main, ["--data=starter"], capsys)
    assert "NANOCHAT_BASE_DIR" in error


@pytest.mark.parametrize(
    ("line", "part"), [("not json", "1"), ('[{"role": "robot", "content": "x"}]', "robot"), ("[]", "1")]
)
def test_bad_conversations(line: str, part: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "chats.jsonl"
    path.write_text(line + "\n")
    error = refused(chat_sft.main, [f"--data={path}", "--device-type=cpu"], capsys)
    assert "chats.jsonl" in error and part in error


@pytest.mark.parametrize("flag", ["num-epochs=0", "num-iterations=0", "init-lr-frac=-1", "weight-decay=-0.5"])
def test_flags_of_sft(flag: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--{flag.split('=')[0]}" in refused(chat_sft.main, [f"--{flag}"], capsys)


def test_sizes_beyond_any_memory_exit_1(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        data = f"--data={copied / 'text.jsonl'}"
        _cli.run(
            lambda: base_train.main(
                [*TINY, data, "--depth=100", "--n-embd=131072", "--head-dim=128", "--model-tag=vast"]
            )
        )
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "memory" in error and "Traceback" not in error


def test_memory_that_is_too_small_names_the_flags_to_lower(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    with pytest.raises(SystemExit) as stop:
        _cli.run(fail, memory_flags="--batch-size")
    assert stop.value.code == 1 and "--batch-size" in capsys.readouterr().err
    for script in (base_train, chat_sft, chat_rl, base_eval, chat_eval, chat_cli, chat_web):
        (flags,) = re.findall(r'_cli\.run\(main, memory_flags="(.*)"\)', Path(str(script.__file__)).read_text())
        fields = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(script.Config)}  # type: ignore[attr-defined]
        assert set(re.findall(r"--[\w-]+", flags)) <= fields, script.__name__


def test_unknown_stage_and_task(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "base_train" in refused(stages.main, ["bas_train"], capsys)
    assert "Arithmetic" in refused(chat_eval.main, ["-a", "Juggling"], capsys)
    assert "bpb" in refused(base_eval.main, ["--eval=vibes"], capsys)
    assert "--baselines" in refused(base_eval.main, ["--baselines=v3"], capsys)
    assert "--eval=core" in refused(base_eval.main, ["--core-tasks=piqa"], capsys)


def test_an_error_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: list[str]) -> int:
        raise UserError(f"cannot read {argv[0]}")

    assert refused(fail, ["a\x1b[2J\x9b\u202e"], capsys) == "cannot read a\\x1b[2J\\x9b\\u202e"


def test_closed_output_is_discarded() -> None:
    code = (
        "import sys; from scripts import _cli\n"
        "def main(): print(1); print(2, file=sys.stderr); assert input() == 'x'\n_cli.run(main)"
    )
    command = ["bash", "-c", 'exec "$0" "$@" >&- 2>&-', sys.executable, "-c", code]
    assert subprocess.run(command, input=b"x\n", cwd=Path(__file__).parents[1]).returncode == 0


def test_ctrl_c_while_python_imports_is_one_line() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import scripts, time; print(1, flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout and process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "interrupted\n" and process.returncode == -signal.SIGINT


def test_stages_lists_every_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert stages.main([]) == 0
    listed = capsys.readouterr().out
    scripts = {p.stem for p in Path(stages.__file__).parent.glob("[a-z]*.py")} - {"stages"}
    assert all(name in listed for name in scripts)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(1, unset=-1), [1, 10**9, -1], [0, -2, math.nan]),
        (Range(above=0, max=1), [1e-9, 1], [0, 1.5]),
        (Range(0, below=1), [0, 0.999], [1, -1e-9]),
    ],
)
def test_ranges(allowed: Range, inside: list[float], outside: list[float]) -> None:
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)


def test_a_field_outside_its_range_is_named_with_its_limits() -> None:
    @dataclass
    class Sizes:
        name: str = "any"
        num_rows: Annotated[int, Range(2, 8, unset=-1)] = 2

    check_ranges(Sizes())
    with pytest.raises(UserError) as error:
        check_ranges(Sizes(num_rows=9))
    assert all(part in str(error.value) for part in ("--num-rows", "2", "8", "-1", "9"))
