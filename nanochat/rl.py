"""On-policy policy gradient: the model answers, a task says how good each answer is, the better ones become likelier.

REINFORCE (Williams, 1992) with the mean reward of a prompt's samples as its baseline, as in GRPO (arXiv 2402.03300)
without its ratio, clip and KL term: every batch is sampled from today's weights and used once, so that there is
nothing to correct. The loss of a token is -advantage * log p, divided by the number of trained tokens in the step.
Only what the model chose is trained, its end of turn included; what a tool forced is context.

    Curriculum      tasks of rising difficulty: once the reward of one is high, most prompts come from the next
    RolloutLoader   the trainer's loader: each batch is sampled when it is asked for

So RL is the one training loop with another loader; and what a step trains on is a function of the weights, the seed
and the step, whatever the number of processes.

Shapes: N rows, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.data.batches import Batch, Loader, seeded_rng
from nanochat.engine import Engine
from nanochat.inference.request import GenerationRequest, TokenSequence
from nanochat.inference.sampling import SamplingParams
from nanochat.ranges import Range, check_ranges
from nanochat.runtime import Runtime

RL_RNG = 7  # purpose of the generator that picks prompts (batches.seeded_rng)
OTHER_SHARE = 0.3  # of prompts that come from a level already passed or from the next one, lest they be unlearnt
MEMORY = 0.9  # of the running mean of a level's reward, per step


class Rewarded(Protocol):
    """What RL asks of a task."""

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def reward(self, conversation: Any, completion: str) -> float: ...


@dataclass
class Curriculum:
    """Levels of one task, easiest first. A level is passed when the running mean of its reward reaches `raise_at`."""

    levels: Sequence[Rewarded]
    raise_at: float = 0.8
    level: int = 0  # the highest that is drawn from
    mean: float = 0.0  # running, of the rewards at that level; not corrected for its start at 0

    def draw(self, rng: np.random.Generator) -> tuple[Rewarded, int]:
        """A task and an item of it: mostly of the present level, now and then of an earlier one or the next."""
        others = [*self.levels[: self.level], *self.levels[self.level + 1 : self.level + 2]]
        other = bool(others) and rng.random() < OTHER_SHARE
        task = others[int(rng.integers(len(others)))] if other else self.levels[self.level]
        return task, int(rng.integers(len(task)))

    def note(self, reward: float | None) -> None:
        """A step's mean reward at the present level, None where it drew none."""
        if reward is None:
            return
        self.mean = MEMORY * self.mean + (1 - MEMORY) * reward
        if self.mean >= self.raise_at and self.level + 1 < len(self.levels):
            self.level, self.mean = self.level + 1, 0.0


@dataclass
class Group:
    """One prompt and all its samples."""

    curriculum: int
    task: Rewarded
    index: int
    conversation: Any
    prompt: list[int]
    rows: list[TokenSequence] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    @property
    def advantages(self) -> list[float]:
        """Reward minus the group's mean."""
        mean = sum(self.rewards) / len(self.rewards)
        return [reward - mean for reward in self.rewards]

    @property
    def silent(self) -> bool:
        """All samples got the same reward: nothing is learnt from them."""
        return max(self.rewards) == min(self.rewards)


@dataclass
class Sampler:
    """How answers are sampled in training."""

    num_samples: Annotated[int, Range(2)] = 16  # they are compared with each other
    max_new_tokens: Annotated[int, Range(1)] = 256
    temperature: Annotated[float, Range(above=0, below=math.inf)] = 1.0
    top_k: Annotated[int, Range(0)] = 50
    batch_size: Annotated[int, Range(1)] = 32  # rows decoded together; does not change the answers

    def __post_init__(self) -> None:
        check_ranges(self)


