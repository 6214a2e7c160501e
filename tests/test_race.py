"""Races of two recipes: sides as words, intervals, the search, and one race for real at toy size."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import _race, _run, recipe
from bench._effects import MAX_PAIRS, Effect, Search, read_candidates
from bench._race import Race, Side, can_run_together
from nanochat.common import UserError

TOY = "--depth=1 --head-dim=8 --aspect-ratio=8 --max-seq-len=16 --total-batch-size=32 --recipe=small"


def test_a_side_is_a_revision_flags_and_changes() -> None:
    side = Side.parse("@main --depth=4 smear=False,matrix_lr=0.03 vocab=2048")
    assert (side.revision, side.flags, side.vocab_size) == ("main", ("--depth=4",), 2048)
    assert side.changes == ("smear=False", "matrix_lr=0.03")
    assert side.command(["--depth=3", "--head-dim=64", "--recipe=small"]) == [
        "--depth=4",
        "--head-dim=64",
        "--recipe=small,smear=False,matrix_lr=0.03",
    ]
    more = side.plus(Side.parse("smear=True --depth=2"))
    assert more.command([]) == ["--depth=2", "--recipe=default,smear=True,matrix_lr=0.03"] and more.revision == "main"
    assert Side.parse("").command(["--recipe=small"]) == ["--recipe=small"]


@pytest.mark.parametrize(
    "text",
    ["smear", "--depth", "-g=1", "@", "smear=1 --x", "vocab=many", "--eval_tokens=5", "--seed=7", "vocab=0", "a='b"],
)
def test_a_wrong_word_is_named(text: str) -> None:
    with pytest.raises(UserError, match=text.split()[-1]):
        Side.parse(text)


def test_the_interval_is_students() -> None:
    """Worked example: differences -0.02, -0.01, -0.03: mean -0.02, s 0.01, t(2) 4.303."""
    effect = Effect([-0.02, -0.01, -0.03])
    assert effect.mean == pytest.approx(-0.02)
    assert effect.half_width == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert effect.verdict == "not told apart"
    assert Effect([-0.02, -0.021, -0.019]).verdict == "better"
    assert Effect([0.02, 0.021, 0.019]).verdict == "worse"
    assert Effect([-0.5]).verdict == "not told apart", "one pair has no interval"
    assert Effect([-0.5, -0.5], ["exit code 1"]).verdict == "failed"


def search_with(effects: dict[str, float], spread: float = 0.001) -> tuple[Search, list[tuple[str, str]]]:
    """Run a search to its end where each candidate's effect is known, on top of any baseline."""
    search, tried = Search(Side.parse(""), [Side.parse(text) for text in effects]), list[tuple[str, str]]()
    while (b := search.next_candidate()) is not None:
        n = len(search.effect(b).differences)
        tried.append((search.baseline.text, b.text))
        search.record(search.baseline.text, b.text, 1.5, 1.5 + effects[b.text] + spread * (-1) ** n)
        assert len(tried) < 200
    return search, tried


def test_a_search_takes_up_what_is_better_and_drops_what_is_worse() -> None:
    search, tried = search_with({"a=1": -0.02, "b=1": 0.03, "c=1": -0.05})
    assert search.baseline.text.split() == ["c=1", "a=1"] and [c.text for c in search.candidates] == ["b=1"]
    assert [b for _, b in tried[:3]] == ["a=1", "b=1", "c=1"], "each is tried once first"
    assert sum(b == "c=1" for _, b in tried) >= 2 and tried.count(("", "b=1")) <= 3


def test_a_search_ends_although_nothing_is_told_apart() -> None:
    search, tried = search_with({"a=1": 0.0001, "b=1": -0.0001}, spread=0.01)
    assert search.baseline.text == "" and len(tried) == 2 * MAX_PAIRS


def test_a_candidate_that_fails_is_not_tried_again() -> None:
    search = Search(Side.parse(""), [Side.parse("a=1")])
    search.record("", "a=1", "exit code 1: disk full", "exit code 1: disk full")
    assert search.next_candidate() is not None, "where A fails too, nothing is known about B"
    search.record("", "a=1", 1.5, "exit code 2: no such field")
    assert search.next_candidate() is None and search.effect(search.candidates[0]).verdict == "failed"


