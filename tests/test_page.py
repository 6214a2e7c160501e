"""The page in a real browser: what is written, edited, deleted and interrupted there is never lost."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from page_helpers import (
    OUTPUT,
    OUTPUT_END,
    PYTHON,
    PYTHON_END,
    TOKENIZER,
    Served,
    answer,
    answered,
    ask,
    browser as browser,
    needs_browser,
    open_page,
    page as page,
    ready,
    served as served,
    until,
)

from nanochat.serve.replica import Busy

pytestmark = needs_browser


def titles(page: Any) -> list[str]:
    return page.locator("nav .title:not(.deleted *)").all_inner_texts()


def streaming(page: Any, served: Served, text: str = "go", script: str = "x" * 400) -> None:
    """Ask, and return while the answer is being written."""
    served.pool.pause, served.pool.script = 0.03, lambda sent: script
    ask(page, text, wait=False)
    until(page, "document.querySelector('.message.assistant:last-child .body')?.textContent.length > 5")


def more_of(page: Any, title: str, action: str) -> None:
    page.get_by_label(f"More for {title}").click()
    page.locator("#choices button", has_text=re.compile(f"^{action}$")).click()


def stored(page: Any) -> dict[str, Any]:
    """Conversations in the browser's database with their messages, by title."""
    read = """() => new Promise((resolve) => { indexedDB.open('nanochat').onsuccess = (event) => {
        const of = (name) => event.target.result.transaction(name).objectStore(name).getAll();
        const chats = of('chats'), messages = of('messages');
        messages.onsuccess = () => resolve([chats.result, messages.result]); }; })"""
    chats, messages = page.evaluate(read)
    return {c["title"]: {**c, "messages": {m["id"]: m for m in messages if m["chat"] == c["id"]}} for c in chats}


# ---------------------------------------------------------------------------------------------------
# Answers


def test_an_answer_is_streamed_kept_and_announced_once(page: Any, served: Served) -> None:
    served.pool.pause = 0.02
    page.evaluate("""() => { window.said = [];
        new MutationObserver(() => said.push(document.getElementById('announce').textContent))
            .observe(document.getElementById('announce'), {childList: true, characterData: true, subtree: true}); }""")
    ask(page, "héllo — 你好 👋", wait=False)
    until(page, "document.querySelector('.message.assistant')?.textContent.includes('You')")
    assert not page.locator("#stop").get_attribute("class")  # it can be stopped while it streams
    answered(page)
    until(page, "document.querySelector('.rate')")
    assert "You said: héllo — 你好 👋" in answer(page).inner_text() and "tokens/s" in answer(page).inner_text()
    assert page.evaluate("said") == ["Answer: You said: héllo — 你好 👋"]
    page.reload()
    ready(page)
    assert "You said: héllo — 你好 👋" in answer(page).inner_text()
    assert titles(page) == ["héllo — 你好 👋"]


def test_stopping_and_going_on(page: Any, served: Served) -> None:
    streaming(page, served)
    page.keyboard.press("Escape")
    answered(page)
    until(page, "document.querySelector('.message.assistant .note')")
    for _ in range(100):
        if served.pool.cancelled:
            break
        time.sleep(0.02)
    assert served.pool.cancelled == 1
    written = answer(page).locator(".body").inner_text()
    assert 3 < len(written) < 400
    served.pool.pause, served.pool.script = 0.0, lambda text: "and the end"
    answer(page).get_by_role("button", name="Continue").click()
    answered(page)
    page.wait_for_selector("text=and the end")
    assert answer(page).locator(".body").inner_text() == written + "and the end"
    assert served.pool.requests[-1].prompt[-served.pool.requests[-1].answer_begun :] == list(written.encode())


def test_another_conversation_does_not_stop_an_answer(page: Any, served: Served) -> None:
    streaming(page, served, "long", "y" * 60)
    page.keyboard.press("Control+k")
    assert page.locator(".message").count() == 0 and page.locator("nav .busy").count() == 1
    ask(page, "short", wait=False)
    page.locator("nav .open", has_text="long").click()
    answered(page)
    assert answer(page).locator(".body").inner_text() == "y" * 60 and served.pool.cancelled == 0


