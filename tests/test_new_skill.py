"""The steps of dev/NEW_SKILL.md work."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stubs import TINY

from scripts import base_train, chat_eval, chat_rl, chat_sft
from tasks.registry import REWARDED, TASKS, generated

DEV = Path(__file__).resolve().parent.parent / "dev"


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example task, registered as the guide says."""
    monkeypatch.syspath_prepend(str(DEV / "new_skill"))
    from backwards import Backwards  # type: ignore[import-not-found]

    monkeypatch.setitem(TASKS, "Backwards", generated(Backwards))
    monkeypatch.setitem(REWARDED, "Backwards", [Backwards])
    return Backwards


def test_the_task_is_sound(backwards: Any) -> None:
    for index in range(50):
        conversation = backwards()[index]
        wanted = conversation["messages"][-1]["content"]
        assert wanted.replace(" ", "")[::-1] in conversation["messages"][0]["content"]
        assert backwards().reward(conversation, wanted) == 1.0 and backwards().evaluate(conversation, wanted)
        assert backwards().reward(conversation, "") == 0.0 and not backwards().evaluate(conversation, "x")
    assert not set(backwards(split="test").words) & set(backwards().words)


def test_the_commands_run(backwards: Any, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [flag for flag in TINY if not flag.startswith("--max-seq-len")]
    assert base_train.main([*flags, "--max-seq-len=64", f"--data={copied / 'text.jsonl'}"]) == 0
    made = subprocess.run(
        [sys.executable, str(DEV / "new_skill" / "make_data.py"), "40"],
        capture_output=True,
        text=True,
        check=True,
        cwd=DEV.parent,
    ).stdout
    data = tmp_path / "backwards.jsonl"
    data.write_text(made)
    assert len(made.splitlines()) == 40 and json.loads(made.splitlines()[0])[0]["role"] == "user"
    common = ["--device-type=cpu", "--num-iterations=1"]
    assert chat_sft.main([f"--data={data}", "--total-batch-size=64", "--eval-tokens=64", *common]) == 0
    assert (
        chat_rl.main(
            [
                "--tasks=Backwards,Arithmetic",
                "--examples-per-step=2",
                "--num-samples=2",
                "--max-new-tokens=4",
                "--eval-examples=2",
                *common,
            ]
        )
        == 0
    )
    assert chat_eval.main(["-i", "rl", "-a", "Backwards", "-x", "2", "-m", "4"]) == 0
    assert "Backwards" in capsys.readouterr().out


def test_the_guide_is_short_and_names_what_there_is() -> None:
    text = (DEV / "NEW_SKILL.md").read_text(encoding="utf-8")
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (DEV / "new_skill").glob("*.py"))
    assert lines < 100
    for name in ("tasks/registry.py", "tasks/mixtures.py"):
        assert name in text and (DEV.parent / name).exists()
