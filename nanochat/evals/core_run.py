"""Running the CORE evaluation: opening the bundle, printing results, writing them for the report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write, say, write_json
from nanochat.core_eval import (
    CoreResult,
    Scorer,
    TaskResult,
    evaluate_core,
    published_gpt2,
)
from nanochat.evals.core_bundle import Bundle, read_bundle
from nanochat.evals.core_download import bundle_folder
from nanochat.report import accuracy_values
from nanochat.reporting.curves import scoped
from nanochat.runtime import Runtime


def open_bundle(given: str, base_dir: Path, runtime: Runtime, baselines: str = "v1", only: str = "") -> Bundle:
    """The bundle of --eval-bundle, downloaded by the main rank if need be. Collective."""
    folder = runtime.broadcast(lambda: str(bundle_folder(given, base_dir)), "downloading the CORE bundle")
    bundle = read_bundle(Path(folder), baselines, only)
    if bundle.missing:
        runtime.warn0(
            f"{len(bundle.missing)} CORE tasks have no data here: {', '.join(bundle.missing)}; the mean is "
            f"of the other {len(bundle.tasks)}, and is called so"
        )
    return bundle


def run_core(
    scorer: Scorer,
    tokenizer: Any,
    bundle: Bundle,
    runtime: Runtime,
    *,
    max_per_task: int,
    mode: str = "reference",
    baselines: str = "v1",
    after_task: Callable[[], None] = lambda: None,
) -> CoreResult:
    """Evaluate, printing a line for each task. `after_task` is called after each, on all ranks; it may raise."""

    def progress(result: TaskResult, seconds: float) -> None:
        if runtime.is_main:
            cropped = f", {result.cropped} prompts cropped" if result.cropped else ""
            say(
                f"  {result.label:<34}{result.accuracy:7.4f} ± {result.standard_error:.4f}   "
                f"centred {result.centered:7.4f}   ({len(result.right)} items, {seconds:.1f} s{cropped})"
            )
        after_task()

    result = evaluate_core(
        scorer, tokenizer, bundle, runtime, max_per_task=max_per_task, mode=mode, baselines=baselines, progress=progress
    )
    runtime.print0(
        f"{scoped('CORE', result.scope)} {result.core:.4f} (95% {result.low:.4f} to {result.high:.4f}, "
        f"{result.baselines} baselines, {result.mode} prompts) in {result.seconds:.0f} s"
    )
    return result


def report_values(result: CoreResult) -> dict[str, Any]:
    """The report's values: each task's accuracy and its chance level, and the metric."""
    by_task = {t.label: (sum(t.right), len(t.right)) for t in result.tasks}
    values = accuracy_values(by_task, {t.label: t.baseline for t in result.tasks})
    values |= {t.label: t.accuracy for t in result.tasks}  # of a task with categories, the mean over them
    published = published_gpt2()["accuracy"]
    rows = [
        {
            "task": t.label,
            "accuracy": t.accuracy,
            "standard error": t.standard_error,
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
        "core_of": result.scope,
        "core_interval": [result.low, result.high],
        "core_mode": result.mode,
        "core_baselines": result.baselines,
        "core_missing": result.missing,
        "tables": {"CORE": rows},
    }


def write_details(folder: Path, result: CoreResult, model: str) -> Path:
    """Write core.json with everything and core.csv in the published table's format; returns the folder."""
    write_json(
        folder / "core.json",
        {"model": model, **result.to_dict(), "examples": {t.label: t.examples for t in result.tasks}},
    )
    with atomic_write(folder / "core.csv", "w") as file:
        file.write(f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}\n")
        for t in result.tasks:
            file.write(f"{t.label:<35}, {t.accuracy:<10.6f}, {t.centered:<10.6f}\n")
        if not result.scope:
            file.write(f"{'CORE':<35}, {'':<10}, {result.core:<10.6f}\n")
    return folder
