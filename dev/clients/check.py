"""Runs every client's checks against a running server and prints the rows of dev/COMPATIBILITY.md.

    python -m scripts.chat_web &
    python -m dev.clients.check --url=http://localhost:8000 --python=PATH --python=PATH

Each `--python` is the interpreter of an environment that has some of the clients; a client is run with the first that
has it, and left out where none has. Node's clients need `npm install` in this folder.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dev.clients.columns import COLUMNS

FOLDER = Path(__file__).parent
PYTHON = {  # script: the package that it needs
    "openai_python": "openai",
    "langchain": "langchain_openai",
    "litellm_python": "litellm",
    "llm_cli": "llm",
    "aider_cli": "aider",
    "lm_eval_harness": "lm_eval",
    "open_webui": "json",
}
NODE = ("openai_node", "ai_sdk")


@dataclass
class Args:
    url: str = "http://localhost:8000"  # of a running chat_web
    python: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())  # more interpreters
    clients: tuple[str, ...] = (*PYTHON, *NODE)  # which scripts


def command(client: str, interpreters: list[str]) -> list[str] | None:
    """How to run a client's script; None where it is not installed."""
    if client in NODE:
        installed = shutil.which("node") and (FOLDER / "node_modules").is_dir()
        return ["node", f"{client}.mjs"] if installed else None
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({PYTHON[client]!r}) is None)"
    for python in interpreters:
        if subprocess.run([python, "-c", probe], cwd=FOLDER.parent.parent).returncode == 0:
            return [python, f"{client}.py"]
    return None


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    failed = 0
    print(f"| client | {' | '.join(COLUMNS)} |")
    for client in args.clients:
        line = command(
            client, [*(str(Path(shutil.which(python) or python).absolute()) for python in args.python), sys.executable]
        )
        if line is None:
            print(f"| {client} | not installed |", flush=True)
            continue
        done = subprocess.run([*line, args.url], cwd=FOLDER, capture_output=True, text=True)
        last = done.stdout.strip().splitlines()[-1:] or ["{}"]
        found = json.loads(last[0]) if last[0].startswith("{") else {}
        if not found:
            found = {"chat": f"the script failed: {done.stderr[-300:]}"}
        failed += sum(result != "ok" for result in found.values())
        print(f"| {client} | {' | '.join(found.get(column, '-') for column in COLUMNS)} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
