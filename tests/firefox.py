"""A small client of Firefox's own remote protocol, Marionette, for tests of the page in Firefox. Needs only firefox."""

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the WebDriver standard's name of a reference to an element
PREFERENCES = {
    "marionette.port": 0,  # a free one, which it writes to the file MarionetteActivePort
    "browser.download.folderList": 2,
    "browser.download.dir": "",
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "browser.startup.homepage_override.mstone": "ignore",
}


class Gone(RuntimeError):
    """The page replaced an element between two commands, before anything was done to it."""


class Firefox:
    """A headless Firefox with an empty profile in `folder`; downloads go to `folder`/downloads."""

    def __init__(self, folder: Path) -> None:
        self.downloads, profile = folder / "downloads", folder / "profile"
        profile.mkdir(parents=True)
        preferences = PREFERENCES | {"browser.download.dir": str(self.downloads)}
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in preferences.items()]
        (profile / "user.js").write_text("\n".join(lines))
        command = [str(FIREFOX), "--headless", "--marionette", "--no-remote", "--profile", str(profile)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
        port = until(lambda: self._port(profile / "MarionetteActivePort"))
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            self.stream = connection.makefile("rwb")  # which keeps the connection open
        self._receive()  # its greeting
        self.number = 0
        self.call("WebDriver:NewSession", {"capabilities": {}})

    @staticmethod
    def _port(file: Path) -> int:
        return int(file.read_text() or 0) if file.exists() else 0

    def _receive(self) -> Any:
        length = b""
        while (byte := self.stream.read(1)) != b":":
            assert byte, "Firefox has gone"
            length += byte
        return json.loads(self.stream.read(int(length)))

    def call(self, command: str, parameters: dict[str, Any] | None = None) -> Any:
        """The result of a command. Raises Gone or another RuntimeError with Firefox's message."""
        self.number += 1
        message = json.dumps([0, self.number, command, parameters or {}]).encode()
        self.stream.write(b"%d:%s" % (len(message), message))
        self.stream.flush()
        _, _, error, result = self._receive()
        if error:
            gone = error["error"] in ("stale element reference", "no such element")
            raise (Gone if gone else RuntimeError)(f"{command}: {error['message']}")
        return result

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a JavaScript function's body returns; it may be a promise."""
        parameters = {"script": script, "args": arguments, "newSandbox": False, "sandbox": None}
        return self.call("WebDriver:ExecuteScript", parameters)["value"]

    def go(self, url: str) -> None:
        self.call("WebDriver:Navigate", {"url": url})

    def find(self, selector: str) -> str:
        """A reference to the first element."""
        using = {"using": "css selector", "value": selector}
        return str(self.call("WebDriver:FindElement", using)["value"][ELEMENT])

    def click(self, selector: str) -> None:
        """Click the first element, once more if the page replaced it meanwhile."""
        try:
            self.call("WebDriver:ElementClick", {"id": self.find(selector)})
        except Gone:
            self.call("WebDriver:ElementClick", {"id": self.find(selector)})

    def press(self, label: str, within: str = "") -> None:
        """Click the last button with this text or label."""
        script = """const found = [...document.querySelectorAll(arguments[0] + " button")].filter((b) =>
            (b.getAttribute("aria-label") || b.textContent).startsWith(arguments[1])).at(-1);
            document.querySelectorAll("[data-press]").forEach((b) => delete b.dataset.press);
            found.dataset.press = ""; """
        for attempt in range(3):
            self.run(script, within, label)
            try:
                return self.call("WebDriver:ElementClick", {"id": self.find("[data-press]")})
            except Gone:
                if attempt == 2:
                    raise

    def keys(self, selector: str, text: str) -> None:
        """Type into an element; \\ue007 is Enter, a file input takes a path."""
        self.call("WebDriver:ElementSendKeys", {"id": self.find(selector), "text": text})

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true. An element counts, and need not outlive the question."""
        until(lambda: self.run(f"return Boolean({condition})"))

    def close(self) -> None:
        self.stream.close()
        self.process.terminate()
        self.process.wait(30)


def until(condition: Any, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)
    return value
