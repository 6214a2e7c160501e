"""report.json and the pages drawn from it."""

import base64
import hashlib
import html
import json
import math
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.common import UserError, format_count
from nanochat.gpt_config import GPTConfig
from nanochat.report import accuracy_values, load_report, record_stage, render_report, to_json
from nanochat.reporting.charts import Chart
from nanochat.reporting.compare import compare_metric, read_run
from nanochat.reporting.curves import Curve, curves_of, last_of_each, read_metrics, smooth, sparkline, thin
from nanochat.reporting.samples import Part, answer_parts, sample_groups
from nanochat.reporting.scales import Scale, horizontal_scales, vertical_scale
from nanochat.reporting.view import STAGES, facts_of, headline, mixed_stages, skill_groups, stages_of, wilson_interval
from nanochat.scaling import describe, estimate, make_plan, ngram_share, reported_params
from scripts.report import main

NASTY = '<script>alert("1")</script> & <b>| `x` ``` </pre>\n| über 日本語 \\'


def write_metrics(base: Path, steps: int = 120) -> str:
    """A run's metrics; its last line is incomplete, as in a run in progress."""
    path = base / "base_checkpoints" / "d2" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    with open(path, "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "loss": 3 + 6 / step, "lr_multiplier": 1 - step / steps, "tokens_per_second": 9000.0}
            file.write(json.dumps(line | ({"val_bpb": 1 + 1 / step} if step % 20 == 0 else {})) + "\n")
        file.write('{"step": 121, "lo')
    return "base_checkpoints/d2/metrics.jsonl"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with the stages of a CPU run recorded."""
    base = tmp_path_factory.mktemp("base")
    table = {"Bytes per token": [{"source": "tales|x", "nanochat": 4.0625, "GPT-2": None}]}
    record_stage(base, "tokenizer", {"seconds": 20, "vocab_size": 8192, "tables": table, "command": "tok <1>"})
    record_stage(base, "base_eval", {"seconds": 9, "samples": [{"prompt": "<i>Once", "text": NASTY}]})
    record_stage(base, "chat_sft", {"seconds": 200, "val_bpb": 0.4})
    results = {"Arithmetic": (80, 100), "ARC<Easy>": (25, 100)}
    record_stage(base, "chat_eval", {"seconds": 30, **accuracy_values(results, {"ARC<Easy>": 0.25})})
    record_stage(
        base,
        "base_train",
        {
            "seconds": 600.5,
            "val_bpb": 1.05,
            "tokens": 5_000_000,
            "num_params": 11_500_000,
            "tokens_per_second": 9000.0,
            "metrics": write_metrics(base),
            "plan": [("layers x width", "4 x 256")],
        },
    )
    return base


class Page(HTMLParser):
    """Parse HTML, check the nesting of tags, keep tags, attributes and text."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data


def html_of(base: Path) -> str:
    return (base / "report" / "report.html").read_text(encoding="utf-8")


def test_report_json_keys(full: Path) -> None:
    report = json.loads((full / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["total_seconds"] == pytest.approx(859.5)
    assert report["plan"] == [["layers x width", "4 x 256"]] and "plan" not in report["base_train"]
    assert report["base_train"]["val_bpb"] == 1.05 and report["base_train"]["num_params"] == 11_500_000
    assert report["chat_eval"]["Arithmetic"] == 0.8 and report["chat_eval"]["counts"]["Arithmetic"] == [80, 100]
    assert {"processor", "cores", "memory", "torch", "python", "system", "commit"} <= set(report["machine"])
    for stage in ("tokenizer", "base_train", "base_eval", "chat_sft", "chat_eval"):
        assert report[stage]["seconds"] > 0 and report[stage]["finished_at"].endswith("+00:00")


def test_page_is_self_contained_and_escaped(full: Path) -> None:
    text = html_of(full)
    page = Page(text)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) and "@import" not in text
    assert not page.tags & {"link", "img", "iframe"}
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert all(value and value.startswith("#") for value in links)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "style"]
    assert NASTY in page.text and "<i>Once" in page.text and "ARC<Easy>" in page.text and "tok <1>" in page.text
    assert 'http-equiv="refresh"' not in text


def test_policy_admits_the_pages_own_script_and_style_alone(full: Path) -> None:
    text = html_of(full)
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="([^"]+)"', text)[0])
    found = [
        hashlib.sha256(body.encode()).digest() for body in re.findall(r"<(?:style|script)>(.*?)</", text, re.DOTALL)
    ]
    assert re.findall(r"'sha256-([^']+)'", policy) == [base64.b64encode(digest).decode() for digest in found]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and len(found) == 2


