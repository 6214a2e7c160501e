"""The page loses nothing: many fast actions, failures at the worst moment, hostile files, several tabs and versions."""

import json
import re
import time
from pathlib import Path
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
    open_page,
    page as page,
    ready,
    served as served,
    until,
)

pytestmark = needs_browser


def texts(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(".message .body").all_inner_texts()]


def choose(page: Any, title: str, action: str) -> None:
    page.get_by_label(f"More for {title}").first.click()
    page.locator("#choices button", has_text=re.compile(f"^{action}$")).click()


def test_many_fast_actions(page: Any, served: Served) -> None:
    """Double clicks and keys in a row do once what they say."""
    served.pool.pause = 0.01
    page.fill("#text", "one")
    page.dblclick("#send", force=True)
    answered(page)
    assert len(served.pool.requests) == 1
    page.evaluate("""() => {
        const again = [...document.querySelectorAll('button')].find((b) => b.textContent === 'Try again');
        again.click(); again.click(); again.click(); }""")
    answered(page)
    assert len(served.pool.requests) == 2 and answer(page).locator(".version").inner_text() == "2/2"
    for _ in range(5):
        page.keyboard.press("Control+k")
    page.evaluate("""() => { document.querySelector('nav .more').click();
        const choice = [...document.querySelectorAll('#choices button')].at(-1); choice.click(); choice.click(); }""")
    assert page.locator("nav .open").count() == 0
    page.evaluate("() => { const undo = document.querySelector('.notice button'); undo.click(); undo.click(); }")
    assert page.locator("nav .open").count() == 1 and texts(page) == ["one", "You said: one"]


def test_deleting_while_answering_and_bringing_it_back(page: Any, served: Served) -> None:
    begin(page, served)
    choose(page, "go", "Delete")
    until(page, "!document.querySelector('nav .open')")
    page.locator(".notice button", has_text="Undo").click()
    until(page, "document.querySelector('.message .note')")
    assert answer(page).locator(".body").inner_text().startswith("xxxxx")
    choose(page, "go", "Delete")
    page.reload()
    ready(page)
    assert page.locator("nav .open").count() == 0
    page.locator("nav .deleted summary").click()
    page.get_by_label("Restore go").click()
    assert answer(page).locator(".body").inner_text().startswith("xxxxx")
    choose(page, "go", "Delete")
    page.get_by_label("Delete go for good").click()  # the list of deleted ones has stayed open
    page.reload()
    ready(page)
    assert page.locator("nav .deleted").count() == 0


def test_undo_after_another_tab_deleted_it_for_good(page: Any, served: Served) -> None:
    ask(page, "keep me")
    other = page.context.new_page()
    open_page(other, served)
    choose(page, "keep me", "Delete")
    other.locator("nav .deleted summary").click()
    other.get_by_label("Delete keep me for good").click()
    until(page, "!document.querySelector('nav .deleted')")
    page.locator(".notice button", has_text="Undo").click()
    other.close()
    page.reload()
    ready(page)
    assert texts(page) == ["keep me", "You said: keep me"]


def test_continuing_never_loses_what_was_there(page: Any, served: Served) -> None:
    begin(page, served)
    page.keyboard.press("Escape")
    answered(page)
    until(page, "document.querySelector('.message .note')")
    written = answer(page).locator(".body").inner_text()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    answer(page).get_by_role("button", name="Continue").click()
    page.wait_for_selector(".message .error")
    assert answer(page).locator(".body").inner_text() == written
    page.reload()
    ready(page)
    assert answer(page).locator(".body").inner_text() == written
    page.unroute("**/v1/chat/completions")
    served.pool.pause, served.pool.script = 0.0, lambda text: " end"
    answer(page).get_by_role("button", name="Continue").click()
    until(page, f"{BODY} === {json.dumps(written + ' end')}")


def test_versions_can_be_looked_at_while_one_is_written(page: Any, served: Served) -> None:
    ask(page, "go")
    served.pool.pause, served.pool.script = 0.02, lambda text: "y" * 60
    answer(page).get_by_role("button", name="Try again").click()
    until(page, f"{BODY}.startsWith('yyy')")
    answer(page).get_by_role("button", name="Earlier version").click()
    assert texts(page)[-1] == "You said: go"
    answered(page)
    answer(page).get_by_role("button", name="Later version").click()
    assert texts(page)[-1] == "y" * 60
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused == "Earlier version"  # the other button can no longer be pressed


