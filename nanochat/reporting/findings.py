"""What the recorded figures say about a training: pure functions from a report to findings.

Where a figure is missing there is no finding. The thresholds are at the top, each with its reason; what stays below one
is called "no sign of", not "none".
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Literal

from nanochat.common import format_count, format_seconds
from nanochat.reporting.curves import Record, is_number
from nanochat.reporting.status import Status
from nanochat.reporting.view import STAGES

FORECAST_ERRORS = 2.0  # standard errors of the forecast: beyond is 1 run in 20 by chance
SHORT_SHARE = 0.9  # of the planned steps; with less, the machine was slower than when it was measured
GAP = 0.05  # of validation over training bits per byte: texts differ by 1 to 2% from each other, memorising by more
# Validation over its best: at least this share, and this many standard deviations of what single evaluations vary by
# (1% in finetuning, with its high rates). With few evaluations that is not known, and a larger share has to do.
RISE, RISE_DEVIATIONS, RISE_OF_FEW, FEW = 0.01, 3.0, 0.05, 5
PASSES = 4  # over the text: further ones teach ever less (arXiv 2305.16264)
WINDOW = 20  # a loss is averaged over a twentieth of the run
ENOUGH_STEPS = 100  # fewer losses show no trend
# The last average over the lowest: relatively, and in standard errors, as the lowest of 20 is low by chance too.
WORSE_LOSS, WORSE_DEVIATIONS = 1.1, 4.0
SPIKE, SPIKE_DEVIATIONS = 1.3, 10.0  # a step's loss against the 50 before: relative to their median, and to its spread

Kind = Literal["bad", "note", "good"]
Remedy = Literal["", "resume", "gentler", "shorter"]  # of a stage: go on, or again with lower rates or fewer steps
Runs = Mapping[str, Sequence[Record]]  # the lines of each stage's metrics.jsonl
TRAINING = ("base_train", "chat_sft", "chat_rl")


@dataclass(frozen=True)
class Finding:
    """One sentence, and the figures behind it."""

    kind: Kind
    text: str
    figures: str = ""
    stage: str = ""  # that it is about
    remedy: Remedy = ""
    steps: int = 0  # of "shorter"


# ---------------------------------------------------------------------------------------------------
# One stage of training


def state(stage: str, values: Record, status: Status | None) -> Iterator[Finding]:
    """A stage that was killed, hangs, or stopped before its last step."""
    steps = f"step {values.get('steps') or 0:,}"
    if status:
        steps = f"step {status.step:,}" if status.step is not None else steps
    if planned := values.get("num_steps"):
        steps += f" of {planned:,}"
    if status and not status.alive:
        saved = (
            "nothing was saved"
            if status.saved_step is None
            else f"its last checkpoint is of step {status.saved_step:,}"
        )
        silence = format_seconds(status.silent_seconds)
        figures = f"{steps}, not heard of for {silence}; {saved}"
        yield Finding("bad", f"{STAGES[stage]} is dead: it was killed, or crashed", figures, stage, "resume")
    elif status and status.hangs:
        silence = format_seconds(status.silent_seconds)
        yield Finding("note", f"{STAGES[stage]} wrote nothing for {silence}: a long evaluation, or it hangs", steps)
    elif values.get("not_finite"):
        yield Finding("bad", f"{STAGES[stage]} diverged", f"{steps}: {values['stopped_by']}", stage, "gentler")
    elif values.get("stopped_early"):
        reason = f": {values['stopped_by']}" if values.get("stopped_by") else ""
        yield Finding("bad", f"{STAGES[stage]} stopped before its end", f"{steps}{reason}", stage, "resume")


def losses_of(lines: Sequence[Record]) -> list[tuple[int, float]]:
    """(step, loss) of each line with a finite loss."""
    return [(line["step"], line["loss"]) for line in lines if is_number(line.get("loss"))]


def course(stage: str, values: Record, lines: Sequence[Record]) -> Iterator[Finding]:
    """A training loss that is not finite, ends above where it was, or has spikes. RL's loss is none to look at."""
    broken = next((line["step"] for line in lines if "loss" in line and not is_number(line["loss"])), None)
    if broken is not None:
        text = f"The loss of {STAGES[stage].lower()} is not finite"
        yield Finding("bad", text, f"step {broken:,}", stage, "gentler")
    losses = losses_of(lines)
    if stage == "chat_rl" or len(losses) < ENOUGH_STEPS:
        return
    size = len(losses) // WINDOW
    windows = [losses[end - size : end] for end in range(len(losses), size - 1, -size)]  # the last one first
    means = [fmean(loss for _, loss in window) for window in windows]
    lowest = min(range(len(means)), key=means.__getitem__)
    noise = math.hypot(*(stdev([loss for _, loss in windows[i]]) / size**0.5 for i in (0, lowest)))
    if means[0] > max(WORSE_LOSS * means[lowest], means[lowest] + WORSE_DEVIATIONS * noise):
        yield Finding(
            "bad",
            f"The training loss of {STAGES[stage].lower()} rose: it diverged, most likely the rates are too high",
            f"{means[0]:.3g} at the end against {means[lowest]:.3g} at step {windows[lowest][-1][0]:,}",
            stage,
            "gentler",
        )
    elif found := spikes(losses):
        step, loss, usual = max(found, key=lambda spike: spike[1] / spike[2])
        count = f"{len(found)} spikes" if len(found) > 1 else "a spike"
        yield Finding(
            "note",
            f"The training loss of {STAGES[stage].lower()} had {count}, and came down again",
            f"{loss:.3g} at step {step:,}, where {usual:.3g} was usual",
        )


