"""From a CORE item to token sequences and the spans of them that are scored.

Two ways to write a prompt:

reference  as the published figures of this system: few-shot examples drawn anew for each item and separated by a
           blank line, the whole prompt tokenised at once, the span found by what the options have in common
dclm       as DCLM's evaluation harness (llm-foundry): examples drawn from one stream over all items and separated
           by a line break, texts stripped, context and continuation tokenised apart, the span the continuation

Scores of the two differ by a point or so on small models; compare only within one.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from nanochat.evals.core_bundle import CoreTask

MODES = ("reference", "dclm")
FEWSHOT_SEED = 1234
SHUFFLE_SEED = 1337


class TextEncoder(Protocol):
    """The part of a tokenizer that prompts need."""

    def encode(self, text: str) -> list[int]: ...
    def get_bos_token_id(self) -> int: ...


class Scored(NamedTuple):
    """A sequence whose tokens start .. end-1 are scored, each given all before it. 1 <= start < end."""

    ids: list[int]
    start: int
    end: int


@dataclass
class Example:
    """An item ready to be scored: a sequence for each option, one alone for language modeling."""

    kind: str
    sequences: list[Scored]
    gold: int = 0
    texts: list[str] = field(default_factory=list)  # the prompts, to be read by people
    cropped: bool = False  # the context was too short for it


def chosen_items(task: CoreTask, most: int = -1) -> list[int]:
    """Which items are asked, as numbers into task.items shuffled; -1 takes all. Examples come from all of them."""
    return list(range(len(task.items) if most < 0 else min(most, len(task.items))))


def shuffled(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items in the published order, of which a shortened evaluation asks the first."""
    mixed = list(items)
    random.Random(SHUFFLE_SEED).shuffle(mixed)
    return mixed


def make_examples(
    task: CoreTask, tokenizer: TextEncoder, max_tokens: int, *, most: int = -1, mode: str = "reference"
) -> Iterator[Example]:
    """The task's items, ready to be scored; sequences longer than `max_tokens` lose their beginning."""
    assert mode in MODES, f"unknown mode {mode!r}"
    render = {"reference": reference_example, "dclm": dclm_example}[mode]
    for item, shots in (reference_shots if mode == "reference" else dclm_shots)(task, most):
        yield crop(render(task, item, shots, tokenizer), max_tokens)


def crop(example: Example, max_tokens: int) -> Example:
    """The same with its sequences cut from the left to at most `max_tokens`; scored tokens without one before them
    are lost."""
    cut = []
    for ids, start, end in example.sequences:
        lost = max(0, len(ids) - max_tokens)
        cut.append(Scored(ids[lost:], max(1, start - lost), end - lost))
        example.cropped |= lost > 0
    example.sequences = cut
    return example


# ---------------------------------------------------------------------------------------------------
# Reference


def reference_shots(task: CoreTask, most: int) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(item, its few-shot examples): drawn from all other items, by the item's place in the shuffled order."""
    items = shuffled(task.items)
    for index in chosen_items(task, most):
        others = [i for i in range(len(items)) if i != index]
        drawn = random.Random(FEWSHOT_SEED + index).sample(others, min(task.num_fewshot, len(others)))
        yield items[index], [items[i] for i in drawn]


def reference_example(
    task: CoreTask, item: dict[str, Any], shots: list[dict[str, Any]], tokenizer: TextEncoder
) -> Example:
    """Prompts tokenised whole. Options differ after (multiple choice) or before (schema) what they share."""
    solved = {
        "multiple_choice": lambda x: x["query"] + task.delimiter + x["choices"][x["gold"]],
        "schema": lambda x: x["context_options"][x["gold"]] + task.delimiter + x["continuation"],
        "language_modeling": lambda x: x["context"].strip() + task.delimiter + x["continuation"],
    }[task.kind]
    before = "".join(solved(shot) + "\n\n" for shot in shots)
    if task.kind == "language_modeling":
        # Without the space that may end it: together with the first letters of the answer it is one token.
        without = (before + item["context"].strip() + task.delimiter).strip()
        texts = [without, before + solved(item)]
        context, whole = encode(tokenizer, texts)
        start = min(common_prefix([context, whole]), len(whole) - 1)
        return Example(task.kind, [Scored(whole, start, len(whole))], texts=texts)
    if task.kind == "multiple_choice":
        texts = [before + item["query"] + task.delimiter + choice for choice in item["choices"]]
        ids = encode(tokenizer, texts)
        # At least the last token of each is scored, also where one option is the beginning of another.
        start = min(common_prefix(ids), min(map(len, ids)) - 1)
        spans = [(start, len(x)) for x in ids]
    else:
        texts = [before + context + task.delimiter + item["continuation"] for context in item["context_options"]]
        ids = encode(tokenizer, texts)
        shared = max(1, min(common_prefix([x[::-1] for x in ids]), min(map(len, ids)) - 1))
        spans = [(len(x) - shared, len(x)) for x in ids]
    return Example(task.kind, [Scored(x, *span) for x, span in zip(ids, spans)], item["gold"], texts)