def test_tool_calls_are_shown_as_what_they_are_and_sent_back(page: Any, served: Served) -> None:
    said = [*b"So ", PYTHON, *b"12*3", PYTHON_END, OUTPUT, *b"36", OUTPUT_END, *"– it is 36.".encode()]
    served.pool.script = lambda text: said
    ask(page, "What is 12*3?")
    shown = [text.strip() for text in answer(page).locator(".tool").all_inner_texts()]
    assert shown == ["Tool call\n12*3", "Tool's answer\n36"]
    page.reload()
    ready(page)
    ask(page, "And now?")
    first, second = (request.prompt for request in served.pool.requests)
    start, end, user, user_end = (
        TOKENIZER.encode_special(f"<|{name}|>")
        for name in ("assistant_start", "assistant_end", "user_start", "user_end")
    )
    assert second == [*first, *said, end, user, *b"And now?", user_end, start]


# ---------------------------------------------------------------------------------------------------
# Versions


def test_edits_and_further_answers_stay_as_versions(page: Any, served: Served) -> None:
    ask(page, "first")
    page.locator(".message.user").get_by_role("button", name="Edit").click()
    assert page.locator(".body textarea").input_value() == "first" and page.locator(".message").count() == 2
    page.keyboard.press("Escape")
    assert page.locator(".body textarea").count() == 0 and served.pool.requests[1:] == []
    page.locator(".message.user").get_by_role("button", name="Edit").click()
    page.locator(".body textarea").fill("second")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.message.assistant')?.textContent.includes('You said: second')")
    assert page.locator(".message.user .version").inner_text() == "2/2"
    page.get_by_role("button", name="Earlier version").click()
    assert "You said: first" in answer(page).inner_text()
    served.pool.script = lambda text: f"again {text}"
    answer(page).get_by_role("button", name="Try again").click()
    until(page, "document.querySelector('.message.assistant')?.textContent.includes('again first')")
    assert answer(page).locator(".version").inner_text() == "2/2"
    page.reload()
    ready(page)
    assert "again first" in answer(page).inner_text()
    answer(page).get_by_role("button", name="Earlier version").click()
    page.locator(".message.user").get_by_role("button", name="Later version").click()
    assert "You said: second" in answer(page).inner_text()


def test_an_alternative_token_begins_another_version(page: Any, served: Served) -> None:
    ask(page, "hi")
    page.locator("h1").click()
    page.keyboard.press("p")
    tokens = answer(page).locator(".tokens .token")
    assert tokens.first.inner_text() == "Y" and tokens.first.get_attribute("data-level") == "4"
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    rows = page.locator("#alternatives .alternative").all_inner_texts()
    assert [re.sub(r"\s+", " ", row).strip() for row in rows] == ["u 90% ←", "a 5%"]
    page.keyboard.press("Escape")
    assert page.locator("#alternatives").get_attribute("class") == "hidden"
    served.pool.script = lambda text: "nother word"
    page.keyboard.press("Enter")
    page.locator("#alternatives .alternative", has_text="a").last.click()
    until(page, "document.querySelector('.message.assistant .version')?.textContent === '2/2'")
    answered(page)
    request = served.pool.requests[-1]
    assert request.answer_begun == 3 and request.prompt[-3:] == list(b"Yoa")
    page.locator("h1").click()
    page.keyboard.press("p")
    until(page, "document.querySelector('.message.assistant .body').textContent.trim() === 'Yoanother word'")


# ---------------------------------------------------------------------------------------------------
# Trouble