def spikes(losses: Sequence[tuple[int, float]], before: int = 50) -> list[tuple[int, float, float]]:
    """(step, loss, median of the `before` losses before) of each spike; neighbours count as one, the highest."""
    found: list[tuple[int, float, float]] = []
    for i in range(before, len(losses)):
        step, loss = losses[i]
        recent = [value for _, value in losses[i - before : i]]
        usual = median(recent)
        if loss < SPIKE * usual:
            continue
        deviation = 1.4826 * median(abs(value - usual) for value in recent)  # a robust standard deviation
        if loss > usual + SPIKE_DEVIATIONS * deviation:
            if found and step - found[-1][0] < before:
                found[-1] = max(found[-1], (step, loss, usual), key=lambda spike: spike[1])
            else:
                found.append((step, loss, usual))
    return found


def rise_beyond_chance(values: Sequence[float]) -> float:
    """How far the last of some evaluations must lie above the lowest to count as a rise.

    Their variation around a smooth curve is estimated from second differences: these vary by √6 times as much."""
    if len(values) < FEW:
        return RISE_OF_FEW * min(values)
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:])]
    deviation = 1.4826 * median(bends) / 6**0.5
    return max(RISE * min(values), RISE_DEVIATIONS * deviation)


def validations(lines: Sequence[Record]) -> list[tuple[int, float]]:
    """(index, bits per byte on validation text) of the lines that have it."""
    return [(i, line["val_bpb"]) for i, line in enumerate(lines) if is_number(line.get("val_bpb"))]


def validation_rose(lines: Sequence[Record]) -> bool | None:
    """Whether the last evaluation is above the lowest by more than chance; None with fewer than two."""
    values = [value for _, value in validations(lines)]
    return values[-1] - min(values) > rise_beyond_chance(values) if len(values) >= 2 else None


