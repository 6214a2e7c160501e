"""What a task is, and how tasks are mixed.

A task is a sequence of conversations with a way to tell whether a completion is right. SFT trains on
the conversations, chat_eval and RL ask the question and judge the completion. Nothing here knows a
tokenizer or a model.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nanochat.common import UserError
from tasks.answers import Conversation
from tasks.hub import DatasetMissing, HubRows, load_hub_rows

__all__ = [
    "Conversation",
    "DatasetMissing",
    "GeneratedTask",
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


class GeneratedTask(Task):
    """`size` conversations that are made when asked for, each from (seed, split, index) alone.

    Subclasses see to it that no seed makes an item of "test" in "train". Raises UserError for another split.
    """

    def __init__(self, size: int = 1000, split: str = "train", *, seed: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        if split not in ("train", "test"):
            raise UserError(f"{type(self).__name__} has the splits train and test, not {split!r}")
        self.size, self.split, self.seed = size, split, seed

    def num_examples(self) -> int:
        return self.size


class TaskMixture(Task):
    """Several tasks shuffled into one, the same way on every machine. A task listed twice is seen twice."""

    def __init__(self, tasks: Sequence[Task], seed: int = 42, **kwargs: Any):
        super().__init__(**kwargs)
        self.tasks = list(tasks)
        sizes = [len(task) for task in self.tasks]
        owner = np.repeat(np.arange(len(sizes)), sizes)
        local = np.concatenate([*map(np.arange, sizes), np.empty(0, dtype=np.int64)])
        order = permutation(len(owner), (seed, len(sizes)))
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

    def fingerprint(self) -> str:
        """Changes when the conversations do: their number, or any of up to a thousand of them."""
        digest = hashlib.sha256(str(len(self)).encode())
        for index in range(0, len(self), max(1, len(self) // 1000)):
            digest.update(json.dumps(self[index], sort_keys=True).encode())
        return digest.hexdigest()[:16]


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


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A multiple-choice question as one user message.

    The letter follows its choice without a space, so that it is the very token the answer is.
    """
    assert len(letters) == len(choices)
    options = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices))
    return f"Multiple Choice question: {question}\n{options}\nRespond only with the letter of the correct answer."