def chart_data(base: Path) -> dict:
    (text,) = re.findall(r'id="chart-data">(.*?)</script>', html_of(base), re.DOTALL)
    return json.loads(text)


def test_charts_hold_the_runs_values_over_each_axis(full: Path) -> None:
    charts = re.findall(r'<svg class="chart".*?aria-label="([^"]*)"', html_of(full))
    assert [label.split(":")[0] for label in charts] == ["Validation", "Training loss", "Speed", "Learning rate"]
    data = chart_data(full)
    (line,) = data["charts"][0]["lines"]
    assert line["axes"]["step"] == [20, 40, 60, 80, 100, 120] and line["values"][0] == 1.05 and not line["smooth"]
    assert list(data["axes"]) == ["step"]  # the lines of this run have no tokens, seconds or FLOPs


def test_flops_add_up_over_the_steps(tmp_path: Path) -> None:
    lines = [{"step": s, "loss": 1.0, "step_flops": 10.0 * s, "tokens": 5 * s, "seconds": s / 2} for s in range(1, 5)]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (curve,) = curves_of({"metrics": "m.jsonl"}, tmp_path)
    assert curve.axes == {
        "step": [1, 2, 3, 4], "tokens": [5, 10, 15, 20], "flops": [10, 30, 60, 100], "seconds": [0.5, 1, 1.5, 2]
    }  # fmt: skip


def test_drawing_twice_gives_the_same_page(full: Path) -> None:
    before = html_of(full)
    assert render_report(full) == full / "report" / "report.html"
    assert html_of(full) == before


def test_markdown_has_the_same_numbers(full: Path) -> None:
    text = (full / "report" / "report.md").read_text(encoding="utf-8")
    for wanted in ("80.0%", "71.1% – 86.7%", "14m20s", "9,000", "4 x 256", "tales\\|x", "ARC&lt;Easy>", "▁"):
        assert wanted in text, wanted
    fence = "````"  # longer than any run of backticks inside
    assert f"{fence}text\n> <i>Once\n{NASTY}\n{fence}" in text


def test_wilson_interval_against_its_definition() -> None:
    """Each end is the proportion p that lies z of its own standard errors from the observed one."""
    z = 1.959963984540054
    for passed, total in ((80, 100), (1, 10), (499, 500), (3, 7)):
        for end in wilson_interval(passed, total):
            assert abs(passed / total - end) == pytest.approx(z * math.sqrt(end * (1 - end) / total), rel=1e-9)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(0, 20)
    assert low == 0.0 and high == pytest.approx(z * z / (20 + z * z))
    assert wilson_interval(20, 20) == pytest.approx((1 - high, 1.0))


def test_second_record_replaces_unless_the_checkpoint_is_the_same(tmp_path: Path) -> None:
    def record(checkpoint: str, results: dict[str, tuple[int, int]]) -> dict:
        record_stage(tmp_path, "chat_eval", {"checkpoint": checkpoint, "seconds": 1, **accuracy_values(results)})
        return load_report(tmp_path)["chat_eval"]

    record("sft/d2/10", {"A": (1, 2), "B": (1, 4)})
    joined = record("sft/d2/10", {"B": (3, 4)})
    assert joined["A"] == 0.5 and joined["B"] == 0.75 and set(joined["intervals"]) == {"A", "B"}
    assert "A" not in record("sft/d2/20", {"B": (3, 4)})
    record_stage(tmp_path, "chat_sft", {"seconds": 1, "val_bpb": 0.5})
    record_stage(tmp_path, "chat_sft", {"seconds": 2})
    assert "val_bpb" not in load_report(tmp_path)["chat_sft"]