def overfitting(stage: str, values: Record, lines: Sequence[Record]) -> Iterator[Finding]:
    """Validation rising, and whether training fell meanwhile; more passes over the text than teach something."""
    points = validations(lines)
    if len(points) >= 2:
        (best_at, best), (_, last) = min(points, key=lambda point: point[1]), points[-1]
        size = max(1, len(lines) // WINDOW)
        training = [
            fmean(loss for _, loss in found)
            for found in (losses_of(lines[max(0, best_at - size + 1) : best_at + 1]), losses_of(lines[-size:]))
            if found
        ]
        if validation_rose(lines):
            memorises = len(training) == 2 and training[1] < training[0]
            more = f"; training loss {training[0]:.3g} → {training[1]:.3g}" if len(training) == 2 else ""
            yield Finding(
                "bad",
                f"Validation rose during {STAGES[stage].lower()}"
                + (" while training fell: it learns its text by heart" if memorises else ""),
                f"{last:.3f} bits per byte against {best:.3f} at step {lines[best_at]['step']:,}{more}",
                stage,
                "shorter" if memorises else "gentler",
                lines[best_at]["step"],
            )
        else:
            yield Finding(
                "good",
                f"No sign of overfitting during {STAGES[stage].lower()}",
                f"validation {points[0][1]:.3f} → {last:.3f} bits per byte, lowest {best:.3f}",
            )
    passes = (values.get("loader") or {}).get("epoch")
    if stage == "base_train" and is_number(passes) and passes >= PASSES:
        yield Finding("note", f"It read its text {passes:.0f} times: from about {PASSES} on, repeats teach little")


# ---------------------------------------------------------------------------------------------------
# Outcomes


def forecast(report: Record) -> Iterator[Finding]:
    """The finished pretraining run against the scaling law's forecast for the tokens it saw."""
    values = report.get("base_train") or {}
    expected, bpb = values.get("forecast") or {}, values.get("val_bpb")
    if values.get("stopped_early") or not is_number(bpb):
        return
    if values.get("status") == "running":
        if is_number(expected.get("bpb")):
            figures = f"{expected['bpb']:.3f} ± {expected['error']:.3f} bits per byte; {bpb:.3f} so far"
            yield Finding("note", "The forecast for the end of pretraining", figures)
        return
    if not is_number(expected.get("bpb")):
        if text := expected.get("text"):
            yield Finding("note", f"No forecast to compare with: the scaling law is of other text ({text})")
        return
    error = expected["error"]
    distance = (bpb - expected["bpb"]) / error
    figures = (
        f"{bpb:.3f} bits per byte against {expected['bpb']:.3f} ± {error:.3f} forecast for "
        f"{format_count(expected['tokens'])} tokens"
    )
    if distance > FORECAST_ERRORS:
        yield Finding("bad", "Pretraining is worse than forecast", figures)
    elif distance < -FORECAST_ERRORS:
        yield Finding("good", "Pretraining is better than forecast", figures)
    else:
        yield Finding("good", "Pretraining is as good as forecast", figures)


def length(report: Record) -> Iterator[Finding]:
    """A finished pretraining run of fewer steps than were planned for its time."""
    values = report.get("base_train") or {}
    planned, steps = values.get("planned_steps"), values.get("steps")
    finished = values.get("status") != "running" and not values.get("stopped_early")
    if finished and is_number(planned) and is_number(steps) and steps < SHORT_SHARE * planned:
        text = "Pretraining was shorter than planned: the machine was slower than when it was measured"
        yield Finding("note", text, f"{steps:,} steps of {planned:,}")


def gap(report: Record, lines: Sequence[Record] = ()) -> Iterator[Finding]:
    """Training and validation text after pretraining; `lines` are its metrics."""
    values = report.get("base_eval") or {}
    train, val = values.get("train_bpb"), values.get("val_bpb")
    if not (is_number(train) and is_number(val)) or train <= 0:
        return
    figures = f"{val:.3f} bits per byte on validation text, {train:.3f} on training text ({val - train:+.3f})"
    passes = ((report.get("base_train") or {}).get("loader") or {}).get("epoch")
    if val <= (1 + GAP) * train:
        yield Finding("good", "Training and validation are not apart: no sign of text learnt by heart", figures)
    elif passes == 0:
        text = "Training and validation are apart, though it read its text once: the two differ in kind"
        yield Finding("note", text, figures)
    elif validation_rose(lines) is False:
        text = (
            "Training and validation are apart, though validation did not rise: the two differ in kind, or it begins "
            "to know its text by heart"
        )
        yield Finding("note", text, figures)
    else:
        yield Finding("bad", "The base model knows its training text better than other text", figures)


def partial(report: Record) -> Iterator[Finding]:
    """CORE and ChatCORE that are means over some of their tasks or items; CORE that guessing could reach."""
    for stage, key, name in (
        ("base_eval", "core", "CORE"),
        ("chat_eval", "chatcore", "ChatCORE"),
        ("chat_eval_rl", "chatcore", "ChatCORE after RL"),
    ):
        values = report.get(stage) or {}
        missing, scope = values.get(f"{key}_missing"), values.get(f"{key}_of")
        if not is_number(values.get(key)):
            continue
        if scope or missing:
            parts = [f"is over {scope}" if scope else "", f"without {', '.join(missing)}" if missing else ""]
            yield Finding(
                "note", f"{name} is partial", f"{values[key]:.4f} " + "; ".join(part for part in parts if part)
            )
        interval = values.get(f"{key}_interval")
        if key == "core" and interval and interval[0] <= 0:
            yield Finding(
                "note", "CORE: no sign of more than guessing", f"{values[key]:.4f}, 95% from {interval[0]:.4f}"
            )


def contamination(report: Record) -> Iterator[Finding]:
    """Benchmark items that the training text contains."""
    for rows in ((report.get("contamination") or {}).get("tables") or {}).values():
        found = [row for row in rows if is_number(row.get("share")) and row["share"] > 0]
        if found:
            figures = ", ".join(f"{row.get('benchmark')} {row['share']:.2%}" for row in found)
            yield Finding("note", "Benchmark items are in the training text: their scores may be too high", figures)
