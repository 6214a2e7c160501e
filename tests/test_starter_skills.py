"""The starter skills: spelling, counting, arithmetic, identity. Held-out items are really held out."""

import operator
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from nanochat.conversation import validate_conversation
from nanochat.inference.calculator import use_calculator
from tasks.arithmetic import Arithmetic, is_held_out
from tasks.common import Task
from tasks.hub import DatasetMissing
from tasks.registry import TASKS, make_task
from tasks.spellingbee import COUNTING_QUESTIONS, SPELLING_QUESTIONS, SimpleSpelling, SpellingBee
from tasks.starter import Identity, StarterChat
from tasks.words import load_words

TRAIN_WORDS = ("the", "apple", "banana", "strawberry", "river", "naïve")
TEST_WORDS = ("melon", "coffee", "banshee")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@pytest.fixture
def words(tmp_path: Path) -> Path:
    (tmp_path / "words_train.txt").write_text("\n".join(TRAIN_WORDS) + "\n", encoding="utf-8")
    (tmp_path / "words_test.txt").write_text("\n".join(TEST_WORDS) + "\n", encoding="utf-8")
    return tmp_path


def question(conversation: dict[str, Any]) -> str:
    return conversation["messages"][0]["content"]


def parts(conversation: dict[str, Any]) -> list[tuple[str, str]]:
    return [(part["type"], part["text"]) for part in conversation["messages"][1]["content"]]


def rendered(conversation: dict[str, Any]) -> str:
    """The reference answer as the engine would show it, tool tokens spelled out."""
    frames = {
        "text": "{}",
        "python": "<|python_start|>{}<|python_end|>",
        "python_output": "<|output_start|>{}<|output_end|>",
    }
    return "".join(frames[kind].format(text) for kind, text in parts(conversation)) + "<|assistant_end|>"


def with_output(call: str, output: str, text: str) -> str:
    return f"<|python_start|>{call}<|python_end|><|output_start|>{output}<|output_end|>{text}<|assistant_end|>"