class RolloutLoader(Loader):
    """Samples this process's share of each global batch from the model as it is now."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        curricula: Sequence[Curriculum],
        sampler: Sampler,
        groups_per_step: int,
        runtime: Runtime,
        seed: int,
        watch: Callable[[int, list[Group]], None] = lambda step, groups: None,
    ) -> None:
        """`watch(step, groups)` is shown this process's samples of each step."""
        assert groups_per_step > 0
        self.engine, self.tokenizer, self.curricula, self.sampler = engine, tokenizer, list(curricula), sampler
        self.groups_per_step, self.runtime, self.seed, self.watch = groups_per_step, runtime, seed, watch
        self.step = 0
        self.figures: dict[str, float] = {}  # of the last batch, over all processes

    def next_batch(self) -> Batch:
        """Prompts of this step, answers to them, and the batch that trains on those."""
        groups = [
            self._draw(number) for number in range(self.runtime.rank, self.groups_per_step, self.runtime.world_size)
        ]
        self._answer(groups, [*range(self.runtime.rank, self.groups_per_step, self.runtime.world_size)])
        self.figures = self._note(groups)
        self.watch(self.step, groups)
        self.step += 1
        return as_batch(groups, f"rollouts of step {self.step - 1}")

    def _draw(self, number: int) -> Group:
        """Prompt `number` of the step: which one depends on the seed, the step and the number alone."""
        rng = seeded_rng(RL_RNG, self.seed, self.step, number)
        which = int(rng.integers(len(self.curricula)))
        task, index = self.curricula[which].draw(rng)
        conversation = task[index]
        prompt = self.tokenizer.render_for_completion(conversation)
        room = self.engine.max_context - 1
        return Group(which, task, index, conversation, prompt[-room:])

    def _answer(self, groups: list[Group], numbers: list[int]) -> None:
        """Samples for every group, all in one running batch, and their rewards."""
        how, n = self.sampler, self.sampler.num_samples
        seed = int(seeded_rng(RL_RNG, self.seed, self.step, 2**31).integers(2**62))
        sampling = SamplingParams(how.temperature, how.top_k, seed=seed)
        requests = [
            GenerationRequest(group.prompt, how.max_new_tokens, sampling, n, top_logprobs=0, first_index=number * n)
            for group, number in zip(groups, numbers)
        ]
        rows = self.engine.complete(requests, how.batch_size)
        for place, group in enumerate(groups):
            group.rows = rows[place * n : (place + 1) * n]
            group.texts = [self.tokenizer.decode(row.tokens) for row in group.rows]
            # An answer that was cut off earns nothing, or there would be no reason to stop once the result is said.
            group.rewards = [
                float(group.task.reward(group.conversation, text)) if row.end is not None else 0.0
                for row, text in zip(group.rows, group.texts)
            ]

    def _note(self, groups: list[Group]) -> dict[str, float]:
        """Let the curricula see the rewards, over all processes; the step's figures."""
        per_level = np.zeros((len(self.curricula), 2))
        for group in groups:
            if group.task is self.curricula[group.curriculum].levels[self.curricula[group.curriculum].level]:
                per_level[group.curriculum] += sum(group.rewards), len(group.rewards)
        rows = [row for group in groups for row in group.rows]
        chosen = sum(sum(row.mask) + (row.end is not None) for row in rows)
        own = [
            sum(sum(g.rewards) for g in groups),
            len(rows),
            sum(len(row.tokens) for row in rows),
            chosen,
            -sum(row.logprob for row in rows),
            sum(row.end is None for row in rows),
            sum(g.silent for g in groups),
            len(groups),
        ]
        summed = self.runtime.all_reduce_sum(
            torch.tensor([*own, *per_level.flatten()]).float().to(self.runtime.device), "summing the rewards"
        ).cpu()
        reward, samples, length, tokens, surprise, cut, silent, count = summed[: len(own)].tolist()
        for curriculum, (total, number) in zip(self.curricula, summed[len(own) :].view(-1, 2).tolist()):
            curriculum.note(total / number if number else None)
        levels = {
            f"level/{c.levels[0].name.partition('/')[0]}": float(c.level + 1)
            for c in self.curricula
            if len(c.levels) > 1
        }
        return {
            "reward": reward / samples,
            "answer_tokens": length / samples,
            "entropy": surprise / max(tokens, 1),
            "cut_off": cut / samples,
            "groups_without_signal": silent / count,
            **levels,
        }

    # -- resuming -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        """What the next batch depends on besides the weights; the same on all processes."""
        return {
            "rl.step": np.array([self.step]),
            "rl.level": np.array([c.level for c in self.curricula]),
            "rl.mean": np.array([c.mean for c in self.curricula]),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if len(state["rl.level"]) != len(self.curricula):
            raise UserError("the checkpoint's tasks are others: give the same --tasks, or start a new run")
        self.step = int(state["rl.step"][0])
        for curriculum, level, mean in zip(self.curricula, state["rl.level"], state["rl.mean"]):
            curriculum.level, curriculum.mean = int(level), float(mean)

    def stats(self) -> dict[str, float]:
        """Figures of the last batch, for the report."""
        return dict(self.figures)


def as_batch(groups: Sequence[Group], origin: str) -> Batch:
    """Inputs and targets (N, T), -1 where nothing is trained, and each row's advantage as the weight of its targets.

    Rows that teach nothing come last, the others by length: the trainer leaves micro-batches without weight out, and
    columns without target.
    """
    sequences = [(row, advantage) for group in groups for row, advantage in zip(group.rows, group.advantages)]
    sequences.sort(key=lambda pair: (pair[1] == 0, len(pair[0].prompt) + len(pair[0].tokens)))
    longest = max((len(row.prompt) + len(row.tokens) + 1 for row, _ in sequences), default=2)
    inputs = torch.zeros(len(sequences), longest - 1, dtype=torch.long)
    targets = torch.full_like(inputs, -1)
    weights = torch.zeros(inputs.shape)
    for number, (row, advantage) in enumerate(sequences):
        end = [] if row.end is None else [row.end]
        ids, trained = [*row.prompt, *row.tokens, *end], [0] * len(row.prompt) + row.mask + [1] * len(end)
        inputs[number, : len(ids) - 1] = torch.tensor(ids[:-1])
        of_ids = torch.tensor(ids[1:])
        targets[number, : len(ids) - 1] = torch.where(torch.tensor(trained[1:]) == 1, of_ids, -1)
        weights[number, : len(ids) - 1] = advantage
    return Batch(inputs, targets, weights, origin)
