"""Conversations of one's own for finetuning: formats, several sources, what is left out and why, the held-out part."""

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from cli_helpers import refused
from hypothesis import given, settings, strategies as st
from stubs import TOKENIZER

from nanochat.checkpoint.runs import run_dir
from nanochat.checkpoint_manager import open_checkpoint
from nanochat.common import UserError
from nanochat.conversation import render
from nanochat.data.chat_formats import ANSWERS, LISTS, QUESTIONS, SYSTEMS, to_conversation
from nanochat.data.listing import split_weight
from nanochat.data.rendered import NO_ANSWER, TOO_LONG, TRUNCATED, WHOLE, render_row
from nanochat.dataloader import ConversationLoader
from nanochat.report import load_report
from nanochat.reporting.console import print_conversation
from nanochat.runtime import Runtime
from nanochat.train.finetuning import make_hooks
from nanochat.train.run import Run
from scripts import chat_sft
from tasks.customjson import CustomJSON
from tasks.mixtures import PUBLISHED, open_sources
from tasks.sft_data import open_sft_data

SFT = ["--num-iterations=1", "--total-batch-size=32", "--eval-tokens=16", "--device-type=cpu"]


def chat(*turns: str, system: str = "") -> list[dict[str, str]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def numbered(count: int) -> list[list[dict[str, str]]]:
    return [chat(f"q{i}", f"a{i}") for i in range(count)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------
# Formats of a row

HI = chat("Hi", "Ho")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (HI, HI),
        ({"messages": HI, "id": 7, "source": "x"}, HI),
        ({"messages": json.dumps(HI)}, HI),  # a column of a CSV file
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, HI),
        ({"conversations": HI}, HI),
        ({"system": "Be brief.", "conversations": HI}, chat("Hi", "Ho", system="Be brief.")),
        ({"instruction": "Add", "input": "1+1", "output": "2"}, chat("Add\n\n1+1", "2")),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, HI),
        ({"instruction": "Hi", "context": None, "response": "Ho", "category": "talk"}, HI),
        ({"instruction": "c", "output": "d", "history": [["a", "b"]]}, chat("a", "b", "c", "d")),
        ({"prompt": "Hi", "completion": "Ho"}, HI),
        ({"prompt": HI[:1], "completion": HI[1:]}, HI),
        ({"question": "Hi", "answer": "Ho"}, HI),
        ({"input": "Hi", "output": "Ho"}, HI),
        ({"conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]}, chat("a", "b", "c", "d")),
        (
            {"system_prompt": "Be brief.", "messages": chat("Hi", "Ho", system="Be brief.")},
            chat("Hi", "Ho", system="Be brief."),
        ),
        ({"prompt": "Hi", "prompt_id": "1", "messages": HI}, HI),
        (
            [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "input_text", "text": "i"}]}, HI[1]],
            HI,
        ),
        ([{"role": "developer", "content": "Be brief."}, *HI], chat("Hi", "Ho", system="Be brief.")),
        ([*chat("Hi"), *chat("there"), HI[1]], chat("Hi\n\nthere", "Ho")),
        ([{"from": "gpt", "value": "Ho"}], chat("", "Ho")),
        ([{"role": "User", "content": "Hi"}, {"role": "MODEL", "content": "Ho"}], HI),
        ([*HI, {"role": "system", "content": "Be brief."}], chat("Hi", "Ho", system="Be brief.")),
    ],
)
def test_formats(row: Any, messages: list[dict[str, str]]) -> None:
    assert to_conversation(row)["messages"] == messages


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("hello", "not str"),
        ({}, "nothing"),
        ({"text": "abc"}, "'text'"),
        ({"prompt": "Hi", "chosen": "Ho", "rejected": "Hu"}, "'chosen'"),
        ({"prompt": "a", "question": "b", "answer": "c"}, "both 'prompt' and 'question'"),
        ({"messages": "Hi"}, "list of messages"),
        ({"messages": 3}, "list"),
        ({"messages": []}, "empty"),
        ({"instruction": "a", "output": ""}, "found 'instruction'"),
        ({"question": "a", "answer": 4}, "int"),
        ({"messages": ["Hi", "Ho"]}, "message 1"),
        ({"instruction": "Hi", "output": "Ho", "history": ["a"]}, "history"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, HI[1]], "image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}, HI[1]], "'text'"),
        ([HI[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "message 2 calls a function"),
        ([*HI, {"role": "tool", "content": "4"}], "'tool'"),
        ([HI[0], HI[1] | {"weight": 0.5}], "weight"),
    ],
)
def test_what_cannot_be_learnt_is_refused_with_the_reason(row: Any, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        to_conversation(row)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_an_answer_of_weight_0_is_context() -> None:
    messages = chat("a", "wrong", "b", "right")
    messages[1]["weight"] = 0  # type: ignore[assignment]
    ids, mask = render(TOKENIZER, to_conversation(messages))
    learnt = bytes(i for i, m in zip(ids, mask) if m and i < 256)
    assert learnt == b"right"
    assert sum(mask) == len("right") + 1
    messages[3]["weight"] = 0  # type: ignore[assignment]
    assert render_row(TOKENIZER, to_conversation(messages), 100).use == NO_ANSWER
    messages[3] = chat("", "right" * 10)[1]
    assert render_row(TOKENIZER, to_conversation(messages), 30).use == TOO_LONG


# ---------------------------------------------------------------------------------------------------
# Files


def as_jsonl(path: Path, rows: list[Any]) -> None:
    write_lines(path, rows)


def as_json(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows, indent=2))


