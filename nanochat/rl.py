"""On-policy policy gradient: the model answers, the task rewards each answer, better ones become more likely.

REINFORCE (Williams, 1992) with the mean reward of a prompt's samples as its baseline, as in GRPO (arXiv 2402.03300)
without ratio, clipping and KL term: each batch is sampled from the current weights and used once, so there is nothing
to correct. The loss of a token is -advantage * log p, divided by the number of trained tokens in the step. Only tokens
that the model chose are trained, its end of turn included; tokens forced by a tool are context.

    Curriculum      tasks of rising difficulty: once the reward of one is high, most prompts come from the next
    RolloutLoader   the trainer's loader: samples each batch when it is asked for

RL is therefore the same training loop with another loader. A step's samples depend on the weights, the seed and the
step alone, whatever the world size.

Shapes: N rows, T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.data.batches import Batch, Loader, saved_numbers, seeded_rng
from nanochat.engine import Engine
from nanochat.inference.request import GenerationRequest, TokenSequence
from nanochat.inference.sampling import SamplingParams
from nanochat.runtime import Runtime

RL_RNG = 7  # purpose of the generator that picks prompts (batches.seeded_rng)
OTHER_LEVELS_SHARE = 0.3  # of prompts from passed levels or the next one, so that they are not unlearnt
SILENT_STEPS = 10  # one after the other draw a warning
REWARD_DECAY = 0.9  # of the running mean of a level's reward, per step


class Rewarded(Protocol):
    """The part of a task that RL needs."""

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
    level: int = 0  # the current one
    mean: float = 0.0  # running mean of its rewards; not corrected for the start at 0

    def draw(self, rng: np.random.Generator) -> tuple[Rewarded, int]:
        """(task, index of an item): mostly of the current level, sometimes of an earlier one or the next."""
        others = [*self.levels[: self.level], *self.levels[self.level + 1 : self.level + 2]]
        other = bool(others) and rng.random() < OTHER_LEVELS_SHARE
        task = others[int(rng.integers(len(others)))] if other else self.levels[self.level]
        return task, int(rng.integers(len(task)))

    def update(self, reward: float | None) -> None:
        """Record a step's mean reward at the current level, None if it had no prompt of it; pass the level if due."""
        if reward is None:
            return
        self.mean = REWARD_DECAY * self.mean + (1 - REWARD_DECAY) * reward
        if self.mean >= self.raise_at and self.level + 1 < len(self.levels):
            self.level, self.mean = self.level + 1, 0.0


@dataclass
class Group:
    """One prompt and all its samples."""

    curriculum: int  # index of its curriculum
    task: Rewarded
    index: int  # of the item
    conversation: Any
    prompt: list[int]
    rows: list[TokenSequence] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    cut: bool = False  # the prompt was longer than the context: only its end is left

    @property
    def advantages(self) -> list[float]:
        """Reward minus the group's mean."""
        mean = sum(self.rewards) / len(self.rewards)
        return [reward - mean for reward in self.rewards]

    @property
    def silent(self) -> bool:
        """All samples got the same reward, so there is no gradient."""
        return max(self.rewards) == min(self.rewards)


@dataclass
class Sampler:
    """How answers are sampled in training."""

    num_samples: int = 16  # at least 2: they are compared with each other
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 50
    batch_size: int = 32  # rows decoded together; does not change the answers


