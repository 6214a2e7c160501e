"""A browser and a server with scripted answers, for the tests of the page. Needs chromium."""

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
from nanochat.serve.replica import Finished
from nanochat.serve.server import create_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
BODY = "document.querySelector('.message.assistant:last-child .body').textContent.trim()"  # of the last answer
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
        begun = len(request.prompt) - request.answer_begun
        text = TOKENIZER.decode(request.prompt[:begun]).rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
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
    playwright_api = pytest.importorskip("playwright.sync_api")
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
    open_page(made, served)
    yield made
    context.close()
    assert not wrong, wrong


def open_page(page: Any, served: Served) -> None:
    page.goto(f"http://127.0.0.1:{served.port}/")
    ready(page)


def ready(page: Any) -> None:
    page.wait_for_selector("html[data-ready]", state="attached")


def ask(page: Any, text: str, wait: bool = True) -> None:
    """Send a message; `wait` until it is answered."""
    before = page.locator(".message.assistant").count()
    page.fill("#text", text)
    page.focus("#text")
    page.keyboard.press("Enter")
    until(page, f"document.querySelectorAll('.message.assistant').length > {before}")
    if wait:
        answered(page)


def begin(page: Any, served: Served, script: str = "x" * 300) -> None:
    """Ask, and return while the answer is being written."""
    served.pool.pause, served.pool.script = 0.03, lambda text: script
    ask(page, "go", wait=False)
    until(page, f"{BODY}.length > 5")


def answered(page: Any) -> None:
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
