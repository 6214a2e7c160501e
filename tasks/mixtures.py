"""Which tasks, in which shares, make up a finetuning run."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError
from tasks.arithmetic import Arithmetic
from tasks.common import DatasetMissing, Task
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.starter import StarterChat
from tasks.wordproblems import LEVELS, WordProblems


@dataclass
class Part:
    """One ingredient; listed twice means two passes over it."""

    name: str
    task: Task


def load_mixture(data: str, seed: int) -> tuple[list[Part], list[Part], list[str]]:
    """(training parts, validation parts, why others are absent) of what chat_sft's --data names."""
    if data == "starter":
        return starter_mixture("train", seed), starter_mixture("val", seed), []
    if data != "published":
        path = Path(data).expanduser()
        return own_conversations(path, "train"), own_conversations(path, "val"), []
    train, missing = published_mixture("train")
    val, _ = published_mixture("val")
    return train, val, missing


def describe_parts(parts: list[Part]) -> list[tuple[str, str]]:
    """(name, number of conversations and share of the whole) of each."""
    total = sum(len(part.task) for part in parts)
    rows = []
    for name, times in Counter(part.name for part in parts).items():
        size = next(len(part.task) for part in parts if part.name == name)
        passes = f" x {times}" if times > 1 else ""
        rows.append((name, f"{size:,} conversations{passes} ({size * times / total:.0%})"))
    return rows


def starter_mixture(split: str, seed: int = 42) -> list[Part]:
    """The embedded conversations and the generated skills: everything works offline.

    The skills' shares are what tiny models need to learn them within minutes on a CPU; see dev/LOG.md.
    """
    # Validation draws other examples from the training generators: the test items are for chat_eval alone.
    train = split == "train"
    size, draw = (20_000, seed) if train else (100, seed + 1)
    parts = [
        Part("arithmetic", Arithmetic(size=size, seed=draw)),
        Part("spelling", SimpleSpelling(size=size, seed=draw)),
        Part("letter counting", SpellingBee(size=size, seed=draw)),
        # Enough to know the form of an answer; to solve them is for reinforcement learning (chat_rl).
        *(Part(f"word problems {level}", WordProblems(level, max(5, size // 500), seed=draw)) for level in LEVELS),
        Part("small talk", StarterChat(split, source="smalltalk")),
        Part("questions", StarterChat(split, source="qa")),
    ]
    repeats = 4 if train else 1
    return parts + [Part("identity", StarterChat(split, source="identity"))] * repeats


def published_mixture(split: str) -> tuple[list[Part], list[str]]:
    """The public mixture, as far as its data is at hand; and why each absent part is absent."""
    train = split == "train"
    makers = [
        ("SmolTalk", lambda: SmolTalk(split="train" if train else "test", stop=None if train else 24_000)),
        (
            "MMLU auxiliary",
            lambda: (
                MMLU(subset="auxiliary_train", split="train") if train else MMLU(subset="all", split="test", stop=5_200)
            ),
        ),
        ("GSM8K", lambda: GSM8K(subset="main", split="train" if train else "test", stop=None if train else 420)),
        ("GSM8K again", lambda: GSM8K(subset="main", split="train") if train else None),
        ("SimpleSpelling", lambda: SimpleSpelling(size=200_000, split="train") if train else None),
        ("SpellingBee", lambda: SpellingBee(size=80_000, split="train") if train else None),
        ("identity", lambda: StarterChat("train" if train else "val", source="identity")),
        ("identity again", lambda: StarterChat("train", source="identity") if train else None),
    ]
    parts, missing = [], []
    for name, make in makers:
        try:
            task = make()
        except DatasetMissing as error:
            missing.append(f"{name}: {error}")
            continue
        if task is not None:
            parts.append(Part(name, task))
    return parts, missing


def own_conversations(path: Path, split: str) -> list[Part]:
    """Your own .jsonl, one JSON array of messages per line, checked first; the last fiftieth is held out."""
    everything = CustomJSON(str(path))
    if len(everything) < 2:
        raise UserError(f"{path} holds {len(everything)} conversation: two are needed, one of them to validate on")
    held_out = max(1, len(everything) // 50)
    if split == "train":
        return [Part(path.name, CustomJSON(str(path), start=0, stop=len(everything) - held_out))]
    return [Part(path.name, CustomJSON(str(path), start=len(everything) - held_out))]
