"""Hooks that evaluate and sample the model during training. All of them measure it without fp8."""

import math
import time
from collections.abc import Callable
from typing import Any

from nanochat.common import say
from nanochat.data.document_order import NoText
from nanochat.distributed.signals import StopRequested, stop_when
from nanochat.evals.core_bundle import Bundle
from nanochat.evals.core_run import run_core
from nanochat.evals.scoring import GPTScorer
from nanochat.fp8 import without_fp8
from nanochat.gpt import GPT
from nanochat.trainer import Hook, Record, Trainer


def validate(trainer: Trainer, measure: Callable[[Trainer], float]) -> Record:
    """Measure validation bits per byte, on all ranks; store it in the run's progress and return it as val_bpb.

    Returns nothing, with a warning, if a stop signal arrived or no data could be read (such as the only, bad, shard).
    """
    now = trainer.progress
    try:
        with without_fp8(trainer.model), stop_when(lambda: trainer.stop_signal is not None):
            now.val_bpb = measure(trainer)
        if not math.isfinite(now.val_bpb):
            raise NoText(f"bits per byte are {now.val_bpb}: no target has a byte, or the model has diverged")
    except (NoText, StopRequested) as error:
        now.val_bpb = None
        trainer.runtime.warn0(f"not evaluated: {error}")
        return {}
    now.best_val_bpb = min(now.val_bpb, now.best_val_bpb or now.val_bpb)
    return {"val_bpb": now.val_bpb}


def sample_hook(complete: Callable[[GPT], list[dict[str, str]]], every: int) -> Hook:
    """Print the completions, {"prompt", "text"} each, on the main rank."""

    def sample(trainer: Trainer) -> None:
        if trainer.runtime.is_main:
            with without_fp8(trainer.model):
                samples = complete(trainer.model)
            say("")
            for item in samples:
                say(f"  {item['prompt']} -> {item['text']!r}")

    return Hook(sample, every)


def evaluate_core(trainer: Trainer, tokenizer: Any, bundle: Bundle, max_per_task: int) -> Record:
    """CORE in its published form. Raises StopRequested if a stop signal arrives meanwhile."""
    with without_fp8(trainer.model):
        result = run_core(
            GPTScorer(trainer.model),
            tokenizer,
            bundle,
            trainer.runtime,
            max_per_task=max_per_task,
            after_task=trainer.raise_if_stop_requested,
        )
    return {"core": result.core, "core_of": result.scope, "core_low": result.low, "core_high": result.high}


def estimate_core_seconds(trainer: Trainer, tokenizer: Any, bundle: Bundle, max_per_task: int) -> float:
    """Expected time of a CORE evaluation with `max_per_task` items (-1: all), from timing a few of each task."""
    FEW = 2
    items = sum(min(len(t.items), max_per_task if max_per_task > 0 else len(t.items)) for t in bundle.tasks)
    trainer.runtime.print0(f"timing CORE on {FEW} items of each task")
    began = time.perf_counter()
    evaluate_core(trainer, tokenizer, bundle, FEW)
    return (time.perf_counter() - began) * items / (FEW * len(bundle.tasks))
