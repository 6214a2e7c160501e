"""Rollouts for reinforcement learning: all answers of a step in one running batch, against one prompt at a time:
`python -m bench.rollout`.

Both sides give the same answers to the same prompts. The lengths of answers are random, so that batch slots are freed
at different times. One prompt at a time is how the published system samples: a prompt's answers together, then the next
prompt.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from bench import _run
from bench._common import Flags, model_config, time_in_turn
from bench._run import Result
from bench.decode import no_tools
from nanochat.common import UserError
from nanochat.common.ranges import Range
from nanochat.gpt import GPT
from nanochat.inference.decoding import RunningBatch
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.request import GenerationRequest, TokenSequence
from nanochat.inference.sampling import SamplingParams
from nanochat.runtime import Runtime
from scripts import _cli


@dataclass
class RolloutFlags(Flags):
    """Sizes of what is measured, and for how long. --batch is not used."""

    prompts: Annotated[int, Range(1)] = 16
    """Prompts in a step."""
    num_samples: Annotated[int, Range(1)] = 1
    """Answers to each prompt."""
    prompt: Annotated[int, Range(1)] = 40
    """Tokens in each prompt."""
    longest: Annotated[int, Range(1)] = 64
    """Tokens in the longest answer; the shortest has a quarter of that."""
    rows: Annotated[int, Range(1)] = 32
    """Answers decoded together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size <= 20:
            raise UserError(f"--vocab-size must be above 20, got {self.vocab_size}")
        if self.prompt + self.longest > self.seq_len:
            raise UserError(f"--prompt and --longest need --seq-len {self.prompt + self.longest}, got {self.seq_len}")


def groups_of(flags: RolloutFlags) -> list[list[TokenSequence]]:
    """New sequences by prompt, the same on each call."""
    rng, sampling = random.Random(0), SamplingParams(1.0, 50, seed=0)
    groups = []
    for number in range(flags.prompts):
        prompt = [rng.randrange(flags.vocab_size - 20) for _ in range(flags.prompt)]
        lengths = [rng.randint(max(1, flags.longest // 4), flags.longest) for _ in range(flags.num_samples)]
        groups.append(
            [
                TokenSequence(GenerationRequest(prompt, length, sampling), number * flags.num_samples + sample)
                for sample, length in enumerate(lengths)
            ]
        )
    return groups


def sample(flags: RolloutFlags, weights: DecodingWeights, together: bool) -> list[list[int]]:
    """The tokens of every answer, from one running batch or prompt by prompt."""
    groups, tools = groups_of(flags), no_tools()
    for part in [groups] if together else [[group] for group in groups]:
        rows = min(flags.rows, sum(map(len, part)))
        batch = RunningBatch(weights, tools, set(), rows, flags.prompt + flags.longest)
        for group in part:
            batch.submit(group)
        while not batch.idle:
            batch.step()
    return [sequence.tokens for group in groups for sequence in group]


def measure(flags: RolloutFlags, runtime: Runtime) -> Result:
    weights = DecodingWeights(GPT.create(model_config(flags), runtime.device, runtime.dtype))
    answers = sample(flags, weights, True)
    same = sum(a == b for a, b in zip(answers, sample(flags, weights, False)))
    ways: dict[str, Callable[[], Any]] = {
        "together": partial(sample, flags, weights, True),
        "one by one": partial(sample, flags, weights, False),
    }
    seconds = time_in_turn(ways, flags.seconds, runtime)
    tokens = sum(map(len, answers))
    values: dict[str, Any] = {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds["together"],
        "tokens_per_second_one_by_one": tokens / seconds["one by one"],
        "times": seconds["one by one"] / seconds["together"],
        "same_answers": same,
        "answers": len(answers),
    }
    rows = [(name, f"{1e3 * took:.0f}", f"{tokens / took:,.0f}") for name, took in seconds.items()]
    title = f"{len(answers)} answers, {same} of them the same both ways, on {runtime.describe()}"
    return Result(title, ("sampled", "ms", "tokens/s"), rows, values)


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("rollout", RolloutFlags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