def test_errors_are_clear_and_lose_nothing(page: Any, served: Served) -> None:
    served.pool.fail = Busy(3)
    ask(page, "precious words")
    page.wait_for_selector(".message .error")
    assert "busy" in answer(page).locator(".error").inner_text()
    served.pool.fail = None
    page.reload()
    ready(page)
    answer(page).locator(".error").get_by_role("button", name="Try again").click()
    page.wait_for_selector("text=You said: precious words")
    assert page.locator(".message").count() == 2 and page.locator(".message .error").count() == 0


def test_a_message_that_is_too_long_is_refused_in_view_and_can_be_edited(page: Any, served: Served) -> None:
    ask(page, "word\n" * 1000)
    error = answer(page).locator(".error")
    assert "4096" in error.inner_text()
    assert (
        page.evaluate("(box => box.scrollHeight - box.clientHeight - box.scrollTop)(document.getElementById('log'))")
        < 8
    )
    error.get_by_role("button", name="Edit").click()
    page.locator(".body textarea").fill("short")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=You said: short")


def test_the_server_dies_in_the_middle_and_comes_back(page: Any, served: Served) -> None:
    streaming(page, served, script="slowly " * 50)
    served.kill()
    page.wait_for_selector(".message .error")
    assert "slow" in answer(page).locator(".body").inner_text()  # what came is kept
    answer(page).locator(".error").get_by_role("button", name="Try again").click()
    until(page, "document.querySelector('.message.assistant .error')?.textContent.includes('cannot be reached')")
    served.pool.pause = 0.0
    served.start()
    answer(page).locator(".error").get_by_role("button", name="Try again").click()
    until(page, "document.querySelector('.message.assistant:last-child')?.textContent.split('slowly').length === 51")
    assert page.locator(".message .error").count() == 0


def test_a_reload_in_the_middle_keeps_what_came(page: Any, served: Served) -> None:
    streaming(page, served, script="y" * 4000)
    time.sleep(1.6)  # it is stored every 1.5 s
    page.reload()
    ready(page)
    assert "yyyyy" in answer(page).locator(".body").inner_text()
    assert page.locator(".message.user .body").inner_text() == "go"


def test_no_room_is_said_until_there_is_room(page: Any, served: Served) -> None:
    page.evaluate("""() => { window.put = IDBObjectStore.prototype.put;
        IDBObjectStore.prototype.put = function () { throw new DOMException('full', 'QuotaExceededError'); }; }""")
    ask(page, "not kept")
    page.wait_for_selector(".notice")
    assert "NOT kept" in page.locator(".notice").inner_text() and page.locator("nav .unsaved").count() == 1
    page.evaluate("() => { IDBObjectStore.prototype.put = window.put; }")
    page.locator(".notice button").click()
    until(page, "!document.querySelector('nav .unsaved')")
    assert "not kept" in stored(page)


def test_one_damaged_entry_hides_no_other(page: Any, served: Served) -> None:
    ask(page, "fine")
    page.evaluate("""() => new Promise((done) => { indexedDB.open('nanochat').onsuccess = (event) => {
        const writing = event.target.result.transaction(['chats', 'messages'], 'readwrite');
        const chats = writing.objectStore('chats'), messages = writing.objectStore('messages');
        chats.put({id: '__proto__', title: 'bad'});
        chats.put({id: 'odd', title: 7, chosen: 5});
        messages.put({chat: 'odd', id: 'a', parent: null, role: 'user', text: 'odd one', made: 'x'});
        messages.put({chat: 'odd', id: 'b', parent: 'a', role: 'assistant', parts: 3});
        messages.put({chat: 'odd', id: 'c', parent: 'b', role: 'user', text: 'after a damaged one'});
        messages.put({chat: 'odd', id: 'd', parent: 'c', role: 'assistant', parts: [{kind: 'text', text: 'fine'}, 5],
            end: {}, usage: 'x', tokens: [null], error: 7, model: {}});
        writing.oncomplete = done; }; })""")
    page.reload()
    ready(page)
    assert set(titles(page)) == {"fine", "7"} and page.locator(".notice").count() == 1