def encode(tokenizer: TextEncoder, texts: Sequence[str]) -> list[list[int]]:
    """Each text behind a bos of its own."""
    return [[tokenizer.get_bos_token_id(), *tokenizer.encode(text)] for text in texts]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all sequences begin with."""
    shortest = min(map(len, sequences))
    first = sequences[0]
    return next((i for i in range(shortest) if any(s[i] != first[i] for s in sequences)), shortest)


# ---------------------------------------------------------------------------------------------------
# DCLM


def dclm_shots(task: CoreTask, most: int) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(item, its few-shot examples): one stream of draws over the items as the file has them.

    The same items are asked as in the reference mode, but all draws are made, so that each has the examples of a
    complete evaluation.
    """
    items = [stripped(item) for item in task.items]
    asked = set(map(id, shuffled(task.items)[: len(chosen_items(task, most))]))
    rng, count = random.Random(FEWSHOT_SEED), len(items)
    for index, item in enumerate(items):
        drawn = set(rng.sample(range(count), min(count - 1, task.num_fewshot)))
        if index in drawn:
            drawn.remove(index)
            while len(drawn) < min(count - 1, task.num_fewshot):
                if (other := rng.choice(range(count))) != index:
                    drawn.add(other)
        if id(task.items[index]) in asked:
            yield item, [items[i] for i in drawn]


def stripped(item: dict[str, Any]) -> dict[str, Any]:
    """The item without blanks around its texts."""

    def strip(value: Any) -> Any:
        if isinstance(value, str):
            return value.strip()
        return [strip(x) for x in value] if isinstance(value, list) else value

    return {key: strip(value) for key, value in item.items()}


def dclm_example(task: CoreTask, item: dict[str, Any], shots: list[dict[str, Any]], tokenizer: TextEncoder) -> Example:
    """Examples, context and continuation tokenised each for itself."""
    question: Callable[[dict[str, Any]], str] = {
        "multiple_choice": lambda x: x["query"],
        "schema": lambda x: x["context_options"][x["gold"]],
        "language_modeling": lambda x: x["context"],
    }[task.kind]
    answer: Callable[[dict[str, Any]], str] = {
        "multiple_choice": lambda x: x["choices"][x["gold"]],
        "schema": lambda x: x["continuation"],
        "language_modeling": lambda x: x["continuation"],
    }[task.kind]
    before = "\n".join(question(shot) + task.delimiter + answer(shot) for shot in shots)
    contexts = item["context_options"] if task.kind == "schema" else [question(item)]
    # Blanks at its end would leave a token that no text has there; the continuation brings its own.
    contexts = [(("\n" if before else "") + context + task.delimiter).rstrip() for context in contexts]
    answers = item["choices"] if task.kind == "multiple_choice" else [answer(item)]
    answers = [text if text.startswith(" ") else " " + text for text in answers]
    head = [tokenizer.get_bos_token_id(), *(tokenizer.encode(before) if before else [])]
    sequences, texts = [], []
    for context in contexts:
        start = [*head, *tokenizer.encode(context)]
        for text in answers:
            ids = [*start, *(tokenizer.encode(text) or [tokenizer.get_bos_token_id()])]
            sequences.append(Scored(ids, len(start), len(ids)))
            texts.append(before + context + text)
    return Example(task.kind, sequences, item.get("gold", 0), texts)
