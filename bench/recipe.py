"""What a change to the recipe is worth, at equal time: `python -m bench.recipe --trials default default,smear=False`.

The first trial is the yardstick. Steps of all trials are timed in turn, and each trial gets as many as fit in the
time that the first one needs for its own. All of them train on the starter corpus, from the same seeds, and are
measured on the same held-out rows. A change smaller than the spread between seeds is no change.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, stdev
from typing import Any

from bench import _run
from bench._common import Flags, starter_texts, time_in_turn
from bench._run import Result
from nanochat.common import UserError, say
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import starter_corpus
from nanochat.evals.bits_per_byte import corpus_bpb
from nanochat.gpt import GPT
from nanochat.recipe import resolve_recipe
from nanochat.runtime import Runtime
from nanochat.scaling import align_batch, make_plan
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.build import random_batch
from nanochat.train.pretraining import PretrainConfig, build_step, plan_arguments
from nanochat.train.step import TrainStep
from nanochat.trainer import Trainer
from scripts import _cli


@dataclass
class RecipeFlags(Flags):
    """Which recipes, how long, how often."""

    trials: list[str] = field(default_factory=lambda: ["default", "published"])
    """Recipes and changes to them, such as default,smear=False; the first is the yardstick."""
    steps: int = 300
    """Optimizer steps of the first trial."""
    total_batch: int = 4096
    """Tokens in a step."""
    seeds: int = 2
    """Runs of each trial, from seeds 1, 2, …, for weights and data."""
    equal_steps: bool = False
    """Give all trials the same number of steps, whatever they cost."""
    chars: int = 4_000_000
    """Characters of text to train the vocabulary on."""
    eval_tokens: int = 131_072
    """Held-out tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trials or min(self.steps, self.seeds, self.total_batch, self.eval_tokens) < 1:
            raise UserError("--trials, --steps, --seeds, --total-batch and --eval-tokens must not be empty or zero")


def new_step(flags: RecipeFlags, trial: str, steps: int, seed: int, runtime: Runtime) -> TrainStep:
    """The optimizer step that base_train would make for this recipe."""
    config = PretrainConfig(
        depth=flags.depth,
        head_dim=flags.head_dim,
        max_seq_len=flags.seq_len,
        recipe=trial,
        seed=seed,
        window_pattern=flags.window_pattern,
        num_iterations=steps,
        total_batch_size=flags.total_batch,
    )
    model_config = config.network(flags.vocab_size)(flags.depth)
    trial = resolve_recipe(trial, model_config.n_layer, model_config.n_embd)
    model = GPT.create(model_config, runtime.device, runtime.dtype, seed)
    plan = make_plan(model_config, **plan_arguments(config, trial), num_iterations=steps)
    return build_step(config, trial, plan, model, runtime)


def measure(flags: RecipeFlags, runtime: Runtime) -> Result:
    flags.total_batch = align_batch(flags.total_batch, flags.seq_len)
    seconds = step_seconds(flags, runtime)
    tokenizer = RustBPETokenizer.train_from_iterator(starter_texts("train", flags.chars), flags.vocab_size)
    found: dict[str, dict[str, Any]] = {}
    for trial in flags.trials:
        ratio = seconds[trial] / seconds[flags.trials[0]]
        steps = flags.steps if flags.equal_steps else max(1, round(flags.steps / ratio))
        bpb = [train(flags, trial, steps, seed, tokenizer, runtime) for seed in range(1, flags.seeds + 1)]
        found[trial] = {"steps": steps, "step_seconds_ratio": ratio, "bpb": bpb}
        say(f"{trial}: {steps} steps, bpb {', '.join(f'{b:.4f}' for b in bpb)}")
    yardstick = found[flags.trials[0]]["bpb"]
    rows = []
    for trial, values in found.items():
        effects = [bpb - reference for bpb, reference in zip(values["bpb"], yardstick)]  # seed by seed
        values["effect"], values["spread"] = mean(effects), stdev(effects) if len(effects) > 1 else None
        spread = "" if values["spread"] is None else f" ± {values['spread']:.4f}"
        rows.append(
            (
                trial,
                f"{values['step_seconds_ratio']:.3f}",
                str(values["steps"]),
                f"{mean(values['bpb']):.4f}",
                f"{values['effect']:+.4f}{spread}",
            )
        )
    title = f"recipes, depth {flags.depth}, {flags.seq_len} tokens, {flags.seeds} seeds"
    return Result(title, ("recipe", "time a step", "steps", "val bpb", "effect"), rows, {"trials": found})


def step_seconds(flags: RecipeFlags, runtime: Runtime) -> dict[str, float]:
    """Median seconds of a step of each trial, timed in turn."""
    actions: dict[str, Callable[[], Any]] = {}
    for trial in dict.fromkeys(flags.trials):
        step = new_step(flags, trial, flags.steps, 1, runtime)
        batch = random_batch(flags.total_batch // flags.seq_len, flags.seq_len, flags.vocab_size, runtime)
        actions[trial] = partial(step, batch)
    return time_in_turn(actions, flags.seconds, runtime)


def train(
    flags: RecipeFlags, trial: str, steps: int, seed: int, tokenizer: RustBPETokenizer, runtime: Runtime
) -> float:
    """Validation bits per byte at the end of one run."""
    loader = PretrainLoader(
        starter_corpus(),
        tokenizer,
        sequence_len=flags.seq_len,
        seed=seed,
        rows_per_step=flags.total_batch // flags.seq_len,
    )
    trainer = Trainer(new_step(flags, trial, steps, seed, runtime), loader)
    try:
        trainer.run()
        return corpus_bpb(
            trainer.model,
            starter_corpus(),
            tokenizer,
            runtime,
            split="val",
            tokens=flags.eval_tokens,
            device_batch_size=trainer.step.device_batch_size,
        )
    finally:
        loader.close()
        gc.collect()


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("recipe", RecipeFlags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