# ---------------------------------------------------------------------------------------------------
# Conversations


def test_conversations_are_found_renamed_deleted_and_brought_back(page: Any, served: Served) -> None:
    ask(page, "the capital of France")
    page.keyboard.press("Control+k")
    ask(page, "sum of numbers")
    assert titles(page) == ["sum of numbers", "the capital of France"]
    page.fill("#search", "said: the CAPITAL")
    assert titles(page) == ["the capital of France"]
    page.fill("#search", "")
    more_of(page, "sum of numbers", "Rename")
    page.keyboard.type("sums")
    page.keyboard.press("Enter")
    until(page, "[...document.querySelectorAll('nav .open')].some((b) => b.textContent === 'sums')")
    more_of(page, "sums", "Delete")
    assert titles(page) == ["the capital of France"] and "You said: the capital" in answer(page).inner_text()
    page.locator(".notice").get_by_role("button", name="Undo").click()
    assert titles(page)[0] == "sums" and "You said: sum of numbers" in answer(page).inner_text()
    page.reload()
    ready(page)
    assert set(titles(page)) == {"sums", "the capital of France"}


def test_export_and_import(page: Any, served: Served, tmp_path: Path) -> None:
    served.pool.script = lambda text: "some ``` code"
    ask(page, "take me along")
    with page.expect_download() as download:
        page.click("#export-all")
    file = tmp_path / "kept.json"
    download.value.save_as(file)
    with page.expect_download() as download:
        more_of(page, "take me along", "Export as Markdown")
    assert "take me along" in Path(download.value.path()).read_text()
    page.evaluate("() => indexedDB.deleteDatabase('nanochat')")
    page.reload()
    ready(page)
    assert titles(page) == []
    page.set_input_files("#import-file", file)
    until(page, "document.querySelectorAll('nav .open').length === 1")
    assert "some ``` code" in answer(page).inner_text() and "take me along" in stored(page)
    other = tmp_path / "other.jsonl"
    rows = [[{"role": "user", "content": "theirs"}, {"role": "assistant", "content": "yes"}]]
    other.write_text("\n".join(json.dumps(row) for row in rows))
    bad = tmp_path / "bad.json"
    bad.write_text("not json at all")
    page.set_input_files("#import-file", [other, bad])
    until(page, "document.querySelectorAll('nav .open').length === 2")
    page.wait_for_selector(".notice:has-text('bad.json')")


def test_drafts_survive(page: Any, served: Served) -> None:
    ask(page, "one")
    page.fill("#text", "half a thought")
    page.keyboard.press("Control+k")
    until(page, "document.querySelector('#text').value === ''")
    page.fill("#text", "another")
    page.locator("nav .open", has_text="one").click()
    until(page, "document.querySelector('#text').value === 'half a thought'")
    page.reload()
    ready(page)
    until(page, "document.querySelector('#text').value === 'half a thought'")


def test_messages_that_no_longer_fit_are_marked(page: Any, served: Served) -> None:
    served.pool.script = lambda text: "Yes."
    for text, dropped in (("a" * 2500, 0), ("b" * 1000, 0), ("c" * 1000, 2)):
        ask(page, text)
        assert served.pool.requests[-1].dropped_messages == dropped
        until(page, f"document.querySelectorAll('.message.dropped').length === {dropped}")
    assert page.locator(".message.boundary .note").count() == 1


def test_failed_answers_are_not_counted_among_the_messages_that_no_longer_fit(page: Any, served: Served) -> None:
    served.pool.fail, served.pool.script = Busy(3), lambda text: "Yes."
    ask(page, "failed")
    served.pool.fail = None
    for text in ("a" * 2500, "b" * 1000, "c" * 1000):
        ask(page, text)
    assert served.pool.requests[-1].dropped_messages == 3
    until(page, "document.querySelectorAll('.message.dropped').length === 4")
    assert page.locator(".message.boundary .body").inner_text() == "b" * 1000


# ---------------------------------------------------------------------------------------------------
# Several tabs


