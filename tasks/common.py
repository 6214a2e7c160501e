"""What a task is, and how tasks are mixed.

A task is a sequence of conversations with a way to tell whether a completion is right. SFT trains on
the conversations, chat_eval and RL ask the question and judge the completion. Nothing here knows a
tokenizer or a model.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tasks.answers import Conversation
from tasks.hub import DatasetMissing, HubRows, load_hub_rows

__all__ = [
    "Conversation",
    "DatasetMissing",
    "HubRows",
    "Task",
    "TaskMixture",
    "TaskSequence",
    "load_hub_rows",
    "render_mc",
]


class Task:
    """A sequence of conversations, or the slice [start:stop:step] of one.

    Subclasses give `num_examples()` and `get_example(index)` over the whole data, and `evaluate`.
    `eval_type` is "generative" (sample a completion, then `evaluate`) or "categorical" (the
    conversation has `letters`; compare their logits, no sampling needed).
    """

    eval_type = "generative"

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError(f"a task slice needs 0 <= start <= stop and step >= 1, got {start}:{stop}:{step}")
        self.start, self.stop, self.step = start, stop, step

    @property
    def name(self) -> str:
        """How the task is called in tables and reports."""
        return type(self).__name__

    def num_examples(self) -> int:
        """Number of conversations before slicing."""
        raise NotImplementedError

    def get_example(self, index: int) -> Conversation:
        """Conversation `index` of the whole data; its last message is the reference answer."""
        raise NotImplementedError

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether `completion` (the model's turn as text, tool tokens spelled out) answers rightly."""
        raise NotImplementedError(f"{self.name} has no right answers to check")

    def reward(self, conversation: Conversation, completion: str) -> float:
        """What reinforcement learning gives for `completion`, in [0, 1]; by default 1.0 if right."""
        return float(self.evaluate(conversation, completion))

    def indices(self) -> range:
        total = self.num_examples()
        return range(self.start, total if self.stop is None else min(self.stop, total), self.step)

    def __len__(self) -> int:
        return len(self.indices())

    def __getitem__(self, index: int) -> Conversation:
        return self.get_example(self.indices()[index])

    def __iter__(self) -> Iterator[Conversation]:
        return map(self.get_example, self.indices())


class TaskMixture(Task):
    """Several tasks shuffled into one, the same way on every machine. A task listed twice is seen twice.

    `limits[i]` is the number of examples taken of task i: fewer than it has is a random part, more
    is whole epochs and a random part; None is all of it once. `shares` (with `total`, by default the
    sum of the tasks' lengths) gives the limits as fractions of the mixture instead.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        seed: int = 42,
        *,
        limits: Sequence[int | None] | None = None,
        shares: Sequence[float] | None = None,
        total: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.tasks = list(tasks)
        if shares is not None:
            assert limits is None, "give limits or shares, not both"
            limits = limits_from_shares(shares, sum(map(len, self.tasks)) if total is None else total)
        limits = [None] * len(self.tasks) if limits is None else list(limits)
        if len(limits) != len(self.tasks):
            raise ValueError(f"{len(self.tasks)} tasks need as many limits or shares, got {len(limits)}")
        picks = [pick(len(task), limit, (seed, i)) for i, (task, limit) in enumerate(zip(self.tasks, limits))]
        self.counts = [len(picked) for picked in picks]
        owner = np.repeat(np.arange(len(picks)), self.counts)
        local = np.concatenate([*picks, np.empty(0, dtype=np.int64)])
        order = permutation(len(owner), (seed, len(picks)))
        self.owner, self.local = owner[order], local[order]

    def num_examples(self) -> int:
        return len(self.owner)

    def get_example(self, index: int) -> Conversation:
        return self.tasks[self.owner[index]][int(self.local[index])]

    def task_of(self, index: int) -> Task:
        """The task that example `index` comes from."""
        return self.tasks[self.owner[self.indices()[index]]]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        raise TypeError("a mixture does not know whose example this is; evaluate with task_of(index)")

    def describe(self) -> list[dict[str, Any]]:
        """One row for each distinct task: name, examples taken, share of the mixture, epochs."""
        rows: dict[int, dict[str, Any]] = {}
        for task, count in zip(self.tasks, self.counts):
            row = rows.setdefault(id(task), {"name": task.name, "examples": 0, "size": len(task)})
            row["examples"] += count
        total = max(1, self.num_examples())
        return [
            {
                "name": row["name"],
                "examples": row["examples"],
                "share": row["examples"] / total,
                "epochs": row["examples"] / max(1, row["size"]),
            }
            for row in rows.values()
        ]


class TaskSequence(Task):
    """Tasks one after the other, unshuffled: a curriculum."""

    def __init__(self, tasks: Sequence[Task], **kwargs: Any):
        super().__init__(**kwargs)
        self.tasks = list(tasks)
        self.ends = np.cumsum([len(task) for task in self.tasks], dtype=np.int64)

    def num_examples(self) -> int:
        return int(self.ends[-1]) if self.tasks else 0

    def get_example(self, index: int) -> Conversation:
        which = int(np.searchsorted(self.ends, index, side="right"))
        return self.tasks[which][index - (int(self.ends[which - 1]) if which else 0)]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        raise TypeError("a sequence does not know whose example this is; evaluate with the task itself")


def permutation(length: int, key: tuple[int, ...]) -> np.ndarray:
    """A permutation of range(length), int64, that depends on `key` alone.

    Sorts raw PCG64 output: numpy keeps raw bit streams stable over versions, but not `shuffle`'s.
    """
    entropy = [value % 2**64 for value in key]  # SeedSequence refuses negative seeds
    keys = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(length)
    return np.argsort(keys, kind="stable")


def pick(size: int, limit: int | None, key: tuple[int, ...]) -> np.ndarray:
    """`limit` indices into range(size): whole epochs, then a random part of one."""
    if limit is None:
        return np.arange(size)
    if limit < 0 or (limit and not size):
        raise ValueError(f"cannot take {limit} examples of a task that has {size}")
    epochs, rest = divmod(limit, size) if size else (0, 0)
    return np.concatenate([np.tile(np.arange(size), epochs), np.sort(permutation(size, key)[:rest])])


def limits_from_shares(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `shares` that add up to `total` (largest remainders)."""
    if total < 0 or any(share < 0 for share in shares) or not sum(shares) > 0:
        raise ValueError(f"shares must be non-negative and not all zero, got {list(shares)}")
    exact = np.asarray(shares, dtype=np.float64) / sum(shares) * total
    limits = np.floor(exact).astype(np.int64)
    largest = np.argsort(limits - exact, kind="stable")[: total - int(limits.sum())]
    limits[largest] += 1
    return limits.tolist()


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A multiple-choice question as one user message.

    The letter follows its choice without a space, so that it is the very token the answer is.
    """
    assert len(letters) == len(choices)
    options = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices))
    return f"Multiple Choice question: {question}\n{options}\nRespond only with the letter of the correct answer."
