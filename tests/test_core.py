"""CORE: prompts and spans worked by hand, scores against a plain scorer, the published figures, damaged bundles."""

import csv
import http.server
import json
import math
import random
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from core_helpers import BOS, Letters, random_task, small_model, task, write_bundle

from nanochat.common import UserError, sha256_file
from nanochat.core_eval import (
    TaskResult,
    centered,
    evaluate_core,
    evaluate_task,
    published_gpt2,
    summarize,
)
from nanochat.evals.core_bundle import CoreTask, read_bundle
from nanochat.evals.core_download import bundle_folder
from nanochat.evals.core_prompts import Example, Scored, crop, dclm_shots, make_examples, reference_shots, shuffled
from nanochat.evals.scoring import GPTScorer, Score, is_right, shared_tokens
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime

GOLDEN = published_gpt2()
CPU = Runtime.create("cpu")


class Pairs(Letters):
    """Two bytes a token where the first is a space: what a real vocabulary does to a word's first letter."""

    def encode(self, text: str) -> list[int]:
        ids, raw, i = [], text.encode(), 0
        while i < len(raw):
            pair = raw[i : i + 2]
            ids.append(1000 + pair[1] if len(pair) == 2 and pair[0] == 32 else pair[0])
            i += 2 if ids[-1] >= 1000 else 1
        return ids


def scored_text(example: Example) -> list[str]:
    return [bytes(s.ids[s.start : s.end]).decode() for s in example.sequences]


def first(t: CoreTask, tokenizer: Any = None, mode: str = "reference", max_tokens: int = 10_000) -> Example:
    return next(make_examples(t, tokenizer or Letters(), max_tokens, max_items=1, mode=mode))


# ---------------------------------------------------------------------------------------------------
# Prompts and spans


def test_multiple_choice_scores_what_the_options_do_not_share() -> None:
    example = first(task("multiple_choice", [{"query": "Q:", "choices": ["red", "blue"], "gold": 1}]))
    assert [s.ids[0] for s in example.sequences] == [BOS, BOS] and example.gold == 1
    assert example.texts == ["Q: red", "Q: blue"] and scored_text(example) == ["red", "blue"]


def test_options_that_share_their_first_tokens() -> None:
    example = first(task("multiple_choice", [{"query": "Q:", "choices": ["the cat", "the dog"], "gold": 0}]))
    assert scored_text(example) == ["cat", "dog"]


def test_an_option_that_begins_another_still_has_a_token() -> None:
    example = first(task("multiple_choice", [{"query": "Q:", "choices": ["go", "gone"], "gold": 0}]))
    assert scored_text(example) == ["o", "one"]
    equal = first(task("multiple_choice", [{"query": "Q:", "choices": ["go", "go", ""], "gold": 0}]))
    assert all(s.start < s.end for s in equal.sequences)


def test_schema_scores_what_the_contexts_share_at_the_end() -> None:
    item = {"context_options": ["Ann saw Bo and Ann", "Ann saw Bo and Bo"], "continuation": "ran.", "gold": 0}
    example = first(task("schema", [item]))
    assert scored_text(example) == [" ran.", " ran."]  # Ann and Bo end in different letters
    same_end = {"context_options": ["a man", "a woman"], "continuation": "ran.", "gold": 0}
    assert scored_text(first(task("schema", [same_end]))) == ["man ran."] * 2


def test_language_modeling_scores_the_continuation() -> None:
    example = first(task("language_modeling", [{"context": " 2+2 = ", "continuation": "four"}]))
    assert example.texts == ["2+2 =", "2+2 = four"] and scored_text(example) == [" four"]


def test_a_space_that_ends_the_context_belongs_to_the_answer() -> None:
    """Where " f" is one token, a context that ended in a space would be no prefix of the whole."""
    example = first(task("language_modeling", [{"context": "2+2 =", "continuation": "four"}]), Pairs())
    s = example.sequences[0]
    assert s.ids[s.start : s.end] == [1000 + ord("f"), *b"our"]


def test_few_shot_examples_are_separated_by_a_blank_line_and_solved() -> None:
    items = [{"query": f"q{i}", "choices": ["a", "b"], "gold": i % 2} for i in range(5)]
    example = first(task("multiple_choice", items, shots=2, delimiter="\nAnswer: "))
    assert example.texts[0].count("\n\n") == 2 and example.texts[0].endswith("\nAnswer: a")
    for block in example.texts[0].split("\n\n")[:-1]:
        number = int(block[1])
        assert block == f"q{number}\nAnswer: {'ab'[number % 2]}"