class RolloutLoader(Loader):
    """Samples this rank's share of each global batch from the current model."""

    def __init__(
        self,
        engine: Engine,
        curricula: Sequence[Curriculum],
        sampler: Sampler,
        groups_per_step: int,
        runtime: Runtime,
        seed: int,
        watch: Callable[[int, list[Group]], None] = lambda step, groups: None,
    ) -> None:
        """`watch(step, groups)` is called with this rank's samples of each step."""
        assert groups_per_step > 0
        self.engine, self.curricula, self.sampler = engine, list(curricula), sampler
        self.groups_per_step, self.runtime, self.seed, self.watch = groups_per_step, runtime, seed, watch
        self.step = 0
        self.figures: dict[str, float] = {}  # of the last batch, over all ranks

    @cached_property
    def sequence_len(self) -> int:  # type: ignore[override]
        """Tokens of the longest row: the longest prompt of all tasks and levels, and an answer."""
        render = self.engine.tokenizer.render_for_completion
        tasks = [task for curriculum in self.curricula for task in curriculum.levels]
        longest = max(len(render(task[index])) for task in tasks for index in range(len(task)))
        return min(longest + self.sampler.max_new_tokens, self.engine.max_context)

    def next_batch(self) -> Batch:
        """Draw this step's prompts, sample and reward answers. Collective."""
        numbers = range(self.runtime.rank, self.groups_per_step, self.runtime.world_size)
        groups = [self._draw(number) for number in numbers]
        self._answer(groups, numbers)
        self.figures = self._update_curricula(groups)
        self.watch(self.step, groups)
        self.step += 1
        return as_batch(groups, f"rollouts of step {self.step - 1}")

    def _draw(self, number: int) -> Group:
        """Prompt `number` of the step, a function of the seed, the step, the number and the levels."""
        rng = seeded_rng(RL_RNG, self.seed, self.step, number)
        curriculum = int(rng.integers(len(self.curricula)))
        task, index = self.curricula[curriculum].draw(rng)
        conversation = task[index]
        prompt, room = self.engine.tokenizer.render_for_completion(conversation), self.engine.max_context - 1
        return Group(curriculum, task, index, conversation, prompt[-room:], cut=len(prompt) > room)

    def _answer(self, groups: list[Group], numbers: Sequence[int]) -> None:
        """Fill in every group's samples, all decoded in one running batch, and their rewards."""
        sampler, n = self.sampler, self.sampler.num_samples
        seed = int(seeded_rng(RL_RNG, self.seed, self.step, 2**31).integers(2**62))
        sampling = SamplingParams(sampler.temperature, sampler.top_k, seed=seed)
        requests = [
            GenerationRequest(group.prompt, sampler.max_new_tokens, sampling, n, top_logprobs=0, first_index=number * n)
            for group, number in zip(groups, numbers)
        ]
        rows = self.engine.complete(requests, sampler.batch_size)
        for place, group in enumerate(groups):
            group.rows = rows[place * n : (place + 1) * n]
            group.texts = [self.engine.tokenizer.decode(row.tokens) for row in group.rows]
            # A cut-off answer gets no reward, or nothing would teach the model to stop after the result.
            group.rewards = [
                float(group.task.reward(group.conversation, text)) if row.end is not None else 0.0
                for row, text in zip(group.rows, group.texts)
            ]

    def _update_curricula(self, groups: list[Group]) -> dict[str, float]:
        """Pass the rewards of all ranks to the curricula; returns the step's figures. Collective."""
        per_level = np.zeros((len(self.curricula), 2))  # (sum of rewards, samples) at the current level
        for group in groups:
            curriculum = self.curricula[group.curriculum]
            if group.task is curriculum.levels[curriculum.level]:
                per_level[group.curriculum] += sum(group.rewards), len(group.rewards)
        rows = [row for group in groups for row in group.rows]
        counts = [
            sum(sum(group.rewards) for group in groups),
            len(rows),
            sum(len(row.tokens) for row in rows),
            sum(sum(row.mask) + (row.end is not None) for row in rows),
            -sum(row.logprob for row in rows),
            sum(row.end is None for row in rows),
            sum(group.silent for group in groups),
            sum(group.cut for group in groups),
            len(groups),
        ]
        values = torch.tensor([*counts, *per_level.flatten()]).float().to(self.runtime.device)
        values = self.runtime.all_reduce_sum(values, "summing the rewards").cpu()
        reward, samples, tokens, chosen, surprisal, cut_off, silent, cut, num_groups = values[: len(counts)].tolist()
        for curriculum, (total, number) in zip(self.curricula, values[len(counts) :].view(-1, 2).tolist()):
            curriculum.update(total / number if number else None)
        levels = [c for c in self.curricula if len(c.levels) > 1]
        return {
            "reward": reward / samples,
            "answer_tokens": tokens / samples,
            "entropy": surprisal / max(chosen, 1),
            "cut_off": cut_off / samples,
            "groups_without_signal": silent / num_groups,
            "prompts_cut": cut / num_groups,
            **{f"level/{c.levels[0].name.partition('/')[0]}": float(c.level + 1) for c in levels},
        }

    def state_dict(self) -> dict[str, np.ndarray]:
        """What the next batch depends on besides the weights; the same on all ranks."""
        return {
            "rl.step": np.array([self.step]),
            "rl.level": np.array([c.level for c in self.curricula]),
            "rl.mean": np.array([c.mean for c in self.curricula]),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if len(state["rl.level"]) != len(self.curricula):
            raise UserError("the checkpoint was trained on other tasks: give the same --tasks, or start a new run")
        self.step = int(saved_numbers(state, "rl.step", (1,))[0])
        levels = saved_numbers(state, "rl.level", (-1,))
        for curriculum, level, mean in zip(self.curricula, levels, state["rl.mean"], strict=True):
            curriculum.level, curriculum.mean = min(int(level), len(curriculum.levels) - 1), float(mean)

    def stats(self) -> dict[str, float]:
        """Figures of the last batch, over all ranks."""
        return dict(self.figures)


class SignalWatch:
    """A hook: the figures of each step's samples, and a warning while steps have nothing to learn from."""

    def __init__(self, loader: RolloutLoader, runtime: Runtime) -> None:
        self.loader, self.runtime = loader, runtime
        self.recent: list[dict[str, float]] = []  # the latest steps, as long as none has a signal

    def __call__(self, trainer: Any) -> dict[str, float]:
        figures = self.loader.stats()
        self.recent = [*self.recent, figures] if figures["groups_without_signal"] == 1 else []
        if len(self.recent) == SILENT_STEPS:
            self.runtime.warn0(what_was_learnt(self.recent))
            self.recent = []
        return figures


def what_was_learnt(records: Sequence[dict[str, Any]]) -> str:
    """Why nothing was learnt in the steps of these records; "" if some answers to a prompt were better than others."""
    steps = [record for record in records if "groups_without_signal" in record]
    if not steps or any(record["groups_without_signal"] < 1 for record in steps):
        return ""
    rewards, cut_off = [record["reward"] for record in steps], sum(record["cut_off"] for record in steps) / len(steps)
    text = f"nothing was learnt in {len(steps)} step{'' if len(steps) == 1 else 's'}: "
    if max(rewards) > 0:
        return f"{text}the answers to each prompt all scored the same ({sum(rewards) / len(steps):.2g} on average)"
    if cut_off > 0.5:
        return f"{text}no answer earned a reward; {cut_off:.0%} were cut off, by --max-new-tokens or the context"
    return f"{text}no answer earned a reward: finetune on the task first (chat_sft), or choose an easier one"


def as_batch(groups: Sequence[Group], origin: str) -> Batch:
    """Inputs and targets (N, T), -1 where nothing is trained; weights (N, T), each row's advantage.

    Rows without advantage come last, the others are sorted by length: the training step leaves out micro-batches
    without weights and columns without targets.
    """
    sequences = [(row, advantage) for group in groups for row, advantage in zip(group.rows, group.advantages)]
    sequences.sort(key=lambda pair: (pair[1] == 0, len(pair[0].prompt) + len(pair[0].tokens)))
    max_length = max((len(row.prompt) + len(row.tokens) + 1 for row, _ in sequences), default=2)
    inputs = torch.zeros(len(sequences), max_length - 1, dtype=torch.long)
    targets = torch.full_like(inputs, -1)
    weights = torch.zeros(inputs.shape)
    for number, (row, advantage) in enumerate(sequences):
        end = [] if row.end is None else [row.end]
        ids = torch.tensor([*row.prompt, *row.tokens, *end])
        trained = torch.tensor([0] * len(row.prompt) + row.mask + [1] * len(end))
        length = len(ids) - 1
        inputs[number, :length] = ids[:-1]
        targets[number, :length] = torch.where(trained[1:] == 1, ids[1:], -1)
        weights[number, :length] = advantage
    return Batch(inputs, targets, weights, origin)
