"""Focus, pressed buttons and drafts stay on the page while answers are written and models looked for."""

import re
from typing import Any

import pytest
from page_helpers import (
    BODY,
    Served,
    answer,
    answered,
    ask,
    begin,
    browser as browser,
    needs_browser,
    page as page,
    ready,
    served as served,
    until,
)

from nanochat.serve.replica import Busy

pytestmark = needs_browser
FOCUSED = "document.activeElement.id"


def look(page: Any) -> None:
    page.evaluate("import('/page/state.js').then(({ emit }) => emit('look'))")


def show_tokens(page: Any) -> None:
    page.locator("h1").click()
    page.keyboard.press("p")
    answer(page).locator(".tokens .token").nth(2).click()


def test_renaming_gives_the_focus_to_where_the_reader_went(page: Any, served: Served) -> None:
    ask(page, "one")
    for key in ("", "Enter"):
        page.get_by_label("More for one").click()
        page.locator("#choices button", has_text=re.compile("^Rename$")).click()
        if key:
            page.keyboard.press(key)
            until(page, "document.activeElement.className === 'open'")
        else:
            page.click("#text")
            until(page, "!document.querySelector('#list input')")
            assert page.evaluate(FOCUSED) == "text"


def test_a_slow_click_on_a_version_while_it_is_written(page: Any, served: Served) -> None:
    ask(page, "go")
    served.pool.pause, served.pool.script = 0.02, lambda text: "y" * 200
    answer(page).get_by_role("button", name="Try again").click()
    until(page, f"{BODY}.startsWith('yyy')")
    box = answer(page).get_by_role("button", name="Earlier version").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    length = page.evaluate(f"{BODY}.length")
    until(page, f"{BODY}.length > {length} + 3")
    page.mouse.up()
    assert page.evaluate(BODY) == "You said: go"


def test_a_failed_look_at_the_server_keeps_its_models(
    page: Any, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = served.server.config.app
    while not hasattr(settings, "state"):
        settings = settings.app
    monkeypatch.setattr(settings.state.api.settings, "chat_model", False)
    page.reload()
    ready(page)
    page.route("**/v1/models", lambda route: route.abort())
    look(page)
    page.wait_for_selector("#trouble:not(.hidden)")
    assert page.inner_text("#send") == "Continue"
    page.unroute("**/v1/models")
    page.wait_for_selector("#trouble.hidden", state="attached", timeout=8000)  # looked for every 3 s, not every 30 s


def test_a_branch_that_failed_is_tried_again_with_its_tokens(page: Any, served: Served) -> None:
    ask(page, "hi")
    show_tokens(page)
    served.pool.fail = Busy(3)
    page.locator("#alternatives .alternative", has_text="a").last.click()
    page.wait_for_selector(".message .error")
    served.pool.fail = None
    answer(page).locator(".error button", has_text="Try again").click()
    until(page, "document.querySelector('.message.assistant .version')?.textContent === '3/3'")
    answered(page)
    request = served.pool.requests[-1]
    assert request.answer_begun == 3 and request.prompt[-3:] == list(b"Yoa")


def test_a_branch_needs_the_model_that_wrote_the_answer(page: Any, served: Served) -> None:
    ask(page, "hi")
    page.route(
        "**/v1/models",
        lambda route: route.fulfill(json={"data": [{"id": "other", "answers": True, "max_context": 99}]}),
    )
    look(page)
    until(page, "document.querySelector('#model').value === 'other'")
    show_tokens(page)
    page.locator("#alternatives .alternative", has_text="a").last.click()
    page.wait_for_selector(".notice")
    assert len(served.pool.requests) == 1


def test_an_example_keeps_what_is_written(page: Any, served: Served) -> None:
    page.fill("#text", "half a thought")
    page.locator(".empty button").first.click()
    until(page, "document.querySelector('.message.assistant .rate')")
    assert page.input_value("#text") == "half a thought"
    page.reload()
    ready(page)
    page.keyboard.press("Control+k")
    assert page.input_value("#text") == "half a thought"


def test_a_hit_leads_to_the_words_searched_for_last(page: Any, served: Served) -> None:
    served.pool.script = lambda text: "the needle" if text == "again" else "nothing"
    ask(page, "hay needles")
    ask(page, "again")
    page.fill("#search", "h")
    page.fill("#search", "hay")
    page.locator("nav .open").click()
    assert page.evaluate("[...CSS.highlights.get('found')].map(String)") == ["hay"]


def test_the_alternatives_close_with_what_they_belong_to(page: Any, served: Served) -> None:
    ask(page, "hi")
    show_tokens(page)
    page.keyboard.press("p")
    assert page.locator("#alternatives").get_attribute("class") == "hidden"
    show_tokens(page)
    page.keyboard.press("Control+k")
    assert page.locator("#alternatives").get_attribute("class") == "hidden"


def test_escape_in_the_search_clears_it_and_stops_nothing(page: Any, served: Served) -> None:
    begin(page, served, "x" * 60)
    page.keyboard.press("Control+/")
    assert page.evaluate(FOCUSED) == "search" and page.evaluate("document.body.className") == ""
    page.keyboard.type("nowhere")
    assert page.locator("nav .open").count() == 0
    page.keyboard.press("Escape")
    assert page.locator("nav .open").count() == 1 and page.input_value("#search") == ""
    answered(page)
    assert page.evaluate(BODY) == "x" * 60


def test_a_continued_answer_counts_all_its_tokens(page: Any, served: Served) -> None:
    begin(page, served)
    page.keyboard.press("Escape")
    answered(page)
    served.pool.pause, served.pool.script = 0.0, lambda text: "end"
    answer(page).get_by_role("button", name="Continue").click()
    until(page, f"{BODY}.endsWith('end')")
    answered(page)
    until(page, "document.querySelector('.rate')")
    assert int(page.inner_text(".rate").split()[0]) == page.evaluate(f"{BODY}.length")


def test_a_key_that_no_request_can_carry_points_to_the_settings(page: Any, served: Served) -> None:
    page.click("#settings-open")
    page.fill("#key", "kęy")
    page.locator("#settings .primary").click()
    page.wait_for_selector("#trouble button")
    ask(page, "hi")
    answer(page).locator(".error button", has_text="Open settings").click()
    assert page.locator("#settings[open]").count() == 1


def test_the_deleted_ones_stay_pressed_and_focused_while_an_answer_is_written(page: Any, served: Served) -> None:
    ask(page, "old")
    page.get_by_label("More for old").click()
    page.locator("#choices button", has_text=re.compile("^Delete$")).click()
    begin(page, served)
    page.locator("nav .deleted summary").click()
    page.get_by_label("Restore old").focus()
    page.evaluate("import('/page/state.js').then(({ emit }) => emit('list'))")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Restore old"


def test_send_and_stop_leave_the_focus_in_the_text(page: Any, served: Served) -> None:
    served.pool.pause, served.pool.script = 0.03, lambda text: "x" * 300
    page.fill("#text", "go")
    page.focus("#send")
    page.keyboard.press("Enter")
    until(page, f"{FOCUSED} === 'text'")
    until(page, f"document.querySelector('.message.assistant .body') && {BODY}.length > 20")
    page.focus("#stop")
    page.keyboard.press("Enter")
    until(page, f"{FOCUSED} === 'text'")
