"""From CORE items to token sequences and their scored spans.

Two prompt formats:

reference  that of this system's published results: few-shot examples drawn per item and separated by a blank line,
           the whole prompt tokenized at once, the span found by comparing the options
dclm       that of DCLM's evaluation harness (llm-foundry): examples drawn from one stream over all items, or over
           those of a category, and separated by a line break, texts stripped, context and continuation tokenized
           separately, the span the continuation

Their scores differ by about a point on small models; compare only within one format.
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
    """The tokenizer interface that prompts need."""

    def encode(self, text: str) -> list[int]: ...
    def get_bos_token_id(self) -> int: ...


class Scored(NamedTuple):
    """Token ids of which start .. end-1 are scored, each given all before it. 1 <= start < end."""

    ids: list[int]
    start: int
    end: int


@dataclass
class Example:
    """An item to score: one sequence per option, a single one for language modeling."""

    kind: str
    sequences: list[Scored]
    gold: int = 0
    texts: list[str] = field(default_factory=list)  # the prompts, to read
    cropped: bool = False  # the prompt exceeded the context
    category: str = ""  # where the task's accuracy is the mean over categories


def shuffled(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items in the published order; a shortened evaluation uses the first of them."""
    mixed = list(items)
    random.Random(SHUFFLE_SEED).shuffle(mixed)
    return mixed


def make_examples(
    task: CoreTask, tokenizer: TextEncoder, max_tokens: int, *, max_items: int = -1, mode: str = "reference"
) -> Iterator[Example]:
    """The first `max_items` items of a task (-1: all) as examples, cropped on the left to `max_tokens` tokens."""
    assert mode in MODES, f"unknown mode {mode!r}"
    limit = len(task.items) if max_items < 0 else max_items
    render = {"reference": reference_example, "dclm": dclm_example}[mode]
    for item, shots in (reference_shots if mode == "reference" else dclm_shots)(task, limit):
        yield crop(render(task, item, shots, tokenizer), max_tokens)


def crop(example: Example, max_tokens: int) -> Example:
    """`example` with its sequences cropped in place on the left to at most `max_tokens`; scored tokens that lose all
    their context are no longer scored."""
    excess = [max(0, len(s.ids) - max_tokens) for s in example.sequences]
    example.sequences = [
        Scored(ids[n:], max(1, start - n), end - n) for n, (ids, start, end) in zip(excess, example.sequences)
    ]
    example.cropped |= any(excess)
    return example


# ---------------------------------------------------------------------------------------------------
# Reference