def tasks_of(split: str, words: Path, size: int = 40, seed: int = 0) -> list[Task]:
    return [
        SimpleSpelling(size, split, words_dir=words, seed=seed),
        SpellingBee(size, split, words_dir=words, seed=seed),
        Arithmetic(size, split, seed=seed),
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_examples_are_pure_functions_of_seed_split_and_index(words: Path, split: str) -> None:
    for first, again, other in zip(
        tasks_of(split, words), tasks_of(split, words, size=30), tasks_of(split, words, seed=1)
    ):
        examples = list(first)
        assert len(examples) == 40
        assert [again[i] for i in reversed(range(30))] == examples[:30][::-1]  # whatever the order and the size
        assert list(other) != examples
        for conversation in examples:
            validate_conversation(conversation, for_training=True)


def test_unknown_splits(words: Path) -> None:
    for make in (SimpleSpelling, SpellingBee, Arithmetic):
        with pytest.raises(UserError, match="train and test"):
            make(10, "val")
    with pytest.raises(UserError, match="train and val"):
        StarterChat("test")


# ---------------------------------------------------------------------------------------------------
# Words


def test_word_lists(words: Path, tmp_path: Path) -> None:
    assert load_words("train", words) == TRAIN_WORDS
    with pytest.raises(DatasetMissing, match="words_test"):
        load_words("test", tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/words_train.txt").write_text("\n")
    with pytest.raises(UserError, match="words_train"):
        load_words("train", tmp_path / "empty")


def test_spelling_by_hand(words: Path) -> None:
    task = SimpleSpelling(60, "train", words_dir=words)
    by_word = {c["messages"][1]["content"].replace(" ", ""): c for c in task}
    assert by_word["apple"]["messages"][1]["content"] == "a p p l e"
    assert by_word["naïve"]["messages"][1]["content"] == "n a ï v e"
    apple = by_word["apple"]
    for right in ("a p p l e", "a p p l e.<|assistant_end|>", " a, p, p, l, e", "a,p,p,l,e"):
        assert task.evaluate(apple, right), right
    for wrong in (
        "",
        "apple",
        "a p l e",
        "a p p l e s",
        "A p p l e",
        "a p p l e a p p l e",
        "e l p p a",
        question(apple),
    ):
        assert not task.evaluate(apple, wrong), wrong


def test_every_word_once_per_pass_and_only_of_its_split(words: Path) -> None:
    for split, expected in (("train", TRAIN_WORDS), ("test", TEST_WORDS)):
        n = len(expected)
        spelled = [c["messages"][1]["content"].replace(" ", "") for c in SimpleSpelling(3 * n, split, words_dir=words)]
        counted = [parts(c)[0][1].replace(" ", "").strip() for c in SpellingBee(3 * n, split, words_dir=words)]
        for drawn in (spelled, counted):
            for turn in range(3):
                assert sorted(drawn[turn * n : (turn + 1) * n]) == sorted(expected)


def test_counting_is_right_for_every_example(words: Path) -> None:
    task = SpellingBee(300, "train", words_dir=words)
    letters, zero = Counter[str](), 0
    for conversation in task:
        (_, spelled), (_, call), (_, output), (kind, answer) = parts(conversation)
        match = re.fullmatch(r'" (\w+)"\.count\("(\w)"\)', call)
        assert match and kind == "text"
        word, letter = match[1], match[2]
        count = sum(character == letter for character in word)  # counted without the calculator
        assert output == answer == str(count) == str(use_calculator(call))
        assert spelled == " ".join(word) + "\n"
        assert word in question(conversation)
        assert f" {letter}" in re.sub(r"[\"']", " ", question(conversation))
        letters[letter] += 1
        zero += count == 0
        assert task.evaluate(conversation, rendered(conversation))
        assert not task.evaluate(conversation, question(conversation))
        assert not task.evaluate(
            conversation, rendered(conversation).replace(f">{answer}<|assistant", f">{count + 1}<|assistant")
        )
    assert len(letters) > 10 and 0 < zero < 60


def test_counting_needs_a_final_number(words: Path) -> None:
    task = SpellingBee(50, "train", words_dir=words)
    conversation = next(c for c in task if parts(c)[2][1] == "1")
    call = parts(conversation)[1][1]
    for right in ("1", "There is 1.", "#### 1", with_output(call, "1", "1"), with_output(call, "2", "It is 1.")):
        assert task.evaluate(conversation, right), right
    for wrong in ("", "one", "1 or 2", "1?", with_output(call, "1", ""), with_output(call, "1", "2")):
        assert not task.evaluate(conversation, wrong), wrong


def test_there_are_many_ways_to_ask() -> None:
    assert len(set(COUNTING_QUESTIONS)) >= 40 and len(set(SPELLING_QUESTIONS)) >= 15
    assert all("{word}" in template and "{letter}" in template for template in COUNTING_QUESTIONS)
    assert all(template.count("{word}") == 1 for template in SPELLING_QUESTIONS)


# ---------------------------------------------------------------------------------------------------
# Arithmetic


def operands(conversation: dict[str, Any]) -> tuple[int, str, int]:
    match = re.fullmatch(r"(\d+)([-+*/])(\d+)", parts(conversation)[0][1])
    assert match
    return int(match[1]), match[2], int(match[3])


def test_sums_are_right_and_ask_for_their_own_numbers() -> None:
    task = Arithmetic(800, "train")
    seen, negative = Counter[str](), 0
    for conversation in task:
        a, operation, b = operands(conversation)
        _, (_, output), (_, answer) = parts(conversation)
        result = OPERATIONS[operation](a, b)
        assert output == answer == str(result)
        assert operation != "/" or result * b == a
        assert max(a, b) < 1000
        numbers = [int(n) for n in re.findall(r"\d+", question(conversation))]
        assert sorted(numbers) == sorted([a, b])
        if numbers != [a, b]:  # turned round only where the words say so
            assert re.search(r"from|away|go into", question(conversation))
        seen[operation] += 1
        negative += result < 0
    assert min(seen.values()) > 150 and 0 < negative < 40
    assert len({re.sub(r"\d+", "#", question(c)) for c in task}) > 100


def test_no_training_sum_is_a_test_sum() -> None:
    def keys(split: str, seed: int) -> set[tuple[object, ...]]:
        found = (operands(c) for c in Arithmetic(1500, split, seed=seed))
        # Written out here a second time: 3+5 and 5+3 are the same sum, 3-5 and 5-3 are not.
        return {(op, frozenset((a, b)) if op in "+*" else (a, b)) for a, op, b in found}

    train = keys("train", 0) | keys("train", 1) | keys("train", -1)
    test = keys("test", 0) | keys("test", 5)
    assert not train & test
    assert len(test) > 1000


def test_the_held_out_share_is_a_tenth_and_ignores_order() -> None:
    pairs = [(a, b, op) for a in range(60) for b in range(60) for op in "+-*/"]
    held_out = [pair for pair in pairs if is_held_out(*pair)]
    assert 0.08 < len(held_out) / len(pairs) < 0.13
    assert all(is_held_out(a, b, op) == is_held_out(b, a, op) for a, b, op in pairs if op in "+*")
    assert any(is_held_out(a, b, "-") != is_held_out(b, a, "-") for a, b, _ in pairs)
    assert is_held_out(12, 7, "+") == is_held_out(7, 12, "+")


def test_arithmetic_judges_the_final_answer_only() -> None:
    task = Arithmetic(300, "test")
    for conversation in task:
        call, answer = parts(conversation)[0][1], parts(conversation)[2][1]
        assert task.evaluate(conversation, rendered(conversation))
        for wrong in (
            question(conversation),
            call,
            with_output(call, answer, ""),
            with_output(call, answer, answer + "1"),
            "",
        ):
            assert not task.evaluate(conversation, wrong), (question(conversation), wrong)
    conversation = next(c for c in task if operands(c)[1] == "+")
    a, _, b = operands(conversation)
    for right in (str(a + b), f"{a} + {b} = {a + b}", f"The answer is {a + b}.", f"{a + b}.0"):
        assert task.evaluate(conversation, right), right


# ---------------------------------------------------------------------------------------------------
# Starter conversations and identity


def exchange(source: str, *turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)], "source": source}


