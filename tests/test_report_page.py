"""The report in a real browser, opened from disk: charts, print, accessibility. Needs chromium."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.report import accuracy_values, record_stage
from scripts.report import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
playwright_api = pytest.importorskip("playwright.sync_api")
HOSTILE = "<img src=x onerror=document.title=1><script>document.title=2</script></script>'\"]]><!--"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def write_run(base: Path, name: str, offset: float = 0.0) -> str:
    """Metrics of 300 steps: bits per byte 2.5 at step 100, 2.0 at 200, 1.8 at 300 (+ offset)."""
    run = base / "base_checkpoints" / name
    run.mkdir(parents=True)
    with open(run / "metrics.jsonl", "w") as file:
        for s in range(1, 301):
            line = {"step": s, "loss": 3 + 4 / s + offset, "tokens": 1000 * s, "seconds": 0.5 * s, "step_flops": 1e9}
            if s % 100 == 0:
                line["val_bpb"] = [2.5, 2.0, 1.8][s // 100 - 1] + offset
            file.write(json.dumps(line | {"lr_multiplier": 1 - s / 301, "tokens_per_second": 2000.0}) + "\n")
    (run / "plan.json").write_text(json.dumps({"num_steps": 300, "user_config": {"seed": offset}}))
    return f"base_checkpoints/{name}/metrics.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with the report of a whole chain, and of two runs compared."""
    base = tmp_path_factory.mktemp("base")
    record_stage(base, "base_train", {"metrics": write_run(base, "a"), "command": HOSTILE, "val_bpb": 1.8})
    write_run(base, "<i>b", 0.25)
    tasks = ["SpellingBee", "Arithmetic", HOSTILE, *(f"WordProblems{i}" for i in range(1, 4))]
    samples = [
        {"task": task, "prompt": HOSTILE, "text": f"<|python_start|>{HOSTILE}<|python_end|>" * 9, "right": i > 0}
        for task in tasks
        for i in range(3)
    ]
    for stage, passed in (("chat_eval", 40), ("chat_eval_rl", 160)):
        values = accuracy_values(dict.fromkeys(tasks, (passed, 200)), dict.fromkeys(tasks, 0.1))
        record_stage(base, stage, {**values, "samples": samples, "command": f"python -m {stage}"})
    assert main(["--base-dir", str(base), "--compare", "a", "<i>b"]) == 0
    return base


@pytest.fixture
def open_page(browser: Any, base: Path) -> Iterator[Any]:
    """Opens report.html, or another file beside it, in a context of its own; a message on the console fails."""
    contexts, wrong = [], []

    def opened(name: str = "report.html", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda request: wrong.append(request.url) if request.url[:5] != "file:" else None)
        page.goto((base / "report" / name).as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def chart_of(page: Any, title: str) -> Any:
    return page.locator("figure", has=page.get_by_text(title, exact=True)).first


def numbers(path: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?[\d.]+", path)]


def test_values_are_shown_under_the_pointer_and_by_keys(open_page: Any) -> None:
    page = open_page()
    chart = chart_of(page, "Validation")
    output, drawing = chart.locator("output"), chart.locator("svg.chart")
    at_rest = output.text_content()
    assert at_rest == "1.8"
    drawing.hover(position={"x": drawing.bounding_box()["width"] - 12, "y": 40})
    assert "1.8" in output.text_content() and "300" in output.text_content()
    drawing.hover(position={"x": 60, "y": 40})
    assert "2.5" in output.text_content() and "100" in output.text_content()
    page.mouse.move(0, 0)
    assert output.text_content() == at_rest
    drawing.focus()
    page.keyboard.press("Home")
    assert "2.5" in output.text_content() and "100" in output.text_content()
    page.keyboard.press("ArrowRight")
    assert "200" in output.text_content()
    page.keyboard.press("Escape")
    assert output.text_content() == at_rest and drawing.locator(".mark").count() == 0


def test_curves_are_redrawn_over_the_chosen_axis(open_page: Any) -> None:
    page = open_page()
    chart = chart_of(page, "Validation")
    line, axis, first_tick = (chart.locator(what) for what in (".bold", ".axis", ".x text >> nth=1"))
    over_steps = numbers(line.get_attribute("d"))
    for value, name, tick in (("tokens", "tokens", "100k"), ("flops", "FLOPs", "1e11"), ("seconds", "time", "30s")):
        page.check(f"input[value={value}]")
        assert name in axis.text_content() and first_tick.text_content() == tick
        assert numbers(line.get_attribute("d")) == pytest.approx(over_steps, rel=1e-3)  # all grow alike here
    page.check("input[name=log]")
    left, _, middle, _, right, _ = numbers(line.get_attribute("d"))
    assert (middle - left) / (right - left) == pytest.approx(0.6309, abs=1e-3)  # log 2 / log 3
    page.reload()  # as a page does whose run goes on
    assert page.is_checked("input[value=seconds]") and "log" in axis.text_content()


def test_the_page_is_complete_without_scripts(open_page: Any) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator("svg.chart .bold").count() == 4 and not page.locator("#axes").is_visible()
    assert chart_of(page, "Validation").locator(".axis").text_content() == "step"
    for link in page.locator("nav a").all():
        assert page.locator(str(link.get_attribute("href"))).count() == 1


def test_nothing_hostile_runs(open_page: Any) -> None:
    page = open_page()
    assert page.title() == "nanochat report" and page.locator("img").count() == 0
    page = open_page("compare.html")
    assert page.title() == "nanochat: runs compared" and page.locator("i").count() == 0


def test_compared_runs_are_named_at_their_curves(open_page: Any) -> None:
    page = open_page("compare.html")
    chart = chart_of(page, "Validation")
    names, drawing = chart.locator(".name"), chart.locator("svg.chart")
    assert names.all_text_contents() == ["a", "<i>b"]
    look = "e => [getComputedStyle(e).stroke, getComputedStyle(e).strokeDasharray]"
    looks = [line.evaluate(look) for line in chart.locator(".bold").all()]
    assert looks[0][0] != looks[1][0] and looks[0][1] != looks[1][1]
    drawing.focus()
    page.keyboard.press("End")
    assert names.all_text_contents() == ["1.8", "2.05"] and "300" in chart.locator("output").text_content()


@pytest.mark.parametrize(
    ("scheme", "name"), [("light", "report.html"), ("dark", "report.html"), ("dark", "compare.html")]
)
def test_pages_are_accessible_and_fit_a_phone(open_page: Any, scheme: str, name: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = open_page(name, color_scheme=scheme, bypass_csp=True)
    page.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")
    assert [violation["id"] for violation in axe.Axe().run(page).response["violations"]] == []
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert [violation["id"] for violation in axe.Axe().run(page).response["violations"]] == []


def test_a_whole_chain_prints_on_few_pages(open_page: Any) -> None:
    pdf = open_page().pdf(format="A4", prefer_css_page_size=True)
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6
