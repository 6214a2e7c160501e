"""The CORE evaluation as scripts run it: which bundle, what is printed, what goes into the report."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write, say, write_json
from nanochat.core_eval import (
    CoreResult,
    GPTScorer,
    Scorer,
    TaskResult,
    bootstrap_error,
    evaluate_core,
    published_gpt2,
)
from nanochat.evals.core_bundle import Bundle, read_bundle
from nanochat.evals.core_download import bundle_folder
from nanochat.fp8 import without_fp8
from nanochat.report import accuracy_values
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from nanochat.trainer import Record, StopObserving, Trainer


def open_bundle(given: str, base_dir: Path, runtime: Runtime, baselines: str = "v1", only: str = "") -> Bundle:
    """The bundle that --eval-bundle means; on all processes, downloaded by one."""
    if runtime.is_main:
        bundle_folder(given, base_dir)
    runtime.barrier("writing the CORE results")
    bundle = read_bundle(bundle_folder(given, base_dir), baselines, only)
    if bundle.missing:
        runtime.warn0(
            f"{len(bundle.missing)} CORE tasks have no data here: {', '.join(bundle.missing)}; the mean is "
            f"of the other {len(bundle.tasks)} and marked partial"
        )
    return bundle


def run_core(
    scorer: Scorer,
    tokenizer: Any,
    bundle: Bundle,
    runtime: Runtime,
    *,
    most: int,
    mode: str = "reference",
    baselines: str = "v1",
    between: Callable[[], None] = lambda: None,
) -> CoreResult:
    """Evaluate, with a line for each task. `between` is called after each, on all processes; it may raise."""

    def progress(result: TaskResult, seconds: float) -> None:
        if runtime.is_main:
            cropped = f", {result.cropped} prompts cropped" if result.cropped else ""
            say(
                f"  {result.label:<34}{result.accuracy:7.4f} ± {bootstrap_error(result.right):.4f}   "
                f"centred {result.centered:7.4f}   ({len(result.right)} items, {seconds:.1f} s{cropped})"
            )
        between()

    result = evaluate_core(
        scorer, tokenizer, bundle, runtime, max_per_task=most, mode=mode, baselines=baselines, progress=progress
    )
    runtime.print0(core_line(result))
    return result


def watch_core(trainer: Trainer, tokenizer: RustBPETokenizer, bundle: Bundle, most: int) -> Record:
    """CORE of a model in training, in the published form; nothing if the run is asked to stop meanwhile."""
    try:
        with without_fp8(trainer.model):
            result = run_core(
                GPTScorer(trainer.model),
                tokenizer,
                bundle,
                trainer.runtime,
                most=most,
                between=trainer.raise_if_stop_requested,
            )
    except StopObserving:
        trainer.runtime.print0("asked to stop: the CORE evaluation is left unfinished")
        return {}
    return {"core": result.core, "core_low": result.low, "core_high": result.high}


def core_seconds(trainer: Trainer, core: Callable[..., Record], bundle: Bundle, most: int) -> float:
    """How long `core` will take with `most` items of each task (-1: all), by asking a few of them."""
    few = 2
    items = sum(min(len(t.items), most if most > 0 else len(t.items)) for t in bundle.tasks)
    trainer.runtime.print0(f"timing CORE on {few} items of each task")
    began = time.perf_counter()
    core(trainer, most=few)
    return (time.perf_counter() - began) * items / (few * len(bundle.tasks))


def core_line(result: CoreResult) -> str:
    """CORE 0.0123 (95% -0.0012 to 0.0261), partial: 18 of 22 tasks"""
    total = len(result.tasks) + len(result.missing)
    partial = f", partial: {len(result.tasks)} of {total} tasks" if result.partial else ""
    return (
        f"CORE {result.core:.4f} (95% {result.low:.4f} to {result.high:.4f}, {result.baselines} baselines, "
        f"{result.mode} prompts{partial}) in {result.seconds:.0f} s"
    )


def report_values(result: CoreResult) -> dict[str, Any]:
    """What the report keeps: each task's accuracy beside chance, and the metric."""
    by_task = {t.label: (sum(t.right), len(t.right)) for t in result.tasks}
    values = accuracy_values(by_task, {t.label: t.baseline for t in result.tasks})
    published = published_gpt2()["accuracy"]
    columns = [
        {
            "task": t.label,
            "accuracy": t.accuracy,
            "standard error": bootstrap_error(t.right),
            "centred": t.centered,
            "items": len(t.right),
            "cropped": t.cropped,
            "GPT-2": published["gpt2"].get(t.label),
            "GPT-2 XL": published["gpt2-xl"].get(t.label),
        }
        for t in result.tasks
    ]
    values["references"] = {"GPT-2": {t.label: published["gpt2"].get(t.label) for t in result.tasks}}
    return values | {
        "core": result.core,
        "core_interval": [result.low, result.high],
        "core_mode": result.mode,
        "core_baselines": result.baselines,
        "core_missing": result.missing,
        "tables": {"CORE": columns},
    }


def write_details(folder: Path, result: CoreResult, model: str) -> Path:
    """core.json with everything, and core.csv in the published table's form; the folder."""
    write_json(
        folder / "core.json",
        {"model": model, **result.to_dict(), "examples": {t.label: t.examples for t in result.tasks}},
    )
    with atomic_write(folder / "core.csv", "w") as file:
        file.write(f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}\n")
        for t in result.tasks:
            file.write(f"{t.label:<35}, {t.accuracy:<10.6f}, {t.centered:<10.6f}\n")
        if not result.partial:
            file.write(f"{'CORE':<35}, {'':<10}, {result.core:<10.6f}\n")
    return folder
