"""What several test files share: a model small enough to train in a test."""

import contextlib
import gc
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stubs import TINY

from nanochat.common import get_kernels_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.sandbox.levels import SAFE_LEVELS, why_unavailable

# A shell has Ctrl-C ignored in what it starts in the background, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Of what tests start, for the same reason as in one_thread below, and as several run at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiled once, for all the base folders that tests make.
os.environ.setdefault("NANOCHAT_KERNELS_DIR", str(get_kernels_dir()))

GOLDENS = Path(__file__).parent / "goldens"


# Few tests, but long ones, that mostly wait for processes of their own: first, so that no core idles at the end.
LONG = ("test_network", "test_elastic", "test_resume", "test_same_answer", "test_bench", "test_bad_shards")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> tuple[int, bool]:
        """Long files first; of a file, tests that compile last."""
        order = LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)
        return order, item.get_closest_marker("compiles") is not None

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors this small, threads only wait for each other: ten times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def short_starts() -> Iterator[None]:
    """Runs in this process freeze no objects, of which pytest and the tests have loaded a million, and measure the
    machine's FLOP/s briefly: a second a run in a full suite."""
    from nanochat import trainer
    from nanochat.train import timing

    measure, short = timing.measure_peak_flops, 0.001
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "frozen_objects", contextlib.nullcontext)
        patch.setattr(
            timing, "measure_peak_flops", lambda runtime, seconds=short: measure(runtime, min(seconds, short))
        )
        yield


@pytest.fixture(scope="module", autouse=True)
def loaded_objects_frozen() -> None:
    """Leave what is loaded before a file's tests out of their garbage collections: a second each in a full suite.

    Nothing is thawed, as all of it would then be traversed again for the next file. So cycles that a file's tests leave
    are collected before the next file's; what is still referenced then is not collected if it becomes garbage later.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", params=SAFE_LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    """Each level of the sandbox that confines programs, where this machine has it."""
    if reason := why_unavailable(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """An empty folder for data of one's own."""
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


@pytest.fixture
def goldens() -> Path:
    """The folder of numbers that are not our own."""
    return GOLDENS


@pytest.fixture
def tiny_config() -> GPTConfig:
    """Two layers, grouped-query attention, a vocabulary that needs padding."""
    return GPTConfig(sequence_len=32, vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)


@pytest.fixture
def tiny_model(tiny_config: GPTConfig) -> GPT:
    """A freshly initialised tiny model on the CPU."""
    return GPT.create(tiny_config, seed=1)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder of this test's own, empty."""
    folder = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three shards in `data`, which is also bucket://data (corpus_helpers.Bucket)."""
    from corpus_helpers import fill_bucket

    return fill_bucket(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with a tokenizer and a one-step run."""
    from scripts import base_train, tok_train

    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"line {i} of text"}) + "\n" for i in range(200)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        tok_train.main([f"--data={folder / 'text.jsonl'}", "--vocab-size=265"])
        assert base_train.main([*TINY, f"--data={folder / 'text.jsonl'}"]) == 0
    return folder


@pytest.fixture
def copied(trained: Path, base: Path) -> Path:
    """`base` with a copy of what `trained` made."""
    shutil.copytree(trained, base)
    return base
