"""The task interface, and mixtures of tasks.

A task is a sequence of conversations and a way to check a completion. SFT trains on the conversations; chat_eval and
RL ask the question and check the completion. Tasks know no tokenizer and no model.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.conversation import Conversation

TEST_SHARE = 10  # a generated problem in so many belongs to the test split


class Task:
    """A sequence of conversations, or the slice [start:stop:step] of one.

    Subclasses define `num_examples()` and `get_example(index)` over the whole data, and `evaluate`.
    `eval_type` is "generative" (sample a completion, then `evaluate`) or "categorical" (the conversation has
    `letters`; compare their logits, no sampling needed).
    """

    eval_type = "generative"

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError(f"a task slice needs 0 <= start <= stop and step >= 1, got {start}:{stop}:{step}")
        self.start, self.stop, self.step = start, stop, step

    @property
    def name(self) -> str:
        """Display name in tables and reports."""
        return type(self).__name__

    def num_examples(self) -> int:
        """Number of conversations before slicing."""
        raise NotImplementedError

    def get_example(self, index: int) -> Conversation:
        """Conversation `index` of the whole data; its last message is the reference answer."""
        raise NotImplementedError

    def place(self, index: int) -> str:
        """Where example `index` of the slice comes from, for messages."""
        return f"{self.name}, conversation {self.indices()[index] + 1}"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether `completion` (the model's turn as text, tool tokens included) is correct."""
        raise NotImplementedError(f"{self.name} has no reference answers to check against")

    def reward(self, conversation: Conversation, completion: str) -> float:
        """Reward for reinforcement learning, in [0, 1]; by default 1.0 if correct."""
        return float(self.evaluate(conversation, completion))

    def indices(self) -> range:
        """Indices of the slice into the whole data."""
        total = self.num_examples()
        return range(self.start, total if self.stop is None else min(self.stop, total), self.step)

    def __len__(self) -> int:
        return len(self.indices())

    def __getitem__(self, index: int) -> Conversation:
        return self.get_example(self.indices()[index])

    def __iter__(self) -> Iterator[Conversation]:
        return map(self.get_example, self.indices())


class GeneratedTask(Task):
    """`size` conversations generated on demand, each a pure function of (seed, split, index).

    Subclasses must keep the items of "test" out of "train" for every seed. Raises UserError for another split.
    """

    def __init__(self, size: int = 1000, split: str = "train", *, seed: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        check_split(type(self).__name__, split, ("train", "test"))
        self.size, self.split, self.seed = size, split, seed

    def num_examples(self) -> int:
        return self.size

    def rng(self, index: int) -> random.Random:
        """The random generator of item `index`."""
        return keyed_random(type(self).__name__, self.seed, self.split, index)


class TaskSubset(Task):
    """The examples of another task at `indices`."""

    def __init__(self, task: Task, indices: Sequence[int] | np.ndarray, **kwargs: Any):
        super().__init__(**kwargs)
        self.task, self.chosen = task, np.asarray(indices, dtype=np.int64)

    @property
    def name(self) -> str:
        return self.task.name

    def num_examples(self) -> int:
        return len(self.chosen)

    def get_example(self, index: int) -> Conversation:
        return self.task[int(self.chosen[index])]

    def place(self, index: int) -> str:
        return self.task.place(int(self.chosen[self.indices()[index]]))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return self.task.evaluate(conversation, completion)


class TaskMixture(Task):
    """Several tasks shuffled into one, identically on every machine. A task listed twice is seen twice."""

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

    def place(self, index: int) -> str:
        number = self.indices()[index]
        return self.tasks[self.owner[number]].place(int(self.local[number]))

    def task_of(self, index: int) -> Task:
        """The task that example `index` comes from."""
        return self.tasks[self.owner[self.indices()[index]]]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        raise TypeError("a mixture cannot tell which task an example comes from; evaluate with task_of(index)")

    def fingerprint(self) -> str:
        """Hash of the number of conversations and of up to a thousand of them."""
        digest = hashlib.sha256(str(len(self)).encode())
        for index in range(0, len(self), max(1, len(self) // 1000)):
            digest.update(json.dumps(self[index], sort_keys=True).encode())
        return digest.hexdigest()[:16]


class TaskSequence(Task):
    """Tasks one after the other, not shuffled: a curriculum."""

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
        raise TypeError("a sequence cannot tell which task an example comes from; evaluate with the task itself")


def check_split(name: str, split: str, splits: Sequence[str]) -> None:
    """Raise UserError unless `split` is one of `splits`."""
    if split not in splits:
        raise UserError(f"{name} has the splits {' and '.join(splits)}, not {split!r}")


def in_test_split(problem: str) -> bool:
    """Whether a generated problem, written in a canonical form, is held out: a hash decides, so that no seed, size or
    phrasing puts it into both splits."""
    return hashlib.sha256(problem.encode()).digest()[0] % TEST_SHARE == 0


def keyed_random(*key: object) -> random.Random:
    """A random generator that is a pure function of `key`.

    The key is hashed because `random.seed(1)` and `random.seed(-1)` give the same stream.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def permutation(length: int, key: tuple[int, ...]) -> np.ndarray:
    """A permutation of range(length), int64, that is a pure function of `key`.

    Sorts raw PCG64 output: numpy keeps raw bit streams stable across versions, but not `shuffle`.
    """
    entropy = [value % 2**64 for value in key]  # SeedSequence rejects negative seeds
    keys = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(length)
    return np.argsort(keys, kind="stable")
