"""A run killed at random moments resumes from its last save and ends with the same bits."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from ranks import start_script

from nanochat.common import sha256_file

STEPS, SAVE_EVERY = 60, 3
BASE = [
    "--recipe=small,smear=True",  # n-grams and smear
    "--depth=1",
    "--n-embd=32",
    "--head-dim=16",
    "--max-seq-len=32",
    "--total-batch-size=128",
    "--eval-every=10",
    "--eval-tokens=1024",
    "--sample-every=-1",
    f"--num-iterations={STEPS}",
    f"--save-every={SAVE_EVERY}",
    "--device-type=cpu",
    "--model-tag=tiny",
    "--keep-last=2",
]
SFT = [
    f"--num-iterations={STEPS}",
    f"--save-every={SAVE_EVERY}",
    "--total-batch-size=128",
    "--eval-tokens=512",
    "--eval-every=20",
    "--device-type=cpu",
    "--model-tag=tiny",
]


def finish(stage: str, argv: list[str], base: Path) -> None:
    process = start_script(stage, argv, base)
    process.join(120)
    assert process.exitcode == 0, (base / "log.txt").read_text()[-3000:]


def result(base: Path, folder: str) -> tuple[str, str, str, list[tuple[int, float, float | None]]]:
    """Hashes of the final weights, optimizer state and generators, and (step, loss, val_bpb) of every metrics line."""
    run = base / folder / "tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = run / f"{STEPS:06d}"
    return (
        sha256_file(last / "model.safetensors"),
        sha256_file(last / "optimizer.safetensors"),
        sha256_file(last / "rng.safetensors"),
        [(line["step"], line["loss"], line.get("val_bpb")) for line in lines],
    )


def count_lines(run: Path) -> int:
    """Steps in the metrics so far; a resumed run cuts them back to its last save."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with a tokenizer, an uninterrupted base run and an uninterrupted SFT run."""
    base = tmp_path_factory.mktemp("straight")
    pairs = [(w, v) for w in ("sea", "hill", "town", "wood") for v in ("anna", "ben", "carl", "dora") for _ in range(9)]
    texts = [f"{i} {w} and {v} went to the {w}. " * (1 + i % 7) for i, (w, v) in enumerate(pairs)]
    data = base / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chats = base / "chats.jsonl"
    chats.write_text(
        "".join(
            json.dumps([{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]) + "\n"
            for i in range(60)
        )
    )
    finish("tok_train", [f"--data={data}", "--vocab-size=300"], base)
    finish("base_train", [*BASE, f"--data={data}"], base)
    finish("chat_sft", [*SFT, f"--data={chats}"], base)
    return base


@pytest.mark.parametrize(
    ("stage", "argv", "folder"), [("base_train", BASE, "base_checkpoints"), ("chat_sft", SFT, "chatsft_checkpoints")]
)
def test_killed_runs_end_like_one_never_killed(
    stage: str, argv: list[str], folder: str, straight: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(straight / "tokenizer", tmp_path / "tokenizer")
    if stage == "chat_sft":
        shutil.copytree(straight / "base_checkpoints", tmp_path / "base_checkpoints")
    data = straight / ("data.jsonl" if stage == "base_train" else "chats.jsonl")
    flags = [*argv, f"--data={data}", "--resume"]
    rng, kills, reached = random.Random(7), 0, 0
    run = tmp_path / folder / "tiny"
    while kills < 10:  # twenty in all
        process = start_script(stage, flags, tmp_path)
        # Some are killed while they start or load, the others up to three steps later, at any point.
        # Near the end all are killed while they start: a run that has ended cannot be killed.
        room = STEPS - count_lines(run)
        wanted = count_lines(run) + (rng.choice([0, 0, 1, 2, 3]) if room > 20 else 0)
        deadline = time.monotonic() + 60
        while process.is_alive() and count_lines(run) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05 if count_lines(run) else 0.3))
        process.join(0)
        assert process.exitcode in (None, 0), (tmp_path / "log.txt").read_text()[-3000:]
        if process.exitcode == 0:  # the test was delayed so long that the run ended
            break
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        kills += 1
        saved = max((int(p.name) for p in run.glob("0*") if (p / "manifest.json").exists()), default=0)
        assert saved >= reached, "a save was lost"
        reached = saved
    assert kills >= 5 and reached > 0
    finish(stage, flags, tmp_path)
    assert result(tmp_path, folder) == result(straight, folder)


def test_resuming_at_an_earlier_step_gives_the_same_end(straight: Path, tmp_path: Path) -> None:
    import shutil

    for name in ("tokenizer", "base_checkpoints"):
        shutil.copytree(straight / name, tmp_path / name)
    resume = f"--resume-from-step={STEPS - SAVE_EVERY}"
    finish("base_train", [*BASE, f"--data={straight / 'data.jsonl'}", resume], tmp_path)
    assert result(tmp_path, "base_checkpoints") == result(straight, "base_checkpoints")


def test_a_second_fresh_run_moves_the_first_aside(straight: Path, tmp_path: Path) -> None:
    import shutil

    for name in ("tokenizer", "base_checkpoints"):
        shutil.copytree(straight / name, tmp_path / name)
    finish("base_train", [*BASE, f"--data={straight / 'data.jsonl'}", "--num-iterations=2"], tmp_path)
    assert (tmp_path / "base_checkpoints" / "tiny.old1" / f"{STEPS:06d}" / "manifest.json").exists()
    assert (tmp_path / "base_checkpoints" / "tiny" / "000002" / "manifest.json").exists()


def test_killed_reinforcement_learning_ends_like_one_never_killed(straight: Path, tmp_path: Path) -> None:
    """Samples after resuming equal those of an uninterrupted run: the figures of every step are equal."""
    import shutil

    flags = [
        "--num-iterations=9",
        "--save-every=2",
        "--eval-every=4",
        "--eval-examples=2",
        "--examples-per-step=2",
        "--num-samples=4",
        "--max-new-tokens=8",
        "--tasks=Format,Arithmetic",
        "--device-type=cpu",
        "--model-tag=tiny",
        "--source-tag=tiny",
    ]
    bases = [tmp_path / name for name in ("straight", "killed")]
    for base in bases:
        shutil.copytree(straight / "chatsft_checkpoints", base / "chatsft_checkpoints")
        shutil.copytree(straight / "tokenizer", base / "tokenizer")
    finish("chat_rl", flags, bases[0])
    run = bases[1] / "chatrl_checkpoints" / "tiny"
    process = start_script("chat_rl", flags, bases[1])
    while process.is_alive() and count_lines(run) < 5:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish("chat_rl", [*flags, "--resume"], bases[1])
    figures = []
    for base in bases:
        lines = (base / "chatrl_checkpoints" / "tiny" / "metrics.jsonl").read_text().splitlines()
        figures.append(
            [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in lines]
        )
    assert figures[0] == figures[1] and len(figures[0]) == 9 and figures[0][3]["answer_tokens"] > 0
    for name in ("model.safetensors", "rng.safetensors"):
        hashes = [sha256_file(base / "chatrl_checkpoints" / "tiny" / "000009" / name) for base in bases]
        assert hashes[0] == hashes[1]
