"""The GPU check: its runner on steps that fail, hang and are interrupted; its real steps' flags; a few of them, run."""

import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_check_helpers import toy_steps
from live import until

from dev import gpu_check_parts
from dev.gpu_check import Check
from dev.gpu_check_run import main_error
from dev.gpu_check_steps import FIRST, decoding, figure, make_steps, test_counts as counts, training
from nanochat import runtime
from scripts import _cli

ROOT = Path(__file__).resolve().parent.parent
CARD = {"device_type": "cuda", "memory_gib": 79.1, "no_fp8": ""}


def command(out: Path, *flags: str) -> list[str]:
    """The check with the steps above."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from gpu_check_helpers import toy_steps
from dev.gpu_check import main
sys.exit(main(sys.argv[1:], make=toy_steps))
"""
    return [sys.executable, "-c", code, f"--out={out}", *flags]


def check(out: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, table.json by step, what it printed)."""
    done = subprocess.run(command(out, *flags), cwd=out.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, table(out), done.stdout


def table(out: Path) -> dict[str, Any]:
    return {row["step"]: row for row in json.loads((out / "table.json").read_text())}


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def child_of(log: Path) -> int:
    return int(log.read_text().splitlines()[0])


def test_whatever_becomes_of_a_step_the_next_one_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = "fails,hangs,needs_it,elsewhere,slow,counts,needs_count,no_figures"
    code, rows, printed = check(out, f"--only={steps}", "--minutes=2")
    assert code == 1
    assert {name: row["result"] for name, row in rows.items()} == {
        FIRST: "passed",
        "fails": "failed",
        "hangs": "timed out",
        "needs_it": "skipped",
        "elsewhere": "not here",
        "slow": "skipped",
        "counts": "passed",
        "needs_count": "passed",
        "no_figures": "failed",
    }
    assert rows["counts"]["note"] == "warning: slow"
    assert rows["counts"]["figures"] == {"tokens_per_second": 1234.5}
    assert "no such thing" in rows["fails"]["note"] and "fails" in rows["needs_it"]["note"]
    assert "in hanging" in (out / "hangs.log").read_text()  # where it hung
    assert not is_running(child_of(out / "hangs.log"))
    assert (out / "needs_count.log").read_text().strip() == str(out / "base")
    lines = (out / "table.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 1 + len(rows) and "a toy" in lines[0]
    assert any("1,234 tokens/s" in line for line in lines) and all(line in printed for line in lines)


def test_in_pieces(tmp_path: Path) -> None:
    """What a step needs runs first, unless it has passed in the same folder before."""
    out = tmp_path / "out"
    code, rows, _ = check(out, "--only=needs_count")
    assert code == 0 and list(rows) == [FIRST, "counts", "needs_count"]
    code, rows, _ = check(out, "--only=needs_count,elsewhere")
    assert code == 0 and (out / "count").read_text() == "x"
    assert list(rows) == [FIRST, "elsewhere", "counts", "needs_count"]
    shutil.rmtree(out / "base")  # as where only the table was kept
    check(out, "--only=elsewhere")
    check(out, "--only=needs_count")
    assert (out / "count").read_text() == "xx"
    _, rows, _ = check(out, "--only=counts", "--minutes=0.0001")
    assert rows["counts"]["result"] == "passed"  # there is no time for it now; the earlier result stays


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_step_and_prints_the_table(tmp_path: Path, number: int) -> None:
    out, log = tmp_path / "out", tmp_path / "out" / "waits.log"
    running = subprocess.Popen(command(out, "--only=counts,waits"), stdout=subprocess.PIPE, text=True)
    until(lambda: log.exists() and log.read_text().endswith("\n"))
    running.send_signal(number)
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == 130 and "| waits | interrupted |" in printed
    assert table(out)["counts"]["result"] == "passed" and not is_running(child_of(log))


def test_mistakes_and_a_list(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, "--only=nonsense"), capture_output=True, text=True)
    assert done.returncode == 2 and "nonsense" in done.stderr
    done = subprocess.run(command(tmp_path, "--list"), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\ntoy ") == len(toy_steps({"device": "a toy"}, tmp_path))


def test_the_first_call_may_name_a_step_of_this_machine(tmp_path: Path) -> None:
    """Which steps there are is known once the first one has run."""
    code, rows, _ = check(tmp_path / "out", "--only=of_this_machine")
    assert code == 0 and list(rows) == [FIRST, "of_this_machine"]


# ---------------------------------------------------------------------------------------------------
# The real steps


class Parsed(Exception):
    """Raised in place of the work, once the command line is parsed."""


@pytest.mark.parametrize("machine", [CARD, {"device_type": "cpu"}], ids=["card", "cpu"])
def test_the_flags_of_every_step_exist(
    machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, steps = _cli.parse, make_steps(machine, tmp_path)

    def parse_only(config: Any, argv: Sequence[str] | None = None) -> Any:
        raise Parsed(parse(config, argv))

    monkeypatch.setattr(_cli, "parse", parse_only)
    for number, step in enumerate(steps):
        assert set(step.needs) <= {earlier.name for earlier in steps[:number]}
        module, *flags = step.command[1:]
        if module == gpu_check_parts.__name__:
            part, *flags = flags
            assert part in gpu_check_parts.PARTS
            module, *flags = {"web": ["scripts.chat_web", *flags], "memory": flags[1:]}.get(part, flags) or [""]
        if module in ("", "pytest"):
            continue
        with pytest.raises(Parsed):
            importlib.import_module(module).main(flags)


def test_steps_that_a_card_cannot_run_say_why(tmp_path: Path) -> None:
    card = {**CARD, "memory_gib": 15.0, "no_fp8": "needs a GPU of capability 8.9"}
    left_out = {step.name for step in make_steps(card, tmp_path) if step.not_here}
    assert left_out == {"memory_24", "fp8", "train_d24"}
    assert not any(step.not_here for step in make_steps(CARD, tmp_path))


def test_figures_from_logs() -> None:
    progress = "step 1/4 | loss 5 | 1.5k tok/s\rstep 4/4 | loss 4 | 2.5M tok/s | 41% of peak"
    rows = "4 rows of 64 tokens per micro-batch take 9.5 GiB of memory, 10.0 expected, of 11.0 usable"
    expected = {"rows": 4, "GiB taken": 9.5, "GiB expected": 10.0}
    assert training(f"{rows}\n{progress}") == {"tokens_per_second": 2.5e6, **expected}
    lines = "tests/test_x.py::test_a[1-b c] PASSED [ 5%]\ntests/test_x.py::test_b SKIPPED (no GPU) [ 9%]\n"
    assert counts(lines + "tests/test_x.py::test_c PASSED") == {"tests passed": 2, "tests skipped": 1}
    wanted = {"ms_per_step_1": 2.0, "ms_per_step_8": 3.0, "tokens_per_second_8": 2666.0, "bandwidth_share_1": 0.5}
    wanted["model_without_graph_ms_per_step_1"] = 4.0
    assert decoding(json.dumps({"model_ms_per_step_1": 1.5, **wanted})) == wanted
    assert all("rows: " in figure(name, value) for name, value in wanted.items())
    others = {"capability": [9, 0], "gpus": 1024, "memory_gib": 139.72, "device": "H200", "cuda": None}
    assert [figure(name, value) for name, value in others.items()] == [
        *("capability 9.0", "1,024 gpus", "140 memory_gib", "H200", "cuda: None")
    ]
    trace = "Traceback (most recent call last):\n  File x\nValueError: first\n\nmore\nRuntimeError: last\nbye"
    assert main_error(trace) == "RuntimeError: last" and main_error(f"error: ours\n{trace}") == "error: ours"


def test_a_smaller_card_is_imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    calls: list[str] = []
    device = SimpleNamespace(total_memory=80 * 2**30)

    def properties(*args: Any) -> Any:
        calls.append("CUDA is initialised")
        return device

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(runtime, "use_expandable_segments", lambda: calls.append("the allocator is set"))
    for gib in (12, 100):
        gpu_check_parts.limit_memory(gib)
    assert calls == ["the allocator is set", "CUDA is initialised"] * 2
    assert limits == [pytest.approx(12 / 80, rel=0.1), 1.0] and limits[0] < 12 / 80


BROKEN = """
import sys, torch
def f(x):
    x = x * 2
    if "break" in sys.argv:
        torch._dynamo.graph_break()
    return x + 1
