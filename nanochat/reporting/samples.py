"""Samples for the report: answers in parts, tool calls told apart from text, and held-out questions side by side."""

import re
from dataclasses import dataclass
from typing import Any

from nanochat.common import visible
from nanochat.reporting.curves import Record, task_words
from nanochat.reporting.view import stages_of

HEADINGS = {
    "base_train": "While pretraining",
    "base_eval": "The base model continues a text",
    "chat_sft": "After finetuning",
    "chat_rl": "After reinforcement learning",
}
HELD_OUT = {"chat_eval": "after finetuning", "chat_eval_rl": "after RL"}
SHOWN, LONG = 6, 360  # samples of a group before the rest is folded, characters of an answer before it is
TOOL_CALL = re.compile(
    r"<\|python_start\|>(?P<call>.*?)(?:<\|python_end\|>|\Z)"
    r"(?:<\|output_start\|>(?P<result>.*?)(?:<\|output_end\|>|\Z))?",
    re.DOTALL,
)


@dataclass
class Part:
    """A piece of an answer: text, or a tool call with its result (None if it was cut off)."""

    text: str
    is_call: bool = False
    result: str | None = None


@dataclass
class Answer:
    """What a model said, and whether it was right, if that is known."""

    text: str
    right: bool | None = None

    @property
    def parts(self) -> list[Part]:
        return answer_parts(self.text)

    @property
    def plain(self) -> str:
        """As one text, tool calls as `[17+25 → 42]`."""
        return "".join(f"[{p.text} → {p.result or ''}]" if p.is_call else p.text for p in self.parts)

    @property
    def is_long(self) -> bool:
        return len(self.text) > LONG


@dataclass
class Question:
    """A prompt and the answer of each model that was asked, None where one was not."""

    prompt: str
    task: str
    answers: list[Answer | None]


@dataclass
class SampleGroup:
    """Questions under a heading; `models` names the columns of answers where there are several."""

    heading: str
    models: list[str]
    questions: list[Question]

    @property
    def shown(self) -> list[Question]:
        """One of each task first, or the first few."""
        tasks = list(dict.fromkeys(question.task for question in self.questions))
        firsts = [next(q for q in self.questions if q.task == task) for task in tasks]
        return firsts if len(tasks) > 1 else self.questions[:SHOWN]

    @property
    def folded(self) -> list[Question]:
        shown = [id(question) for question in self.shown]
        return [question for question in self.questions if id(question) not in shown]


def answer_parts(text: str) -> list[Part]:
    """The answer's text and tool calls in their order."""
    parts, at = [], 0
    for call in TOOL_CALL.finditer(text):
        parts += [Part(text[at : call.start()]), Part(call["call"], True, call["result"])]
        at = call.end()
    return [part for part in [*parts, Part(text[at:])] if part.text or part.is_call]


def sample_groups(report: Record) -> list[SampleGroup]:
    """The samples of all stages: held-out questions with the answers before and after, then those of each stage."""
    by_stage = {key: read_samples(values.get("samples")) for key, _, values in stages_of(report)}
    groups = [
        SampleGroup(HEADINGS.get(key, title), [], [Question(*where, [answer]) for where, answer in by_stage[key]])
        for key, title, _ in stages_of(report)
        if by_stage[key] and key not in HELD_OUT
    ]
    asked = {key: dict(by_stage[key]) for key in HELD_OUT if by_stage.get(key)}
    if asked:
        prompts = dict.fromkeys(where for answers in asked.values() for where in answers)
        questions = [Question(*where, [answers.get(where) for answers in asked.values()]) for where in prompts]
        groups.insert(0, SampleGroup("Held-out questions", [HELD_OUT[key] for key in asked], questions))
    return groups


def read_samples(samples: Any) -> list[tuple[tuple[str, str], Answer]]:
    """((prompt, task in words), answer) of a stage's recorded samples; control characters made visible."""
    return [
        (
            (visible(str(sample.get("prompt") or "")), task_words(visible(str(sample.get("task") or "")))),
            Answer(visible(str(sample.get("text") or "")), sample.get("right")),
        )
        for sample in samples or []
    ]
