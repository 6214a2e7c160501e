"""Mixtures of tasks for supervised finetuning."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanochat.common import UserError
from tasks.arithmetic import Arithmetic
from tasks.common import Task
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.hub import DatasetMissing
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.starter import StarterChat
from tasks.wordproblems import LEVELS, WordProblems

# The published mixture: (name, builder) by split; a task listed twice is seen twice.
PUBLISHED: dict[str, list[tuple[str, Callable[[], Task]]]] = {
    "train": [
        ("SmolTalk", partial(SmolTalk, "train")),
        ("MMLU auxiliary", partial(MMLU, "auxiliary_train", "train")),
        ("GSM8K", partial(GSM8K, "main", "train")),
        ("GSM8K again", partial(GSM8K, "main", "train")),
        ("SimpleSpelling", partial(SimpleSpelling, 200_000, "train")),
        ("SpellingBee", partial(SpellingBee, 80_000, "train")),
        ("identity", partial(StarterChat, "train", "identity")),
        ("identity again", partial(StarterChat, "train", "identity")),
    ],
    "val": [
        ("SmolTalk", partial(SmolTalk, "test", stop=24_000)),
        ("MMLU auxiliary", partial(MMLU, "all", "test", stop=5_200)),
        ("GSM8K", partial(GSM8K, "main", "test", stop=420)),
        ("identity", partial(StarterChat, "val", "identity")),
    ],
}


@dataclass
class Part:
    """A task of a mixture; listed twice means two passes over it."""

    name: str
    task: Task


def load_mixture(data: str, seed: int) -> tuple[list[Part], list[Part], list[str]]:
    """(training parts, validation parts, reasons why others are missing) of chat_sft's --data: "starter", "published"
    or the path of a .jsonl file."""
    if data == "starter":
        return starter_mixture("train", seed), starter_mixture("val", seed), []
    if data == "published":
        train, missing = published_mixture("train")
        return train, published_mixture("val")[0], missing
    return *own_conversations(Path(data).expanduser()), []


def describe_parts(parts: list[Part]) -> list[tuple[str, str]]:
    """(name, "number of conversations (share of the whole)") of each part."""
    total = sum(len(part.task) for part in parts)
    rows = []
    for name, times in Counter(part.name for part in parts).items():
        size = next(len(part.task) for part in parts if part.name == name)
        passes = f" x {times}" if times > 1 else ""
        rows.append((name, f"{size:,} conversations{passes} ({size * times / total:.0%})"))
    return rows


def starter_mixture(split: str, seed: int = 42) -> list[Part]:
    """The starter conversations and the generated tasks; needs no download.

    The sizes are those that tiny models need to learn the tasks within minutes on a CPU; see dev/LOG.md.
    """
    # Validation draws other examples of the training split: the test split is for chat_eval alone.
    train = split == "train"
    size, draw = (20_000, seed) if train else (100, seed + 1)
    parts = [
        Part("arithmetic", Arithmetic(size=size, seed=draw)),
        Part("spelling", SimpleSpelling(size=size, seed=draw)),
        Part("letter counting", SpellingBee(size=size, seed=draw)),
        # Enough to learn the format of an answer; reinforcement learning (chat_rl) trains to solve them.
        *(Part(f"word problems {level}", WordProblems(level, max(5, size // 500), seed=draw)) for level in LEVELS),
        Part("small talk", StarterChat(split, source="smalltalk")),
        Part("questions", StarterChat(split, source="qa")),
    ]
    repeats = 4 if train else 1
    return parts + [Part("identity", StarterChat(split, source="identity"))] * repeats


def published_mixture(split: str) -> tuple[list[Part], list[str]]:
    """The available parts of the published mixture, and the reason for each missing part."""
    parts, missing = [], []
    for name, build in PUBLISHED[split]:
        try:
            parts.append(Part(name, build()))
        except DatasetMissing as error:
            missing.append(f"{name}: {error}")
    return parts, missing


def own_conversations(path: Path) -> tuple[list[Part], list[Part]]:
    """A .jsonl file, one JSON array of messages per line; the last fiftieth is for validation."""
    size = len(CustomJSON(path))
    if size < 2:
        raise UserError(f"{path} holds {size} conversation: at least two are needed, one of them for validation")
    num_train = size - max(1, size // 50)
    return [Part(path.name, CustomJSON(path, stop=num_train))], [Part(path.name, CustomJSON(path, start=num_train))]
