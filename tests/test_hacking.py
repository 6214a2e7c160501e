"""The page dev/HACKING.md: its diffs apply to the code as it is, touch as few files as it says, and work."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from stubs import TINY

from nanochat.cpu import kernels

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "dev" / "HACKING.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^## Another ([a-z ]+)\n.*?```diff\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
ENDPOINT_TEST_FILE = 1  # the endpoint's line in tests/test_schema.py, which the page names but does not show

SNIPPET = """
import torch
from fastapi.testclient import TestClient
from serve_helpers import TOKENIZER, app_of, chat
from stubs import OUTPUT, PYTHON, PYTHON_END
from nanochat.inference.sampling import SamplingParams, c_agrees, c_can_draw, draw_tokens, make_rng
from nanochat.inference.tools import ToolSession, ToolTable
from nanochat.serve.routes_chat import ChatRequest

session = ToolSession(ToolTable(TOKENIZER))
for token in (PYTHON, *b"now", PYTHON_END):
    session.observe(token, room=99)
clock = TOKENIZER.decode(list(session.forced)[1:-1])
assert session.forced[0] == OUTPUT and len(clock) == 5 and clock[2] == ":", clock

params = SamplingParams().override(ChatRequest.model_validate(chat(top_a=0.5, seed=1)))
assert params.top_a == 0.5 and params.seed == 1
logits = torch.tensor([[0.0, 0.5, 2.0, 2.1]]).expand(64, -1)
drawn = draw_tokens(logits, [params] * 64, [make_rng(1, i) for i in range(64)])
assert set(drawn) == {2, 3}, drawn
assert KERNELS == 0 or c_can_draw([params, SamplingParams()]) == [False, True]

with TestClient(app_of()) as client:
    assert client.get("/v1/limits").json()["max_tokens"] == 64
    assert client.post("/v1/chat/completions", json=chat(top_a=1.5)).status_code == 400
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with all six diffs."""
    copy = tmp_path_factory.mktemp("hacking")
    for name in ("nanochat", "scripts", "tasks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "starter"))
    (copy / "nanochat" / "starter").symlink_to(ROOT / "nanochat" / "starter")
    outside = {**os.environ, "GIT_DIR": str(copy / "none")}  # no repository: git takes the paths as they are
    for diff in DIFFS.values():
        subprocess.run(["git", "apply", "-C1", "-"], cwd=copy, input=diff, text=True, check=True, env=outside)
    return copy


def run(copy: Path, *command: str, base: Path) -> "subprocess.CompletedProcess[str]":
    paths = os.pathsep.join([str(copy), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "NANOCHAT_BASE_DIR": str(base)}
    done = subprocess.run([sys.executable, *command], cwd=copy, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_each_diff_touches_as_few_files_as_the_page_says() -> None:
    rows = dict(re.findall(r"\[another ([a-z ]+)\]\(#[a-z-]+\) \| (\d)", PAGE))
    touched = {change: diff.count("diff --git") for change, diff in DIFFS.items()}
    touched["endpoint"] += ENDPOINT_TEST_FILE
    assert {change: int(files) for change, files in rows.items()} == touched
    assert len(touched) == 6


def test_rule_layer_and_source_train_and_generate(patched: Path, copied: Path, tmp_path: Path) -> None:
    """One run uses all three: its data from SQLite, its MLP SwiGLU, its matrices updated by Lion."""
    database = tmp_path / "texts.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE documents (text TEXT)")
        texts = [(f"document {i} " + "word " * (i % 50),) for i in range(400)]
        connection.executemany("INSERT INTO documents VALUES (?)", texts)
    kept = [flag for flag in TINY if not flag.startswith(("--num-iterations", "--n-embd", "--head-dim"))]
    sizes = ["--n-embd=32", "--head-dim=16", "--num-iterations=4", "--save-every=2", "--sample-every=4"]
    flags = [
        *kept,
        *sizes,
        "--recipe=default,matrix_rule=lion,matrix_lr=0.001,mlp=swiglu",
        f"--data=sqlite://{database}",
    ]
    train_and_export = """if True:
        import sys
        from scripts import base_train, export
        assert base_train.main(sys.argv[1:]) == 0
        try:
            export.main(["out", "-i", "base"])
        except Exception as error:
            print("refused:", error)
    """
    done = run(patched, "-c", train_and_export, *flags, base=copied)
    # The C decoder does not know the layer, says so once, and PyTorch samples.
    assert done.stderr.count("SwiGLU") == int(kernels.in_use(torch.device("cpu")))
    folder = copied / "base_checkpoints" / "tiny"
    files = (folder / "000004").glob("*.safetensors")
    names = " ".join(name for path in files for name in safe_open(path, "pt").keys())  # noqa: SIM118
    assert "mlp.c_gate.weight" in names and "exp_avg" in names and "momentum_buffer" not in names
    # Nor do exports: theirs would be another model.
    refused = done.stdout.partition("refused:")[2]
    assert "mlp=swiglu" in refused and "same_network.py" in refused and not (patched / "out").exists()
    shutil.rmtree(folder / "000004")
    assert "step 2" in run(patched, "-m", "scripts.base_train", *flags, "--resume", base=copied).stdout


def test_tool_sampling_setting_and_endpoint(patched: Path, copied: Path) -> None:
    code = f"KERNELS = {int(kernels.in_use(torch.device('cpu')))}\n{SNIPPET}"
    run(patched, "-c", code, base=copied)
