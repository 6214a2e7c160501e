"""What was planned before a run, beside its outcome."""

from typing import Any

from nanochat.common import format_count, format_seconds
from nanochat.planning.law import Law
from nanochat.runtime import process_age
from nanochat.scaling import Plan, scaling_params
from nanochat.train.progress import Progress


def plan_and_outcome(plan: Plan, progress: Progress, minutes: float) -> list[dict[str, Any]]:
    """Rows of the report's table: steps, tokens, the time if `minutes` was given, bits per byte if there is a law."""
    rows: list[dict[str, Any]] = [
        {"": "steps", "planned": f"{plan.num_steps:,}", "outcome": f"{progress.step:,}"},
        {"": "tokens", "planned": format_count(plan.tokens), "outcome": format_count(progress.tokens)},
    ]
    if minutes > 0:
        seconds = max(process_age(), progress.wall_seconds)  # the latter counts earlier sessions too
        rows.append({"": "time", "planned": format_seconds(60 * minutes), "outcome": format_seconds(seconds)})
    law = Law.load()
    if law and progress.val_bpb is not None:
        forecast = law.forecast(scaling_params(plan.params), plan.tokens)
        rows.append({"": "bits per byte", "planned": str(forecast), "outcome": f"{progress.val_bpb:.4f}"})
    return rows