def as_gzip(path: Path, rows: list[Any]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def as_zstd(path: Path, rows: list[Any]) -> None:
    path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def as_parquet(path: Path, rows: list[Any]) -> None:
    pq.write_table(pa.table({"messages": rows, "id": list(range(len(rows)))}), path)


def as_csv(path: Path, rows: list[Any]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "completion"], *([m["content"] for m in row] for row in rows)])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", as_jsonl),
        ("a.ndjson", as_jsonl),
        ("a.json", as_json),
        ("a.json", as_jsonl),
        ("a.jsonl.gz", as_gzip),
        ("a.jsonl.zst", as_zstd),
        ("a.parquet", as_parquet),
        ("a.csv", as_csv),
        ("chats", as_jsonl),  # a name that says nothing
    ],
)
def test_files(name: str, write: Callable[[Path, list[Any]], None], tmp_path: Path, base: Path) -> None:
    write(tmp_path / name, numbered(5))
    task = CustomJSON(tmp_path / name)
    assert [conversation["messages"] for conversation in task] == numbered(5)
    assert all(name in task.place(i) for i in range(5))


def test_a_column_of_weights_gives_every_message_one(tmp_path: Path, base: Path) -> None:
    """Null where a row has none: such messages may be merged as those without the field."""
    weighted = [HI[0], HI[1] | {"weight": 0}, *HI]
    as_parquet(tmp_path / "a.parquet", [weighted, [*chat("Hi"), *chat("there"), HI[1]]])
    task = CustomJSON(tmp_path / "a.parquet", strict=False)
    assert not task.bad and len(task) == 2
    assert [message["content"] for message in task[1]["messages"]] == ["Hi\n\nthere", "Ho"]


