"""Tasks over public data sets: hub layout, splits, rendering, honest evaluation. Rows here are made up."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from nanochat.conversation import validate_conversation
from nanochat.sandbox.levels import SAFE_LEVELS, why_unavailable
from tasks import hub
from tasks.answers import final_number, final_text
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, TaskSequence, keyed_random
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, solution_parts
from tasks.hub import DatasetMissing, load_hub_rows
from tasks.humaneval import HumanEval, extract_program
from tasks.mmlu import MMLU
from tasks.multiple_choice import render_mc
from tasks.registry import TASKS, known_name, make_task
from tasks.smoltalk import SmolTalk

Rows = list[dict[str, Any]]

ARC_ROWS: Rows = [
    {"question": "What falls?", "choices": {"text": ["rain", "rock"], "label": ["A", "B"]}, "answerKey": "A"},
    {"question": "What flies?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"},
]
MMLU_ROW = {"question": "2+2?", "subject": "sums", "choices": ["1", "2", "3", "4"], "answer": 3}
GSM_ANSWER = (
    "Ann has 2*3=<<2*3=6>>6 eggs.\nShe sells 6/4=<<6/4=1.50>>1.5 trays for $<<1,000+234=1234>>1,234.\n#### 1,234"
)
HUMANEVAL_ROW = {
    "task_id": "X/0",
    "prompt": 'import math\n\ndef half(n):\n    return n / 2\n\ndef root(n):\n    """The square root."""\n',
    "canonical_solution": "    return math.sqrt(n) + half(0)\n",
    "test": "def check(candidate):\n    assert candidate(9) == 3\n    assert candidate(4) == 2\n",
    "entry_point": "root",
}


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data set mirror, and no network."""
    monkeypatch.setenv("NANOCHAT_DATASETS_DIR", str(tmp_path))
    monkeypatch.setattr(hub, "download_split", lambda *_: (None, "no network in tests"))
    return tmp_path