def test_numpy_torch_and_path_values_become_json(tmp_path: Path) -> None:
    values = {
        "a": np.float32(0.5),
        "b": torch.tensor(3),
        "c": float("nan"),
        "d": (np.int64(2), True),
        "e": Path("x"),
        "f": np.array([1.0, math.inf]),
        "g": None,
    }
    assert to_json(values) == {"a": 0.5, "b": 3, "c": None, "d": [2, True], "e": "x", "f": [1.0, None], "g": None}
    record_stage(tmp_path, "base_eval", values)
    assert "NaN" not in (tmp_path / "report" / "report.json").read_text(encoding="utf-8")


def test_page_of_a_running_stage_refreshes(tmp_path: Path) -> None:
    record_stage(tmp_path, "base_train", {"status": "running", "seconds": 5})
    page = Page(html_of(tmp_path))
    assert ("http-equiv", "refresh") in page.attributes and page.text.count("Pretraining") > 1
    assert "finished_at" not in load_report(tmp_path)["base_train"]
    updated = load_report(tmp_path)["base_train"]["updated_at"]
    assert updated[:10] in page.text and updated[11:19] in page.text  # it may have been killed since
    record_stage(tmp_path, "base_train", {"seconds": 9})
    assert 'http-equiv="refresh"' not in html_of(tmp_path)


def test_parameters_in_the_table_of_n_grams_are_named(tmp_path: Path) -> None:
    for config, found in ((GPTConfig.later(n_layer=2), {}), (GPTConfig.small(n_layer=2), {"ngram_params": 2**25})):
        counts = estimate(config)[1]
        assert reported_params(counts) == {"num_params": counts["total"], **found}
        record_stage(tmp_path, "base_train", reported_params(counts))
        shown = [text for label, text in headline(load_report(tmp_path)) if "n-grams" in label]
        assert shown == [format_count(number) for number in found.values()]
        assert ("33.6M" in ngram_share(counts)) == bool(found)
        plan = dict(describe(config, make_plan(config)))
        assert ("33.6M" in plan["parameters"]) == bool(found)


def test_stages_of_different_models_get_a_note(tmp_path: Path) -> None:
    def notes() -> list[str]:
        found = list(mixed_stages(load_report(tmp_path)).values())
        assert all(note in Page(html_of(tmp_path)).text for note in found)
        return found

    def assert_one_note(*words: str) -> None:
        (note,) = notes()
        assert [word for word in words if re.search(rf"\b{word}\b", note)] == list(words)

    record_stage(tmp_path, "base_train", {"metrics": "base_checkpoints/d4/metrics.jsonl"})
    record_stage(tmp_path, "chat_sft", {"metrics": "chatsft_checkpoints/d4/metrics.jsonl"})
    record_stage(tmp_path, "chat_eval", {"model": "d4", "chatcore": 0.25})
    record_stage(tmp_path, "chat_eval_rl", {"model": "d4", "chatcore": 0.5})
    assert not notes()
    assert [text for label, text in headline(load_report(tmp_path)) if "ChatCORE" in label] == ["0.2500", "0.5000"]
    record_stage(tmp_path, "base_eval", {"model": "d6"})
    assert_one_note("Base model", "d6", "Pretraining", "d4")
    report = load_report(tmp_path)
    report["base_eval"]["model"], report["chat_sft"]["finished_at"] = "d4", "2025-01-01T00:00:00+00:00"
    (note,) = mixed_stages(report).values()
    assert "Supervised finetuning" in note and "older" in note and "Pretraining" in note
    del report["chat_sft"]["finished_at"]  # under way
    assert not mixed_stages(report)
    record_stage(tmp_path, "base_eval", {"model": "d4"})
    talk = {"metrics": "chatsft_checkpoints/talk/metrics.jsonl", "started_from": "d4"}
    record_stage(tmp_path, "chat_sft", talk)  # a name of its own
    record_stage(tmp_path, "chat_eval", {"model": "talk"})
    assert not notes()
    record_stage(tmp_path, "chat_sft", talk | {"started_from": "older_talk", "started_from_stage": "sft"})
    record_stage(tmp_path, "chat_eval", {"model": "talk"})
    assert not notes()
    record_stage(tmp_path, "chat_sft", talk | {"started_from": "d8", "started_from_stage": "base"})
    record_stage(tmp_path, "chat_eval", {"model": "talk"})
    assert_one_note("Supervised finetuning", "d8", "Pretraining", "d4")


