"""What finetuning and RL gained, from accuracies with their intervals, and whether RL had anything to learn from."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from nanochat.reporting.curves import Record, is_number, task_words
from nanochat.reporting.findings import Finding
from nanochat.reporting.view import mixed_stages, of_usual_split, run_of, skills_of, wilson_interval

SAME_SCORES = 0.9  # share of prompts whose answers all scored the same: few steps then teach anything
CUT_OFF = 0.1  # share of answers that reach the limit of tokens and earn nothing for it
CONFIDENCE = 0.95  # of all the intervals of one comparison together


def finetuning(report: Record) -> Iterator[Finding]:
    """Skills of the finetuned model against guessing."""
    values = report.get("chat_eval") or {}
    skills = [s for s in skills_of(values) if s.baseline is not None and s.total and of_usual_split(values, s.name)]
    if not skills:
        return
    z = joint_z(len(skills))
    above = [s for s in skills if wilson_interval(s.passed, s.total, z)[0] > (s.baseline or 0.0)]
    others = [f"{task_words(s.name)} {s.accuracy:.1%} (guessing {s.baseline:.1%})" for s in skills if s not in above]
    if above:
        text = f"Beyond guessing after finetuning: {len(above)} of {len(skills)} skills"
        yield Finding("good", text, ", ".join(f"{task_words(s.name)} {s.accuracy:.1%}" for s in above))
    if others:
        yield Finding("note" if above else "bad", "No sign of more than guessing after finetuning", ", ".join(others))


CHAIN = ("chat_sft", "chat_eval", "chat_rl", "chat_eval_rl")


@dataclass(frozen=True)
class Change:
    """One skill before and after, as accuracies, and the interval of the difference."""

    name: str
    before: float
    after: float
    low: float
    high: float

    def __str__(self) -> str:
        points = f"({100 * self.low:+.0f} to {100 * self.high:+.0f} points)"
        return f"{task_words(self.name)} {self.before:.1%} → {self.after:.1%} {points}"


def reinforcement(report: Record) -> Iterator[Finding]:
    """Skills before and after RL, on the same held-out items."""
    changes = changes_of(report)
    if not changes:
        return
    better, worse = [c for c in changes if c.low > 0], [c for c in changes if c.high < 0]
    if worse:
        text = f"RL made {len(worse)} of {len(changes)} skills worse"
        yield Finding("note" if len(better) >= len(worse) else "bad", text, ", ".join(map(str, worse)))
    if better:
        text = f"RL made {len(better)} of {len(changes)} skills better"
        yield Finding("good", text, ", ".join(map(str, better)))
    else:
        largest = max(changes, key=lambda change: change.after - change.before)
        yield Finding("note", f"No sign that RL made any of {len(changes)} skills better", f"at best {largest}")


def changes_of(report: Record) -> list[Change]:
    """From the chat evaluations before and after RL if they are of the models in question, else from RL's own."""
    before, after, own = (report.get(key) or {} for key in ("chat_eval", "chat_eval_rl", "chat_rl"))
    pairs: dict[str, tuple[float, float, float, float]] = {}
    chain = run_of(before) == own.get("started_from") and run_of(after) == run_of(own)
    chain = chain and "--source=rl" not in own.get("command", "") and not set(mixed_stages(report)) & set(CHAIN)
    splits, splits_after = before.get("splits", {}), after.get("splits", {})
    if chain and before.get("counts") and after.get("counts"):
        for name in before["counts"]:
            same = name in after["counts"] and splits.get(name) == splits_after.get(name)
            if same and of_usual_split(before, name):
                pairs[name] = (*before["counts"][name], *after["counts"][name])
    elif own.get("status") != "running":
        first, last = own.get("before") or {}, own.get("after") or {}
        for name, items in own.get("sizes", {}).items():
            shares = [found.get(f"accuracy/{name}") for found in (first, last)]
            if all(map(is_number, shares)):
                pairs[name] = (shares[0] * items, items, shares[1] * items, items)
    z = joint_z(len(pairs))
    return [
        Change(name, a / m, b / n, *difference_interval(a, m, b, n, z))
        for name, (a, m, b, n) in pairs.items()
        if m and n
    ]


def joint_z(comparisons: int) -> float:
    """Standard deviations of intervals that all hold together with CONFIDENCE (Bonferroni)."""
    return NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2 / max(1, comparisons))


def difference_interval(a: float, m: float, b: float, n: float, z: float) -> tuple[float, float]:
    """The interval of b/n - a/m from both Wilson intervals (Newcombe 1998, method 10)."""
    p, q = a / m, b / n
    (p_low, p_high), (q_low, q_high) = wilson_interval(a, int(m), z), wilson_interval(b, int(n), z)
    return q - p - math.hypot(q - q_low, p_high - p), q - p + math.hypot(q_high - q, p - p_low)


def signal(values: Record, lines: Sequence[Record]) -> Iterator[Finding]:
    """Rewards that teach nothing, and answers cut off, over all steps and in the last part of an RL run."""
    steps = [line for line in lines if is_number(line.get("groups_without_signal")) and is_number(line.get("reward"))]
    if not steps:
        return
    recent = steps[-max(1, len(steps) // 10) :]
    same, reward = (fmean(line[key] for line in recent) for key in ("groups_without_signal", "reward"))
    cut_off = fmean(line.get("cut_off") or 0.0 for line in recent)
    if all(line["groups_without_signal"] == 1 for line in steps):
        nothing = (
            "no answer earned a reward" if all(line["reward"] == 0 for line in steps) else "all answers score alike"
        )
        yield Finding("bad", f"RL learnt nothing: {nothing}", f"{len(steps):,} steps, mean reward {reward:.2f}")
    elif same > SAME_SCORES:
        level = "too easy" if reward > 0.5 else "too hard"
        yield Finding(
            "note",
            f"RL learns little by now: its prompts are {level}",
            f"{same:.0%} of prompts have answers that all score the same, mean reward {reward:.2f}",
        )
    if cut_off > CUT_OFF:
        yield Finding("note", "Many of RL's answers are cut off: raise --max-new-tokens", f"{cut_off:.0%} at the end")
