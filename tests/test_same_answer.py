"""One run, whatever it runs on: any number of processes, any device batch, saved by some and resumed by others."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from nanochat.checkpoint_manager import open_checkpoint, run_dir
from nanochat.runtime import Runtime

STEPS, HALF = 8, 4
FLAGS = [
    "--depth=3", "--n-embd=32", "--head-dim=16", "--max-seq-len=32", "--total-batch-size=256", "--eval-tokens=512",
    "--eval-every=-1", "--sample-every=-1", f"--num-iterations={STEPS}", f"--save-every={HALF}", "--device-type=cpu",
    "--model-tag=tiny", "--keep-last=0", "--lr-scale=0.3", "--weight-decay=0",  # which would explode in so short a run
]  # fmt: skip


def train(runtime: Runtime, base: str, dtype: str, argv: list[str]) -> None:
    """base_train on one rank, as torchrun would start it."""
    from scripts import base_train

    os.environ |= {"NANOCHAT_BASE_DIR": base, "NANOCHAT_DTYPE": dtype}
    assert base_train.main(argv) == 0


def run(base: Path, world_size: int, *argv: str, dtype: str = "float32") -> None:
    run_ranks(world_size, train, str(base), dtype, [*FLAGS, f"--data={base / 'data.jsonl'}", *argv])


def result(base: Path) -> tuple[list[float], dict[str, Any], int]:
    """Losses by step, final weights, documents begun."""
    folder = run_dir(base, "base", "tiny")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    checkpoint = open_checkpoint(folder, STEPS)
    return [line["loss"] for line in lines], checkpoint.model_state(), checkpoint.meta["progress"]["tokens"]


def assert_same(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Losses and all weights taken together within `tolerance`; a matrix alone within ten times that, as Muon amplifies
    the rounding of a gradient's small singular values; a scalar within a hundred, as its first gradients are rounding
    alone (see SCALAR_EPS)."""
    assert found[0] == pytest.approx(wanted[0], rel=tolerance) and found[2] == wanted[2]
    off = {name: float((found[1][name] - tensor).norm()) for name, tensor in wanted[1].items()}
    norms = {name: float(tensor.norm()) for name, tensor in wanted[1].items()}
    assert math.hypot(*off.values()) <= tolerance * math.hypot(*norms.values())
    for name, tensor in wanted[1].items():
        allowed = tolerance * (100 if tensor.numel() < 100 else 10)
        assert off[name] <= allowed * norms[name], f"{name} is {off[name] / norms[name]:.2g} off"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with a tokenizer and text."""
    from scripts import tok_train

    base = tmp_path_factory.mktemp("prepared")
    pairs = [(w, v) for w in ("sea", "hill", "town", "wood") for v in ("anna", "ben", "carl", "dora") for _ in range(9)]
    texts = [f"{i} {w} and {v} went to the {w}. " * (1 + i % 7) for i, (w, v) in enumerate(pairs)]
    (base / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        tok_train.main([f"--data={base / 'data.jsonl'}", "--vocab-size=300"])
    return base


def copy(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


@pytest.fixture(scope="module")
def straight(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = copy(prepared, tmp_path_factory.mktemp("straight") / "base")
    run(base, 1)
    return base


@pytest.fixture(scope="module")
def by_four(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = copy(prepared, tmp_path_factory.mktemp("by_four") / "base")
    run(base, 4, "--device-batch-size=1")
    return base


@pytest.mark.parametrize(("world_size", "device_batch"), [(1, 3), (2, 8), (2, 1), (3, 2)])
def test_any_size_gives_the_same_run(
    world_size: int, device_batch: int, straight: Path, prepared: Path, tmp_path: Path
) -> None:
    base = copy(prepared, tmp_path / "base")
    run(base, world_size, f"--device-batch-size={device_batch}")
    assert_same(result(base), result(straight))


def test_four_processes_save_in_shares(by_four: Path, straight: Path) -> None:
    assert_same(result(by_four), result(straight))
    folder = run_dir(by_four, "base", "tiny") / f"{HALF:06d}"
    shares = [f"{stem}-{i:05d}-of-00004.safetensors" for stem in ("loader", "optimizer") for i in range(1, 5)]
    rest = ["manifest.json", "meta.json", "model.safetensors", "rng.safetensors", "tokenizer.json"]
    assert sorted(os.listdir(folder)) == sorted(shares + rest)
    assert list(json.loads((folder / "manifest.json").read_text())["files"]) and not list(folder.parent.glob(".*.*"))
    sizes = [(folder / name).stat().st_size for name in shares if name.startswith("optimizer")]
    assert max(sizes) < 0.3 * sum(sizes)
    joined, counts = open_checkpoint(folder.parent, HALF).optimizer_state()
    whole, same = open_checkpoint(run_dir(straight, "base", "tiny"), HALF).optimizer_state()
    assert joined.keys() == whole.keys() and counts == same
    for name, tensor in whole.items():
        assert (joined[name].reshape(tensor.shape) - tensor).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (4, 3), (4, 8), (1, 3)])
def test_what_some_saved_others_go_on_from(
    before: int, after: int, straight: Path, by_four: Path, tmp_path: Path
) -> None:
    base = copy(by_four if before == 4 else straight, tmp_path / "base")
    wanted = result(base)
    run(base, after, f"--resume-from-step={HALF}")
    assert_same(result(base), wanted)
    exactly = open_checkpoint(run_dir(base, "base", "tiny"), STEPS)
    assert exactly.meta["runtime"]["world_size"] == after
