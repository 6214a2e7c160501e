"""Mixtures of tasks for supervised finetuning: the sources that --data names, and what each trains and validates on."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from nanochat.common import UserError
from nanochat.conversation import Conversation
from nanochat.data.listing import split_entries, split_weight
from tasks.arithmetic import Arithmetic
from tasks.common import Task, TaskSubset, permutation
from tasks.customjson import NAMED, CustomJSON
from tasks.gsm8k import GSM8K
from tasks.hub import DatasetMissing, HubTask
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.starter import StarterChat
from tasks.wordproblems import LEVELS, WordProblems

# The published mixture: (name, builder, passes) by split.
PUBLISHED: dict[str, list[tuple[str, Callable[[], Task], int]]] = {
    "train": [
        ("SmolTalk", partial(SmolTalk, "train"), 1),
        ("MMLU auxiliary", partial(MMLU, "auxiliary_train", "train"), 1),
        ("GSM8K", partial(GSM8K, "main", "train"), 2),
        ("SimpleSpelling", partial(SimpleSpelling, 200_000, "train"), 1),
        ("SpellingBee", partial(SpellingBee, 80_000, "train"), 1),
        ("identity", partial(StarterChat, "train", "identity"), 2),
    ],
    "val": [
        ("SmolTalk", partial(SmolTalk, "test", stop=24_000), 1),
        ("MMLU auxiliary", partial(MMLU, "all", "test", stop=5_200), 1),
        ("GSM8K", partial(GSM8K, "main", "test", stop=420), 1),
        ("identity", partial(StarterChat, "val", "identity"), 1),
    ],
}


@dataclass
class Part:
    """A task of a mixture, seen `passes` times in each epoch; half a pass is half of its conversations."""

    name: str
    task: Task
    passes: float = 1
    malformed: int = 0  # rows of its files that are no conversation

    def tasks(self, seed: int) -> list[Task]:
        """The task once for each pass; first whole passes, then the share of the last."""
        share, whole = math.modf(self.passes)
        some = permutation(len(self.task), (seed,))[: math.ceil(share * len(self.task))]
        return [self.task] * int(whole) + ([TaskSubset(self.task, some)] if len(some) else [])


@dataclass
class Source:
    """An entry of --data: parts to train on and to validate on; or conversations of one's own, not split yet."""

    name: str
    passes: float = 1
    train: list[Part] = field(default_factory=list)
    val: list[Part] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # reasons why parts are not at hand
    own: CustomJSON | None = None

    def split(self, usable: Callable[[Conversation], bool], by_tail: bool) -> None:
        """Hold out a part of one's own conversations, by their content, or as older runs did (`by_tail`)."""
        if self.own is not None:
            train, val = self.own.split_tail() if by_tail else self.own.split(usable)
            self.train = [Part(self.name, train, self.passes, len(self.own.bad))]
            self.val = [Part(self.name, val)]


def open_sources(data: str, seed: int) -> list[Source]:
    """The sources of chat_sft's --data: "starter", "published", and files, folders, globs and URLs of conversations,
    separated by commas, each with its passes in an epoch after a colon if it is not 1 (`starter,mine.jsonl:3`).

    Raises UserError for an entry that cannot be used. Bad conversations do not raise: see CustomJSON.bad.
    """
    entries = split_entries(data, NAMED)
    if not entries:
        raise UserError(f"--data is empty; give {', '.join(NAMED)}, or files of conversations")
    return [open_source(*split_weight(entry), seed) for entry in entries]


def open_source(name: str, passes: float, seed: int) -> Source:
    """One entry of --data without its number of passes."""
    if name == "starter":
        source = Source(name, passes, starter_mixture("train", seed), starter_mixture("val", seed))
    elif name == "published":
        train, missing = published_mixture("train")
        val, missing_val = published_mixture("val")
        source = Source(name, passes, train, val, missing + [f"to validate on, {reason}" for reason in missing_val])
        if not any(isinstance(part.task, HubTask) for part in train):
            reason = "set NANOCHAT_DATASETS_DIR to a mirror, or use --data=starter"
            raise UserError(f"--data={name}: no public data set is at hand: {reason}")
    else:
        short = name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or name
        return Source(short, passes, own=CustomJSON(name, strict=False))
    for part in source.train:
        part.passes *= passes
    return source


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
        # Enough that some answers of each level are right, which reinforcement learning (chat_rl) needs to go on from.
        *(Part(f"word problems {level}", WordProblems(level, max(5, size // 20), seed=draw)) for level in LEVELS),
        Part("small talk", StarterChat(split, source="smalltalk")),
        Part("questions", StarterChat(split, source="qa")),
        Part("stories", StarterChat(split, source="stories")),
        Part("reading", StarterChat(split, source="reading")),
        Part("what cannot be known", StarterChat(split, source="unknown"), passes=2 if train else 1),
    ]
    return [*parts, Part("identity", StarterChat(split, source="identity"), passes=4 if train else 1)]


def published_mixture(split: str) -> tuple[list[Part], list[str]]:
    """The available parts of the published mixture, and the reason for each missing part."""
    parts, missing = [], []
    for name, build, passes in PUBLISHED[split]:
        try:
            task = build()
            parts.append(Part(name, task, passes, getattr(task, "skipped", 0)))
        except DatasetMissing as error:
            missing.append(f"{name}: {error}")
    return parts, missing
