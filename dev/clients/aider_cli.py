"""aider, the pair programmer, in its mode for questions. Its own instructions take some 420 tokens there,
several thousand where it edits files."""

import subprocess
import sys
import tempfile
from pathlib import Path

from cells import API, MODEL, check, run

AIDER = Path(sys.executable).parent / "aider"


def ask(*options, key="none"):
    command = [AIDER, f"--model=openai/{MODEL}", f"--openai-api-base={API}", f"--openai-api-key={key}"]
    command += ["--chat-mode=ask", "--yes-always", "--no-git", "--map-tokens=0"]
    command += ["--no-check-update", "--no-show-model-warnings", "--no-analytics", "--no-pretty"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {"HOME": folder, "PATH": "/usr/bin:/bin", "LITELLM_LOCAL_MODEL_COST_MAP": "true"}
        kept = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 180}
        return subprocess.run([*command, *options, "--message=hi"], **kept)


def check_answered(done):
    """It counts tokens after an answer, by words that depend on whether the answer was cut."""
    check("okens:" in done.stdout and "litellm." not in done.stdout, done.stdout[-800:] + done.stderr[-800:])


def chat():
    check_answered(ask("--no-stream"))


def stream():
    check_answered(ask("--stream"))


run(globals())
