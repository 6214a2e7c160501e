"""Reinforcement learning: its flags, and the horizon and training step that follow from them.

What is learnt from is in nanochat/rl.py, the tasks in tasks/rl_tasks.py.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from nanochat.common import UserError
from nanochat.common.ranges import Range
from nanochat.runtime import Runtime
from nanochat.train.build import create_step
from nanochat.train.config import OnResume, TrainConfig
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.starting_model import StartingModel
from nanochat.train.step import TrainStep

GUESSED_STEPS = 100  # of a run that the clock ends, until its pace is known

# Flags of the other training stages that chat_rl refuses, and why.
UNUSED = {
    "total_batch_size": "--examples-per-step times --num-samples is",
    "sample_every": "every evaluation leaves its answers in transcripts/",
    "eval_tokens": "--eval-examples says how many items are evaluated",
    "compile": "the shapes of answers change from step to step, and each would be compiled anew",
}


@dataclass
class RLConfig(TrainConfig):
    """Train a chat model on its own answers, by how good they are. -1 means "derive it" or "off".

    --total-batch-size, --sample-every, --eval-tokens and --compile do not apply here.
    """

    source: Literal["sft", "rl"] = "sft"
    """Which model to start from: sft, or rl to train one further."""
    source_tag: str = ""
    """Tag of its run; empty takes the one of this run's name, else the latest."""
    model_step: Annotated[int, Range(-1)] = -1
    """Its step; -1 takes the last."""
    tasks: str = "WordProblems"
    """Separated by commas: WordProblems, GSM8K, Arithmetic, LetterCounting, Spelling, Identity, Unknown,
    Answerable (the questions of Unknown that can be answered), Format, Code."""
    num_epochs: Annotated[int, Range(1)] = 1
    """As many prompts as the tasks have training items, times this, drawn at random; unless --num-iterations or
    --minutes says otherwise."""
    examples_per_step: Annotated[int, Range(1)] = 16
    """Prompts in each step."""
    num_samples: Annotated[int, Range(2)] = 16
    """Answers to each prompt, which are compared with each other."""
    max_new_tokens: Annotated[int, Range(1)] = 256
    """Longest answer."""
    temperature: Annotated[float, Range(above=0)] = 1.0
    """Sampling temperature of the answers trained on."""
    top_k: Annotated[int, Range(0)] = 50
    """The answers trained on are sampled among the k most likely tokens; 0 is off."""
    init_lr_frac: Annotated[float, Range(above=0)] = 0.05
    """All rates are multiplied by this alone, whatever the batch; they fall linearly to zero over the run."""
    weight_decay: Annotated[float, Range(0)] = 0.0
    """Cautious decay of the matrices."""
    raise_at: Annotated[float, Range(above=0, max=1)] = 0.8
    """Running mean of its rewards at which a level is passed: most prompts then come from the next. From the first step
    on, 30% come from the next level and those passed."""
    eval_every: Annotated[int, Range(-1), OnResume.NEW] = 60
    """Steps between evaluations on held-out items; -1 only at the end. There is one before the first step."""
    eval_examples: Annotated[int, Range(1)] = 200
    """Held-out items of each task and level."""
    eval_samples: Annotated[int, Range(1)] = 4
    """Answers to each of them at temperature 1, for pass@k; accuracy is that of the likeliest answer."""

    def start_from(self, tag: str) -> dict[str, Any]:
        return {"source": "rl", "source_tag": tag, "model_step": -1}

    def __post_init__(self) -> None:
        for name, reason in UNUSED.items():
            if getattr(self, name) != getattr(TrainConfig, name):
                raise UserError(f"--{name.replace('_', '-')} is not for chat_rl: {reason}")


def find_horizon(config: RLConfig, items: int) -> int:
    """Steps: as given, or a first guess for --minutes, or the epochs."""
    if config.num_iterations > 0:
        return config.num_iterations
    return GUESSED_STEPS if config.minutes > 0 else max(1, items * config.num_epochs // config.examples_per_step)


def build_step(config: RLConfig, start: StartingModel, runtime: Runtime, num_steps: int) -> TrainStep:
    """The optimizer step of the starting model."""
    return create_step(
        start.model,
        config,
        start.base["recipe"],
        ScheduleConfig(num_steps, warmdown_ratio=1.0),
        runtime,
        rows=config.examples_per_step * config.num_samples,
        T=min(start.model.config.sequence_len, 2 * config.max_new_tokens),
        lr_scale=config.init_lr_frac,
        weight_decay=config.weight_decay,
        compile="off",
    )
