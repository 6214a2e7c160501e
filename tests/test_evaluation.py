"""Asking tasks: letters by logits, pass@k, ChatCORE, transcripts, and benchmark items in training text."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import write_bundle
from stubs import TOKENIZER, stir

from nanochat.evals.contamination import Index, words_of
from nanochat.gpt import GPT, GPTConfig
from nanochat.report import load_report, record_stage
from nanochat.runtime import Runtime
from scripts import chat_eval, contamination
from tasks import registry
from tasks.arc import ARC
from tasks.common import Task
from tasks.evaluation import (
    CHATCORE,
    AskFlags,
    ask_on_all_ranks,
    chat_core,
    choose_letters,
    constant_share,
    earlier_shares,
    pass_at_k,
    pass_rates,
)
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.multiple_choice import mc_conversation


class Chats:
    """A tokenizer that renders a question and nothing around it."""

    def encode(self, text: str) -> list[int]:
        return TOKENIZER.encode(text)

    def render_for_completion(self, conversation: Any) -> list[int]:
        return self.encode(conversation["messages"][0]["content"])


def test_letters_are_chosen_by_their_logits_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Against one question at a time; other tokens may have higher logits."""
    config = GPTConfig(sequence_len=160, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = stir(GPT.create(config, seed=3))
    rng = random.Random(0)
    letters = [list("ABCD"), list("ABC"), list("12345")]
    asked = [
        mc_conversation("q" * rng.randint(1, 60), own, [str(i)] * len(own), own[0])
        for i, own in enumerate(letters[i % 3] for i in range(40))
    ]
    chosen = choose_letters(model, Chats(), asked)
    overlong = sum(len(Chats().render_for_completion(conversation)) > 160 for conversation in asked)
    assert overlong > 0 and f"{overlong} of 40" in capsys.readouterr().err
    for conversation, letter in zip(asked, chosen):
        ids = Chats().render_for_completion(conversation)[-160:]
        logits = model(torch.tensor([ids]))[0, -1].detach()
        assert letter == max(conversation["letters"], key=lambda c: float(logits[ord(c)]))
    assert len(set(chosen)) > 1


def test_what_always_saying_the_same_gets() -> None:
    def conversation(answer: str, **more: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], **more}

    assert constant_share([conversation(a, letters="AB") for a in "ABBA" + "B"]) == 0.6
    assert constant_share([conversation(a) for a in ("1", "so 2\n#### 1", "#### 0", "three", "1.0")]) == 0.6
    assert constant_share([conversation("def f():\n    return 0"), conversation("words")]) is None


def test_pass_at_k_is_the_chance_over_all_draws() -> None:
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_rates([0, 2, 4], 4) == {1: 0.5, 2: pytest.approx((0 + 5 / 6 + 1) / 3), 4: pytest.approx(2 / 3)}
    assert list(pass_rates([3], 6)) == [1, 2, 4, 6]


def test_chatcore_is_centred_and_says_what_is_missing() -> None:
    perfect = chat_core({name: [1.0] * 20 for name in CHATCORE})
    assert perfect is not None and perfect.value == perfect.low == perfect.high == 1 and perfect.scope == ""
    assert perfect.describe().startswith("ChatCORE 1.0000")
    first = chat_core({name: [1.0] * 20 for name in CHATCORE}, dict.fromkeys(CHATCORE, 21))
    assert first is not None and first.describe().startswith("ChatCORE (first 20 items of each) 1.0000")
    asked = {"MMLU": [1.0] * 20, "GSM8K": [1.0] * 50, "SpellingBee": [1.0] * 9}
    several = chat_core(asked, {"MMLU": 99, "GSM8K": 99, "SpellingBee": 9})
    assert several is not None and several.scope.endswith("first 20 to 50 items of each")
    alone = chat_core({"SpellingBee": [1.0] * 200}, {"SpellingBee": 256})
    assert alone is not None and "(1 of 6 tasks: SpellingBee, first 200 items of each)" in alone.describe()
    guessing = chat_core({"MMLU": [0.25] * 400, "GSM8K": [0.0] * 50, "Arithmetic": [1.0] * 9})
    assert guessing is not None and guessing.value == pytest.approx(0) and guessing.tasks == ["MMLU", "GSM8K"]
    assert "HumanEval" in guessing.missing and chat_core({"Arithmetic": [1.0]}) is None
    half = chat_core({"MMLU": [1.0, 0.0] * 100})
    assert half is not None and half.low < half.value < half.high and half.value == pytest.approx(1 / 3)
    assert half.high - half.low == pytest.approx(2 * 1.96 * (0.25 / 200) ** 0.5 / 0.75, rel=0.15)