def test_two_tabs_lose_nothing_of_each_other(page: Any, served: Served) -> None:
    ask(page, "first")
    other = page.context.new_page()
    open_page(other, served)
    assert "You said: first" in answer(other).inner_text()
    other.keyboard.press("Control+k")
    ask(other, "second")
    until(page, "document.querySelectorAll('nav .open').length === 2")
    assert "You said: first" in answer(page).inner_text(), "each tab shows its own"

    # Both in one conversation at the same time: each adds to it, and both have all of it afterwards.
    other.locator("nav .open", has_text="first").click()
    served.pool.pause = 0.03
    ask(page, "from one", wait=False)
    other.locator(".message.user").first.get_by_role("button", name="Edit").click()
    other.locator(".message textarea").fill("from the other")
    other.locator(".message").get_by_role("button", name="Send").click()
    answered(page)
    answered(other)
    for tab in (page, other):
        until(tab, "document.querySelector('.version')?.textContent.endsWith('/2')")
    kept = stored(page)["first"]["messages"].values()
    assert {"first", "from one", "from the other"} == {m.get("text") for m in kept} - {None}
    assert all(m["end"] == "length" for m in kept if m["role"] == "assistant")
    more_of(other, "second", "Delete")
    until(page, "document.querySelectorAll('nav .open').length === 1")


def test_another_tab_shows_that_an_answer_is_being_written(page: Any, served: Served) -> None:
    streaming(page, served, script="z" * 120)
    other = page.context.new_page()
    open_page(other, served)
    assert "Another tab" in answer(other).inner_text()
    answered(page)
    until(other, "document.querySelector('.message.assistant .body').textContent.trim().length === 120")
    assert other.locator(".message .error").count() == 0


# ---------------------------------------------------------------------------------------------------
# Settings


def test_settings_are_sent_checked_and_can_be_cancelled(page: Any, served: Served) -> None:
    page.click("#settings-open")
    assert page.get_attribute("#temperature", "placeholder") == "0.8"
    page.fill("#temperature", "30")
    page.get_by_role("button", name="Save").click()
    assert page.locator("#settings").get_attribute("open") is not None and page.inner_text("#temperature-error")
    page.fill("#temperature", "0.3")
    page.fill("#top_k", "7")
    page.fill("#seed", "11")
    page.fill("#system", "Be brief.")
    page.get_by_role("button", name="Save").click()
    ask(page, "hi")
    request = served.pool.requests[-1]
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.3, 7, 11)
    assert "Be brief." in TOKENIZER.decode(request.prompt)
    page.click("#settings-open")
    page.fill("#top_k", "9")
    page.get_by_role("button", name="Cancel").click()
    page.click("#settings-open")
    assert page.input_value("#top_k") == "7"
    page.locator("#presets button").first.click()
    assert page.input_value("#top_k") == ""
    page.keyboard.press("Escape")
    ask(page, "again")
    assert served.pool.requests[-1].sampling.top_k == 7


def test_settings_of_two_tabs(page: Any, served: Served) -> None:
    other = page.context.new_page()
    open_page(other, served)
    page.click("#settings-open")
    page.fill("#top_k", "7")
    other.click("#settings-open")
    other.fill("#system", "Be brief.")
    other.get_by_role("button", name="Save").click()
    page.get_by_role("button", name="Save").click()
    ask(page, "hi")
    assert served.pool.requests[-1].sampling.top_k == 7
    assert "Be brief." in TOKENIZER.decode(served.pool.requests[-1].prompt)
    theme = page.evaluate("document.documentElement.dataset.theme")
    other.click("#theme")
    until(page, f"document.documentElement.dataset.theme !== '{theme}'")


