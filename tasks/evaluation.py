"""Evaluating a chat model on tasks, by the letters' logits or by sampling, and statistics of the results."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.common import UserError, atomic_write, warn
from nanochat.conversation import Conversation, Tokenizer, plain_text
from nanochat.data.batches import by_length
from nanochat.engine import Engine
from nanochat.evals.scoring import pad_rows
from nanochat.gpt import GPT
from nanochat.inference.request import GenerationRequest
from nanochat.inference.sampling import SamplingParams
from nanochat.loss_head import head_logits
from nanochat.report import load_report
from nanochat.reporting.curves import scoped
from nanochat.reporting.view import wilson_interval
from nanochat.runtime import Runtime
from tasks.answers import number_after_marker, parse_number, reference_text
from tasks.common import Task
from tasks.registry import TASKS

BATCH_TOKENS = 8192  # of questions answered by a letter, padding included
RESAMPLES = 1000
GUESSING_ITEMS = 2000  # a frequent answer is looked for among so many, even if fewer are asked
TABLE_COLUMNS = ["task", "split", "right", "of", "accuracy", "95% interval", "guessing"]
# The published tasks of ChatCORE, and the accuracy of guessing.
CHATCORE = {
    name: TASKS[name].baseline for name in ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
}


@dataclass
class Sample:
    """One answer to one item."""

    text: str
    right: bool
    cut: bool = False  # at the limit of tokens, before its end


@dataclass
class Outcome:
    """An item and all answers to it."""

    index: int
    conversation: Conversation
    samples: list[Sample]

    @property
    def num_right(self) -> int:
        return sum(sample.right for sample in self.samples)


@dataclass
class AskFlags:
    """How answers are sampled."""

    num_samples: int = 1
    batch_size: int = 32
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 50
    seed: int = 42


def ask(task: Task, indices: Sequence[int], engine: Engine, tokenizer: Tokenizer, flags: AskFlags) -> list[Outcome]:
    """Evaluate items: categorical tasks by the letter with the highest logit, others by sampling."""
    conversations = [task[i] for i in indices]
    if not conversations:
        return []
    if task.eval_type == "categorical":
        letters = choose_letters(engine.model, tokenizer, conversations)
        samples = [[Sample(letter, task.evaluate(c, letter))] for c, letter in zip(conversations, letters)]
    else:
        samples = sample_answers(task, conversations, engine, tokenizer, flags, indices)
    return [Outcome(*one) for one in zip(indices, conversations, samples)]


def ask_on_all_ranks(
    task: Task, total: int, engine: Engine, flags: AskFlags, runtime: Runtime
) -> tuple[list[int], list[Outcome]]:
    """(number of right answers to each of the first `total` items, this rank's outcomes). Collective."""
    outcomes = ask(task, range(total)[runtime.rank :: runtime.world_size], engine, engine.tokenizer, flags)
    rights = torch.zeros(total)
    for outcome in outcomes:
        rights[outcome.index] = outcome.num_right
    rights = runtime.all_reduce_sum(rights.to(runtime.device), "summing right answers")
    return [int(right) for right in rights.tolist()], outcomes


@dataclass
class TaskScore:
    """A task's result over its first items."""

    split: str
    size: int  # of the task's items, of which the first may have been asked
    rights: list[int]  # number of right answers, by item
    answers_per_item: int
    guessing: float  # accuracy of guessing

    @property
    def shares(self) -> list[float]:
        """Share of right answers, by item."""
        return [right / self.answers_per_item for right in self.rights]

    @property
    def total(self) -> int:
        return len(self.rights)

    @property
    def right(self) -> float:
        """Items answered right; an item with several answers counts by its share of right ones."""
        right = sum(self.rights) / self.answers_per_item
        return int(right) if right.is_integer() else right

    def table_row(self, name: str) -> tuple[str, ...]:
        """Cells for the columns of TABLE_COLUMNS and, with several answers per item, pass@k."""
        low, high = wilson_interval(self.right, self.total)
        rates = pass_rates(self.rights, self.answers_per_item)
        return (
            name,
            self.split,
            f"{self.right:g}",
            str(self.total),
            f"{self.right / self.total:.1%}",
            f"{low:.1%} - {high:.1%}",
            f"{self.guessing:.1%}",
            "  ".join(f"pass@{k} {rate:.1%}" for k, rate in rates.items() if k > 1),
        )


def score_task(
    name: str, task: Task, split: str, max_items: int, engine: Engine, flags: AskFlags, runtime: Runtime
) -> tuple[TaskScore, list[Outcome]]:
    """(the score over the first `max_items` items, all if negative; this rank's outcomes). Collective."""
    total = len(task) if max_items < 0 else min(max_items, len(task))
    rights, outcomes = ask_on_all_ranks(task, total, engine, flags, runtime)
    answers_per_item = 1 if task.eval_type == "categorical" else flags.num_samples
    own = torch.tensor(sum(sample.cut for outcome in outcomes for sample in outcome.samples), device=runtime.device)
    if cut := int(runtime.all_reduce_sum(own, "counting answers that were cut")):
        runtime.warn0(
            f"{name}: {cut} of {total * answers_per_item} answers were cut, by --max-new-tokens="
            f"{flags.max_new_tokens} or the context, and are scored as they are"
        )
    return TaskScore(split, len(task), rights, answers_per_item, guessing_accuracy(name, task)), outcomes


def sample_answers(
    task: Task,
    conversations: Sequence[Conversation],
    engine: Engine,
    tokenizer: Tokenizer,
    flags: AskFlags,
    items: Sequence[int],
) -> list[list[Sample]]:
    """flags.num_samples answers to each item, with tool calls. The draws depend on the item's index, not on how items
    are distributed over ranks."""
    n = flags.num_samples
    sampling = SamplingParams().override(flags)
    requests = [
        GenerationRequest(tokenizer.render_for_completion(c), flags.max_new_tokens, sampling, n, first_index=item * n)
        for c, item in zip(conversations, items)
    ]
    samples = []
    for i, sequence in enumerate(engine.complete(requests, flags.batch_size)):
        text = tokenizer.decode(sequence.tokens)
        samples.append(Sample(text, bool(task.evaluate(conversations[i // n], text)), sequence.end is None))
    return [samples[i * n : (i + 1) * n] for i in range(len(conversations))]


@torch.no_grad()
def choose_letters(model: GPT, tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> list[str]:
    """For each question the letter that the model gives the highest logit, as the first token of its answer.

    Questions longer than the context are cropped on the left, with a warning. Raises UserError if a letter is not a
    single token.
    """
    T = model.config.sequence_len
    prompts = [tokenizer.render_for_completion(c) for c in conversations]
    if overlong := sum(len(prompt) > T for prompt in prompts):
        warn(f"{overlong} of {len(prompts)} questions are longer than the context ({T} tokens): only their end is used")
    prompts = [prompt[-T:] for prompt in prompts]
    letter_ids = {letter: tokenizer.encode(letter) for c in conversations for letter in c["letters"]}
    if long := sorted(letter for letter, ids in letter_ids.items() if len(ids) != 1):
        raise UserError(f"this vocabulary has no token for the answers {', '.join(long)}: the task cannot be scored")
    found: list[str] = [""] * len(prompts)
    model.eval()
    for batch in by_length([len(prompt) for prompt in prompts], BATCH_TOKENS):
        x = model.hidden(pad_rows([prompts[i] for i in batch], model.device))  # (B, T, C)
        last = torch.tensor([len(prompts[i]) - 1 for i in batch], device=model.device)
        logits = head_logits(x[torch.arange(len(batch)), last], model.head_weight, model.config.softcap).cpu()
        for row, i in enumerate(batch):
            letters = conversations[i]["letters"]
            ids = torch.tensor([letter_ids[letter][0] for letter in letters])
            found[i] = letters[int(logits[row, ids].argmax())]
    return found


# ---------------------------------------------------------------------------------------------------
# Statistics


def constant_share(conversations: Sequence[Conversation]) -> float | None:
    """The accuracy of always giving the most frequent answer, the baseline of a model that learned nothing else. None
    unless answers are letters or numbers."""
    answers: list[Any] = []
    for conversation in conversations:
        text = reference_text(conversation).strip()
        number = number_after_marker(text) if "####" in text else parse_number(text)
        answers.append(text if "letters" in conversation else number)
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts.values()) / len(answers) if counts else None


def guessing_accuracy(name: str, task: Task) -> float:
    """The accuracy of guessing, or of always giving the most frequent answer if that is higher.

    Tasks of fewer than 50 items use the former: among a few items, any answer is frequent.
    """
    items = min(len(task), GUESSING_ITEMS)
    constant = constant_share([task[i] for i in range(items)]) if items >= 50 else None
    return max(TASKS[name].baseline, constant or 0.0)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that at least one of k samples drawn without replacement is right (arXiv 2107.03374)."""
    assert 1 <= k <= num_samples and 0 <= num_right <= num_samples
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def pass_rates(rights: Sequence[int], num_samples: int) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, … and num_samples, over items with so many right answers each."""
    ks = sorted({2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples} | {num_samples})
    return {k: sum(pass_at_k(num_samples, right, k) for right in rights) / len(rights) for k in ks}


@dataclass
class ChatCore:
    """The centred mean over the ChatCORE tasks that were run, with a 95% interval bootstrapped over the items."""

    value: float
    low: float
    high: float
    tasks: list[str]
    missing: list[str]
    first: list[int]  # fewest and most items that were asked of tasks that have more; empty if all were

    @property
    def scope(self) -> str:
        """What the mean is of, if not of all of ChatCORE: `1 of 6 tasks: SpellingBee, first 200 items of each`."""
        tasks = f"{len(self.tasks)} of {len(CHATCORE)} tasks: {' '.join(self.tasks)}" if self.missing else ""
        first = f"first {' to '.join(map(str, self.first))} items of each" if self.first else ""
        return ", ".join(part for part in (tasks, first) if part)

    def describe(self) -> str:
        return f"{scoped('ChatCORE', self.scope)} {self.value:.4f} (95% {self.low:.4f} to {self.high:.4f})"

    def report_values(self) -> dict[str, Any]:
        return {
            "chatcore": self.value,
            "chatcore_of": self.scope,
            "chatcore_interval": [self.low, self.high],
            "chatcore_missing": self.missing,
        }


def chat_core(
    shares: Mapping[str, Sequence[float]], sizes: Mapping[str, int] | None = None, seed: int = 0
) -> ChatCore | None:
    """ChatCORE from each task's shares of right answers by item; None if none of its tasks was run.

    `sizes` are those of the tasks, where not all items were asked.
    """
    tasks = [name for name in CHATCORE if shares.get(name)]
    if not tasks:
        return None
    rng, draws, values = np.random.default_rng(seed), [], []
    for name in tasks:
        item, chance = np.array(shares[name], float), CHATCORE[name]
        means = rng.choice(item, (RESAMPLES, len(item))).mean(1)
        draws.append((means - chance) / (1 - chance))
        values.append((item.mean() - chance) / (1 - chance))
    low, high = np.quantile(np.mean(draws, axis=0), (0.025, 0.975))
    missing = [name for name in CHATCORE if name not in tasks]
    asked = {len(shares[name]) for name in tasks if len(shares[name]) < (sizes or {}).get(name, 0)}
    first = sorted({min(asked), max(asked)}) if asked else []
    return ChatCore(float(np.mean(values)), float(low), float(high), tasks, missing, first)


def earlier_shares(base_dir: Path, stage: str, checkpoint: str) -> tuple[dict[str, list[float]], dict[str, int]]:
    """(shares of right answers, sizes of the tasks) that the report holds for the same checkpoint, so that ChatCORE can
    be evaluated one task per command. Empty if there is no report or it is about another checkpoint."""
    try:
        known = load_report(base_dir).get(stage) or {}
    except UserError:  # no report yet
        return {}, {}
    if known.get("checkpoint") != checkpoint:
        return {}, {}
    found = {}
    for name, (right, total) in known["counts"].items():
        whole = int(right)  # the report keeps only the sum: of several answers per item, one item gets the remainder
        if total and name in CHATCORE:
            found[name] = ([1.0] * whole + [right - whole] + [0.0] * total)[:total]
    return found, known.get("sizes", {})


def write_transcripts(path: Path, task: str, split: str, outcomes: Sequence[Outcome]) -> None:
    """Write one JSON line per item: question, reference, answers."""
    with atomic_write(path, "w") as file:
        for outcome in outcomes:
            messages = outcome.conversation["messages"]
            line = {
                "task": task,
                "split": split,
                "index": outcome.index,
                "question": "\n\n".join(plain_text(m["content"]) for m in messages[:-1]),
                "reference": messages[-1]["content"],
                "right": outcome.num_right,
                "answers": [asdict(sample) for sample in outcome.samples],
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