def test_candidates_are_lines() -> None:
    lines = ["# ideas", "", "smear=False  # first", "smear=False", "vocab=512"]
    assert [side.text for side in read_candidates(lines)] == ["smear=False", "vocab=512"]
    with pytest.raises(UserError):
        read_candidates(["# none yet", ""])


def fake_pairs(monkeypatch: pytest.MonkeyPatch, bpb: Any) -> list[tuple[str, str, int]]:
    """Replace training by `bpb(side, seed)`; returns the list of pairs that are asked for."""
    asked = list[tuple[str, str, int]]()

    def pair(race: Race, a: Side, b: Side, seed: int) -> tuple[Any, Any]:
        asked.append((a.text, b.text, seed))
        return bpb(a, seed), bpb(b, seed)

    monkeypatch.setattr(Race, "pair", pair)
    return asked


def test_a_race_goes_on_where_it_was_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(side: Side, seed: int) -> float:
        if seed == 2:
            raise KeyboardInterrupt
        return 1.5 - 0.1 * bool(side.text)

    argv = ["--b=smear=False", f"--results={tmp_path / 'race.jsonl'}", "--seeds=3"]
    asked = fake_pairs(monkeypatch, stopped)
    assert recipe.main(argv) == 0 and [seed for *_, seed in asked] == [1, 2]
    asked = fake_pairs(monkeypatch, lambda side, seed: 1.5 - 0.1 * bool(side.text))
    assert recipe.main(argv) == 0 and [seed for *_, seed in asked] == [2, 3]
    assert "better" in capsys.readouterr().out
    asked = fake_pairs(monkeypatch, lambda side, seed: 1.5)
    assert recipe.main([*argv, "--minutes=7"]) == 0 and len(asked) == 3, "other settings are another race"


def test_a_candidate_is_trained_on_top_of_what_won(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ideas").write_text("smear=False\nbackout=False\n")
    gains = {"smear=False": 0.05, "backout=False": 0.02}
    asked = fake_pairs(
        monkeypatch,
        lambda side, seed: 1.5 - sum(gains[change] for change in side.changes) + 1e-4 * len(side.text) * seed,
    )
    assert recipe.main([f"--candidates={tmp_path / 'ideas'}", f"--results={tmp_path / 'r'}"]) == 0
    assert {b for a, b, _ in asked if a == "smear=False"} == {"smear=False backout=False"}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_the_threads_of_a_core_are_in_the_same_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(_race, "core_of", lambda cpu: cpu % 4)  # as Linux numbers them as a rule
    assert _race.cpu_halves() == [{0, 4, 1, 5}, {2, 6, 3, 7}]


def test_a_row_of_the_leaderboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    board = tmp_path / "LEADERBOARD.md"
    monkeypatch.setattr(recipe, "LEADERBOARD", board)
    fake_pairs(monkeypatch, lambda side, seed: 1.5 - 0.1 * bool(side.text))
    assert recipe.main(["--b=smear=False", f"--results={tmp_path / 'r'}", "--seeds=2", "--record"]) == 0
    [row] = board.read_text().splitlines()
    assert row.split("|")[1].strip().startswith("-0.1000") and "smear=False" in row and "2 pairs" in row
    assert recipe.main(["--b=smear=False", f"--results={tmp_path / 'r'}", "--seeds=3", "--record"]) == 0
    assert len(board.read_text().splitlines()) == 2
    other = ["--data=own.txt", "--seeds=3", "--record"]
    for _ in range(2):  # the second time nothing is new
        assert recipe.main(["--b=smear=False", f"--results={tmp_path / 'r'}", *other]) == 0
        assert len(board.read_text().splitlines()) == 3
    assert "--data=own.txt" in board.read_text().splitlines()[2]


def test_the_idea_may_be_in_the_working_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recipe, "commit_of", str)
    asked = fake_pairs(monkeypatch, lambda side, seed: 1.5)
    assert recipe.main(["--a=@HEAD", f"--results={tmp_path / 'r'}", "--seeds=1"]) == 0
    assert asked == [("@HEAD", "", 1)]