def test_folders_globs_and_urls(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "mine"
    write_lines(folder / "a.jsonl", numbered(3))
    write_lines(folder / "sub" / "b.jsonl", numbered(4))
    (folder / "notes.pdf").write_text("x")
    for number, row in enumerate(numbered(2)):
        (folder / f"{number}.json").write_text(json.dumps(row))  # a file a conversation
    task = CustomJSON(folder)
    assert len(task) == 9 and "1 .pdf" in task.listing
    assert len(CustomJSON(f"{folder}/**/*.jsonl")) == 7
    fs = fsspec.filesystem("memory")
    fs.pipe("/chats/c.jsonl", (folder / "a.jsonl").read_bytes())
    assert [c["messages"] for c in CustomJSON("memory://chats/c.jsonl")] == numbered(3)
    fs.rm("/chats", recursive=True)


def test_a_copy_of_the_held_out_conversation_is_not_trained_on(tmp_path: Path, base: Path) -> None:
    """Of few conversations the one with the smallest hash is held out: here it is in the file twice."""
    alone = CustomJSON(write_lines(tmp_path / "a.jsonl", numbered(5)))
    (held,) = alone.split(lambda conversation: True)[1]
    path = write_lines(tmp_path / "b.jsonl", [*numbered(5), held["messages"]])
    train, val = CustomJSON(path).split(lambda conversation: True)
    assert list(val) == [held, held] and held not in list(train) and len(train) == 4


def test_bad_rows_are_all_named(tmp_path: Path, base: Path) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [*numbered(3), {"text": "x" * 9999}, chat("alone"), *numbered(1)])
    path.write_text(path.read_text() + "nope\n" + json.dumps(chat("a", "\ud800")) + "\n" + '{"a":' * 9999 + "\n")
    task = CustomJSON(path, strict=False)
    assert len(task) == 4 and len(task.bad) == 5
    assert [line.split(": ")[0] for line in task.bad] == [f"{path}, line {n}" for n in (4, 5, 7, 8, 9)]
    assert r"\ud800" in task.bad[3] and "JSON" in task.bad[4] and max(map(len, task.bad)) < 500
    assert task.place(3) == f"{path}, line 6"
    with pytest.raises(UserError, match=r"line 4.*4 more"):
        CustomJSON(path)


def test_a_damaged_file_costs_its_rest(tmp_path: Path, base: Path) -> None:
    """And not the files beside it."""
    as_gzip(tmp_path / "a.jsonl.gz", [chat(f"q{i}", f"{i * 7919 % 9973}" * 9) for i in range(5000)])
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) * 2 // 3])
    write_lines(tmp_path / "b.jsonl", numbered(3))
    task = CustomJSON(tmp_path, strict=False)
    assert 1000 < len(task) < 5003 and task.place(len(task) - 1).endswith("b.jsonl, line 3")
    assert len(task.bad) == 1 and "a.jsonl.gz" in task.bad[0]
    (tmp_path / "c.jsonl").write_bytes(json.dumps(chat("a", "b")).encode("utf-16"))
    with pytest.raises(UserError, match="iconv"):
        CustomJSON(tmp_path / "c.jsonl")


def test_rows_of_a_table_with_all_columns(tmp_path: Path, base: Path) -> None:
    """Fields that a row does not use are null; others, such as a date, are ignored."""
    now = datetime(2026, 1, 1)
    said = [{"from": "human", "value": "Hi", "role": None, "at": now}, {"from": "gpt", "value": "Ho", "role": None}]
    rows = [
        {"messages": None, "conversations": said, "prompt": None, "completion": None},
        {"messages": None, "conversations": None, "prompt": "Hi", "completion": "Ho"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "tool_calls": None}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")
    task = CustomJSON(tmp_path / "mine.parquet")
    assert [[(m["role"], m["content"]) for m in c["messages"]] for c in task] == [
        [("user", "Hi"), ("assistant", "Ho")]
    ] * 3


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [*LISTS, *QUESTIONS, *ANSWERS, *SYSTEMS, "history", "role", "from", "content", "value", "type"]
            )
            | st.text(max_size=3),
            inner | st.sampled_from(["user", "assistant", "human", "system", "text", "python"]),
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSONS)
def test_any_json_is_a_conversation_or_has_a_reason(row: Any) -> None:
    try:
        conversation = to_conversation(row)
    except ValueError as error:
        assert str(error)
    else:
        ids, mask = render(TOKENIZER, conversation)
        assert len(ids) == len(mask) and to_conversation(conversation) == conversation


# ---------------------------------------------------------------------------------------------------
# Several sources