def test_what_an_earlier_version_kept_is_still_there(page: Any, served: Served) -> None:
    old = """localStorage.clear(); sessionStorage.clear();
    const chats = ['new', 'old'].map((title) => ({ id: title, title, messages: [{ role: 'user', content: title },
        { role: 'assistant', content: 'to ' + title, parts: [{kind: 'text', text: 'to ' + title}], tokens: [] }] }));
    localStorage.setItem('nanochat', JSON.stringify(
        { chats, current: 'old', theme: 'dark', settings: { top_k: '5' } }));
    localStorage.setItem('nanochat/bad', '{"messages": 5}');
    localStorage.setItem('nanochat/own', JSON.stringify({ id: 'own', made: 5, title: 'own', messages: [] }));"""
    page.goto(f"http://127.0.0.1:{served.port}/v1/models")
    page.evaluate(old)
    open_page(page, served)
    assert set(titles(page)) == {"new", "old"}
    page.locator("nav .open", has_text="old").click()
    assert page.locator(".message .body").all_inner_texts() == ["old", "to old"]
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    ask(page, "more")
    assert served.pool.requests[-1].sampling.top_k == 5


def test_light_dark_and_phone(browser: Any, served: Served) -> None:
    served.pool.__init__()  # type: ignore[misc]
    context = browser.new_context(viewport={"width": 320, "height": 640}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    open_page(page, served)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.fill("#text", "a" * 300)
    page.click("#send")
    page.wait_for_selector(".rate")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.click("#menu")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.keyboard.press("Escape")
    assert page.get_attribute("#menu", "aria-expanded") == "false"
    context.close()


def test_on_a_phone_targets_are_large_and_the_keyboard_stays_closed(browser: Any, served: Served) -> None:
    served.pool.__init__()  # type: ignore[misc]
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    open_page(page, served)
    page.fill("#text", "hello")
    page.tap("#send")
    page.wait_for_selector(".rate")
    page.tap(".message.user button:has-text('Edit')")
    page.keyboard.type(" again")
    page.tap(".message.user .primary")
    page.wait_for_selector(".version")
    assert page.evaluate("document.activeElement.tagName") != "TEXTAREA"
    small = """() => [...document.querySelectorAll('button, select')].filter((e) => e.checkVisibility())
        .map((e) => [e.textContent, e.getBoundingClientRect()]).filter(([, r]) => r.width < 36 || r.height < 36)"""
    assert page.evaluate(small) == []
    page.tap("#menu")
    page.tap("#settings-open")
    assert page.evaluate("document.activeElement.id") == "settings-title"
    # A smaller font makes iOS zoom into the field.
    fonts = """() => [...document.querySelectorAll('textarea, select, input')]
        .map((e) => parseFloat(getComputedStyle(e).fontSize))"""
    assert min(page.evaluate(fonts)) >= 16
    page.fill("#temperature", "99")
    page.tap("#settings .primary")
    assert page.evaluate("document.activeElement.id") == "temperature"
    page.fill("#temperature", "0.5")
    page.tap("#settings .primary")
    assert "open" not in (page.get_attribute("body", "class") or "")
    page.tap("#new-here")
    until(page, "document.querySelectorAll('.message').length === 0")
    context.close()


def test_text_follows_the_browsers_text_size(page: Any, served: Served) -> None:
    ask(page, "hello")
    size = "parseFloat(getComputedStyle(document.querySelector('.message .body')).fontSize)"
    before = page.evaluate(size)
    page.evaluate("document.documentElement.style.fontSize = '200%'")
    assert page.evaluate(size) == 2 * before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_accessibility_violations(browser: Any, served: Served, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    served.pool.__init__()  # type: ignore[misc]
    served.pool.script = lambda text: "# A\n**b** `c` [d](https://e.example)\n\n- f\n\n```py\ng = 'h'  # i\n```\n> h"
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    open_page(page, served)
    ask(page, "go")

    def check() -> None:
        found = axe.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()

    check()
    page.click("#settings-open")
    check()
    page.click("#settings-cancel")
    page.locator("h1").click()
    page.keyboard.press("p")
    answer(page).locator(".tokens .token").nth(2).click()
    check()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    check()
    context.close()
