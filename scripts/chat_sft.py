"""Finetune a base model on conversations: `python -m scripts.chat_sft`.

The flags, and how sizes, horizon and training step follow from them, are in nanochat/train/finetuning.py; the
conversations in tasks/mixtures.py and tasks/sft_data.py.
"""

from collections.abc import Sequence
from functools import partial

from nanochat.common import UserError, say
from nanochat.data.conversation_loader import EXACT_CONVERSATIONS
from nanochat.reporting.console import print_conversation
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.finetuning import (
    FinetuneConfig as Config,
    RowSizes,
    answers,
    build_step,
    count_conversations,
    find_horizon,
    make_hooks,
    row_sizes,
)
from nanochat.train.run import Run, open_run
from nanochat.train.starting_model import finetuning_dir, open_starting_model
from nanochat.trainer import Trainer
from scripts import _cli
from tasks.mixtures import open_sources
from tasks.sft_data import SFTData, check_sources, open_sft_data

SPLIT_BY_CONTENT = "by content"  # how conversations of one's own are held out; older runs held out the last of a file


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    with Runtime.create(
        config.device_type, seed=config.seed, timeout_seconds=config.timeout, deterministic=config.deterministic
    ) as runtime:
        return train(config, runtime)


def train(config: Config, runtime: Runtime) -> int:
    """One finetuning run, fresh or resumed, to its end. Returns the exit code."""
    folder = finetuning_dir("sft", config.source, config, config.base_tag, runtime)
    with open_run("chat_sft", folder, config, runtime) as run:
        config = run.config
        listing = folder.with_name(f"{folder.name}.left_out.txt")  # beside the folder, which may be moved
        sources = open_sources(config.data, config.seed)
        check_sources(sources, listing, config.strict, runtime)
        start = open_starting_model(run.checkpoint, config.source, folder, config.base_tag, config.model_step, runtime)
        model, tokenizer = start.model, start.tokenizer

        sizes = row_sizes(config, start)
        old = run.checkpoint is not None and run.checkpoint.meta.get("held_out") != SPLIT_BY_CONTENT
        data = open_sft_data(sources, tokenizer, runtime, *sizes, config.seed, config.epochs, by_tail=old)
        known = run.checkpoint.meta if run.checkpoint else {}
        fingerprints = (data.fingerprint, data.own_fingerprint)
        if known and (known["data"], known.get("own_data", data.own_fingerprint)) != fingerprints:
            raise UserError(
                f"the conversations have changed since step {known['step']} was saved: cannot resume "
                "exactly; give the same --data, or start a new run"
            )
        data.name_left_out(listing, config.strict, runtime)
        make_step = partial(build_step, config, start.base["recipe"], sizes, runtime=runtime)
        num_steps = run.planned_steps or find_horizon(config, make_step, model, data.loader, sizes, runtime)
        trainer = Trainer(make_step(model, num_steps), data.loader)
        trainer.hooks = make_hooks(config, data.make_validation, data.held_out_tokens, tokenizer, runtime)
        plan = describe(data, sizes, num_steps, config.epochs)
        run.begin(num_steps, plan)
        run.shown = {
            "started_from": start.base["tag"],
            "started_from_stage": start.base["source"],
            "tables": {"Conversations": data.table()},
        }
        if runtime.is_main and not run.checkpoint:
            print_conversation(tokenizer, data.preview)
        return run.train(
            trainer,
            tokenizer,
            total_batch_tokens=sizes.rows * sizes.T,
            meta={
                "stage": "sft",
                "base": start.base,
                "data": data.fingerprint,
                "own_data": data.own_fingerprint,
                "held_out": "the last" if old else SPLIT_BY_CONTENT,
                "conversations": data.table(),
            },
            report=partial(report, run, trainer, plan, tokenizer),
        )


def describe(data: SFTData, sizes: RowSizes, num_steps: int, epochs: int | None) -> list[tuple[str, str]]:
    """The plan, as (name, value) rows to print."""
    tokens_per_step = sizes.rows * sizes.T
    exact = epochs if data.loader.size <= EXACT_CONVERSATIONS else None
    passes = f"{exact or f'at most about {num_steps * tokens_per_step / data.tokens:.2g}'}"
    return [
        *data.plan_rows(),
        ("row length", f"{sizes.T}"),
        ("tokens per step", f"{tokens_per_step:,}"),
        ("steps", f"{num_steps:,}"),
        ("passes over the data", passes),
    ]


def report(run: Run[Config], trainer: Trainer, plan: list[tuple[str, str]], tokenizer: RustBPETokenizer) -> None:
    """Put the run's figures and sample answers into the report, and say how many conversations were read."""
    samples = answers(trainer.model, tokenizer)
    run.report(trainer, {"mixture": plan, "samples": samples})
    counts = count_conversations(trainer)
    text = "{conversations:,} used, {truncated:,} of them truncated to whole turns; {left_out:,} left out"
    say("conversations, each as often as it came up: " + text.format(**counts))


if __name__ == "__main__":
    _cli.run(main, memory_flags="--device-batch-size or --max-seq-len")