def reference_shots(task: CoreTask, max_items: int) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(item, few-shot examples), drawn from all other items with a seed per position in the shuffled order."""
    items = shuffled(task.items)
    for index in range(len(items))[:max_items]:
        others = [i for i in range(len(items)) if i != index]
        drawn = random.Random(FEWSHOT_SEED + index).sample(others, min(task.num_fewshot, len(others)))
        yield items[index], [items[i] for i in drawn]


def reference_example(
    task: CoreTask, item: dict[str, Any], shots: list[dict[str, Any]], tokenizer: TextEncoder
) -> Example:
    """Prompts tokenized as a whole. Options share a prefix (multiple choice) or a suffix (schema)."""
    solved = {
        "multiple_choice": lambda x: x["query"] + task.delimiter + x["choices"][x["gold"]],
        "schema": lambda x: x["context_options"][x["gold"]] + task.delimiter + x["continuation"],
        "language_modeling": lambda x: x["context"].strip() + task.delimiter + x["continuation"],
    }[task.kind]
    before = "".join(solved(shot) + "\n\n" for shot in shots)
    if task.kind == "language_modeling":
        # Without a trailing space, which forms one token with the first letters of the answer.
        without = (before + item["context"].strip() + task.delimiter).strip()
        texts = [without, before + solved(item)]
        context, whole = encode(tokenizer, texts)
        start = min(common_prefix([context, whole]), len(whole) - 1)
        return Example(task.kind, [Scored(whole, start, len(whole))], texts=texts)
    if task.kind == "multiple_choice":
        texts = [before + item["query"] + task.delimiter + choice for choice in item["choices"]]
        ids = encode(tokenizer, texts)
        # Score at least the last token of each, even if one option is a prefix of another.
        start = min(common_prefix(ids), min(map(len, ids)) - 1)
        spans = [(start, len(x)) for x in ids]
    else:
        texts = [before + context + task.delimiter + item["continuation"] for context in item["context_options"]]
        ids = encode(tokenizer, texts)
        shared = max(1, min(common_prefix([x[::-1] for x in ids]), min(map(len, ids)) - 1))
        spans = [(len(x) - shared, len(x)) for x in ids]
    return Example(task.kind, [Scored(x, *span) for x, span in zip(ids, spans)], item["gold"], texts)


def encode(tokenizer: TextEncoder, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, after a bos token."""
    return [[tokenizer.get_bos_token_id(), *tokenizer.encode(text)] for text in texts]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix."""
    shortest = min(map(len, sequences))
    first = sequences[0]
    return next((i for i in range(shortest) if any(s[i] != first[i] for s in sequences)), shortest)


# ---------------------------------------------------------------------------------------------------
# DCLM


def dclm_shots(task: CoreTask, max_items: int) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(item, few-shot examples), drawn from one stream over the items in file order; one for each category, if any.

    Yields the same items as the reference format, but makes the draws of all items, so that each gets the examples of
    a complete evaluation.
    """
    selected = set(map(id, shuffled(task.items)[:max_items]))
    for group in by_category(task):
        items, count = [stripped(item) for item in group], len(group)
        rng = random.Random(FEWSHOT_SEED)
        for index, item in enumerate(items):
            drawn = set(rng.sample(range(count), min(count - 1, task.num_fewshot)))
            if index in drawn:
                drawn.remove(index)
                while len(drawn) < min(count - 1, task.num_fewshot):
                    if (other := rng.choice(range(count))) != index:
                        drawn.add(other)
            if id(group[index]) in selected:
                yield item, [items[i] for i in drawn]


def by_category(task: CoreTask) -> list[list[dict[str, Any]]]:
    """The items of each category; all of them where the task has none."""
    if not task.has_categories:
        return [task.items]
    names = sorted({item["category"] for item in task.items})
    return [[item for item in task.items if item["category"] == name] for name in names]


def stripped(item: dict[str, Any]) -> dict[str, Any]:
    """The item with its texts stripped, but not those in lists: as the harness does."""
    return {key: value.strip() if isinstance(value, str) else value for key, value in item.items()}


def dclm_example(task: CoreTask, item: dict[str, Any], shots: list[dict[str, Any]], tokenizer: TextEncoder) -> Example:
    """Few-shot examples, context and continuation tokenized separately."""
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
    gap = "\n" if before else ""
    if task.kind == "schema":
        delimiter = task.delimiter.rstrip() if before else ""
        contexts = [gap + context + delimiter for context in item["context_options"]]
    else:  # a trailing space would be an unusual token of its own
        contexts = [(gap + question(item) + task.delimiter).rstrip()]
    answers = item["choices"] if task.kind == "multiple_choice" else [answer(item)]
    if puts_space_into_words(tokenizer):
        answers = [text if text.startswith(" ") else " " + text for text in answers]
    head = [tokenizer.get_bos_token_id(), *(tokenizer.encode(before) if before else [])]
    sequences, texts = [], []
    for context in contexts:
        start = [*head, *tokenizer.encode(context)]
        for text in answers:
            ids = [*start, *(tokenizer.encode(text) or [tokenizer.get_bos_token_id()])]
            sequences.append(Scored(ids, len(start), len(ids)))
            texts.append(before + context + text)
    category = item["category"] if task.has_categories else ""
    return Example(task.kind, sequences, item.get("gold", 0), texts, category=category)


def puts_space_into_words(tokenizer: TextEncoder) -> bool:
    """Whether a word's token begins with its space, as in GPT-2's vocabulary. Llama 2's tokenizer, say, adds the space
    itself, and another one would be a token of its own."""
    return len(tokenizer.encode(" a")) == 1