def test_results_of_earlier_commands_join_only_for_the_same_weights(tmp_path: Path) -> None:
    """And with the interval that one command would have given."""
    values = {"counts": {"ARC-Easy": [40, 100], "Arithmetic": [1, 9]}, "splits": {"ARC-Easy": "validation"}}
    record_stage(tmp_path, "chat_eval", {"checkpoint": "sft/a/5/abc", **values})
    assert earlier_shares(tmp_path, "chat_eval", "sft/a/5/def") == ({}, {})
    earlier, sizes = earlier_shares(tmp_path, "chat_eval", "sft/a/5/abc")
    assert sizes == {}  # of an older report
    assert list(earlier) == ["ARC-Easy"] and sum(earlier["ARC-Easy"]) == 40 and len(earlier["ARC-Easy"]) == 100
    alone = chat_core({"ARC-Easy": [1.0] * 40 + [0.0] * 60})
    joined = chat_core(earlier)
    assert alone is not None and joined is not None and joined == alone and joined.low < joined.value < joined.high
    more = {"counts": {"MMLU": [1, 4]}, "splits": {"MMLU": "test"}}
    record_stage(tmp_path, "chat_eval", {"checkpoint": "sft/a/5/abc", **more})
    kept = json.loads((tmp_path / "report" / "report.json").read_text())["chat_eval"]
    assert kept["splits"] == {"ARC-Easy": "validation", "MMLU": "test"}


class Yes(Task):
    """Right answers hold the letter e."""

    def __init__(self, split: str = "test") -> None:
        super().__init__()
        self.split = split

    def num_examples(self) -> int:
        return 5

    def get_example(self, index: int) -> Any:
        return {"messages": [{"role": "user", "content": f"say {index}"}, {"role": "assistant", "content": "yes"}]}

    def evaluate(self, conversation: Any, completion: str) -> bool:
        return "e" in completion


@pytest.fixture
def finetuned(copied: Path) -> Path:
    """`copied` with a finetuned model."""
    from scripts import chat_sft

    (copied / "chats.jsonl").write_text(
        "".join(
            json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) + "\n"
            for _ in range(40)
        )
    )
    flags = [f"--data={copied / 'chats.jsonl'}", "--num-iterations=1", "--eval-tokens=64", "--device-type=cpu"]
    assert chat_sft.main(flags) == 0
    return copied