def put(mirror: Path, place: str, rows: Rows, split: str = "test", shards: int = 1) -> None:
    folder = mirror / place
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(shards):
        part = pa.Table.from_pylist(rows[i * len(rows) // shards : (i + 1) * len(rows) // shards])
        pq.write_table(part, folder / f"{split}-{i:05d}-of-{shards:05d}.parquet")


def rendered(conversation: dict[str, Any]) -> str:
    """The reference answer as the engine would show it, tool tokens spelled out."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    frames = {
        "text": "{}",
        "python": "<|python_start|>{}<|python_end|>",
        "python_output": "<|output_start|>{}<|output_end|>",
    }
    return "".join(frames[part["type"]].format(part["text"]) for part in content) + "<|assistant_end|>"


class Numbers(Task):
    """Conversation i says i."""

    def __init__(self, size: int, offset: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        self.size, self.offset = size, offset

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": str(index + self.offset)}]
        }

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]


def said(task: Task) -> list[int]:
    return [int(conversation["messages"][-1]["content"]) for conversation in task]


# ---------------------------------------------------------------------------------------------------
# Task, TaskMixture, TaskSequence


@pytest.mark.parametrize(
    "start, stop, step", [(0, None, 1), (3, None, 1), (0, 4, 1), (1, 9, 3), (2, 100, 4), (5, 5, 1)]
)
def test_slices_are_python_slices(start: int, stop: int | None, step: int) -> None:
    task = Numbers(10, start=start, stop=stop, step=step)
    expected = list(range(10))[start:stop:step]
    assert said(task) == expected
    assert len(task) == len(expected)
    assert [int(task[i]["messages"][-1]["content"]) for i in range(len(task))] == expected
    with pytest.raises(IndexError):
        task[len(expected)]


@pytest.mark.parametrize("wrong", [{"start": -1}, {"step": 0}, {"start": 5, "stop": 4}])
def test_wrong_slices(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="slice"):
        Numbers(10, **wrong)


def test_reward_is_the_evaluation() -> None:
    task = Numbers(2)
    assert (task.reward(task[1], "1"), task.reward(task[1], "0")) == (1.0, 0.0)


def test_mixture_is_a_deterministic_permutation() -> None:
    mixture = TaskMixture([Numbers(50), Numbers(30, offset=50)])
    assert sorted(said(mixture)) == list(range(80))
    assert said(mixture) != list(range(80))
    assert said(mixture) == said(TaskMixture([Numbers(50), Numbers(30, offset=50)], seed=42))
    assert said(mixture) != said(TaskMixture([Numbers(50), Numbers(30, offset=50)], seed=43))
    first_half = said(mixture)[:40]
    assert 10 < sum(value < 50 for value in first_half) < 40  # really mixed


def test_mixture_order_is_pinned_across_machines() -> None:
    # PCG64 seeded with (42, 1), sorted by raw output: the definition, written out with numpy's own names.
    import numpy as np

    raw = np.random.PCG64(np.random.SeedSequence([42, 1])).random_raw(6).tolist()
    assert said(TaskMixture([Numbers(6)])) == sorted(range(6), key=raw.__getitem__)


def test_negative_seeds_are_seeds_of_their_own() -> None:
    orders = {seed: tuple(said(TaskMixture([Numbers(30)], seed=seed))) for seed in (-1, 0, 1)}
    assert len(set(orders.values())) == 3
    assert keyed_random(1).random() != keyed_random(-1).random()


def test_a_task_listed_twice_is_two_epochs() -> None:
    twice, once = Numbers(5), Numbers(4, offset=10)
    mixture = TaskMixture([twice, once, twice])
    assert Counter(said(mixture)) == {**dict.fromkeys(range(5), 2), **dict.fromkeys(range(10, 14), 1)}


def test_mixture_knows_whose_example_it_is() -> None:
    small, large = Numbers(3), Numbers(5, offset=10)
    mixture = TaskMixture([small, large], start=2)
    assert len(mixture) == 6
    for i in range(len(mixture)):
        assert mixture.task_of(i) is (small if said(mixture)[i] < 10 else large)
    with pytest.raises(TypeError, match="task_of"):
        mixture.evaluate(mixture[0], "1")


def test_sequence_keeps_the_order() -> None:
    assert said(TaskSequence([Numbers(2), Numbers(0), Numbers(3, offset=7)])) == [0, 1, 7, 8, 9]
    assert len(TaskSequence([])) == 0 and len(TaskMixture([])) == 0


# ---------------------------------------------------------------------------------------------------
# Where rows come from


def test_rows_of_several_shards_in_order(mirror: Path) -> None:
    put(mirror, "some/set/main", [{"n": i} for i in range(7)], shards=3)
    rows = load_hub_rows("some/set", "main", "test")
    assert [row["n"] for row in rows] == list(range(7))
    assert (len(rows), rows[2], rows[-1], rows[1:3]) == (7, {"n": 2}, {"n": 6}, [{"n": 1}, {"n": 2}])
    with pytest.raises(IndexError):
        rows[7]


def test_splits_are_never_mixed(mirror: Path) -> None:
    put(mirror, "allenai/ai2_arc/ARC-Easy", ARC_ROWS, "validation")
    assert len(ARC("ARC-Easy", "validation")) == 2
    with pytest.raises(DatasetMissing, match=r"ai2_arc.*'test'.*validation.*NANOCHAT_DATASETS_DIR") as error:
        ARC("ARC-Easy", "test")
    assert "\n" not in str(error.value)
    with pytest.raises(DatasetMissing, match="no network in tests"):
        ARC("ARC-Challenge", "test")
    with pytest.raises(UserError, match="'dev'"):
        ARC("ARC-Easy", "dev")


def test_split_names_that_begin_alike(mirror: Path) -> None:
    put(mirror, "some/set/main", [{"n": 1}], "train_extra")
    with pytest.raises(DatasetMissing, match="train_extra"):
        load_hub_rows("some/set", "main", "train")


def test_damaged_mirrors(mirror: Path) -> None:
    put(mirror, "some/set/main", [{"n": i} for i in range(4)], shards=2)
    (mirror / "some/set/main/test-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="1 of 2"):
        load_hub_rows("some/set", "main", "test")
    (mirror / "some/set/main/test-00001-of-00002.parquet").write_bytes(b"PAR1 not parquet")
    with pytest.raises(UserError, match="test-00001-of-00002"):
        load_hub_rows("some/set", "main", "test")
    put(mirror, "openai/gsm8k/main", [{"question": "?", "solution": "1"}])
    with pytest.raises(UserError, match=r"'answer'.*question, solution"):
        GSM8K(split="test")


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo=repo)
        put(tmp_path, "snapshot/data", [{"n": 5}], "train")
        return str(tmp_path / "snapshot")

    monkeypatch.delenv("NANOCHAT_DATASETS_DIR", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    rows = load_hub_rows("some/set", "default", "train")
    assert list(rows) == [{"n": 5}] and rows.origin == "hub some/set (train)"
    assert asked["repo"] == "some/set" and asked["repo_type"] == "dataset"
    assert asked["cache_dir"] == tmp_path / "base" / "hub"
    with pytest.raises(DatasetMissing, match=r"'test'.*train\)"):
        load_hub_rows("some/set", "default", "test")


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(repo: str, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.delenv("NANOCHAT_DATASETS_DIR", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(DatasetMissing, match=r"openai/gsm8k.*main.*'train'.*NANOCHAT_DATASETS_DIR"):
        GSM8K()


# ---------------------------------------------------------------------------------------------------
# The benchmarks


def test_render_mc_word_for_word() -> None:
    assert render_mc("Why?", ["A", "B"], ["so", "no"]) == (
        "Multiple Choice question: Why?\n- so=A\n- no=B\n\nRespond only with the letter of the correct answer."
    )


def test_arc(mirror: Path) -> None:
    put(mirror, "allenai/ai2_arc/ARC-Challenge", ARC_ROWS)
    task = ARC("ARC-Challenge", "test")
    assert (task.name, task.eval_type, len(task)) == ("ARC-Challenge", "categorical", 2)
    assert task[1]["letters"] == ["1", "2", "3"]
    assert task[1]["messages"][1]["content"] == "3"
    assert task.evaluate(task[0], "A") and task.evaluate(task[0], " A.<|assistant_end|>")
    for wrong in ("B", "", "a", "AB", "A or B", task[0]["messages"][0]["content"]):
        assert not task.evaluate(task[0], wrong)


def test_mmlu_and_its_nested_training_rows(mirror: Path) -> None:
    put(mirror, "cais/mmlu/all", [MMLU_ROW])
    put(mirror, "cais/mmlu/auxiliary_train", [{"train": {**MMLU_ROW, "answer": 0}}], "train")
    test, train = MMLU("all", "test"), MMLU("auxiliary_train", "train")
    assert test[0]["messages"][1]["content"] == "D" and test[0]["subject"] == "sums"
    assert train[0]["messages"][1]["content"] == "A"
    assert train[0]["messages"][0] == test[0]["messages"][0]
    with pytest.raises(UserError, match="'train'"):
        MMLU("all", "train")


def test_gsm8k_calls_become_tool_parts(mirror: Path) -> None:
    put(mirror, "openai/gsm8k/main", [{"question": "How much?", "answer": GSM_ANSWER}])
    task = GSM8K(split="test")
    validate_conversation(task[0], for_training=True)
    assert task[0]["messages"][1]["content"] == [
        {"type": "text", "text": "Ann has 2*3="},
        {"type": "python", "text": "2*3"},
        {"type": "python_output", "text": "6"},
        {"type": "text", "text": "6 eggs.\nShe sells 6/4="},
        {"type": "python", "text": "6/4"},
        {"type": "python_output", "text": "1.5"},  # as the calculator says it, not the data's 1.50
        {"type": "text", "text": "1.5 trays for $"},
        {"type": "python", "text": "1,000+234"},
        {"type": "python_output", "text": "1234"},
        {"type": "text", "text": "1,234.\n#### 1,234"},
    ]
    assert solution_parts("<<x y=3>>3")[1] == {"type": "python_output", "text": "3"}  # beyond the calculator


def test_gsm8k_judges_the_number_after_the_marker(mirror: Path) -> None:
    put(mirror, "openai/gsm8k/main", [{"question": "1234 eggs are #### 1234?", "answer": GSM_ANSWER}])
    task = GSM8K(split="test")
    for right in (
        rendered(task[0]),
        "#### 1234",
        "#### $1,234.00",
        "so\n####1234.\n",
        "#### 5\n#### 1234<|assistant_end|>",
    ):
        assert task.evaluate(task[0], right), right
    echo = task[0]["messages"][0]["content"]
    for wrong in ("", "1234", "#### 1235", "#### 12,345", "#### -1234", "####", "#### none", "1234\n#### 6", echo):
        assert not task.evaluate(task[0], wrong), wrong
    assert not task.evaluate(task[0], "#### 6<|assistant_end|>#### 1234")
    assert not task.evaluate(task[0], "#### 1234<|python_start|>1<|python_end|><|output_start|>#### 1234<|output_end|>")


def run_program(program: str, tests: str, *_: Any) -> bool:
    """passes_tests without a sandbox, for programs that this file wrote itself."""
    command = [sys.executable, "-I", "-c", f"{program}\n\n{tests}"]
    return subprocess.run(command, capture_output=True, timeout=20).returncode == 0


def test_humaneval(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(mirror, "openai/openai_humaneval/openai_humaneval", [HUMANEVAL_ROW])
    task = HumanEval()
    whole = task[0]["messages"][1]["content"]
    with monkeypatch.context() as patch:
        patch.setattr("nanochat.sandbox.levels.why_unavailable", lambda level: "not today")
        with pytest.raises(UserError, match="not today"):
            task.evaluate(task[0], whole)
    body = HUMANEVAL_ROW["canonical_solution"]
    monkeypatch.setattr("tasks.humaneval.passes_tests", run_program)
    assert task.evaluate(task[0], whole)
    assert task.evaluate(task[0], body)  # goes on where the prompt stops
    redefined = f"Sure!\n```python\ndef root(n):\n{body}```\nThat is all."
    assert task.evaluate(task[0], redefined)
    assert not task.evaluate(task[0], "    return 3\n")
    with pytest.raises(UserError, match="'train'"):
        HumanEval("train")


def test_humaneval_in_the_sandbox(mirror: Path) -> None:
    """Of a machine without a safe level the unsafe one is taken: the programs are this file's own."""
    put(mirror, "openai/openai_humaneval/openai_humaneval", [HUMANEVAL_ROW])
    safe = not all(why_unavailable(level) for level in SAFE_LEVELS)
    task = HumanEval(sandbox="" if safe else "unsafe")
    whole, body = task[0]["messages"][1]["content"], HUMANEVAL_ROW["canonical_solution"]
    right = [
        whole,
        body,
        f"Sure!\n```python\ndef root(n):\n{body}```\nThat is all.",
        "```python\nimport math\ndef half(n): return 0\ndef root(n): return math.sqrt(n)\n```",
    ]
    wrong = [
        "    pass\n",
        "    return 3\n",
        "    exit(0)\n",
        "",
        "I do not know.",
        "    import os; os._exit(0)\n",
        "    return math.sqrt(n) +\n",
        f"{body}\ncheck = print\ndef root(n): return 3\n",
    ]
    for answer in right:
        assert task.evaluate(task[0], answer), answer
    for answer in wrong:
        assert not task.evaluate(task[0], answer), answer


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("    return 1\n", "    return 1\n"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("text\n```\nx = 1\n``` and\n```py\ny\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("x = 1<|assistant_end|>y", "x = 1"),
    ],
)
def test_extract_program(completion: str, program: str) -> None:
    assert extract_program(completion) == program


def talk(*turns: tuple[str | None, str | None]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD_TALKS = [
    talk(("user", "Hi"), ("assistant", "Hello")),
    talk(("system", "Be kind"), ("user", "Hi"), ("assistant", "Hello")),
    talk(("user", "你好"), ("assistant", "您好"), ("user", "?"), ("assistant", "!")),
]
BAD_TALKS: Rows = [
    talk(),
    talk(("user", "Hi")),
    talk(("system", "Be kind")),
    talk(("assistant", "Hello")),
    talk(("assistant", "Hello"), ("user", "Hi")),
    talk(("user", "Hi"), ("user", "Hi")),
    talk(("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")),
    talk(("user", "Hi"), ("system", "Be kind"), ("assistant", "Hello")),
    talk(("user", "Hi"), ("assistant", " \n")),
    talk(("user", None), ("assistant", "Hello")),
    talk((None, "Hi"), ("assistant", "Hello")),
    talk(("human", "Hi"), ("gpt", "Hello")),
    {"messages": None},
]


def test_smoltalk_skips_what_is_malformed(mirror: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: Rows = []
    for i, bad in enumerate(BAD_TALKS):
        rows += [bad, GOOD_TALKS[i % 3]]
    put(mirror, "HuggingFaceTB/smol-smoltalk/data", rows, "train", shards=3)
    task = SmolTalk("train")
    assert list(task) == [GOOD_TALKS[i % 3] for i in range(len(BAD_TALKS))]
    assert task.skipped == len(BAD_TALKS)
    assert f"{len(BAD_TALKS)} of {len(rows)}" in capsys.readouterr().err
    for conversation in task:
        validate_conversation(conversation, for_training=True)


def test_smoltalk_with_nothing_good(mirror: Path) -> None:
    put(mirror, "HuggingFaceTB/smol-smoltalk/data", BAD_TALKS[:3], "train")
    with pytest.raises(UserError, match="smol-smoltalk"):
        SmolTalk("train")


def test_embedded_samples_are_asked_for_by_name(mirror: Path) -> None:
    for name in ("MMLU", "GSM8K", "HumanEval"):
        task = make_task(name, sample=True)
        assert 0 < len(task) <= 32 and "embedded sample" in task.rows.origin  # type: ignore[attr-defined]
        for conversation in task:
            validate_conversation(conversation)
            if name != "HumanEval":  # tests/test_execution.py runs those
                assert task.evaluate(conversation, rendered(conversation))
                assert not task.evaluate(conversation, conversation["messages"][0]["content"])
        with pytest.raises(DatasetMissing):
            make_task(name)
    with pytest.raises(DatasetMissing, match="openai/gsm8k"):
        GSM8K(split="train", sample=True)


# ---------------------------------------------------------------------------------------------------
# Your own conversations


def test_customjson(tmp_path: Path) -> None:
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]
    lines = [
        GOOD_TALKS[2]["messages"],
        talk(("user", "1+1?"))["messages"] + [{"role": "assistant", "content": parts}],
        GOOD_TALKS[1],
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8-sig")
    task = CustomJSON(path)
    assert len(task) == 3
    assert task[0] == GOOD_TALKS[2] and task[2] == GOOD_TALKS[1]
    assert task[1]["messages"][1]["content"] == parts


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b'"hello"', "messages"),
        (b"[]", "empty"),
        (b'{"turns": []}', "messages"),
        (b'[{"role": "user", "content": "Hi"}]', "no assistant message"),
        (b'[{"role": "narrator", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]', "narrator"),
        (b'[{"role": "user"}, {"role": "assistant", "content": "Hi"}]', "content"),
        (b'[{"role": "user", "content": 3}, {"role": "assistant", "content": "Hi"}]', "string"),
        (b'[{"role": "user", "content": "\xff"}]', "UTF-8"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_customjson_names_the_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(GOOD_TALKS[0]).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match=r"mine\.jsonl, line 3: ") as error:
        CustomJSON(path)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_customjson_without_conversations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl"):
        CustomJSON(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty\.jsonl"):
        CustomJSON(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=str(tmp_path)):
        CustomJSON(tmp_path)


# ---------------------------------------------------------------------------------------------------
# Final answers, registry


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("19", 19),
        ("-5", -5),
        ("The answer is 19.", 19),
        ("It is 1,234.50 dollars", 1234.5),
        ("$1,234", 1234),
        (".5", 0.5),
        ("12 + 7 = 19", 19),
        ("12-7=5", 5),
        ("= -5", -5),
        ("#### 3", 3),
        ("3 #### -4.0 eggs", -4),
        ("Is that 7? No, 8!", 8),
        ("", None),
        ("none", None),
        ("12 + 7", None),
        ("12+7", None),
        ("5 -5", None),
        ("12x1", None),
        ("12 times 7", None),
        ("What is 0 + 5?", None),
        ("the sum of 0 and 5", None),
        ("How often does 1 go into 5?", None),
        ("#### none 3", None),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    found = final_number(text)
    assert (found is None) if number is None else float(found) == number  # type: ignore[arg-type]


def test_final_text_is_what_comes_last_without_the_question() -> None:
    conversation = talk(("user", "How many?"), ("assistant", "3"))
    tool = "<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>"
    assert final_text(conversation, f"first {tool} then {tool} 4 <|assistant_end|> 5") == "4"
    assert final_text(conversation, "How many? 3") == "3"
    assert final_text(conversation, f"3 {tool}") == ""


def test_registry() -> None:
    names = (
        "ARC-Easy ARC-Challenge MMLU GSM8K HumanEval SpellingBee SimpleSpelling Arithmetic WordProblems1 "
        "WordProblems2 WordProblems3 Identity Unanswerable Answerable Stories"
    )
    assert list(TASKS) == names.split()
    assert {name: spec.baseline for name, spec in TASKS.items() if spec.baseline} == {
        "ARC-Easy": 0.25,
        "ARC-Challenge": 0.25,
        "MMLU": 0.25,
    }
    assert known_name("gsm8k", TASKS) == "GSM8K"
    with pytest.raises(UserError, match=r"'Chess'.*ARC-Easy, "):
        make_task("Chess")


def test_registry_takes_another_split(mirror: Path) -> None:
    put(mirror, "allenai/ai2_arc/ARC-Easy", ARC_ROWS, "validation")
    task = make_task("ARC-Easy", "validation", stop=1)
    assert len(task) == 1