def test_a_side_that_fails_is_not_raced_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = fake_pairs(monkeypatch, lambda side, seed: "exit code 1: out of memory" if side.text else 1.5)
    argv = ["--b=smear=False", f"--results={tmp_path / 'r'}", "--seeds=3"]
    for _ in range(2):
        assert recipe.main(argv) == 0 and len(asked) == 1


def test_a_yardstick_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pairs(monkeypatch, lambda side, seed: 1.5 if side.text else "exit code 2: no text")
    with pytest.raises(UserError, match="no text"):
        recipe.main(["--b=smear=False", f"--results={tmp_path / 'r'}"])


def test_other_code_is_another_race(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The results of a branch that has moved since do not count."""
    head = ["1" * 40]
    monkeypatch.setattr(recipe, "commits", lambda *sides: head)
    monkeypatch.setattr(recipe, "commit_of", lambda revision: head[0])
    argv = ["--b=@branch", f"--results={tmp_path / 'race.jsonl'}", "--seeds=2"]
    for expected in (2, 0):
        asked = fake_pairs(monkeypatch, lambda side, seed: 1.5)
        assert recipe.main(argv) == 0 and len(asked) == expected
    head[0] = "2" * 40
    asked = fake_pairs(monkeypatch, lambda side, seed: 1.5)
    assert recipe.main(argv) == 0 and len(asked) == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["--candidates=nowhere.txt"],
        [],
        ["--b=smear=False", "--candidates=x"],
        ["--b=smear"],
        ["--minutes=0", "--b=a=1"],
        ["--b=backoutt=False"],
        ["--b=@no-such-revision"],
        ["--b=smear=False", "--common=--depth 4"],
        ["--b=smear=False", "--common=smear=False"],
    ],
)
def test_wrong_flags(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Race, "pair", None)  # nothing is trained before
    with pytest.raises(UserError):
        recipe.main(argv)


def test_a_recorded_race_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Results count for the code that they were measured with; a new row of the leaderboard is no other code."""
    monkeypatch.setattr(_run, "ROOT", tmp_path)
    (tmp_path / "dev").mkdir()
    board, code = tmp_path / "dev" / "LEADERBOARD.md", tmp_path / "gpt.py"
    board.write_text("rows\n")
    code.write_text("n = 1\n")
    user = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["add", "-A"], [*user, "commit", "-qm", "first"]):
        assert _run.git(*words).returncode == 0
    before = recipe.race_settings(recipe.Config(b="smear=True"))
    board.write_text("rows\nanother\n")
    assert recipe.race_settings(recipe.Config(b="smear=True")) == before
    code.write_text("n = 2\n")
    assert recipe.race_settings(recipe.Config(b="smear=True")) != before


def test_code_that_changes_during_a_race_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = iter([{"code": "1"}, {"code": "1"}, {"code": "2"}])
    monkeypatch.setattr(recipe, "race_settings", lambda config: next(settings))
    asked = fake_pairs(monkeypatch, lambda side, seed: 1.5)
    with pytest.raises(UserError, match="changed"):
        recipe.main(["--b=smear=False", f"--results={tmp_path / 'new' / 'r'}", "--seeds=3"])
    assert len(asked) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_two_recipes_are_raced_for_real(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("The cat sat on the mat and looked at the dog. " * 2000)
    (tmp_path / "scripts").mkdir()  # is not the code to run
    (tmp_path / "scripts" / "__init__.py").write_text("raise SystemExit(3)")
    results = tmp_path / "race.jsonl"
    argv = [
        "--b=matrix_lr=0.0,embedding_lr=0.0,unembedding_lr=0.0",
        "--minutes=0.05",
        "--seeds=1",
        f"--common={TOY} --num-iterations=30",
        "--data=own.txt",  # relative to the user's folder
        "--vocab-size=300",
        "--chars=20000",
        "--eval-bytes=2000",
        f"--results={results}",
    ]
    assert recipe.main(argv) == 0
    [line] = [json.loads(line) for line in results.read_text().splitlines()]
    a, b = line["bpb"]
    assert a < b - 0.5 and line["seed"] == 1, "what does not learn is worse"
    assert f"{a:.4f}" in capsys.readouterr().out
    if can_run_together():
        assert len(os.sched_getaffinity(0)) > 1, "this process keeps its cores"