@pytest.fixture
def starter(tmp_path: Path) -> Path:
    train = [
        exchange("smalltalk", "hello", "hi", "Are you a cat?", "no"),
        exchange("identity", "Who are you?", "I am nanochat."),
    ]
    val = [
        exchange("qa", "What is rain?", "Water."),
        exchange("identity", "who are YOU", "I am nanochat."),  # known from training
        exchange("identity", "Are you a cat", "I am nanochat, no cat."),  # known from a later turn
        exchange("identity", "What is your name?", "Nanochat!", "Thanks", "Welcome"),
        exchange("identity", "what is your name", "nanochat"),  # twice
        exchange("identity", "Are you nanochat?", "Yes, nanochat."),  # an echo would pass
        exchange("identity", "Do you sleep?", "Never."),  # its answer does not say the name
    ]
    pq.write_table(pa.Table.from_pylist(train), tmp_path / "sft_train.parquet")
    pq.write_table(pa.Table.from_pylist(val), tmp_path / "sft_val.parquet")
    return tmp_path


def test_starter_chat(starter: Path) -> None:
    assert len(StarterChat("train", data_dir=starter)) == 2
    rain = StarterChat("val", "qa", data_dir=starter)
    assert rain.name == "StarterChat/qa"
    assert list(rain) == [{"messages": exchange("qa", "What is rain?", "Water.")["messages"]}]
    assert len(StarterChat("val", "identity", data_dir=starter, stop=4)) == 4
    with pytest.raises(UserError, match=r"'poems'.*identity, qa"):
        StarterChat("val", "poems", data_dir=starter)
    with pytest.raises(DatasetMissing, match="sft_train"):
        StarterChat("train", data_dir=starter / "elsewhere")
    (starter / "sft_val.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"sft_val\.parquet"):
        StarterChat("val", data_dir=starter)


def test_identity_asks_only_what_is_unseen_and_cannot_be_echoed(starter: Path) -> None:
    task = Identity(data_dir=starter)
    assert [question(conversation) for conversation in task] == ["What is your name?"]
    assert len(task[0]["messages"]) == 2
    for right in ("Nanochat!", "I'm NANOCHAT, a small model.<|assistant_end|>"):
        assert task.evaluate(task[0], right)
    for wrong in ("", "I am a chat model.", "nano chat", question(task[0]), "x<|assistant_end|>nanochat"):
        assert not task.evaluate(task[0], wrong)


def test_the_shipped_skills_are_held_out() -> None:
    """On the files in the package, once they are built."""
    try:
        train, test = load_words("train"), load_words("test")
        skills = {name: make_task(name) for name, spec in TASKS.items() if spec.starter}
    except DatasetMissing as missing:
        pytest.skip(str(missing))
    assert not set(train) & set(test)
    assert all(word == word.lower() and not re.search(r"[\s\"\\]", word) for word in train + test)
    for name, task in skills.items():
        assert len(task) >= 20, name
        for conversation in task:
            validate_conversation(conversation, for_training=True)
            answer = conversation["messages"][1]["content"]
            assert task.evaluate(conversation, answer if isinstance(answer, str) else rendered(conversation))
            assert not task.evaluate(conversation, question(conversation))
