"""The verdict that a report begins with: did the training go well, and what next?"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nanochat.common import format_seconds
from nanochat.reporting.curves import Record, is_number
from nanochat.reporting.findings import (
    PASSES,
    TRAINING,
    Finding,
    Runs,
    contamination,
    course,
    forecast,
    gap,
    length,
    overfitting,
    partial,
    state,
)
from nanochat.reporting.gains import finetuning, reinforcement, signal
from nanochat.reporting.status import Status
from nanochat.reporting.view import STAGES, mixed_stages, run_of


@dataclass(frozen=True)
class Step:
    """What to do next, and the command that does it; without one, nothing is to be typed."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Verdict:
    """`summary` in a line; findings, what is wrong first; next steps, the first one first."""

    summary: str
    findings: list[Finding] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def lines(self) -> list[str]:
        """As plain text, for the terminal."""
        mark = {"bad": "!", "note": "-", "good": "+"}
        found = [f"  {mark[f.kind]} {f.text}{': ' if f.figures else ''}{f.figures}" for f in self.findings]
        steps = [
            line for step in self.steps for line in (f"  {step.text}", *([f"    {step.command}"] * bool(step.command)))
        ]
        return [*([self.summary] * bool(self.summary)), *found, *(["Next:", *steps] if steps else []), ""]


def verdict_of(report: Record, runs: Runs, statuses: Mapping[str, Status]) -> Verdict:
    """The verdict on a report, whose stages under way have `statuses`. Empty without a finding and a next step."""
    found = [*forecast(report), *length(report)]
    for stage in TRAINING:
        values = report.get(stage)
        if values:
            found += state(stage, values, statuses.get(stage))
            found += course(stage, values, runs.get(stage, ()))
            found += overfitting(stage, values, runs.get(stage, ()))
    found += [Finding("bad", "Figures of different models are mixed", note) for note in mixed_stages(report).values()]
    found += gap(report, runs.get("base_train", ()))
    for judge in (partial, contamination, finetuning, reinforcement):
        found += judge(report)
    found += signal(report.get("chat_rl") or {}, runs.get("chat_rl", ()))
    found.sort(key=lambda finding: finding.kind != "bad")
    return Verdict(summary_of(found, statuses), found, list(next_steps(report, found, statuses)))


def summary_of(found: Sequence[Finding], statuses: Mapping[str, Status]) -> str:
    bad, notes = (sum(finding.kind == kind for finding in found) for kind in ("bad", "note"))
    running = any(status.alive for status in statuses.values())
    if bad:
        return "Still training, and something is wrong" if running else "Something is wrong"
    if running:
        return "Still training; nothing wrong was found so far"
    if not found:
        return ""
    return "Nothing wrong was found" + (f"; {notes} thing{'s' * (notes > 1)} to know" if notes else "")


# ---------------------------------------------------------------------------------------------------
# What next

FOLLOWING = (  # (stage, what it does, its command, the stage whose run it takes)
    ("base_train", "Pretrain a base model", "base_train --depth=4", ""),
    ("base_eval", "Measure the base model", "base_eval --model-tag={}", "base_train"),
    ("chat_sft", "Finetune it on conversations", "chat_sft --base-tag={}", "base_train"),
    ("chat_eval", "Measure the chat model's skills", "chat_eval --model-tag={}", "chat_sft"),
    ("chat_rl", "Train it on its own answers", "chat_rl --source-tag={}", "chat_sft"),
    ("chat_eval_rl", "Measure its skills again", "chat_eval --source=rl --model-tag={}", "chat_rl"),
)


def next_steps(report: Record, found: Sequence[Finding], statuses: Mapping[str, Status]) -> Iterator[Step]:
    """What to do next: repair what broke, else the pipeline's next stage; talk to the model; train longer."""
    if any(status.alive for status in statuses.values()):
        yield Step(
            "Wait, or stop it with Ctrl-C: it saves, and can be resumed. If its line above is old, this says whether "
            "it still runs",
            "python -m scripts.report",
        )
        return
    broken = {finding.stage: finding for finding in reversed(found) if finding.remedy}  # the first of each stage
    if broken:
        yield from (
            remedy_of(report[stage], broken[stage], statuses.get(stage)) for stage in TRAINING if stage in broken
        )
        return
    old = mixed_stages(report)
    for stage, text, command, source in FOLLOWING:
        if (stage not in report or stage in old) and (not source or source in report):
            yield Step(text, f"python -m scripts.{command.format(shlex.quote(run_of(report.get(source) or {})))}")
            break
    for stage, source in (("chat_rl", "rl"), ("chat_sft", "sft")):
        if stage in report:
            tag = shlex.quote(run_of(report[stage]))
            yield Step("Talk to it in the browser", f"python -m scripts.chat_web --source={source} --model-tag={tag}")
            break
    yield from train_longer(report.get("base_train") or {})


def remedy_of(values: Record, finding: Finding, status: Status | None) -> Step:
    """The step that removes the cause of a finding; without a command where none is recorded."""
    title, expected = STAGES[finding.stage].lower(), values.get("forecast") or {}
    if finding.remedy == "resume":
        command = values.get("resume_command") or with_flags(values.get("command"), "--resume")
        again = status is not None and status.saved_step is None
        return Step(f"Run {title} again" if again else f"Resume {title} from its last checkpoint", command)
    if finding.remedy == "gentler":
        aim = f" (forecast: {forecast_text(expected)})" if is_number(expected.get("bpb")) else ""
        return Step(f"Run {title} again with lower learning rates{aim}", values.get("gentler_command") or "")
    return Step(
        f"Train on more text, or run {title} again for {finding.steps:,} steps, where validation was lowest",
        with_flags(values.get("command"), f"--num-iterations={finding.steps}"),
    )


def with_flags(command: str | None, flag: str) -> str:
    """The command with this flag, without its other value and those of resuming; "" without a command."""
    others = (flag.partition("=")[0], "--resume", "--resume-from-step")
    words = [w for w in shlex.split(command or "") if w.partition("=")[0] not in others]
    return shlex.join([*words, flag]) if words else ""


def forecast_text(expected: Record) -> str:
    """`1.457 ± 0.013 bits per byte`."""
    return f"{expected['bpb']:.3f} ± {expected['error']:.3f} bits per byte"


def train_longer(values: Record) -> Iterator[Step]:
    """A longer run of the same model, with its forecast, where the law has one and the text is not used up."""
    longer = values.get("longer") or {}
    passes = longer.get("times", 1) * (1 + ((values.get("loader") or {}).get("epoch") or 0))
    if is_number(longer.get("bpb")) and passes <= PASSES:
        time = format_seconds(longer["seconds"])
        yield Step(
            f"Or pretrain {longer['times']} times as long, about {time}: forecast {forecast_text(longer)}",
            longer["command"],
        )
