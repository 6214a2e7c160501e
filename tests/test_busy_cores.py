"""Other programs on the cores of a run are noticed, and said once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_training import CPU, make_trainer

from nanochat.train import busy_cores
from nanochat.train.busy_cores import BUSY_SHARE, CoreWatch, waited_for_cores
from nanochat.train.metrics import WAIT_WATCH_SECONDS, Metrics


def test_the_waits_of_all_threads_are_added_up(tmp_path: Path) -> None:
    for name, line in {"1": "7 2500000000 3\n", "2": "9 500000000 1\n", "3": "", "4": "one two"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(line)
    (tmp_path / "5").mkdir()  # a thread that has ended
    assert waited_for_cores(str(tmp_path)) == 3.0
    assert waited_for_cores(str(tmp_path / "nothing")) == 0.0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux tells how long threads wait")
def test_a_busy_core_is_measured() -> None:
    """Two processes that compute on one core: each waits for the other about half of the time."""
    mine = os.sched_getaffinity(0)
    code = f"import os; os.sched_setaffinity(0, [{min(mine)}])\nwhile True: pass"
    spin = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(0.1)
        os.sched_setaffinity(0, {min(mine)})
        watch, end = CoreWatch(), time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
        assert watch.share() > BUSY_SHARE / 2
    finally:
        os.sched_setaffinity(0, mine)
        spin.kill()
        spin.wait()


def test_the_advice_is_left_out_where_it_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_cores, "waited_for_cores", lambda: 0.0)
    watch = CoreWatch()
    assert watch.warning("training") == ""
    monkeypatch.setattr(busy_cores, "waited_for_cores", lambda: 1e6)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert "100%" in watch.warning("training") and "OMP_WAIT_POLICY=passive" in watch.warning("training")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert "100%" in watch.warning("training") and "OMP_WAIT_POLICY" not in watch.warning("training")


@pytest.mark.parametrize("busy", [True, False])
def test_a_run_says_once_that_it_waits(
    busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CoreWatch, "share", lambda self: 0.9 if busy else 0.0)
    trainer = make_trainer(steps=10)
    metrics = Metrics(tmp_path / "metrics.jsonl", CPU, flops_per_token=1, peak_flops=0)
    warnings = []
    for step in range(1, 6):
        trainer.progress.step = step
        record = {"step": step, "tokens_per_second": 1.0, "wait_seconds": 0.0}
        metrics(trainer, record | {"seconds": step * WAIT_WATCH_SECONDS / 2})
        warnings.append("OMP_WAIT_POLICY" in capsys.readouterr().err)
    metrics.close()
    assert warnings == [False, False, False, busy, False]  # more than WAIT_WATCH_SECONDS after the first step
