"""The page in a real browser, over a pool with scripted answers. Needs chromium."""

import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from serve_helpers import TOKENIZER

from nanochat.inference.request import GenerationRequest, Token, TokenLogprobs, TokenSequence
from nanochat.serve.api import Settings
from nanochat.serve.replica import Busy, Finished
from nanochat.serve.server import create_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
playwright_api = pytest.importorskip("playwright.sync_api")
PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = (
    TOKENIZER.encode_special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end")
)


class ScriptedPool:
    """Answers with `script(last user text)`, a token per byte, `pause` seconds apart."""

    def __init__(self) -> None:
        self.replicas = [SimpleNamespace(max_context=4096)]
        self.alive, self.failing, self.replaced = True, False, 0
        self.script: Any = lambda text: f"You said: {text}"
        self.pause, self.fail = 0.0, None
        self.requests: list[GenerationRequest] = []
        self.cancelled = 0

    def submit(self, request: GenerationRequest, deliver: Any, admitted: bool = False) -> Any:
        if self.fail:
            raise self.fail
        self.requests.append(request)
        text = TOKENIZER.decode(request.prompt).rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
        said = self.script(text)
        sequence = TokenSequence(replace(request, max_tokens=10_000))
        handle = SimpleNamespace(request=request, sequences=[sequence], stop=False)

        def cancel(index: int | None = None) -> None:
            self.cancelled += not handle.stop and not sequence.done
            handle.stop = True

        handle.cancel = cancel

        def work() -> None:
            for token in said if isinstance(said, list) else said.encode():
                if handle.stop:
                    break
                logprobs = (
                    TokenLogprobs(-0.1, [(token, -0.1), (97, -3.0)]) if request.top_logprobs is not None else None
                )
                sequence.tokens.append(token)
                deliver([Token(sequence, token, 1, logprobs)])
                time.sleep(self.pause)
            sequence.done = True
            deliver(Finished())

        threading.Thread(target=work, daemon=True).start()
        return handle

    def stats(self) -> dict[str, Any]:
        return dict.fromkeys(("rows_running", "requests_waiting", "prefix_bytes", "prefix_hit_tokens", "replaced"), 0)

    def close(self, drain_seconds: float = 0) -> None:
        """Nothing to close."""