@pytest.mark.parametrize(
    ("entry", "name", "weight"),
    [
        ("mine.jsonl", "mine.jsonl", 1),
        ("mine.jsonl:3", "mine.jsonl", 3),
        ("starter:0.5", "starter", 0.5),
        (r"C:\chats\mine.jsonl", r"C:\chats\mine.jsonl", 1),
        (r"C:\chats\mine.jsonl:2", r"C:\chats\mine.jsonl", 2),
        ("https://host:8080/a.jsonl", "https://host:8080/a.jsonl", 1),
        ("https://host:8080/a.jsonl:2", "https://host:8080/a.jsonl", 2),
        ("http://localhost:8080", "http://localhost:8080", 1),
        ("s3://bucket/chats/:.25", "s3://bucket/chats/", 0.25),
    ],
)
def test_weights(entry: str, name: str, weight: float) -> None:
    assert split_weight(entry) == (name, weight)


@pytest.mark.parametrize("entry", ["mine.jsonl:0", "mine.jsonl:99999"])
def test_weights_out_of_range(entry: str) -> None:
    with pytest.raises(UserError, match=entry):
        split_weight(entry)


def test_a_file_whose_name_ends_like_a_weight(tmp_path: Path) -> None:
    write_lines(tmp_path / "mine:3", numbered(2))
    assert split_weight(str(tmp_path / "mine:3")) == (str(tmp_path / "mine:3"), 1)