def test_every_stage_alone_can_be_drawn(tmp_path: Path) -> None:
    for stage in STAGES:
        record_stage(tmp_path / stage, stage, {"metrics": "not/there.jsonl", "samples": [], "tables": {}, "plan": []})
        Page(html_of(tmp_path / stage))


def test_records_from_several_threads_all_arrive(tmp_path: Path) -> None:
    threads = [threading.Thread(target=record_stage, args=(tmp_path, stage, {"seconds": 1})) for stage in STAGES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load_report(tmp_path)["total_seconds"] == len(STAGES)


def test_damaged_report_json_is_renamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_stage(tmp_path, "tokenizer", {"seconds": 1})
    path = tmp_path / "report" / "report.json"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(UserError, match=r"report\.json"):
        load_report(tmp_path)
    record_stage(tmp_path, "chat_sft", {"seconds": 2})
    assert load_report(tmp_path)["total_seconds"] == 2
    assert (path.parent / "report.json.damaged1").exists() and "report.json.damaged1" in capsys.readouterr().err
    path.write_text('{"chat_sft": [1]}')  # valid JSON, but not a report
    record_stage(tmp_path, "chat_sft", {"seconds": 3})
    assert load_report(tmp_path)["total_seconds"] == 3
    assert (path.parent / "report.json.damaged2").exists(), "the first is kept"


def test_leftovers_of_a_killed_stage_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / ".report.json.0123abcd.tmp").write_text("{")
    record_stage(tmp_path, "chat_sft", {"seconds": 3})
    assert not list((tmp_path / "report").glob(".*.tmp"))


def test_numbers_survive_a_page_that_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanochat.report._draw", fails)
    record_stage(tmp_path, "chat_sft", {"seconds": 2})
    assert load_report(tmp_path)["chat_sft"]["seconds"] == 2 and "No space left" in capsys.readouterr().err


def test_metrics_reader_skips_damaged_lines_and_what_is_not_finite(tmp_path: Path) -> None:
    path = write_metrics(tmp_path)
    assert len(read_metrics(tmp_path / path)) == 120
    lines = (tmp_path / path).read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"step"', b'"st\xe5p"')
    lines[5] = b"[1]\n"
    (tmp_path / path).write_bytes(b"".join(lines))
    assert [line["step"] for line in read_metrics(tmp_path / path)][:5] == [1, 2, 3, 5, 7]
    assert read_metrics(tmp_path / "none.jsonl") == []
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1.0}\n')
    (curve,) = curves_of({"metrics": "m.jsonl"}, tmp_path)
    assert (curve.steps, curve.values) == ([1, 3], [2.0, 1.0])


def test_thinning_keeps_means_and_the_last_step() -> None:
    points = [float(i) for i in range(1, 11)]
    assert last_of_each(points, 3) == [3, 6, 9, 10] and thin(points, 3) == [2.0, 5.0, 8.0, 10.0]


