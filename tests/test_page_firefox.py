"""The page's main paths in Firefox: ask, stream, stop, continue, edit, versions, delete, settings, export, import."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from firefox import FIREFOX, Firefox, until
from page_helpers import Served, served as served

pytestmark = pytest.mark.skipif(FIREFOX is None, reason="no firefox: apt-get install firefox-esr")
LAST = "document.querySelector('.message.assistant:last-child .body')?.textContent.trim()"


@pytest.fixture(scope="module")
def firefox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firefox]:
    made = Firefox(tmp_path_factory.mktemp("firefox"))
    yield made
    made.close()


@pytest.fixture
def page(firefox: Firefox, served: Served) -> Firefox:
    """The page with empty storage."""
    served.pool.__init__()  # type: ignore[misc]
    firefox.go(f"http://127.0.0.1:{served.port}/page/style.css")
    firefox.run("""localStorage.clear(); sessionStorage.clear();
        return new Promise((done) => { indexedDB.deleteDatabase("nanochat").onsuccess = () => done(); });""")
    firefox.go(f"http://127.0.0.1:{served.port}/")
    ready(firefox)
    return firefox


def ready(page: Firefox) -> None:
    page.wait("document.documentElement.dataset.ready")


def ask(page: Firefox, text: str) -> None:
    page.keys("#text", text + "\ue007")


def answered(page: Firefox, text: str) -> None:
    page.wait(f"!document.querySelector('#send.hidden') && {LAST} === {json.dumps(text)}")


def reload(page: Firefox) -> None:
    page.call("WebDriver:Refresh")
    ready(page)


def test_answers_versions_and_edits_are_kept(page: Firefox, served: Served) -> None:
    ask(page, "héllo 👋")
    answered(page, "You said: héllo 👋")
    served.pool.script = lambda text: f"again **{text}**"
    page.press("Try again")
    answered(page, "again héllo 👋")
    assert page.run("return document.querySelector('.message.assistant strong').textContent") == "héllo 👋"
    page.press("Edit")
    page.wait("document.activeElement.matches('.message textarea')")
    page.keys(".message textarea", " you")
    reload(page)  # what was typed there is a draft
    assert page.run("return document.querySelector('.message textarea').value") == "héllo 👋 you"
    page.press("Send", ".message")
    answered(page, "again héllo 👋 you")
    reload(page)
    answered(page, "again héllo 👋 you")
    page.press("Earlier version", ".message.user")
    answered(page, "again héllo 👋")
    page.press("Earlier version", ".message.assistant")
    answered(page, "You said: héllo 👋")


def test_streaming_stopping_continuing_and_closing(page: Firefox, served: Served) -> None:
    served.pool.pause, served.pool.script = 0.03, lambda text: "x" * 300
    ask(page, "go")
    page.wait(f"{LAST}?.length > 5")
    page.click("#stop")
    page.wait("document.querySelector('.message .note')")
    written = page.run(f"return {LAST}")
    served.pool.pause, served.pool.script = 0.0, lambda text: " and the end"
    page.press("Continue")
    answered(page, written + " and the end")
    served.pool.pause, served.pool.script = 0.05, lambda text: "y" * 300
    ask(page, "more")
    page.wait(f"{LAST}?.startsWith('yyyyy')")
    reload(page)
    page.wait("document.querySelector('.message:last-child .error')")
    assert page.run("return document.querySelectorAll('.message').length") == 4
    served.pool.pause, served.pool.script = 0.0, lambda text: "complete"
    page.press("Try again", ".message:last-child .error")
    answered(page, "complete")


def test_conversations_settings_and_files(page: Firefox, served: Served, tmp_path: Path) -> None:
    ask(page, "capital of France")
    answered(page, "You said: capital of France")
    page.click("#settings-open")
    page.keys("#top_k", "7")
    page.press("Save", "#settings")
    page.click("#new")
    ask(page, "another")
    answered(page, "You said: another")
    assert served.pool.requests[-1].sampling.top_k == 7
    page.keys("#search", "said: capital")
    page.wait("document.querySelectorAll('nav .open').length === 1")
    page.click("nav .open")
    answered(page, "You said: capital of France")
    page.run("const s = document.getElementById('search'); s.value = ''; s.dispatchEvent(new Event('input'))")
    page.press("More for capital of France")
    page.press("Delete", "#choices")
    page.wait("document.querySelectorAll('nav .open').length === 1")
    reload(page)  # also then it can be restored
    page.click("nav .deleted summary")
    page.press("Restore capital")
    page.wait("document.querySelectorAll('nav .open').length === 2")
    page.click("#export-all")
    (file,) = until(lambda: [f for f in page.downloads.glob("*.json") if f.stat().st_size])
    kept = json.loads(file.read_text())["conversations"]
    assert {c["title"] for c in kept} == {"another", "capital of France"}
    page.run("""return new Promise((done) => { indexedDB.deleteDatabase("nanochat").onsuccess = () => done(); });""")
    reload(page)
    assert page.run("return document.querySelectorAll('nav .open').length") == 0
    page.run("document.getElementById('import-file').hidden = false")
    page.keys("#import-file", str(file))
    page.wait("document.querySelectorAll('nav .open').length === 2")
    assert page.run(f"return {LAST}").startswith("You said: ")


def test_composing_and_probabilities(page: Firefox, served: Served) -> None:
    sent = """const text = document.getElementById("text"); text.value = "こん";
        const enter = {key: "Enter", isComposing: true, bubbles: true, cancelable: true};
        text.dispatchEvent(new KeyboardEvent("keydown", enter));
        return document.querySelectorAll(".message").length"""
    assert page.run(sent) == 0
    ask(page, "!")
    answered(page, "You said: こん!")
    page.run("document.activeElement.blur()")
    page.keys("body", "p")
    page.wait("document.querySelectorAll('.tokens .token').length > 5")
    page.click(".tokens .token:nth-child(3)")
    page.wait("document.querySelectorAll('#alternatives .alternative').length === 2")
    page.keys("body", "\ue00c")
    page.wait("document.querySelector('#alternatives.hidden')")