def test_what_is_typed_in_an_edit_survives(page: Any, served: Served) -> None:
    ask(page, "one")
    page.keyboard.press("Control+k")
    ask(page, "two")
    page.locator(".message.user").get_by_role("button", name="Edit").click()
    page.locator(".message textarea").fill("two and a half")
    page.locator("nav .open", has_text="one").click()
    page.locator("nav .open", has_text="two").click()
    assert page.locator(".message textarea").input_value() == "two and a half"
    page.reload()
    ready(page)
    assert page.locator(".message textarea").input_value() == "two and a half"
    page.locator(".message textarea").focus()
    page.keyboard.press("Escape")
    assert texts(page) == ["two", "You said: two"]
    page.locator(".notice button", has_text="Undo").click()
    page.locator(".message textarea").focus()
    page.keyboard.press("Control+Enter")
    until(page, f"{BODY} === 'You said: two and a half'")


def test_a_clock_that_is_set_back(page: Any, served: Served) -> None:
    ask(page, "before")
    page.evaluate("() => { const now = Date.now; Date.now = () => now() - 3_600_000; }")
    begin(page, served, "late " * 8)
    answered(page)
    answer(page).get_by_role("button", name="Try again").click()
    answered(page)
    page.reload()
    ready(page)
    assert texts(page)[-1] == ("late " * 8).strip() and answer(page).locator(".version").inner_text() == "2/2"


def test_a_closed_tab_loses_at_most_seconds(page: Any, served: Served) -> None:
    """Another tab of the same browser sees what was stored, and that the answer is no longer written."""
    begin(page, served, "z" * 3000)
    until(page, f"{BODY}.length > 80")
    other = page.context.new_page()
    open_page(other, served)
    assert "Another tab" in answer(other).inner_text()
    page.close()
    other.wait_for_selector(".message .error")
    assert len(answer(other).locator(".body").inner_text()) > 20
    answer(other).get_by_role("button", name="Continue").click()
    other.click("#stop")


def test_search_shows_what_it_found_in_any_version(page: Any, served: Served) -> None:
    served.pool.script = lambda text: "the needle is here"
    ask(page, "first")
    served.pool.script = lambda text: "nothing"
    answer(page).get_by_role("button", name="Try again").click()
    until(page, f"{BODY} === 'nothing'")
    page.keyboard.press("Control+k")
    ask(page, "second")
    page.fill("#search", "NEEDLE")
    assert page.locator("nav .open").count() == 1 and page.locator("nav .found mark").inner_text() == "needle"
    page.locator("nav .open").click()
    assert texts(page)[-1] == "the needle is here"
    assert page.evaluate("CSS.highlights.get('found').size") == 1


def test_a_title_can_be_edited_while_an_answer_is_written(page: Any, served: Served) -> None:
    begin(page, served, "w" * 100)
    choose(page, "go", "Rename")
    page.keyboard.type("my very own title", delay=100)
    assert page.evaluate("document.activeElement.value") == "my very own title"
    page.keyboard.press("Enter")
    assert page.locator("nav .title").inner_text() == "my very own title"
    page.get_by_label("More for my very").click()
    answered(page)
    page.keyboard.press("Escape")
    assert page.locator("#choices:popover-open").count() == 0
    until(page, "document.activeElement.className === 'more'")


# ---------------------------------------------------------------------------------------------------
# Files


def imported(page: Any, tmp_path: Path, name: str, content: str | bytes) -> str:
    """Import a file; the notice about it."""
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    page.set_input_files("#import-file", file)
    until(page, f"[...document.querySelectorAll('.notice')].some((n) => n.textContent.includes({json.dumps(name)}))")
    return str(page.locator(".notice", has_text=name).last.inner_text())


def exported(page: Any, title: str, how: str) -> str:
    with page.expect_download() as download:
        choose(page, title, how)
    return Path(download.value.path()).read_text()


TRICKY = "## You\n\n<!-- nanochat-1: user -->\n```\ncode\n````\n\n  blanks  \n\n\n"