def test_smoothing_follows_a_straight_line_without_lag() -> None:
    line = [2.0 * i for i in range(600)]
    assert smooth(line)[:589] == pytest.approx(line[:589])
    noisy = np.random.default_rng(0).normal(size=600)
    assert np.std(smooth(list(noisy))) < 0.5 * np.std(noisy)


def test_sparkline_spans_its_range() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█" and sparkline([2.0, 2.0]) == "▁▁"


def test_facts_are_formatted() -> None:
    facts = dict(
        facts_of(
            {
                "tokens": 5_000_000,
                "val_bpb": 1.0471234,
                "eval_seconds": 75.0,
                "x": 1e-7,
                "intervals": {"T": [0, 1]},
                "T": 0.5,
                "seconds": 3,
            }
        )
    )
    assert facts == {
        "validation bits per byte": "1.0471",
        "tokens": "5,000,000",
        "eval seconds": "1m15s",
        "x": "1e-07",
    }


def test_command_line(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-dir", str(full)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(full / "report" / "report.html")
    assert "80.0%" in out and "Pretraining" in out and "ARC<Easy>" in out
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR"):
        main(["--base-dir", str(tmp_path)])


# ---------------------------------------------------------------------------------------------------
# Live, and several runs


def test_the_report_follows_a_run(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stubs import TINY

    from nanochat.train import run as training_run
    from scripts import base_train

    pages: list[tuple[str, dict]] = []
    record_so_far = training_run.record_so_far

    def look(stage: str, values: dict) -> None:
        record_so_far(stage, values)
        pages.append((html_of(copied), load_report(copied)["base_train"]))

    monkeypatch.setattr(training_run, "record_so_far", look)
    flags = [f for f in TINY if not f.startswith("--num-iterations")]
    text = f"--data={copied / 'text.jsonl'}"
    assert base_train.main([*flags, text, "--num-iterations=6", "--eval-every=2"]) == 0
    assert [values["steps"] for _, values in pages] == [2, 4] and all(v["status"] == "running" for _, v in pages)
    assert all('http-equiv="refresh"' in page for page, _ in pages)
    assert 'http-equiv="refresh"' not in html_of(copied) and load_report(copied)["base_train"]["steps"] == 6
    assert set(chart_data(copied)["axes"]) == {"step", "tokens", "flops", "seconds"}


def test_a_report_that_cannot_be_written_stops_no_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nanochat.train import run as training_run

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_run, "record_stage", full)
    training_run.record_so_far("base_train", {})
    assert "No space left" in capsys.readouterr().err


def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, extra in (("a", 0.0), ("b<i>", 0.25)):
        run = tmp_path / "base_checkpoints" / name
        run.mkdir(parents=True)
        lines = [
            {"step": s, "loss": 3 + extra + 6 / s, "tokens": 100 * s, "seconds": s, "tokens_per_second": 100.0}
            | ({"val_bpb": 1 + extra + 1 / s} if s % 20 == 0 else {})
            for s in range(1, 101)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "plan.json").write_text(json.dumps({"num_steps": 100, "user_config": {"depth": 4, "seed": extra}}))
    assert main(["--base-dir", str(tmp_path), "--compare", "a", "b<i>"]) == 0
    text = (tmp_path / "report" / "compare.html").read_text()
    page = Page(text)
    assert "+0.2500" in page.text and "b<i>" in page.text and "i" not in page.tags - {"i"} and "<b>" not in page.text
    assert "seed" in page.text and "depth" not in page.text and text.count('<svg class="chart"') == 3
    (tmp_path / "base_checkpoints" / "a" / "plan.json").write_text(json.dumps({"num_steps": 200, "user_config": {}}))
    assert main(["--base-dir", str(tmp_path), "--compare", "a", "b<i>"]) == 0
    text = (tmp_path / "report" / "compare.html").read_text()
    assert "refresh" not in text, "run a has not finished, but nothing draws the page again"
    tuned = tmp_path / "chatsft_checkpoints" / "talk" / "metrics.jsonl"
    tuned.parent.mkdir(parents=True)
    tuned.touch()
    for wrong, expected in (
        (["a"], "--compare d4 d4.old1"),
        (["a", "nobody"], "nobody.*a, b<i>"),
        (["a", "sft/nobody"], "chatsft_checkpoints: talk;"),
    ):
        with pytest.raises(UserError, match=expected):
            main(["--base-dir", str(tmp_path), "--compare", *wrong])


def test_published_results_of_another_model_are_marked(tmp_path: Path) -> None:
    values = accuracy_values({"copa": (60, 100), "other": (1, 2)}, {"copa": 0.5})
    references = {"GPT-2": {"copa": 0.61, "other": None}}
    record_stage(tmp_path, "base_eval", {**values, "core": 0.0123, "references": references})
    text = html_of(tmp_path)
    assert text.count('<use href="#mark-reference" x="61.00%"') == 1 and "GPT-2" in text and "0.0123" in text


def test_another_validation_set_is_named_and_not_drawn(tmp_path: Path) -> None:
    for name, digest, tokenizer in (("a", "d1", "t1"), ("b", "d1", "t1"), ("c", "d2", "t1"), ("d", "d1", "t2")):
        run = tmp_path / "base_checkpoints" / name
        (run / "000002").mkdir(parents=True)
        lines = [{"step": s, "loss": 2.0 / s, "val_bpb": 1.0 / s} for s in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        flags = {"eval_tokens": 4096}
        (run / "plan.json").write_text(json.dumps({"num_steps": 2, "user_config": flags}))
        (run / "corpus.json").write_text(json.dumps({"val": [{"digest": digest}]}))
        meta = {"plan": {"num_steps": 2}, "tokenizer_hash": tokenizer, "model_config": {"sequence_len": 64}}
        (run / "000002" / "meta.json").write_text(json.dumps(meta))
    runs = [read_run(tmp_path, name) for name in "abcd"]
    assert [run.differs(runs[0]) for run in runs] == [[], [], ["data"], ["tokenizer"]]
    drawn = {key: compare_metric(key, runs) for key in ("val_bpb", "loss")}
    assert {key: [curve.run for curve in chart.shown] for key, chart in drawn.items() if chart} == {
        "val_bpb": ["a", "b"],
        "loss": ["a", "b", "c"],
    }
    assert main(["--base-dir", str(tmp_path), "--compare", *"abcd"]) == 0
    page = Page((tmp_path / "report" / "compare.html").read_text())
    assert page.text.count("+0.0000") == 1 and page.text.count("another validation set") >= 2


def test_skills_of_the_same_tasks_are_paired(tmp_path: Path) -> None:
    record_stage(tmp_path, "base_eval", accuracy_values({"copa": (6, 10)}, {"copa": 0.5}))
    record_stage(tmp_path, "chat_eval", accuracy_values({"A": (1, 10), "SpellingBee": (5, 10)}))
    record_stage(tmp_path, "chat_eval_rl", accuracy_values({"A": (9, 10)}))
    chat, base = skill_groups(load_report(tmp_path))
    assert [skill and skill.passed for _, row in chat.rows for skill in row] == [1, 9, 5, None]
    assert (chat.marks, base.marks) == (["before", "after"], ["after"]) and [name for name, _ in base.rows] == ["copa"]
    text = html_of(tmp_path)
    assert text.count('<use href="#mark-before" x="10.00%"') == 1
    assert text.count('<use href="#mark-after" x="90.00%"') == 1
    assert "Letter counting" in Page(text).text and "90.0%" in (tmp_path / "report" / "report.md").read_text()


def test_answers_are_marked_and_tool_calls_are_told_apart(tmp_path: Path) -> None:
    call = "so<|python_start|>1+2<|python_end|><|output_start|>3<|output_end|>3"
    assert answer_parts(call) == [Part("so"), Part("1+2", True, "3"), Part("3")]
    assert answer_parts("a<|python_start|>1+") == [Part("a"), Part("1+", True, None)] and answer_parts("") == []
    samples = [{"task": task, "prompt": f"{task}{i}", "text": call, "right": i > 0} for task in "AB" for i in range(3)]
    later = {"task": "A", "prompt": "A9", "text": "new", "right": True}  # asked after RL alone
    record_stage(tmp_path, "chat_eval", {"samples": samples})
    record_stage(tmp_path, "chat_eval_rl", {"samples": [{**samples[0], "text": "long " * 200, "right": True}, later]})
    (group,) = sample_groups(load_report(tmp_path))
    assert [question.prompt for question in group.shown] == ["A0", "B0"] and len(group.folded) == 5
    assert [answer and answer.right for answer in group.questions[0].answers] == [False, True]
    assert group.questions[1].answers[1] is None
    page = Page(html_of(tmp_path))
    assert "1+2 → 3" in page.text and "python_start" not in page.text and "✗ wrong" in page.text
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "✗ so[1+2 → 3]3" in markdown and "✓ long" in markdown
    assert "\nafter RL: ✓ new\n" in markdown


def test_stages_stand_in_order_of_time(tmp_path: Path) -> None:
    report = {
        "tokenizer": {"finished_at": "2026-01-02"},
        "base_train": {"updated_at": "2026-01-05", "status": "running"},
        "chat_sft": {"finished_at": "2026-01-03"},
        "base_eval": {"finished_at": "2026-01-01"},
    }
    assert [key for key, _, _ in stages_of(report)] == ["base_eval", "tokenizer", "chat_sft", "base_train"]


@pytest.mark.parametrize(
    ("low", "high", "unit", "log", "expected"),
    [
        (0, 1578, "step", False, "0 500 1k 1.5k"),
        (0, 1, "share", False, "0% 20% 40% 60% 80% 100%"),
        (0, 400, "seconds", False, "0s 2m 4m 6m"),
        (0, 3 * 3600, "seconds", False, "0s 1h 2h 3h"),
        (1.42, 1.52, "", False, "1.42 1.44 1.46 1.48 1.5 1.52"),
        (1e12, 4.2e15, "flops", True, "1e12 1e13 1e14 1e15"),
        (3, 80, "", True, "5 10 20 50"),
        (0.4, 300, "seconds", True, "1s 10s 1m"),
        (30, 370, "seconds", True, "30s 1m 2m 5m"),
        (-0.1, 0.1, "", False, "-0.1 -0.05 0 0.05 0.1"),
    ],
)
def test_ticks_are_round(low: float, high: float, unit: str, log: bool, expected: str) -> None:
    scale = Scale(low, high, unit, log)
    assert " ".join(label for _, label in scale.ticks()) == expected
    assert all(-1e-9 <= scale.position(value) <= 1 + 1e-9 for value, _ in scale.ticks())


def test_scales_are_logarithmic_where_it_helps() -> None:
    assert vertical_scale([0.01, 8.0], "", from_zero=False).log and not vertical_scale([1.0, 8.0], "", False).log
    assert vertical_scale([0.2, 0.3], "share", False).high == 1
    linear, log = horizontal_scales([[0, 10, 1000], [5, 100]], "tokens")
    assert (linear.low, linear.high, log.low, log.high) == (0, 1000, 5, 1000)
    assert log.position(0) == 0 and log.position(math.sqrt(5 * 1000)) == pytest.approx(0.5)
    assert len(horizontal_scales([[0, 0]], "tokens")) == 1


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [-2.0, -2.0], [1e38, 1e-38], [5e-324, 1.0], [1e38, -1e38]])
@pytest.mark.parametrize("key", ["loss", "reward", "lr_multiplier"])
def test_any_finite_values_can_be_drawn(values: list[float], key: str) -> None:
    chart = Chart(key, [Curve(key, "t", {"step": [1.0, 2.0], "tokens": [0.0, 0.0]}, values)])
    assert "nan" not in chart.svg() and "inf" not in chart.svg()
    json.dumps(chart.data(), allow_nan=False)
