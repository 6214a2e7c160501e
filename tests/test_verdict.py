"""The verdict of a report: each finding on both sides of its threshold, and none where figures are missing."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import start_script

from nanochat.report import accuracy_values, load_report, record_stage
from nanochat.reporting import findings, gains
from nanochat.reporting.findings import Finding
from nanochat.reporting.pages import judge
from nanochat.reporting.status import SILENCE_SECONDS, Status, run_lock, status_of
from nanochat.reporting.verdict import verdict_of, with_flags
from nanochat.reporting.view import STAGES, mixed_stages, wilson_interval
from scripts.report import main

Report = dict[str, Any]


def kinds(found: Any) -> list[str]:
    return [finding.kind for finding in found]


def only(found: Any) -> Finding:
    (finding,) = found
    return finding


def lines_of(losses: Any, val_bpb: dict[int, float] | None = None) -> list[Report]:
    """Lines of metrics.jsonl; `val_bpb` by step."""
    evaluated = val_bpb or {}
    return [
        {"step": i, "loss": float(loss)} | ({"val_bpb": evaluated[i]} if i in evaluated else {})
        for i, loss in enumerate(losses, 1)
    ]


# ---------------------------------------------------------------------------------------------------
# Pretraining


def pretrained(bpb: float, **values: Any) -> Report:
    expected = {"bpb": 1.4, "error": 0.02, "tokens": 1e6, "text": "starter"}
    return {"base_train": {"val_bpb": bpb, "steps": 100, "forecast": expected, **values}}


def test_the_forecast_is_met_within_two_errors() -> None:
    for bpb, kind, word in ((1.4, "good", "as good"), (1.439, "good", "as good"), (1.441, "bad", "worse")):
        finding = only(findings.forecast(pretrained(bpb)))
        assert (finding.kind, word in finding.text) == (kind, True)
        assert f"{bpb:.3f}" in finding.figures and "1.400 ± 0.020" in finding.figures and "1M" in finding.figures
    assert "better" in only(findings.forecast(pretrained(1.359))).text


def test_no_forecast_for_other_text_and_for_what_is_not_finished() -> None:
    other = only(findings.forecast(pretrained(1.4, forecast={"text": "starter"})))
    assert other.kind == "note" and "starter" in other.text
    for values in ({"forecast": {}}, {"val_bpb": None}, {"stopped_early": True}):
        assert not list(
            findings.forecast(pretrained(1.5) | {"base_train": {**pretrained(1.5)["base_train"], **values}})
        )
    running = only(findings.forecast(pretrained(3.0, status="running")))
    assert running.kind == "note" and "3.000" in running.figures


def test_a_run_shorter_than_planned_is_named() -> None:
    assert not list(findings.length(pretrained(1.4, planned_steps=110)))
    assert only(findings.length(pretrained(1.4, planned_steps=112))).kind == "note"
    for unfinished in ({"status": "running"}, {"stopped_early": True}):
        assert not list(findings.length(pretrained(1.4, planned_steps=112, **unfinished)))


@pytest.mark.parametrize(
    ("val", "epoch", "kind"), [(1.04, 3, "good"), (1.06, 3, "bad"), (1.06, 0, "note"), (1.06, None, "bad")]
)
def test_training_and_validation_apart(val: float, epoch: int | None, kind: str) -> None:
    report = {"base_eval": {"train_bpb": 1.0, "val_bpb": val}, "base_train": {"loader": {"epoch": epoch}}}
    finding = only(findings.gap(report))
    assert finding.kind == kind and f"{val:.3f}" in finding.figures and f"{val - 1:+.3f}" in finding.figures
    assert not list(findings.gap({"base_eval": {"val_bpb": val}}))


def test_apart_is_no_fault_while_validation_falls() -> None:
    """As in the starter corpus, whose validation text is of other kinds."""
    report = {"base_eval": {"train_bpb": 1.0, "val_bpb": 1.2}, "base_train": {"loader": {"epoch": 3}}}
    for evaluations, kind in (({50: 1.3, 100: 1.2}, "note"), ({50: 1.1, 100: 1.2}, "bad"), ({100: 1.2}, "bad")):
        lines = lines_of(np.linspace(5, 1, 100), evaluations)
        assert only(findings.gap(report, lines)).kind == kind


def test_validation_rising_while_training_falls() -> None:
    losses = np.linspace(5, 1, 100)
    rising = only(findings.overfitting("base_train", {}, lines_of(losses, {20: 2.0, 50: 1.5, 100: 1.58})))
    assert (rising.kind, rising.remedy, rising.steps) == ("bad", "shorter", 50) and "1.500 at step 50" in rising.figures
    flat = only(findings.overfitting("base_train", {}, lines_of(losses, {20: 2.0, 50: 1.5, 100: 1.57})))
    assert flat.kind == "good" and flat.text.startswith("No sign of")
    diverging = only(findings.overfitting("base_train", {}, lines_of(losses[::-1], {20: 2.0, 50: 1.5, 100: 1.6})))
    assert diverging.remedy == "gentler"
    assert not list(findings.overfitting("base_train", {}, lines_of(losses, {100: 1.5})))


def test_a_rise_within_what_evaluations_vary_by_is_none() -> None:
    """Evaluations of a finetuning run of 6,300 steps, which learnt its text by heart as little as others do."""
    sft = [1.153, 1.119, 1.110, 1.104, 1.100, 1.105, 1.089, 1.083, 1.100, 1.096, 1.081]
    sft += [1.104, 1.085, 1.085, 1.105, 1.094, 1.082, 1.095, 1.072, 1.051, 1.068]
    smooth = [1.153 * 0.98**i for i in range(19)] + [1.051 * 0.745, 1.051 * 0.757]  # the same rise, out of the ordinary
    for values, kind in ((sft, "good"), (smooth, "bad")):
        bpb = dict(zip(range(5, 106, 5), values))
        assert only(findings.overfitting("chat_sft", {}, lines_of(np.linspace(5, 1, 105), bpb))).kind == kind


def test_many_passes_over_the_text_are_named() -> None:
    assert not list(findings.overfitting("base_train", {"loader": {"epoch": 3}}, []))
    assert only(findings.overfitting("base_train", {"loader": {"epoch": 4}}, [])).kind == "note"


def test_a_loss_that_rises_diverged() -> None:
    fell = np.linspace(5, 3, 300)
    for end, diverged in ((3.2, False), (3.5, True)):
        found = list(findings.course("base_train", {}, lines_of([*fell, *np.full(100, end)])))
        assert [finding.remedy for finding in found] == (["gentler"] if diverged else [])
    assert not list(findings.course("base_train", {}, lines_of([3.0] * 50 + [9.0] * 49)))  # too short to tell
    noisy = np.random.default_rng(1).normal(3, 0.8, 110)  # averages of 5 differ by more than a tenth
    assert not list(findings.course("base_train", {}, lines_of(noisy)))
    assert not list(findings.course("chat_rl", {}, lines_of([*fell, *np.full(100, 9.0)])))


def test_spikes_that_came_down() -> None:
    losses = np.random.default_rng(0).normal(3, 0.1, 400)
    assert not list(findings.course("base_train", {}, lines_of(losses)))
    losses[200], losses[203], losses[300] = 4.5, 4.2, 5.0
    finding = only(findings.course("base_train", {}, lines_of(losses)))
    assert finding.kind == "note" and "2 spikes" in finding.text and "step 301" in finding.figures
    losses[200] = losses[203] = losses[300] = 3.8  # 8 deviations, but less than a third above
    assert not list(findings.course("base_train", {}, lines_of(losses)))


def test_a_loss_that_is_not_finite() -> None:
    found = only(findings.course("base_train", {}, lines_of([3.0, math.nan])))
    assert (found.kind, found.remedy) == ("bad", "gentler") and "2" in found.figures
    assert "0" in only(findings.course("base_train", {}, [{"step": 0, "loss": None}])).figures
    stopped = {"steps": 37, "num_steps": 90, "stopped_early": True, "not_finite": True, "stopped_by": "loss is nan"}
    found = only(findings.state("chat_sft", stopped, None))
    assert found.remedy == "gentler" and "37 of 90" in found.figures and "loss is nan" in found.figures
    assert only(findings.state("chat_sft", stopped | {"not_finite": False}, None)).remedy == "resume"
    assert not list(findings.state("chat_sft", {"steps": 90}, None))


# ---------------------------------------------------------------------------------------------------
# Evaluations


def test_partial_means_name_what_is_missing() -> None:
    core = {"core": 0.1, "core_of": "18 of 22 tasks", "core_missing": ["squad", "coqa"], "core_interval": [0.05, 0.15]}
    finding = only(findings.partial({"base_eval": core}))
    assert finding.kind == "note" and "18 of 22 tasks" in finding.figures and "squad, coqa" in finding.figures
    assert not list(findings.partial({"base_eval": {"core": 0.1, "core_of": "", "core_missing": []}}))
    assert not list(findings.partial({"base_eval": {}}))
    guessing = only(findings.partial({"base_eval": {"core": 0.01, "core_of": "", "core_interval": [-0.01, 0.03]}}))
    assert "guessing" in guessing.text
    old = only(findings.partial({"chat_eval": {"chatcore": 0.5, "chatcore_missing": ["MMLU"]}}))
    assert "MMLU" in old.figures


def test_contaminated_benchmarks_are_named() -> None:
    def report(share: float) -> Report:
        return {"contamination": {"tables": {"found": [{"benchmark": "ARC", "share": share}]}}}

    assert "ARC 1.00%" in only(findings.contamination(report(0.01))).figures
    assert not list(findings.contamination(report(0.0)))


def evaluated(results: dict[str, tuple[int, int]], run: str = "d4", guessing: float = 0.25) -> Report:
    return {"model": run, **accuracy_values(results, dict.fromkeys(results, guessing))}


def test_skills_beyond_guessing() -> None:
    report = {"chat_eval": evaluated({"A": (60, 100), "B": (30, 100)})}
    good, note = gains.finetuning(report)
    assert (good.kind, note.kind) == ("good", "note") and "A 60.0%" in good.figures and "B 30.0%" in note.figures
    assert kinds(gains.finetuning({"chat_eval": evaluated({"B": (30, 100)})})) == ["bad"]
    assert not list(gains.finetuning({"chat_eval": {"intervals": {"A": [0.1, 0.2]}}}))  # nothing to compare with


def after_rl(before: Report, after: Report) -> Report:
    return {"chat_eval": before, "chat_rl": {"model": "d4", "started_from": "d4"}, "chat_eval_rl": after}


def test_what_rl_gained_and_lost() -> None:
    before = evaluated({"A": (40, 200), "B": (100, 200), "C": (100, 200)})
    report = after_rl(before, evaluated({"A": (160, 200), "B": (60, 200), "C": (110, 200)}))
    worse, better = gains.reinforcement(report)
    assert better.kind == "good" and better.figures.startswith("A 20.0% → 80.0%") and "1 of 3" in better.text
    assert worse.kind == "note" and worse.figures.startswith("B 50.0% → 30.0%")
    unchanged = only(gains.reinforcement(after_rl(before, before)))
    assert unchanged.kind == "note" and unchanged.text.startswith("No sign")
    lost = list(gains.reinforcement(after_rl(before, evaluated({"A": (1, 200), "B": (100, 200), "C": (100, 200)}))))
    assert kinds(lost) == ["bad", "note"]
    report["chat_eval_rl"]["model"] = "d6"  # of another run: not comparable
    assert not list(gains.reinforcement(report))


def test_rl_compares_its_own_evaluations_where_there_are_no_others() -> None:
    own = {"before": {"accuracy/A": 0.1}, "after": {"accuracy/A": 0.9}, "sizes": {"A": 100}}
    assert only(gains.reinforcement({"chat_rl": own})).figures.startswith("A 10.0% → 90.0%")
    del own["sizes"]  # of an older report: no interval without the number of items
    assert not list(gains.reinforcement({"chat_rl": own}))


def test_the_interval_of_a_difference_against_a_published_example() -> None:
    """Newcombe 1998, Table II, (a): 56/70 and 48/80, method 10: 0.0524 to 0.3339."""
    low, high = gains.difference_interval(48, 80, 56, 70, 1.959963984540054)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert gains.joint_z(1) == pytest.approx(1.959963984540054)
    share = wilson_interval(30, 100, gains.joint_z(20))
    assert share[0] < wilson_interval(30, 100)[0]


def rollouts(silent: float, reward: float = 0.5, cut_off: float = 0.0, steps: int = 20) -> list[Report]:
    line = {"groups_without_signal": silent, "reward": reward, "cut_off": cut_off}
    return [{"step": step, **line} for step in range(1, steps + 1)]


def test_rl_without_a_signal() -> None:
    nothing = only(gains.signal({}, rollouts(1.0, reward=0.0)))
    assert nothing.kind == "bad" and "no answer" in nothing.text
    assert only(gains.signal({}, rollouts(1.0, reward=1.0))).kind == "bad"
    assert only(gains.signal({}, [*rollouts(0.5), *rollouts(0.95, reward=0.9)])).kind == "note"
    assert not list(gains.signal({}, rollouts(0.85)))
    assert not list(gains.signal({}, []))
    assert not list(gains.signal({}, [{"step": 1, "groups_without_signal": 1.0}]))  # as a damaged file may have it


def test_answers_cut_off() -> None:
    assert "max-new-tokens" in only(gains.signal({}, rollouts(0.2, cut_off=0.11))).text
    assert not list(gains.signal({}, rollouts(0.2, cut_off=0.09)))


def test_the_tokenizer_of_another_model() -> None:
    report = {"tokenizer": {"hash": "a" * 64}, "base_train": {"tokenizer_hash": "b" * 64}}
    assert list(mixed_stages(report)) == ["tokenizer"]
    assert "bad" in kinds(verdict_of(report, {}, {}).findings)
    report["base_train"]["tokenizer_hash"] = "a" * 64
    assert not mixed_stages(report) and not mixed_stages({"tokenizer": {"hash": "a" * 64}, "base_train": {}})


# ---------------------------------------------------------------------------------------------------
# Next steps


def commands(report: Report, statuses: dict[str, Status] | None = None) -> list[str]:
    return [step.command for step in verdict_of(report, {}, statuses or {}).steps]


def test_the_next_stage_of_the_pipeline() -> None:
    run = {"metrics": "base_checkpoints/d 4/metrics.jsonl"}
    report: Report = {}
    for stage, script in (
        ("base_train", "base_train"),
        ("base_eval", "base_eval"),
        ("chat_sft", "chat_sft"),
        ("chat_eval", "chat_eval"),
        ("chat_rl", "chat_rl"),
        ("chat_eval_rl", "chat_eval --source=rl"),
    ):
        assert f"scripts.{script}" in commands(report)[0]
        report[stage] = dict(run)
    assert commands(report) == ["python -m scripts.chat_web --source=rl --model-tag='d 4'"]
    report["chat_eval_rl"] = {"model": "another"}
    assert "chat_eval --source=rl" in commands(report)[0]


def test_every_command_is_one_that_its_script_takes() -> None:
    from scripts import base_eval, chat_eval, chat_rl, chat_sft, chat_web
    from scripts._cli import parse

    configs = {m.__name__.split(".")[1]: m.Config for m in (base_eval, chat_eval, chat_rl, chat_sft)}
    report: Report = {"base_train": {"model": "d4"}}
    for stage in ("base_eval", "chat_sft", "chat_eval", "chat_rl", "chat_eval_rl"):
        script, *flags = commands(report)[0].removeprefix("python -m scripts.").split()
        parse(configs[script], flags)
        report[stage] = {"model": "d4"}
    assert hasattr(chat_web, "Config") and parse(chat_web.Config, commands(report)[0].split()[3:])


def test_training_longer_has_a_forecast_where_the_text_lasts() -> None:
    longer = {
        "times": 4,
        "command": "python -m scripts.base_train --num-iterations=400",
        "seconds": 240,
        "bpb": 1.25,
        "error": 0.02,
    }
    base = {"model": "d4", "seconds": 60, "longer": longer, "loader": {"epoch": 0}}
    step = verdict_of({"base_train": base}, {}, {}).steps[-1]
    assert step.command == longer["command"] and "1.250 ± 0.020" in step.text and "4m" in step.text
    assert longer["command"] not in commands({"base_train": base | {"loader": {"epoch": 1}}})
    assert longer["command"] not in commands(
        {"base_train": base | {"longer": {"times": 4, "command": "x", "seconds": 9}}}
    )


def test_what_broke_comes_first() -> None:
    base = {"steps": 3, "resume_command": "resume it", "gentler_command": "gentler", "stopped_early": True}
    assert commands({"base_train": base}) == ["resume it"]
    assert commands({"base_train": base | {"not_finite": True, "stopped_by": "nan"}}) == ["gentler"]
    old = {"command": "python -m scripts.base_train --depth=4", "status": "running"}
    dead = {"base_train": Status(alive=False, silent_seconds=60, step=2, saved_step=1)}
    assert commands({"base_train": old}, dead) == [f"{old['command']} --resume"]
    assert (
        with_flags("a --resume --resume-from-step=7 --num-iterations=9 '--data=x y'", "--num-iterations=5")
        == "a '--data=x y' --num-iterations=5"
    )


def test_no_verdict_without_figures() -> None:
    assert verdict_of({}, {}, {}).summary == ""
    empty = verdict_of({stage: {"model": "d4"} for stage in STAGES}, {}, {})
    assert not empty.findings and empty.summary == ""


# ---------------------------------------------------------------------------------------------------
# Runs under way


def test_a_run_is_dead_once_its_lock_is_free(tmp_path: Path) -> None:
    folder = tmp_path / "base_checkpoints" / "d2"
    (folder / "000100").mkdir(parents=True)
    (folder / "000100" / "meta.json").touch()
    (folder / "metrics.jsonl").write_text('{"step": 120}\n')
    values = {"status": "running", "num_steps": 500, "metrics": "base_checkpoints/d2/metrics.jsonl"}
    with run_lock(folder):
        status = status_of(values, [{"step": 120}], tmp_path)
        assert status and status.alive and not status.hangs
        os.utime(folder / "metrics.jsonl", (0, time.time() - SILENCE_SECONDS - 60))
        status = status_of(values, [{"step": 120}], tmp_path)
        assert status and status.alive and status.hangs
        assert kinds(findings.state("base_train", values, status)) == ["note"]
    status = status_of(values, [{"step": 120}], tmp_path)
    assert status and not status.alive
    finding = only(findings.state("base_train", values, status))
    assert all(words in finding.figures for words in ("step 120 of 500", "11m", "step 100"))
    assert status_of({"metrics": values["metrics"]}, [], tmp_path) is None


def test_without_a_lock_to_ask_silence_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.reporting.status.is_held", lambda folder: None)
    for silence, alive in ((60, True), (SILENCE_SECONDS + 60, False)):
        (tmp_path / "metrics.jsonl").touch()
        os.utime(tmp_path / "metrics.jsonl", (0, time.time() - silence))
        status = status_of({"status": "running", "metrics": "metrics.jsonl"}, [], tmp_path)
        assert status and status.alive == alive


def test_a_killed_run_is_noticed(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stubs import TINY

    flags = [f for f in TINY if not f.startswith("--num-iterations")]
    flags += [f"--data={copied / 'text.jsonl'}", "--num-iterations=1000000", "--eval-every=5", "--eval-tokens=16"]
    process = start_script("base_train", flags, copied)
    try:
        deadline = time.monotonic() + 60
        while load_report(copied)["base_train"].get("status") != "running" and time.monotonic() < deadline:
            assert process.is_alive(), (copied / "log.txt").read_text()
            time.sleep(0.02)
        _, statuses = judge(load_report(copied), copied)
        assert statuses["base_train"].alive and "1000000" in load_report(copied)["base_train"]["progress"]
        assert main(["--base-dir", str(copied)]) == 0 and "step " in capsys.readouterr().out
        assert 'http-equiv="refresh"' in (copied / "report" / "report.html").read_text()
    finally:
        process.kill()
        process.join()
    record_stage(copied, "tokenizer", {"seconds": 1})  # any later stage draws the report again
    for page in ("report.html", "report.md"):
        text = (copied / "report" / page).read_text()
        assert "dead" in text and "--resume" in text and 'http-equiv="refresh"' not in text
    assert main(["--base-dir", str(copied)]) == 0
    shown = capsys.readouterr().out
    assert "dead" in shown and "--resume" in shown and "nothing was saved" in shown


def test_the_report_is_drawn_between_evaluations_too(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stubs import TINY

    from nanochat.train import run as training_run
    from scripts import base_train

    recorded: list[Report] = []
    monkeypatch.setattr(training_run, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(training_run, "REPORT_FACTOR", 0.0)
    monkeypatch.setattr(training_run, "record_so_far", lambda stage, values: recorded.append(values))
    flags = [f for f in TINY if not f.startswith("--num-iterations")]
    text = f"--data={copied / 'text.jsonl'}"
    assert base_train.main([*flags, text, "--num-iterations=3", "--eval-every=-1"]) == 0
    assert [(values["steps"], values["num_steps"]) for values in recorded] == [(1, 3), (2, 3)]
    assert all(f"step {values['steps']}/3" in values["progress"] for values in recorded)
    values = load_report(copied)["base_train"]
    assert values["planned_steps"] == 3 and values["forecast"] == {"text": "starter"}
    record_stage(copied, "chat_sft", {"started_from": "tiny", "finished_at": values["finished_at"]})
    assert base_train.main([*flags, text, "--num-iterations=3", "--resume"]) == 0  # nothing is left to train
    assert not mixed_stages(load_report(copied))
    assert "--num-iterations=12" in values["longer"]["command"] and values["longer"]["seconds"] > 0


def test_a_diverged_run_says_so(copied: Path) -> None:
    from stubs import TINY

    from scripts import base_train

    flags = [f for f in TINY if not f.startswith("--num-iterations")]
    flags += [f"--data={copied / 'text.jsonl'}", "--num-iterations=50", "--lr-scale=1e30", "--warmup-steps=0"]
    assert base_train.main(flags) == 1
    values = json.loads((copied / "report" / "report.json").read_text())["base_train"]
    assert values["not_finite"] and values["stopped_by"]
    (step,) = judge(load_report(copied), copied)[0].steps
    assert "lr-scale" not in step.command and "lower" in step.text
