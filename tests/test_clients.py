"""The checks of dev/COMPATIBILITY.md, for the clients that are installed, against a server with a tiny random model."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from engine_helpers import make_model
from live import Live
from serve_helpers import TOKENIZER

from dev.clients.check import FOLDER, PYTHON, command
from nanochat.serve.api import ServerMetrics, Settings
from nanochat.serve.server import create_app
from nanochat.serve.service import Service, WorkerPool

CLIENTS = [name for name in PYTHON if name not in ("lm_eval_harness", "aider_cli")]  # these have long prompts


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    model = make_model(vocab_size=265, sequence_len=256)
    metrics = ServerMetrics()
    pool = WorkerPool(lambda index: Service(model, TOKENIZER, observe=metrics.observe))
    with Live(create_app(pool, TOKENIZER, Settings(request_seconds=60, drain_seconds=2), metrics)) as made:
        yield made


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gets_what_it_expects(client: str, live: Live) -> None:
    line = command(client, [sys.executable])
    if line is None:
        pytest.skip(f"{PYTHON[client]} is not installed")
    done = subprocess.run([*line, live.url], cwd=FOLDER, capture_output=True, text=True, timeout=200)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(found.values()) == {"ok"}, (found, done.stderr[-3000:])
