"""llm, the command-line tool, with nanochat in its extra-openai-models.yaml."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cells import API, MODEL, SCHEMA, TOO_LONG, check, check_person, run

FOLDER = tempfile.TemporaryDirectory()  # until this program ends
HOME = Path(FOLDER.name)
(HOME / "extra-openai-models.yaml").write_text(
    f"- model_id: local\n  model_name: {MODEL}\n  api_base: {API}\n  supports_schema: true\n  supports_tools: true\n"
    f"- model_id: other\n  model_name: gpt-4o\n  api_base: {API}\n"
)
ENVIRONMENT = {**os.environ, "LLM_USER_PATH": str(HOME), "OPENAI_API_KEY": "none"}


def llm(*arguments, text=None, model="local"):
    command = [sys.executable, "-m", "llm", "prompt", "-m", model, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, input=text, capture_output=True, text=True, timeout=120)


def answer(*arguments, text=None):
    done = llm(*arguments, text=text)
    check(done.returncode == 0 and done.stdout.strip(), done.stderr[-500:])
    return done.stdout.strip()


def chat():
    answer("--no-stream", "What is 12 + 30?")


def stream():
    options = ("-o", "temperature", "0", "What is 12 + 30?")
    check(answer(*options) == answer("--no-stream", *options), "streamed differs")


def tools():
    answer("--functions", 'def add(a: int, b: int) -> int:\n    "Adds"\n    return a + b', "hi")


def structured():
    check_person(json.loads(answer("--no-stream", "--schema", json.dumps(SCHEMA), "Ann is 7.")))


def max_tokens():
    answer("-o", "max_tokens", "32000", "hi")


def errors():
    too_long, unknown = llm(text=TOO_LONG), llm("hi", model="other")
    check(too_long.returncode and "maximum context length" in too_long.stderr, too_long.stderr[-500:])
    check(unknown.returncode and "gpt-4o" in unknown.stderr, unknown.stderr[-500:])


run(globals())