f = torch.compile(f, dynamic=False)
for rows in (2, 3) if "recompile" in sys.argv else (2, 2):
    f(torch.zeros(rows))
"""


@pytest.mark.parametrize(
    ("flags", "found"),
    [([], (1, 0, 0)), (["recompile"], (2, 0, 1)), (["break"], (2, 1, 0))],
    ids=["whole", "recompiles", "breaks"],
)
def test_graphs_are_counted(
    flags: list[str],
    found: tuple[int, int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torch._dynamo.utils import counters

    (tmp_path / "compiles_it.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "compile", torch.compile)  # replaced in there
    monkeypatch.setattr(sys, "argv", sys.argv)
    torch._dynamo.reset()
    counters.clear()
    try:
        code = gpu_check_parts.graphs("compiles_it", *flags)
    finally:
        torch._logging.set_logs()
        logging.getLogger("torch._dynamo.guards.__recompiles").handlers.clear()
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (values["graphs"], values["breaks"], values["recompiles"]) == found and code == bool(flags)


def test_some_steps_on_this_machine(tmp_path: Path) -> None:
    steps = "decode_d1"
    done = subprocess.run(
        ["bash", ROOT / "dev" / "gpu_check.sh", f"--out={tmp_path}", f"--only={steps}"],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(tmp_path)
    assert list(rows) == [FIRST, *steps.split(",")] and rows["decode_d1"]["figures"]["tokens_per_second_8"] > 0
    assert Check(tmp_path, make_steps).machine["torch"] == torch.__version__