class Served:
    """A server that can be killed and started again on its port."""

    def __init__(self) -> None:
        self.pool = ScriptedPool()
        self.port = 0
        self.start()

    def start(self) -> None:
        app = create_app(self.pool, TOKENIZER, Settings(max_tokens=500, drain_seconds=0.1))  # type: ignore[arg-type]
        self.server = uvicorn.Server(
            uvicorn.Config(app, port=self.port, log_level="error", lifespan="off", timeout_graceful_shutdown=0)
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def kill(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.kill()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """A page with empty storage; an error in it fails the test."""
    served.pool.__init__()  # type: ignore[misc]
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    made, wrong = context.new_page(), []
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on(
        "console",
        lambda m: (
            wrong.append(m.text)
            if m.type == "error" and "Failed to load" not in m.text and "ERR_" not in m.text
            else None
        ),
    )
    made.on("dialog", lambda dialog: (wrong.append("a dialog"), dialog.dismiss()))
    made.goto(f"http://127.0.0.1:{served.port}/")
    yield made
    context.close()
    assert not wrong, wrong


def ask(page: Any, text: str, wait: bool = True) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")
    if wait:
        page.wait_for_selector("#send:not(.hidden)")


def until(page: Any, expression: str) -> None:
    """Wait for a condition; the page's content policy forbids the browser driver's own way of waiting."""
    for _ in range(500):
        if page.evaluate(expression):
            return
        time.sleep(0.02)
    raise AssertionError(f"never: {expression}")


def answer(page: Any) -> Any:
    return page.locator(".message.assistant").last


def titles(page: Any) -> list[str]:
    """Of the conversations stored in the browser."""
    own = "Object.keys(localStorage).filter((key) => key.startsWith('nanochat/'))"
    return sorted(page.evaluate(f"{own}.map((key) => JSON.parse(localStorage[key]).title)"))


def test_an_answer_is_streamed_kept_and_announced_once(page: Any, served: Served) -> None:
    served.pool.pause = 0.02
    page.evaluate("""() => { window.said = [];
        new MutationObserver(() => said.push(document.getElementById('announce').textContent))
            .observe(document.getElementById('announce'), {childList: true, characterData: true, subtree: true}); }""")
    ask(page, "héllo — 你好 👋", wait=False)
    until(page, "document.querySelector('.message.assistant')?.textContent.includes('You')")
    assert not page.locator("#stop").get_attribute("class")  # it can be stopped while it streams
    page.wait_for_selector("#send:not(.hidden)")
    assert "You said: héllo — 你好 👋" in answer(page).inner_text() and "tokens/s" in answer(page).inner_text()
    assert page.evaluate("said") == ["nanochat: You said: héllo — 你好 👋"]
    page.reload()
    assert "You said: héllo — 你好 👋" in answer(page).inner_text()
    assert page.locator("nav li").count() == 1


def test_stop_regenerate_edit(page: Any, served: Served) -> None:
    served.pool.pause = 0.05
    served.pool.script = lambda text: "x" * 400
    ask(page, "go", wait=False)
    until(page, "document.querySelector('.message.assistant .body')?.textContent.length > 3")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:not(.hidden)")
    for _ in range(100):
        if served.pool.cancelled:
            break
        time.sleep(0.02)
    assert served.pool.cancelled == 1
    assert 3 < len(answer(page).locator(".body").inner_text()) < 400
    served.pool.pause, served.pool.script = 0.0, lambda text: f"again {text}"
    answer(page).get_by_text("Regenerate").click()
    page.wait_for_selector("text=again go")
    page.locator(".message.user").get_by_text("Edit").click()
    assert page.input_value("#text") == "go" and page.locator(".message").count() == 0
    ask(page, "went")
    assert "again went" in answer(page).inner_text() and page.locator(".message").count() == 2


def test_tool_calls_are_shown_as_what_they_are(page: Any, served: Served) -> None:
    served.pool.script = lambda text: [*b"It is ", PYTHON, *b"12+30", PYTHON_END, OUTPUT, *b"42", OUTPUT_END, *b"42."]
    ask(page, "What is 12 + 30?")
    shown = [text.strip() for text in answer(page).locator(".tool").all_inner_texts()]
    assert shown == ["Tool call\n12+30", "Tool's answer\n42"]
    assert "It is" in answer(page).inner_text() and "42." in answer(page).inner_text()


def test_markdown_is_rendered(page: Any, served: Served) -> None:
    text = (
        "## T\n**b** and *i* `c*d` [l](https://e.example/x) 2*3*4 a ** b\n\n- one\n- two\n\n"
        "3. three\n\n```py\nx = '<b>'\n```\n> q\n\nend ``a`b``"
    )
    served.pool.script = lambda text_sent: text
    ask(page, "go")
    found = answer(page).locator(".body").evaluate("node => node.innerHTML")
    for piece in (
        "<h3>T</h3>",
        "<strong>b</strong>",
        "<em>i</em>",
        "<code>c*d</code>",
        ">l</a>",
        "<li>one</li>",
        '<ol start="3"><li>three</li>',
        "<code>x = '&lt;b&gt;'</code>",
        "<blockquote>q",
        "<code>a`b</code>",
        "a ** b",
    ):
        assert piece in found, (piece, found)


HOSTILE = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror='window.hacked=1'>",
    "<svg/onload=window.hacked=1>",
    "[click](javascript:window.hacked=1)",
    '[click](https://a.example/"onmouseover="window.hacked=1)',
    "```html\n<script>window.hacked=1</script>\n```",
    "`<b onclick=alert(1)>`",
    "<iframe src='javascript:1'></iframe>",
    "**<script>window.hacked=1</script>**",
    "# <img src=x onerror=alert(1)>",
    "- <a href='javascript:1'>x</a>",
    "> <style>*{display:none}</style>",
    "\u202e<script>\u2028alert(1)",
    "</article></div><script>window.hacked=1</script>",
    "```\n</code></pre><script>window.hacked=1</script>",
    "[a](http://x y) ![i](http://a.example/i.png)",
    "*" * 5000,
    "[" * 2000 + "(" * 2000,
    "`" * 999 + "x",
    "1. " * 500,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_stay_text(page: Any, served: Served, text: str) -> None:
    served.pool.script = lambda text_sent: text
    ask(page, "go")
    assert page.evaluate("window.hacked") is None
    box = answer(page)
    assert box.locator("script, img, iframe, svg, style, object").count() == 0
    for link in box.locator("a").all():
        assert link.get_attribute("href").startswith(("http://", "https://")) and link.get_attribute("rel")
    shown = box.locator(".body").evaluate("node => node.textContent")
    for piece in ("<script>", "onerror", "<iframe"):
        assert (piece in shown) == (piece in text), shown


@pytest.mark.parametrize("probabilities", [False, True])
def test_settings_are_sent(page: Any, served: Served, probabilities: bool) -> None:
    page.click("#settings-open")
    page.fill("#temperature", "0.3")
    page.fill("#top_k", "7")
    page.fill("#seed", "11")
    page.fill("#system", "Be brief.")
    if probabilities:
        page.check("#probabilities")
    page.get_by_text("Done").click()
    until(page, "state.settings.top_k === '7'")
    ask(page, "hi")
    request = served.pool.requests[-1]
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.3, 7, 11)
    assert "Be brief." in TOKENIZER.decode(request.prompt) and (request.top_logprobs == 5) == probabilities
    if probabilities:
        first = answer(page).locator(".token").first
        assert first.inner_text() == "Y"
        first.focus()
        shown = page.locator("#alternatives").inner_text()
        assert '"Y" ←' in shown and "90%" in shown
        page.locator("#text").focus()
        assert page.locator("#alternatives").get_attribute("class") == "hidden"


def test_errors_are_clear_and_lose_nothing(page: Any, served: Served) -> None:
    served.pool.fail = Busy(3)
    ask(page, "precious words")
    assert "busy" in answer(page).locator(".error").inner_text()
    served.pool.fail = None
    page.reload()
    answer(page).get_by_role("button", name="Try again").click()
    page.wait_for_selector("text=You said: precious words")
    assert page.locator(".message").count() == 2 and page.locator(".error").count() == 0


def test_the_server_dies_in_the_middle_and_comes_back(page: Any, served: Served) -> None:
    served.pool.pause, served.pool.script = 0.05, lambda text: "slowly " * 50
    ask(page, "go", wait=False)
    until(page, "document.querySelector('.message.assistant .body')?.textContent.length > 5")
    served.kill()
    page.wait_for_selector(".error")
    assert "slow" in answer(page).inner_text()  # what came is kept
    answer(page).get_by_role("button", name="Try again").click()
    page.wait_for_selector("text=cannot be reached")
    served.pool.pause = 0.0
    served.start()
    answer(page).get_by_role("button", name="Try again").click()
    page.wait_for_selector("#send:not(.hidden)")
    assert answer(page).inner_text().count("slowly") == 50 and page.locator(".error").count() == 0


def test_a_reload_in_the_middle_keeps_what_came(page: Any, served: Served) -> None:
    served.pool.pause, served.pool.script = 0.05, lambda text: "y" * 400
    ask(page, "go", wait=False)
    until(page, "document.querySelector('.message.assistant .body')?.textContent.length > 5")
    page.reload()
    assert "closed before" in answer(page).locator(".error").inner_text()
    assert "yyyyy" in answer(page).locator(".body").inner_text()
    assert page.locator(".message.user").inner_text().startswith("You\ngo")


def test_several_conversations_and_the_keyboard(page: Any, served: Served) -> None:
    ask(page, "first")
    page.keyboard.press("Control+k")
    assert page.locator(".message").count() == 0
    ask(page, "second")
    assert page.locator("nav li").count() == 2
    page.locator("nav li button", has_text="first").first.click()
    assert "You said: first" in answer(page).inner_text()
    page.get_by_label("Delete first").click()
    assert page.locator("nav li").count() == 1 and "You said: second" in answer(page).inner_text()
    assert titles(page) == ["second"]
    page.fill("#text", "two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=You said: two")
    assert page.locator(".message.user .body").last.inner_text() == "two\nlines"


def test_messages_that_no_longer_fit_are_counted(page: Any, served: Served) -> None:
    served.pool.script = lambda text: "Yes."
    for text, dropped in (("a" * 2500, 0), ("b" * 1000, 0), ("c" * 1000, 2)):
        ask(page, text)
        assert ("2 earlier messages" in answer(page).inner_text()) == (dropped == 2)
        assert served.pool.requests[-1].dropped_messages == dropped


def test_tool_calls_are_sent_back_as_the_model_wrote_them(page: Any, served: Served) -> None:
    said = [*b"So ", PYTHON, *b"12*3", PYTHON_END, OUTPUT, *b"36", OUTPUT_END, *"– it is 36.".encode()]
    served.pool.script = lambda text: said
    ask(page, "What is 12*3?")
    page.reload()
    ask(page, "And now?")
    first, second = (request.prompt for request in served.pool.requests)
    start, end, user, user_end = (
        TOKENIZER.encode_special(f"<|{name}|>")
        for name in ("assistant_start", "assistant_end", "user_start", "user_end")
    )
    assert second == [*first, *said, end, user, *b"And now?", user_end, start]


def test_two_tabs_lose_nothing_of_each_other(page: Any, served: Served) -> None:
    ask(page, "first")
    other = page.context.new_page()
    other.goto(page.url)
    assert "You said: first" in answer(other).inner_text()
    other.keyboard.press("Control+k")
    ask(other, "second")
    until(page, "document.querySelectorAll('nav li').length === 2")
    assert "You said: first" in answer(page).inner_text(), "each tab shows its own"
    ask(page, "third")
    assert titles(page) == ["first", "second"]
    other.locator("nav li button", has_text="first").first.click()
    assert "You said: third" in answer(other).inner_text()

    # Both in one conversation at the same time: there are two afterwards.
    served.pool.pause = 0.05
    ask(page, "from one", wait=False)
    until(other, "document.querySelectorAll('.message.user').length === 3")
    ask(other, "from the other", wait=False)
    for tab, text in ((page, "from one"), (other, "from the other")):
        tab.wait_for_selector("#send:not(.hidden)")
        assert text in answer(tab).inner_text()
    assert titles(page) == ["first", "first", "second"]
    for tab, text in ((page, "from one"), (other, "from the other")):
        tab.reload()
        assert tab.locator("nav li").count() == 3 and text in answer(tab).inner_text()

    other.get_by_label("Delete second").click()
    until(page, "document.querySelectorAll('nav li').length === 2")
    assert titles(other) == ["first", "first"]


def test_a_second_tab_may_look_type_and_delete_while_the_first_streams(page: Any, served: Served) -> None:
    ask(page, "short")
    page.keyboard.press("Control+k")
    served.pool.pause, served.pool.script = 0.02, lambda text: "z" * 150
    ask(page, "first", wait=False)
    until(page, "document.querySelector('.message.assistant .body')?.textContent.length > 5")
    other = page.context.new_page()
    other.goto(page.url)
    assert "another tab" in answer(other).locator(".error").inner_text()
    other.fill("#text", "half a thought")
    other.reload()
    assert other.input_value("#text") == "half a thought" and page.input_value("#text") == ""
    other.locator("nav li button", has_text="short").first.click()
    other.locator("nav li button", has_text="first").first.click()
    page.wait_for_selector("#send:not(.hidden)")
    assert titles(page) == ["first", "short"], "looking changes nothing"
    until(other, "document.querySelector('.message.assistant .body').textContent.length === 150")
    assert other.locator(".error").count() == 0 and other.input_value("#text") == "half a thought"

    served.pool.cancelled = 0
    ask(page, "again", wait=False)
    until(other, "document.querySelectorAll('.message.user').length === 2")
    other.get_by_label("Delete first").click()
    page.wait_for_selector("#send:not(.hidden)")
    time.sleep(0.2)
    assert titles(page) == ["short"] and page.locator("nav li").count() == 1, "deleted is deleted"
    assert served.pool.cancelled == 1


def test_a_conversation_deleted_while_it_is_answered_stays_deleted(page: Any, served: Served) -> None:
    served.pool.pause = 0.05
    ask(page, "gone", wait=False)
    until(page, "document.querySelector('.message.assistant .body')?.textContent.length > 3")
    page.get_by_label("Delete gone").click()
    page.wait_for_selector("#send:not(.hidden)")
    assert titles(page) == []


def test_settings_of_two_tabs(page: Any, served: Served) -> None:
    other = page.context.new_page()
    other.goto(page.url)
    page.click("#settings-open")
    page.fill("#top_k", "7")
    other.click("#settings-open")
    other.fill("#system", "Be brief.")
    other.get_by_role("button", name="Done").click()
    until(page, "state.settings.system === 'Be brief.'")
    page.get_by_role("button", name="Done").click()
    until(other, "state.settings.top_k === '7'")
    other.click("#settings-open")
    assert (other.input_value("#system"), other.input_value("#top_k")) == ("Be brief.", "7")
    other.keyboard.press("Escape")
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.evaluate("document.querySelector('#log').firstChild.id = 'mark'")
    other.click("#theme")
    until(page, f"document.documentElement.dataset.theme !== '{theme}'")
    assert page.locator("#mark").count() == 1, "nothing is drawn anew for that"
    other.click("#settings-open")
    other.check("#probabilities")
    other.get_by_role("button", name="Done").click()
    until(page, "state.settings.probabilities")
    assert page.locator("#mark").count() == 0


def test_what_an_earlier_version_kept_is_still_there(page: Any, served: Served) -> None:
    old = """localStorage.clear(); sessionStorage.clear();
    const chats = ['new', 'old'].map((title) => ({ id: title, title, messages: [{ role: 'user', content: title }] }));
    localStorage.setItem('nanochat', JSON.stringify({ chats, current: 'old', theme: 'dark' }));
    localStorage.setItem('nanochat/bad', '{"messages": 5}');"""
    page.goto(f"http://127.0.0.1:{served.port}/v1/models")  # which keeps nothing when it is left
    page.evaluate(old)
    page.goto(f"http://127.0.0.1:{served.port}/")
    assert page.locator("nav li button:first-child").all_inner_texts() == ["new", "old"]
    assert page.locator(".message.user .body").inner_text() == "old"
    ask(page, "more")
    page.reload()
    assert page.locator(".message.user .body").all_inner_texts() == ["old", "more"]
    assert page.locator("nav li").count() == 2


def test_light_dark_and_phone(browser: Any, served: Served) -> None:
    served.pool.__init__()  # type: ignore[misc]
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{served.port}/")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    ask(page, "a" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#menu")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.keyboard.press("Escape")
    assert page.get_attribute("#menu", "aria-expanded") == "false"
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_accessibility_violations(browser: Any, served: Served, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    served.pool.__init__()  # type: ignore[misc]
    served.pool.script = lambda text: "# A\n**b** `c` [d](https://e.example)\n\n- f\n\n```py\ng\n```\n> h"
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{served.port}/")
    ask(page, "go")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.click("#settings-open")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    context.close()