@pytest.mark.parametrize("shots", [reference_shots, dclm_shots])
def test_examples_come_from_all_items_but_the_one_asked(shots: Any) -> None:
    """Also where few are asked: drawing from those would let the answers leak into each other."""
    items = [{"context": f"c{i}", "continuation": "x"} for i in range(30)]
    seen = set()
    asked = list(shots(task("language_modeling", items, shots=10), 4))
    assert len(asked) == 4
    for item, drawn in asked:
        assert len({d["context"] for d in drawn}) == 10 and item["context"] not in {d["context"] for d in drawn}
        seen |= {d["context"] for d in drawn}
    few = {item["context"] for item in shuffled(items)[:4]}
    assert {item["context"] for item, _ in asked} == few and len(seen - few) > 10
    again = [[d["context"] for d in drawn] for _, drawn in shots(task("language_modeling", items, shots=10), 4)]
    assert again == [[d["context"] for d in drawn] for _, drawn in asked]
    whole = {
        item["context"]: [d["context"] for d in drawn]
        for item, drawn in shots(task("language_modeling", items, shots=10), 30)
    }
    assert all(whole[item["context"]] == [d["context"] for d in drawn] for item, drawn in asked)


def test_more_examples_than_items() -> None:
    items = [{"context": f"c{i}", "continuation": "x"} for i in range(3)]
    for mode in ("reference", "dclm"):
        assert len(list(make_examples(task("language_modeling", items, shots=10), Letters(), 999, mode=mode))) == 3


def test_dclm_prompts_are_tokenised_apart() -> None:
    items = [{"query": " q0 ", "choices": ["aa", "ab"], "gold": 1}, {"query": "q1", "choices": ["c", "d"], "gold": 0}]
    t = task("multiple_choice", items, shots=1, delimiter="\nAnswer: ")
    by_query = {e.texts[0]: e for e in make_examples(t, Letters(), 999, mode="dclm")}
    example = by_query["q1\nAnswer: c\nq0\nAnswer:aa"]
    assert scored_text(example) == ["aa", "ab"] and example.gold == 1  # also the "a" that both begin with
    schema = task("schema", [{"context_options": ["x", "yy"], "continuation": "z.", "gold": 1}])
    assert scored_text(first(schema, mode="dclm")) == ["z.", "z."]
    assert first(schema, Pairs(), mode="dclm").sequences[0].ids == [BOS, ord("x"), 1000 + ord("z"), ord(".")]


class LlamaLike(Letters):
    """Puts a space before every text, as Llama 2's normalizer does; a space and a letter are a token."""

    def encode(self, text: str) -> list[int]:
        return Pairs().encode(" " + text)


def harness(task: CoreTask, encode: Any, bos: int) -> dict[str, list[tuple[list[int], list[int]]]]:
    """What DCLM's harness feeds to the model, by the item's own texts: (context ids, continuation ids) of each option.

    Written from the description of that program: a data set for each category, each with a generator of its own.
    """
    blank = " " if len(encode(" a")) == 1 else ""
    found = {}
    for name in sorted({i.get("category", "") for i in task.items}) if task.has_categories else [None]:
        rows = [i for i in task.items if name is None or i.get("category", "") == name]
        rows = [{k: v.strip() if isinstance(v, str) else v for k, v in row.items()} for row in rows]
        rng = random.Random(1234)
        for number, row in enumerate(rows):
            wanted = min(len(rows) - 1, task.num_fewshot)
            chosen = set(rng.sample(range(len(rows)), wanted))
            if number in chosen:
                chosen.discard(number)
                while len(chosen) < wanted:
                    chosen |= {rng.choice(range(len(rows)))} - {number}
            shots = ""
            for shot in chosen:
                shots += "\n" if shots else ""
                if task.kind == "multiple_choice":
                    shots += rows[shot]["query"] + task.delimiter + rows[shot]["choices"][rows[shot]["gold"]]
                elif task.kind == "schema":
                    options, gold = rows[shot]["context_options"], rows[shot]["gold"]
                    shots += options[gold] + task.delimiter + rows[shot]["continuation"]
                else:
                    shots += rows[shot]["context"] + task.delimiter + rows[shot]["continuation"]
            start, line_break = [bos, *(encode(shots) if shots else [])], "\n" if shots else ""
            if task.kind == "multiple_choice":
                context = encode((line_break + row["query"] + task.delimiter).rstrip())
                pairs = [(start + context, encode(blank + choice)) for choice in row["choices"]]
            elif task.kind == "schema":
                after = task.delimiter.rstrip() if shots else ""
                contexts = [encode(line_break + option + after) for option in row["context_options"]]
                pairs = [(start + context, encode(blank + row["continuation"])) for context in contexts]
            else:
                context = encode((line_break + row["context"] + task.delimiter).rstrip())
                pairs = [(start + context, encode(blank + row["continuation"]))]
            found[json.dumps(row)] = pairs
    return found