def test_chat_eval_writes_every_answer(
    finetuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "make_task", lambda name, split: Yes(split or "test"))
    flags = ["-a", "GSM8K", "-m", "4", "-x", "3", "--device-type=cpu"]
    assert chat_eval.main([*flags, "-n", "4", "-t", "1"]) == 0
    said, warned = capsys.readouterr()
    assert "pass@4" in said and "ChatCORE" not in said
    folder = finetuned / "chat_eval" / "sft_tiny_000001"
    lines = (folder / "GSM8K_4_x_at_temperature_1.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    cut = sum(answer["cut"] for item in items for answer in item["answers"])
    assert cut > 0 and f"{cut} of 12 " in warned and "--max-new-tokens=4" in warned
    assert [item["index"] for item in items] == [0, 1, 2] and all(len(item["answers"]) == 4 for item in items)
    for item in items:
        assert item["right"] == sum("e" in a["text"] for a in item["answers"]) and item["question"].startswith("say")
    assert chat_eval.main(flags) == 0
    scope = "1 of 6 tasks: GSM8K, first 3 items of each"
    assert f"ChatCORE ({scope}) " in capsys.readouterr().out
    assert chat_eval.main([*flags, "--split=validation"]) == 0
    assert "ChatCORE" not in capsys.readouterr().out
    assert len(list(folder.iterdir())) == 3 and (folder / "GSM8K_validation.jsonl").exists()
    report = json.loads((finetuned / "report" / "report.json").read_text())["chat_eval"]
    sampled, other = "GSM8K, 4 x at temperature 1", "GSM8K, validation"
    assert report["counts"][sampled][0] == pytest.approx(sum(item["right"] for item in items) / 4)
    assert report["splits"] == {sampled: "test", "GSM8K": "test", other: "validation"}
    assert "MMLU" in report["chatcore_missing"]
    assert [sample["task"] for sample in report["samples"]] == [sampled] * 3 + ["GSM8K"] * 3 + [other] * 3
    assert report["chatcore_of"] == scope
    for page in ("report.md", "report.html"):
        assert f"ChatCORE ({scope})" in (finetuned / "report" / page).read_text()


def test_humaneval_needs_a_sandbox(
    finetuned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanochat.common import UserError
    from nanochat.sandbox import levels

    flags = ["-a", "HumanEval", "--embedded-sample", "-x", "2", "-m", "2", "--device-type=cpu"]
    with pytest.raises(UserError, match=r"'none'.*bubblewrap"):
        chat_eval.main([*flags, "--sandbox=none"])
    levels.announce.cache_clear()
    assert chat_eval.main([*flags, "--sandbox=unsafe"]) == 0
    said = capsys.readouterr().out
    assert "HumanEval" in said and "sandbox: unsafe" in said
    monkeypatch.setattr(levels, "why_unavailable", lambda level: "not today")
    with pytest.raises(UserError, match=r"bubblewrap: not today"):
        chat_eval.main(flags)


def test_embedded_samples_run(finetuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nanochat.common import UserError

    with pytest.raises(UserError, match="-t 1"):
        chat_eval.main(["-a", "GSM8K", "-n", "2", "--device-type=cpu"])
    with pytest.raises(UserError, match="'validation'"):
        chat_eval.main(["-a", "GSM8K", "--split", "validation", "--device-type=cpu"])
    assert chat_eval.main(["-a", "GSM8K", "--embedded-sample", "-x", "2", "-m", "2", "--device-type=cpu"]) == 0
    assert "GSM8K" in capsys.readouterr().out
    assert (finetuned / "chat_eval" / "sft_tiny_000001" / "GSM8K_embedded_sample.jsonl").exists()
    assert "chat_eval" not in load_report(finetuned)


# ---------------------------------------------------------------------------------------------------
# Contamination


def test_thirteen_words_in_common_are_found() -> None:
    item = "The quick brown fox jumps over the lazy dog while seven old monks drink tea."
    short = "What is the capital city of France today?"  # eight words: compared whole
    ten = "one two three four five six seven eight nine ten"
    index = Index({"a": [["x", item], [short, f"{short} Paris"], ["too short", ""]], "b": [[ten]]})
    copied = "He wrote: THE QUICK, brown fox jumps -- over the lazy dog while seven OLD monks! And left."
    near = "the quick brown fox jumps over the lazy cat while seven old monks drink tea"
    assert index.check([near, "nothing here", copied, f"Quiz: {short.lower()} Paris."]) == 4
    a, b = index.overlaps["a"], index.overlaps["b"]
    assert (a.items, a.too_short, b.too_short) == (3, 1, 0) and set(a.found) == {0, 1} and not b.found
    assert a.found[0].startswith("He wrote")
    assert words_of("Don't STOP_now, 3.5!") == ["don", "t", "stop", "now", "3", "5"]


def test_questions_are_compared_as_published_not_as_asked() -> None:
    arc = {
        "question": "Which of these planets is the nearest to the Sun?",
        "answerKey": "B",
        "choices": {"text": ["Venus", "Mercury"], "label": ["A", "B"]},
    }
    assert ARC.published_texts(arc)[1].endswith("Sun? Mercury")
    index = Index({"arc": [ARC.published_texts(arc)]})
    index.check(["Quiz time! Which of these planets is the nearest to the Sun? Think."])
    assert list(index.overlaps["arc"].found) == [0]
    mmlu = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 2}
    assert MMLU.published_texts(mmlu) == ["q", "q c"]
    assert GSM8K.published_texts({"question": "q", "answer": "<<1+1=2>>2\n#### 2"})[1] == "<<1+1=2>>2\n#### 2"
    core = {"query": "Question: What is it?", "choices": ["x", "y"], "gold": 1}
    assert contamination.texts_of_core_item(core) == ["What is it?", "What is it? y"]


def test_contamination_names_the_items(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(tmp_path / "b")
    question = "which of these nine words would you choose to hide in a text"
    (bundle / "eval_data" / "pick.jsonl").write_text(json.dumps({"query": question, "choices": ["x", "y"], "gold": 0}))
    (tmp_path / "text.jsonl").write_text(
        "".join(
            json.dumps({"text": t}) + "\n" for t in [f"line {i} of text" for i in range(300)] + [f"{question}? x"] * 100
        )
    )
    monkeypatch.setenv("NANOCHAT_DATASETS_DIR", str(tmp_path / "none"))
    monkeypatch.setattr("tasks.hub.download_split", lambda *a: (None, "no network"))
    contamination.main([f"--data={tmp_path / 'text.jsonl'}", f"--eval-bundle={bundle}"])
    found = json.loads((base / "contamination" / "found.json").read_text())
    assert list(found["pick"]) == ["0"] and not found["go_on"]
    assert "1 of 1" in capsys.readouterr().out
    rows = json.loads((base / "report" / "report.json").read_text())["contamination"]["tables"]
    assert next(iter(rows.values()))[0]["found in training text"] == 1


def test_ranks_share_the_items(finetuned: Path) -> None:
    """The shares of three ranks make up the items of one."""
    flags = AskFlags(max_new_tokens=3)
    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import Engine

    runtime = Runtime.create("cpu")
    model, tokenizer, _ = load_model("sft", runtime, base_dir=finetuned, model_tag="tiny")
    engine = Engine(model, tokenizer)
    alone, _ = ask_on_all_ranks(Yes(), 5, engine, flags, runtime)
    parts = []
    for rank in range(3):
        part = Runtime(runtime.device, runtime.dtype, "", 0, rank=rank, local_rank=rank, world_size=3)
        part.all_reduce_sum = lambda x, name: x  # type: ignore[method-assign]
        parts.append(ask_on_all_ranks(Yes(), 5, engine, flags, part)[0])
    assert [sum(column) for column in zip(*parts)] == alone