def test_sources(tmp_path: Path, base: Path) -> None:
    one, two = (write_lines(tmp_path / f"{n}.jsonl", numbered(n)) for n in (10, 20))
    sources = open_sources(f"starter:0.5,{one}:2.5,{two}", seed=1)
    assert [source.name for source in sources] == ["starter", "10.jsonl", "20.jsonl"]
    for source in sources:
        source.split(lambda conversation: True, by_tail=False)
    identity = next(part for part in sources[0].train if part.name == "identity")
    assert identity.passes == 2, "four passes, by half"
    part = sources[1].train[0]
    tasks = part.tasks(seed=1)
    assert [len(task) for task in tasks] == [len(part.task)] * 2 + [-(-len(part.task) // 2)]
    assert {c["messages"][0]["content"] for c in tasks[2]} < {c["messages"][0]["content"] for c in tasks[0]}
    for bad in ("", " , ", f"{one},nothing.jsonl", "stater"):
        with pytest.raises(UserError, match="--data"):
            open_sources(bad, seed=1)


def test_published_parts_and_what_is_missing(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of the data sets are at hand, one of them with rows that are no conversation; one lacks its test split."""
    mirror = copied / "mirror"
    talks = [*numbered(30), chat("alone"), []]
    for split_name in ("train", "test"):
        as_parquet(data_file(mirror / "HuggingFaceTB/smol-smoltalk/data", split_name), talks)
    sums = pa.table({"question": ["1+1?"] * 5, "answer": ["It is 2.\n#### 2"] * 5})
    pq.write_table(sums, data_file(mirror / "openai/gsm8k/main", "train"))
    monkeypatch.setenv("NANOCHAT_DATASETS_DIR", str(mirror))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("no network in tests"))
    monkeypatch.setattr("tasks.hub.download_split", lambda *_: (None, "there is no network"))
    source = open_sources("published:0.5", seed=1)[0]
    assert {part.name: part.passes for part in source.train} == {
        "SmolTalk": 0.5,
        "GSM8K": 1,
        "SimpleSpelling": 0.5,
        "SpellingBee": 0.5,
        "identity": 1,
    }
    assert [reason.split(":")[0] for reason in source.missing] == [
        "MMLU auxiliary",
        "to validate on, MMLU auxiliary",
        "to validate on, GSM8K",
    ]
    monkeypatch.setattr("tasks.sft_data.COUNTED", 40)
    fewer = [(name, partial(task.func, 50) if "Spelling" in name else task, n) for name, task, n in PUBLISHED["train"]]
    monkeypatch.setitem(PUBLISHED, "train", fewer)
    assert chat_sft.main([*SFT, "--data=published"]) == 0
    assert "to validate on, GSM8K" in capsys.readouterr().out
    table = {row["source"]: row for row in load_report(copied)["chat_sft"]["tables"]["Conversations"]}
    assert table["SmolTalk"]["no conversation"] == 2 and table["SmolTalk"]["conversations"] == 30
    assert table["SpellingBee"]["looked at"] == 40 and table["SpellingBee"]["too long"] == 40
    assert table["GSM8K"]["passes"] == 2


def test_published_needs_a_public_data_set(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other parts come with the package."""
    monkeypatch.setenv("NANOCHAT_DATASETS_DIR", str(copied / "none"))
    monkeypatch.setattr("tasks.hub.download_split", lambda *_: (None, "there is no network"))
    with pytest.raises(UserError, match=r"NANOCHAT_DATASETS_DIR.*--data=starter"):
        open_sources("published", seed=1)


def data_file(folder: Path, split_name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{split_name}-00000-of-00001.parquet"


# ---------------------------------------------------------------------------------------------------
# The held-out part


def split(rows: list[Any], folder: Path, usable: Callable[[Any], bool] = lambda c: True) -> tuple[list[str], list[str]]:
    """The questions of the (training, validation) part."""
    parts = CustomJSON(write_lines(folder / "mine.jsonl", rows)).split(usable)
    return tuple([c["messages"][0]["content"] for c in part] for part in parts)  # type: ignore[return-value]


def test_the_held_out_part_is_chosen_by_content(tmp_path: Path, base: Path) -> None:
    rows = [chat(f"q{i}", "a" * i) for i in range(1000)]  # sorted by length
    train, val = split(rows, tmp_path)
    assert sorted(train + val) == sorted(row[0]["content"] for row in rows)
    assert 10 <= len(val) <= 35
    numbers = [int(question[1:]) for question in val]
    assert min(numbers) < 200 and max(numbers) > 800, "long and short ones"
    assert set(split(rows[::-1], tmp_path)[1]) == set(val), "whatever the order"
    assert set(split(rows[:500], tmp_path)[1]) == {q for q in val if int(q[1:]) < 500}, "and the neighbours"


@pytest.mark.parametrize("usable", [{3}, {3, 7}, set(range(20, 40))])
def test_both_parts_hold_a_usable_conversation_if_there_are_two(usable: set[int], tmp_path: Path, base: Path) -> None:
    train, val = split(numbered(60), tmp_path, lambda c: int(c["messages"][0]["content"][1:]) in usable)
    assert len(train) + len(val) == 60
    found = [sum(int(question[1:]) in usable for question in part) for part in (train, val)]
    assert found[1] >= 1 and (found[0] >= 1 or len(usable) < 2)


def test_two_copies_of_one_conversation_can_be_split(tmp_path: Path, base: Path) -> None:
    train, val = split([chat("a", "b")] * 2, tmp_path)
    assert len(train) == len(val) == 1


def resumed_from(
    copied: Path, data: str, monkeypatch: pytest.MonkeyPatch, first: Callable[[pytest.MonkeyPatch], None]
) -> tuple[list[Any], list[Any]]:
    """Weights of a run of 4 steps as `first` changes the code, and of the same resumed at step 2 by today's code."""
    flags = [*SFT[1:], data, "--num-iterations=4", "--save-every=2", "--keep-last=0", "--model-tag=mine"]
    with monkeypatch.context() as patch:
        first(patch)
        assert chat_sft.main(flags) == 0
    whole = open_checkpoint(run_dir(copied, "sft", "mine"), 4).model_state()
    assert chat_sft.main([data, "--model-tag=mine", "--resume-from-step=2", "--eval-tokens=16"]) == 0
    again = open_checkpoint(run_dir(copied, "sft", "mine"), 4).model_state()
    return list(whole.values()), list(again.values())


def test_a_run_of_before_goes_on_with_the_split_it_started_with(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = f"--data={write_lines(copied / 'mine.jsonl', numbered(60))}"
    train = Run.train

    def old(patch: pytest.MonkeyPatch) -> None:
        def without_mark(self: Run, *args: Any, meta: dict[str, Any], **rest: Any) -> int:
            del meta["held_out"]
            return train(self, *args, meta=meta, **rest)

        patch.setattr(Run, "train", without_mark)
        patch.setattr(CustomJSON, "split", lambda self, usable: self.split_tail())

    whole, again = resumed_from(copied, data, monkeypatch, old)
    assert all((one == other).all() for one, other in zip(whole, again))
    assert len(CustomJSON(copied / "mine.jsonl").split_tail()[1]) == 1


def test_a_run_of_today_goes_on_with_its_split(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = f"--data=starter:0.001,{write_lines(copied / 'mine.jsonl', numbered(60))}:3"
    whole, again = resumed_from(copied, data, monkeypatch, lambda patch: None)
    assert all((one == other).all() for one, other in zip(whole, again))


# ---------------------------------------------------------------------------------------------------
# What is left out is said


@pytest.mark.parametrize(
    ("messages", "use"),
    [
        (chat("q", "a"), WHOLE),
        (chat("q", "a", "q" * 30, "a"), TRUNCATED),
        (chat("q", "a" * 30), TOO_LONG),
        (chat("q" * 30, "a"), TOO_LONG),
        (chat("q"), NO_ANSWER),
    ],
)
def test_uses(messages: list[Any], use: str) -> None:
    rendered = render_row(TOKENIZER, {"messages": messages}, 12)
    assert rendered.use == use
    assert (rendered.ids is None) == (use in (TOO_LONG, NO_ANSWER))
    assert rendered.ids is None or len(rendered.ids) <= 12


def test_tokens_of_an_evaluation_are_those_there_are(tmp_path: Path, base: Path) -> None:
    """Of the rows asked for, or of all rows of the held-out conversations, however many."""
    runtime = Runtime.create("cpu")
    data = open_sft_data(
        open_sources(str(write_lines(tmp_path / "a.jsonl", numbered(60))), 1), TOKENIZER, runtime, 4, 32, 1, 1
    )
    loader = data.make_validation()
    while loader.stats()["trained"] < len(loader.rendered.dataset):
        loader.next_batch()
    assert data.held_out_tokens == loader.stats()["tokens"]

    held_out = [{"messages": chat("q", "a")} for _ in range(2_500)]  # of 7 tokens: 4 in a row of 33
    make: Any = partial(ConversationLoader, held_out, TOKENIZER, sequence_len=32, rows_per_step=5)
    for asked, tokens in ((320, 320), (2**20, 625 * 32)):
        config = chat_sft.Config(eval_tokens=asked)
        assert make_hooks(config, make, 2_500 * 7, TOKENIZER, runtime)[0].tokens == tokens  # type: ignore[arg-type]


def test_what_is_left_out_is_in_plan_log_metrics_checkpoint_and_report(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's context is 16 tokens of a byte."""
    rows = [
        *numbered(20),
        *(chat(f"{i}", "long" * 10) for i in range(60)),
        *(chat(f"{i}", "b", "c" * 9, "d") for i in range(7)),
    ]
    path = write_lines(copied / "mine.jsonl", [*rows, {"text": "x"}, chat("alone")])
    assert chat_sft.main([*SFT, f"--data=starter:0.001,{path}", "--num-iterations=2"]) == 0
    output = capsys.readouterr()
    listed = (copied / "chatsft_checkpoints" / "tiny.left_out.txt").read_text().splitlines()
    assert [f"{path}, line {n}: " in "\n".join(listed) for n in (21, 80, 88, 89)] == [True] * 4
    assert sum(line.endswith("too long") and str(path) in line for line in listed) == 60
    assert "line 88" in output.err and "line 89" in output.err, "the bad ones are few"
    assert "tiny.left_out.txt" in output.err
    table = open_checkpoint(run_dir(copied, "sft", "tiny")).meta["conversations"]
    assert table == load_report(copied)["chat_sft"]["tables"]["Conversations"]
    mine = [row for row in table if row["source"].startswith("mine.jsonl")]
    for use, count in (
        ("conversations", 87),
        ("whole", 20),
        ("truncated", 7),
        ("too long", 60),
        ("no conversation", 2),
    ):
        assert sum(row.get(use, 0) for row in mine) == count, use
    assert len({row["source"] for row in table}) > 10, "each part of the starter mixture"
    last = json.loads((copied / "chatsft_checkpoints" / "tiny" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["conversations"] > 0 and last["left_out"] > 0 and {"truncated", "epoch"} <= set(last)
    squeezed = "".join(output.out.split())
    assert "60toolong" in squeezed or "59toolong" in squeezed, "the plan"


@pytest.mark.parametrize("bad", [{"text": "x"}, chat("a", "long" * 10)])
def test_strict_stops_and_names_them(bad: Any, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(copied / "mine.jsonl", [*numbered(5), bad, bad])
    error = refused(chat_sft.main, [*SFT, f"--data={path}", "--strict"], capsys)
    assert "--strict" in error and "2 of 7" in error and "left_out.txt" in error
    listed = (copied / "chatsft_checkpoints" / "tiny.left_out.txt").read_text()
    assert "line 6" in listed and "line 7" in listed
    assert chat_sft.main([*SFT, f"--data={path}"]) == 0
    assert chat_sft.main([*SFT, f"--data={write_lines(path, numbered(5))}"]) == 0
    assert not (copied / "chatsft_checkpoints" / "tiny.left_out.txt").exists(), "of the earlier run"


def test_data_is_checked_before_the_model_is_loaded(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_sft, "open_starting_model", lambda *_: pytest.fail("the model was loaded"))
    (copied / "empty").mkdir()
    write_lines(copied / "mine.jsonl", [{"text": "x"}] * 9)
    for name, part in (("nothing", "--data"), ("empty", "--data"), ("mine.jsonl", "9 of 9")):
        assert part in refused(chat_sft.main, [*SFT, f"--data={copied / name}"], capsys)


def test_one_step_of_few_conversations_draws_a_warning(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(copied / "mine.jsonl", numbered(40))
    flags = [f"--data={path}", "--eval-tokens=16", "--device-type=cpu"]
    assert chat_sft.main([*flags, "--total-batch-size=4096"]) == 0
    assert "--total-batch-size=" in capsys.readouterr().err
    assert chat_sft.main([*flags, "--total-batch-size=32"]) == 0
    assert "--total-batch-size=" not in capsys.readouterr().err
    assert json.loads((copied / "chatsft_checkpoints" / "tiny" / "plan.json").read_text())["num_steps"] > 10


def test_the_preview_marks_what_is_learnt_and_obeys_no_escape(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = {"messages": chat("Hi [bold]\x1b[31m", "Ho\nho")}
    print_conversation(TOKENIZER, conversation)
    text = capsys.readouterr().out
    assert "[[Ho\nho<|assistant_end|>]]" in text and r"Hi [bold]\x1b[31m<|user_end|>" in text
    monkeypatch.setattr("nanochat.reporting.console.on_terminal", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_conversation(TOKENIZER, conversation)
    colored = capsys.readouterr().out
    assert "[[" not in colored and "\x1b[2m<|bos|>" in colored and "\x1b[2mHo" not in colored


def test_own_conversations_alone_draw_the_note_about_unlearning(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(copied / "mine.jsonl", numbered(5))
    assert chat_sft.main([*SFT, f"--data={path}"]) == 0
    assert f"--data=starter,{path}" in capsys.readouterr().out
    shutil.rmtree(copied / "chatsft_checkpoints")
    assert chat_sft.main([*SFT, f"--data=starter:0.001,{path}"]) == 0
    assert "--data=starter," not in capsys.readouterr().out