@pytest.mark.parametrize("tokenizer", [Letters(), Pairs(), LlamaLike()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("categories", [False, True])
@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("delimiter", [" ", "\nAnswer: "])
@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
def test_dclm_is_the_harness(kind: str, delimiter: str, shots: int, categories: bool, tokenizer: Any) -> None:
    t = random_task(kind, 12, shots)
    for number, item in enumerate(t.items):
        item["category"] = "xyz"[number % 3]
    t = replace(t, delimiter=delimiter, has_categories=categories)
    expected = harness(t, tokenizer.encode, BOS)
    examples = list(make_examples(t, tokenizer, 9999, mode="dclm"))
    got = [[(s.ids[: s.start], s.ids[s.start : s.end]) for s in e.sequences] for e in examples]
    assert sorted(got) == sorted(expected.values()) and len(got) == 12
    assert {e.category for e in examples} == ({"x", "y", "z"} if categories else {""})


class Continues:
    """A scorer that knows the text `whole`, and continues it by its tokens."""

    max_tokens = 1000

    def __init__(self, whole: list[int]) -> None:
        self.whole = whole

    def score(self, examples: Any) -> list[list[Score]]:
        return [[Score(1.0, s.ids[: s.end] == self.whole) for s in e.sequences] for e in examples]


@pytest.mark.parametrize("tokenizer", [Pairs(), LlamaLike()], ids=lambda t: type(t).__name__)
def test_a_model_is_right_whichever_way_its_tokenizer_treats_spaces(tokenizer: Any) -> None:
    t = task("language_modeling", [{"context": "the cat", "continuation": "sat"}])
    scorer = Continues([BOS, *tokenizer.encode("the cat sat")])
    assert evaluate_task(scorer, t, tokenizer, CPU, mode="dclm").accuracy == 1.0


def test_accuracy_is_the_mean_over_categories() -> None:
    items = [{"context": f"c{i}", "continuation": "x", "category": "big" if i < 9 else "small"} for i in range(10)]
    t = replace(task("language_modeling", items, shots=2), has_categories=True)

    class KnowsTheSmall(Answers):
        def score(self, examples: Any) -> list[list[Score]]:
            return [[Score(1.0, e.category == "small")] for e in examples]

    result = evaluate_task(KnowsTheSmall("gold"), t, Letters(), CPU, mode="dclm")
    assert result.accuracy == 0.5 and sum(result.right) == 1 and len(result.right) == 10
    assert evaluate_task(KnowsTheSmall("gold"), t, Letters(), CPU).accuracy == 0.0  # reference: no categories


def test_long_prompts_lose_their_beginning() -> None:
    example = Example("multiple_choice", [Scored(list(range(10)), 7, 10), Scored(list(range(5)), 3, 5)])
    crop(example, 6)
    assert example.sequences == [Scored([4, 5, 6, 7, 8, 9], 3, 6), Scored([0, 1, 2, 3, 4], 3, 5)] and example.cropped
    assert crop(Example("x", [Scored(list(range(10)), 2, 10)]), 4).sequences == [Scored([6, 7, 8, 9], 1, 4)]
    assert not crop(Example("x", [Scored(list(range(4)), 2, 4)]), 4).cropped


# ---------------------------------------------------------------------------------------------------
# Scoring


@torch.no_grad()
def brute_force(model: GPT, example: Example) -> list[Score]:
    """One sequence at a time, softmax in float64."""
    scores = []
    for ids, start, end in example.sequences:
        probabilities = model(torch.tensor([ids]))[0, start - 1 : end - 1].double().softmax(-1)
        losses = [-math.log(p[token]) for p, token in zip(probabilities, ids[start:end])]
        greedy = all(int(p.argmax()) == token for p, token in zip(probabilities, ids[start:end]))
        scores.append(Score(sum(losses) / len(losses), greedy))
    return scores


@pytest.mark.parametrize("form", [GPTConfig, GPTConfig.later])
@pytest.mark.parametrize("shots", [0, 4])
@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
def test_batched_scores_are_the_plain_ones(kind: str, shots: int, form: Any) -> None:
    """Prompts beyond the window and beyond the context among them; 50 items."""
    model = small_model(form(sequence_len=192, vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=32))
    examples = list(make_examples(random_task(kind, 50, shots), Letters(), 192))
    assert shots == 0 or any(e.cropped for e in examples)
    assert (kind, shots) != ("multiple_choice", 4) or any(shared_tokens(e) > 100 for e in examples)
    scorer = GPTScorer(model, batch_tokens=1000)
    for example, ours in zip(examples, scorer.score(examples)):
        theirs = brute_force(model, example)
        assert [s.mean_loss for s in ours] == pytest.approx([s.mean_loss for s in theirs], abs=2e-4)
        assert [s.greedy for s in ours] == [s.greedy for s in theirs]
        assert is_right(example, ours) == is_right(example, theirs)


def test_a_cached_beginning_is_used_only_where_nothing_in_it_is_scored() -> None:
    same = [1, 2, 3, 4]
    assert shared_tokens(Example("multiple_choice", [Scored([*same, 5], 4, 5), Scored([*same, 6], 4, 5)])) == 4
    assert shared_tokens(Example("multiple_choice", [Scored(same, 3, 4), Scored(same, 3, 4)])) == 3
    assert shared_tokens(Example("schema", [Scored([*same, 5], 2, 5), Scored([*same, 6], 2, 5)])) == 2
    assert shared_tokens(Example("language_modeling", [Scored(same, 1, 4)])) == 0


class Answers:
    """A scorer that knows: certain of the gold option, of another one, or of nothing."""

    max_tokens = 1000

    def __init__(self, knows: str) -> None:
        self.knows = knows

    def score(self, examples: Any) -> list[list[Score]]:
        found = []
        for e in examples:
            chosen = {"gold": e.gold, "wrong": (e.gold + 1) % max(2, len(e.sequences)), "nothing": -1}[self.knows]
            found.append([Score(0.0 if i == chosen else 1.0, self.knows == "gold") for i in range(len(e.sequences))])
        return found


def test_models_with_known_answers() -> None:
    items = [{"query": f"q{i}", "choices": list("abcd"), "gold": i % 4} for i in range(400)]
    t = task("multiple_choice", items, shots=1)
    result = {k: evaluate_task(Answers(k), t, Letters(), CPU) for k in ("gold", "nothing", "wrong")}
    assert result["gold"].centered == 1.0 and result["wrong"].centered == pytest.approx(-1 / 3)
    assert result["nothing"].centered == 0.0  # a uniform model chooses the first option, right a quarter of the time
    lm = task("language_modeling", [{"context": "c", "continuation": "x"}])
    assert evaluate_task(Answers("gold"), lm, Letters(), CPU).accuracy == 1.0
    assert evaluate_task(Answers("nothing"), lm, Letters(), CPU).accuracy == 0.0


def test_ranks_share_the_items_and_get_the_same_result() -> None:
    model = small_model(GPTConfig(sequence_len=64, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    t, scorer = random_task("multiple_choice", 11, 0), GPTScorer(model)
    alone = evaluate_task(scorer, t, Letters(), CPU)
    parts: list[torch.Tensor] = []

    def keep(values: torch.Tensor, name: str) -> torch.Tensor:
        parts.append(values)
        return values

    for rank in range(3):
        runtime = Runtime(CPU.device, CPU.dtype, "", 0, rank=rank, local_rank=rank, world_size=3)
        runtime.all_reduce_sum = keep  # type: ignore[method-assign]
        evaluate_task(scorer, t, Letters(), runtime)
    assert [bool(x) for x in sum(parts)[0]] == alone.right  # type: ignore[index]


def test_bootstrap_error_is_that_of_a_share() -> None:
    def error(*groups: list[bool]) -> float:
        return TaskResult("t", list(groups), 0.0).standard_error

    thirty_right = [True] * 30 + [False] * 70
    assert error(thirty_right) == pytest.approx(math.sqrt(0.3 * 0.7 / 100), rel=0.08)
    assert error([True] * 9) == 0.0
    assert error(thirty_right, [True] * 9) == pytest.approx(math.sqrt(0.3 * 0.7 / 100) / 2, rel=0.08)


# ---------------------------------------------------------------------------------------------------
# The published figures


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_published_gpt2_tables_give_the_published_core(name: str, tmp_path: Path) -> None:
    accuracies = GOLDEN["accuracy"][name]
    assert len(accuracies) == 22
    published = {"gpt2": 0.113891, "gpt2-medium": 0.184903, "gpt2-large": 0.214641, "gpt2-xl": 0.256525}[name]

    def core(baselines: dict[str, float]) -> float:
        return mean(centered(accuracies[label], baselines[label]) for label in accuracies)

    assert core(baselines_of(tmp_path, "v1")) == pytest.approx(published, abs=1e-6)
    if name == "gpt2-xl":
        assert core(baselines_of(tmp_path, "v2")) == pytest.approx(0.2309, abs=5e-5)


def baselines_of(folder: Path, version: str) -> dict[str, float]:
    from nanochat.evals.core_bundle import read_baselines

    with open(folder / "meta.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Eval Task", "Random baseline"])
        writer.writerows(GOLDEN["baseline_percent"].items())
    return read_baselines(folder / "meta.csv", version)


def test_centred() -> None:
    assert centered(1.0, 0.25) == 1 and centered(0.25, 0.25) == 0 and centered(0.0, 0.5) == -1


# ---------------------------------------------------------------------------------------------------
# Bundles


def test_a_bundle_is_read_and_evaluated(tmp_path: Path) -> None:
    bundle = read_bundle(write_bundle(tmp_path / "b"))
    assert [(t.label, t.num_fewshot, t.delimiter, t.baseline, len(t.items)) for t in bundle.tasks] == [
        ("pick", 2, "\nAnswer: ", 0.25, 6),
        ("pronoun", 0, " ", 0.5, 5),
        ("go_on", 1, " ", 0.0, 4),
    ]
    result = evaluate_core(Answers("gold"), Letters(), bundle, CPU)
    assert result.core == result.low == result.high == 1.0 and result.scope == "3 tasks of another bundle"
    few = evaluate_core(Answers("gold"), Letters(), bundle, CPU, max_per_task=2)
    assert [len(t.right) for t in few.tasks] == [2, 2, 2]
    some = read_bundle(tmp_path / "b", only="go_on, pick")
    assert [t.label for t in some.tasks] == ["pick", "go_on"] and some.left_out == ["pronoun"] and not some.missing
    assert evaluate_core(Answers("gold"), Letters(), some, CPU, max_per_task=5).scope == (
        "2 tasks of another bundle, first 5 items of each"
    )


def test_a_mean_is_core_only_if_it_is_of_all_tasks_and_all_items() -> None:
    published = list(GOLDEN["baseline_percent"])

    def scope(labels: list[str], right: int = 4, size: int = 4) -> str:
        return summarize([TaskResult(label, [[True] * right], 0.0, size) for label in labels], [], "", "", 0.0).scope

    assert scope(published) == ""
    assert scope(published[:18]) == "18 of 22 tasks"
    assert scope(published, 3) == "first 3 items of each"
    assert scope(published[:1], 3) == "1 of 22 tasks, first 3 items of each"
    assert scope([*published, "other"]) == "23 tasks of another bundle"


def test_missing_data_is_listed_and_marks_the_mean(tmp_path: Path) -> None:
    (write_bundle(tmp_path / "b") / "eval_data" / "pronoun.jsonl").unlink()
    bundle = read_bundle(tmp_path / "b")
    assert bundle.missing == ["pronoun"] and len(bundle.tasks) == 2
    result = evaluate_core(Answers("gold"), Letters(), bundle, CPU)
    assert result.scope.startswith("2 tasks") and result.to_dict()["missing"] == ["pronoun"]


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("pick.jsonl", '{"query": "q", "choices": ["a", "b"], "gold": 0}\n{"query": 3\n', "pick.jsonl, line 2"),
        ("pick.jsonl", '\n{"query": "q", "choices": ["a", "b"], "gold": 2}', "line 2: 'gold' must be .* 0 to 1, got 2"),
        ("pick.jsonl", '{"query": "q", "choices": ["a", "b"], "gold": -1}', "line 1: 'gold'"),
        ("pick.jsonl", '{"query": "q", "choices": ["a", "b"], "gold": true}', "line 1: 'gold'"),
        ("pick.jsonl", '{"query": "q", "choices": ["a"], "gold": 0}', "at least two"),
        ("pick.jsonl", '{"query": 1, "choices": ["a", "b"], "gold": 0}', "'query' must be text"),
        ("pick.jsonl", '["a"]', "not a JSON object"),
        ("pick.jsonl", "\n \n", "pick.jsonl is empty"),
        ("go_on.jsonl", '{"context": "c", "continuation": " ", "category": ""}', "line 1: 'continuation'"),
        ("go_on.jsonl", '{"context": "c", "continuation": "x"}', "line 1: 'category'"),
        ("pronoun.jsonl", '{"context_options": ["a", 3], "continuation": "x", "gold": 0}', "context_options"),
        ("../core.yaml", "icl_tasks: 3", "core.yaml.* icl_tasks"),
        ("../core.yaml", "a: [", "core.yaml is not a list"),
        ("../core.yaml", "[" * 100_000, "core.yaml is not a list"),
        ("../core.yaml", "&a [*a]", "core.yaml"),
        ("../core.yaml", "icl_tasks: [{label: x, dataset_uri: ../x, num_fewshot: [0], icl_task_type: schema}]", "uri"),
        ("../eval_meta_data.csv", "Eval Task,Random baseline\n" + "x" * 200_000, "eval_meta_data.csv"),
        ("pick.jsonl", "[" * 100_000, "pick.jsonl, line 1"),
        (
            "../core.yaml",
            "icl_tasks: [{label: x, dataset_uri: x, num_fewshot: [0], icl_task_type: essay}]",
            "0.icl_task_type",
        ),
        ("../eval_meta_data.csv", "Eval Task,Random baseline\npick,much\n", "Random baseline"),
        ("../eval_meta_data.csv", "Eval Task,Random baseline\npick,25\n", "no random baseline for pronoun"),
        ("../eval_meta_data.csv", "Eval Task,Random baseline\npick,100\n", "below 100 percent"),
        (
            "../core.yaml",
            "icl_tasks: [{label: x, dataset_uri: x, num_fewshot: [-1], icl_task_type: schema}]",
            "num_fewshot.0.* 0",
        ),
        (
            "../core.yaml",
            "icl_tasks: [{label: x, dataset_uri: x, num_fewshot: [0], icl_task_type: schema, "
            "continuation_delimiter: null}]",
            "0.continuation_delimiter",
        ),
    ],
)
def test_damage_is_named(file: str, content: str, says: str, tmp_path: Path) -> None:
    (write_bundle(tmp_path / "b") / "eval_data" / file).write_text(content)
    with pytest.raises(UserError, match=says):
        read_bundle(tmp_path / "b")


def test_bundles_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"core\.yaml"):
        read_bundle(tmp_path)
    write_bundle(tmp_path / "b")
    with pytest.raises(UserError, match="there are: pick, pronoun, go_on"):
        read_bundle(tmp_path / "b", only="pock")
    for path in (tmp_path / "b" / "eval_data").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="interrupted"):
        read_bundle(tmp_path / "b")
    (tmp_path / "b" / "eval_data" / "pick.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_bundle(tmp_path / "b")
    with pytest.raises(UserError, match="no such folder"):
        bundle_folder(str(tmp_path / "nowhere"), tmp_path)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Tests print nothing."""


def test_the_bundle_is_downloaded_once_and_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path / "eval_bundle")
    served, base = tmp_path / "served", tmp_path / "base"
    served.mkdir()
    base.mkdir()
    with zipfile.ZipFile(served / "good.zip", "w") as archive:
        for path in sorted((tmp_path / "eval_bundle").rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    (served / "bad.zip").write_bytes((served / "good.zip").read_bytes()[:200])

    def handler(*args: Any) -> Quiet:
        return Quiet(*args, directory=str(served))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        for wrong in ("bad.zip", "none.zip"):
            with pytest.raises(UserError, match="cannot download"):
                bundle_folder("", base, f"{url}/{wrong}")
            assert not (base / "eval_bundle").exists()
        assert len(read_bundle(bundle_folder("", base, f"{url}/good.zip")).tasks) == 3
        server.shutdown()
    assert bundle_folder("", base, "http://127.0.0.1:9/gone") == base / "eval_bundle"  # not asked again
    assert sorted(p.name for p in base.iterdir() if p.suffix != ".lock") == ["eval_bundle"]


# ---------------------------------------------------------------------------------------------------
# Scripts


def test_base_eval_writes_core(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts import base_eval

    write_bundle(tmp_path / "b")
    flags = ["--eval=core", f"--eval-bundle={tmp_path / 'b'}", "--max-per-task=3", "--device-type=cpu"]
    assert base_eval.main(flags) == 0
    said = capsys.readouterr().out
    assert "pick" in said and "CORE (3 tasks of another bundle, first 3 items of each) " in said
    details = json.loads((copied / "base_eval" / "tiny_000001_first3" / "core.json").read_text())
    assert details["tasks"]["pick"]["items"] == 3 and details["examples"]["pick"]
    report = json.loads((copied / "report" / "report.json").read_text())["base_eval"]
    assert report["core"] == details["core_metric"] and report["counts"]["pronoun"][1] == 3
    assert report["weights"] == sha256_file(copied / "base_checkpoints" / "tiny" / "000001" / "model.safetensors")
    for page in ("report.md", "report.html"):
        assert "CORE (3 tasks of another bundle, first 3 items of each)" in (copied / "report" / page).read_text()
    assert base_eval.main([*flags, "--core-mode=dclm", "--core-tasks=pick"]) == 0
    with pytest.raises(UserError, match="--core-mode"):
        base_eval.main([*flags, "--core-mode=other"])


def test_core_during_training(copied: Path, tmp_path: Path) -> None:
    from stubs import TINY

    from scripts import base_train

    text = f"--data={copied / 'text.jsonl'}"
    flags = [f for f in TINY if not f.startswith(("--num-iterations", "--model-tag"))]
    write_bundle(copied / "eval_bundle")
    assert (
        base_train.main(
            [
                *flags,
                text,
                "--num-iterations=4",
                "--model-tag=c",
                "--core-metric-every=2",
                "--core-metric-max-per-task=2",
            ]
        )
        == 0
    )
    metrics = (copied / "base_checkpoints" / "c" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert ["core" in line for line in lines] == [False, True, False, True]


def test_samples_cannot_command_the_terminal(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts import base_eval

    monkeypatch.setattr(base_eval, "samples", lambda subject: [{"prompt": "a", "text": "b\rc\x1b[2J"}])
    assert base_eval.main(["--eval=sample", "--device-type=cpu"]) == 0
    shown, report = capsys.readouterr().out, (copied / "report" / "report.md").read_text()
    assert "  ab\nc\\x1b[2J\n" in shown and "\x1b" not in shown + report and "c\\x1b[2J" in report
    assert json.loads((copied / "report" / "report.json").read_text())["base_eval"]["samples"][0]["text"][-4] == "\x1b"


def test_bits_per_byte_are_of_the_text_that_the_model_was_trained_on(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts import base_eval

    flags = ["--eval=bpb", "--split-tokens=256", "--device-type=cpu"]
    assert base_eval.main(flags) == 0
    assert "not of the model's training data" not in capsys.readouterr().out
    assert "text.jsonl" in json.loads((copied / "report" / "report.json").read_text())["base_eval"]["data"]
    other = copied / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"wholly other words {i}"}) + "\n" for i in range(99)))
    assert base_eval.main([*flags, f"--data={other}"]) == 0
    assert "not of the model's training data" in capsys.readouterr().out

    def gone(*args: Any, **kwargs: Any) -> None:
        raise UserError("no such file")

    monkeypatch.setattr("nanochat.evals.subject.open_corpus", gone)
    with pytest.raises(UserError, match="--data"):
        base_eval.main(flags)