def test_files_hold_everything_exactly(page: Any, served: Served, tmp_path: Path) -> None:
    served.pool.script = lambda text: TRICKY
    ask(page, "first\n\n  <!-- nanochat-2: user -->")
    answer(page).get_by_role("button", name="Try again").click()
    answered(page)
    title = page.locator("nav .title").inner_text()
    markdown, whole = exported(page, title, "Export as Markdown"), exported(page, title, "Export as JSON")
    page.evaluate("() => new Promise((done) => { indexedDB.deleteDatabase('nanochat').onsuccess = done; })")
    page.reload()
    ready(page)
    imported(page, tmp_path, "a.json", whole)
    assert answer(page).locator(".version").inner_text() == "2/2"
    assert json.loads(exported(page, title, "Export as JSON")) == json.loads(whole)
    assert "here already" in imported(page, tmp_path, "again.json", whole) and page.locator("nav .open").count() == 1
    for number, text in enumerate((markdown, markdown.replace("\n", "\r\n"), markdown)):
        imported(page, tmp_path, f"{number}.md", text)
        assert page.locator("nav .open").count() == 2  # the same conversation each time
        again = exported(page, title, "Export as Markdown") if number == 0 else markdown
        assert again == markdown
    rows = [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "q"}]}]}
    ]
    said = imported(page, tmp_path, "theirs.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert "1 entry" in said and texts(page) == ["q"]


HOSTILE = [
    {"id": "__proto__", "messages": {"__proto__": {"id": "__proto__", "parent": None, "role": "user", "text": "x"}}},
    {"id": "h", "title": {"a": 1}, "made": "x", "changed": 1e300, "deleted": 5,
     "chosen": {"": "constructor"}, "messages": {
        "a": {"id": "a", "parent": None, "role": "user", "text": "harmless", "made": -1, "changed": 1e99,
              "writing": True},
        "b": {"id": "b", "parent": "a", "role": "assistant",
              "parts": [{"kind": "text", "text": "shown"}, None, {"kind": 7}],
              "tokens": [None], "usage": {"tokens": "x", "seconds": {}}, "error": {"text": {}, "action": []}, "end": [],
              "model": {}, "dropped": -5, "from": 1e300, "writing": True},
        "c": {"id": "c", "parent": "d", "role": "user", "text": "circle"},
        "d": {"id": "d", "parent": "c", "role": "user", "text": "circle"},
        "e": {"id": "e", "parent": "lost", "role": "user", "text": "orphan"}}},
    5, None, [], {"messages": 7}, {"conversations": [{"from": "constructor", "value": 5}]},
]  # fmt: skip


WRONG: dict[str, str | bytes] = {
    "a.txt": "hello",
    "b.json": "{",
    "c.json": b"\xff\xfe\x00",
    "d.json": "[]",
    "e.json": "5",
    "f.json": "[" * 100_000,
    "g.md": "# A text\n\nof mine",
    "h.json": "",
    "i.json": '{"format": "nanochat conversations", "version": 2, "conversations": []}',
}


def test_hostile_and_wrong_files(page: Any, served: Served, tmp_path: Path) -> None:
    ask(page, "mine")
    for name, content in WRONG.items():
        said = imported(page, tmp_path, name, content)
        assert said.count("\n") <= 2 and page.locator("nav .open").count() == 1, name
    said = imported(page, tmp_path, "hostile.json", json.dumps(HOSTILE).replace("1e+300", "1e300"))
    assert "1 conversation" in said and "could not be read" in said
    page.reload()
    ready(page)
    page.locator("nav .open", has_text="New conversation").click()
    assert page.locator(".message").count() >= 1
    page.locator(".message.user").first.get_by_role("button", name="Earlier version").click()
    assert "harmless" in texts(page) and "shown" in texts(page)
    page.locator("h1").click()
    page.keyboard.press("p")
    ask(page, "still works")


# ---------------------------------------------------------------------------------------------------
# Storage


def test_storage_that_is_blocked(browser: Any, served: Served) -> None:
    served.pool.__init__()  # type: ignore[misc]
    context = browser.new_context()
    context.add_init_script("""for (const name of ['indexedDB', 'localStorage', 'sessionStorage'])
        Object.defineProperty(window, name, {get() { throw new DOMException('no', 'SecurityError'); }});""")
    page = context.new_page()
    open_page(page, served)
    assert "keeps nothing" in page.locator(".notice").inner_text()
    ask(page, "one")
    page.fill("#text", "half a thought")
    page.keyboard.press("Control+k")
    ask(page, "two")
    page.locator("nav .open", has_text="one").click()
    assert page.input_value("#text") == "half a thought" and texts(page) == ["one", "You said: one"]
    page.click("#theme")
    context.close()


def test_no_room_for_drafts_is_said_and_deleted_ones_make_room(page: Any, served: Served) -> None:
    ask(page, "old")
    choose(page, "old", "Delete")
    page.evaluate("""() => { window.full = true;
        const store = IDBObjectStore.prototype, put = store.put, drop = store.delete;
        store.put = function (...values) {
            if (full) throw new DOMException('full', 'QuotaExceededError');
            return put.apply(this, values); };
        store.delete = function (...values) { full = false; return drop.apply(this, values); }; }""")
    page.keyboard.press("Control+k")
    ask(page, "new")
    page.reload()
    ready(page)
    assert page.locator("nav .title").all_inner_texts() == ["new"] and page.locator("nav .deleted").count() == 0
    page.evaluate(
        "() => { IDBObjectStore.prototype.put = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    page.locator("#text").press_sequentially("draft")
    page.wait_for_selector(".notice:has-text('NOT kept')")


def test_a_newer_version_of_the_page_in_another_tab(page: Any, served: Served) -> None:
    ask(page, "one")
    upgraded = page.evaluate("""() => new Promise((done) => { const request = indexedDB.open('nanochat', 2);
        request.onblocked = () => done('blocked');
        request.onsuccess = () => { request.result.close(); done('open'); }; })""")
    assert upgraded == "open"  # this page lets go of the database
    ask(page, "two")
    page.wait_for_selector(".notice button:has-text('Reload')")
    page.reload()
    page.wait_for_selector(".notice:has-text('newer version')")
    page.evaluate("() => new Promise((done) => { indexedDB.deleteDatabase('nanochat').onsuccess = done; })")


def test_site_data_that_is_cleared_meanwhile(page: Any, served: Served) -> None:
    ask(page, "one")
    page.evaluate("() => new Promise((done) => { indexedDB.deleteDatabase('nanochat').onsuccess = done; })")
    ask(page, "two")
    page.reload()
    ready(page)
    assert texts(page) == ["one", "You said: one", "two", "You said: two"]


def test_an_older_conversation_that_is_long(page: Any, served: Served, tmp_path: Path) -> None:
    """Editing the first of 1,000 messages, and back."""
    rows = [{"role": ("user", "assistant")[i % 2], "content": f"number {i}"} for i in range(1000)]
    imported(page, tmp_path, "long.json", json.dumps(rows))
    until(page, "document.querySelectorAll('.message').length === 1000")
    page.locator(".message.user").first.get_by_role("button", name="Edit").click()
    page.locator(".message textarea").fill("number one")
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelectorAll('.message').length === 2")
    answered(page)
    begun = time.monotonic()
    page.locator(".message.user").get_by_role("button", name="Earlier version").click()
    assert page.locator(".message").count() == 1000 and time.monotonic() - begun < 5
    page.reload()
    ready(page)
    assert page.locator(".message").count() == 1000


# ---------------------------------------------------------------------------------------------------
# What is said of errors


@pytest.mark.parametrize(
    ("status", "headers", "body", "words"),
    [
        (429, {"Retry-After": "7"}, "{}", "7 s"),
        (502, {}, "<html>", "proxy"),
        (200, {"Content-Type": "text/html"}, "<html>sign in", "not nanochat"),
        (418, {}, "<html>", "not nanochat"),
        (400, {}, '{"error": {"message": "too long"}}', "too long"),
    ],
)
def test_errors_say_what_to_do(page: Any, served: Served, status: int, headers: Any, body: str, words: str) -> None:
    page.route("**/v1/chat/completions", lambda r: r.fulfill(status=status, headers=headers, body=body))
    ask(page, "kept")
    page.wait_for_selector(".message .error")
    assert words in answer(page).locator(".error").inner_text() and texts(page)[0] == "kept"
    page.unroute("**/v1/chat/completions")
    answer(page).locator(".error button", has_text="Try again").click()
    until(page, f"{BODY} === 'You said: kept'")


def test_a_key_is_asked_for_and_a_wrong_one_is_called_wrong(page: Any, served: Served) -> None:
    def guarded(route: Any) -> None:
        good = route.request.headers.get("authorization") == "Bearer right"
        route.continue_() if good else route.fulfill(status=401, body='{"error": {"message": "no"}}')

    page.route("**/v1/**", guarded)
    page.reload()
    ready(page)
    page.locator("#trouble button").click()
    page.fill("#key", "wrong")
    page.locator("#settings .primary").click()
    until(page, "document.querySelector('#trouble').textContent.includes('wrong')")
    page.locator("#trouble button").click()
    page.fill("#key", "right")
    page.locator("#settings .primary").click()
    until(page, "document.querySelector('#trouble.hidden')")
    ask(page, "in")
    assert texts(page)[-1] == "You said: in"


def test_a_base_model_continues_one_text(page: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = served.server.config.app
    while not hasattr(settings, "state"):
        settings = settings.app
    monkeypatch.setattr(settings.state.api.settings, "chat_model", False)
    page.reload()
    ready(page)
    page.wait_for_selector("#send:has-text('Continue')")
    served.pool.script = lambda text: " there was\n\n  a king"
    ask(page, "Once upon a time")
    served.pool.script = lambda text: " and so on"
    page.click("#send")
    until(page, "document.querySelectorAll('.message.assistant').length === 2")
    answered(page)
    ask(page, " The end.")
    flow = page.evaluate("[...document.querySelectorAll('.message .body')].map((b) => b.textContent)")
    assert flow == ["Once upon a time", " there was\n\n  a king", " and so on", " The end.", " and so on"]
    sent = [bytes(t for t in r.prompt if t < 256).decode() for r in served.pool.requests]
    assert sent == ["Once upon a time", "Once upon a time there was\n\n  a king", "".join(flow[:4])]
    assert page.evaluate("getComputedStyle(document.querySelector('.message')).display") == "inline"
    served.pool.script = lambda text: "x"
    ask(page, "y" * 6000)
    assert len(served.pool.requests[-1].prompt) < 4096 and "only the end" in page.locator(".note").last.inner_text()
