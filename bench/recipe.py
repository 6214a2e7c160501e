"""Race one recipe or revision against another at equal time: `python -m bench.recipe --b=backout=False --minutes=5`.

Both sides train at the same time, each on its own half of the cores, from the same seeds, and are measured on the same
held-out text. They train in turns on a GPU, on a single core, and where cores cannot be assigned (macOS, Windows). Each
pair of runs gives one difference; the table has its mean over the pairs with the 95% interval. `--candidates=FILE`
searches among many changes until it is stopped: docs/leaderboard.md.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

from bench._effects import MAX_PAIRS, Search, ranking, read_candidates
from bench._race import Race, Side, can_run_together, stopped_by_signal
from bench._run import ROOT, commit_of, git
from nanochat.common import UserError, json_hash, say
from nanochat.common.files import parse_json, read_file
from nanochat.common.ranges import Range
from nanochat.recipe import get_recipe
from nanochat.reporting.console import print_table
from nanochat.reporting.machine import describe_machine
from nanochat.train.commands import describe_flags
from scripts import _cli

COMMON = "--depth=3 --head-dim=64 --max-seq-len=512 --total-batch-size=4096 --recipe=small"
LEADERBOARD = ROOT / "dev" / "LEADERBOARD.md"


@dataclass
class Config:
    """Race side B against side A. A side is written as words: @REVISION, --flag=value of base_train, vocab=N, or
    changes to the recipe such as backout=False,matrix_lr=0.03; nothing is the working tree as it is."""

    a: str = ""
    """Side A, which B is measured against."""
    b: str = ""
    """Side B."""
    minutes: Annotated[float, Range(above=0, max=600)] = 5.0
    """Of each run."""
    seeds: Annotated[int, Range(1, 1000)] = 3
    """Pairs of runs; with one there is no interval. With --candidates each has as many as it needs, at most 8."""
    common: str = COMMON
    """Flags of base_train that both sides have, unless a side says otherwise; they replace the default ones."""
    data: str = ""
    """The corpus, as for base_train; empty: the starter corpus."""
    vocab_size: int = 4096
    """Tokens in the vocabulary, special tokens included."""
    chars: int = 20_000_000
    """Characters of text to train the vocabulary on."""
    eval_bytes: Annotated[int, Range(1)] = 1_000_000
    """Held-out text to measure on."""
    candidates: str = ""
    """A file with one side a line: search for what beats A, until stopped or decided."""
    results: str = "race.jsonl"
    """Where every pair is written down; a race or search that was stopped goes on from there."""
    record: bool = False
    """Append the result to dev/LEADERBOARD.md."""


@dataclass
class Pair:
    """A line of --results: a pair of runs, and what their result depends on."""

    a: str
    b: str
    seed: int
    bpb: tuple[float | str, float | str]
    settings: dict[str, Any]
    commits: list[str]


CONDITIONS = ("common", "data", "vocab_size", "eval_bytes")  # a row of the leaderboard says which are not as usual


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    if (config.b and config.candidates) or not (config.a or config.b or config.candidates):
        raise UserError("give a side to race: --b=backout=False, --a=@main, or --candidates=FILE with one a line")
    common = Side.parse(config.common)
    if common.revision or common.changes or common.vocab_size:
        raise UserError("--common takes flags of base_train only, as --flag=value")
    results = Path(config.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    candidates = [Side.parse(config.b)]
    if config.candidates:
        candidates = read_candidates(read_file(config.candidates).decode(errors="replace").splitlines())
    search = Search(Side.parse(config.a), candidates)
    for side in (search.baseline, *candidates):
        check(side)
    first = search.baseline
    settings = race_settings(config)
    for line in known_results(results, settings):
        search.record(line.a, line.b, *line.bpb)
    race = Race(
        config.minutes, common.flags, config.data or "starter", config.vocab_size, config.chars,
        config.eval_bytes, can_run_together(),
    )  # fmt: skip
    try:
        with stopped_by_signal(), race:
            while (b := following(search, config)) is not None:
                if race_settings(config) != settings:
                    raise UserError(f"the code in {ROOT} changed during the race: the same command starts anew")
                effect = search.effect(b)
                seed = 1 + len(effect.differences) + len(effect.failures)
                say(f"pair {seed}: {search.baseline.text or 'A'} against {b.text or 'as it is'}")
                bpb = race.pair(search.baseline, search.baseline.plus(b) if config.candidates else b, seed)
                sides = search.baseline.text, b.text
                append_line(results, json.dumps(asdict(Pair(*sides, seed, bpb, settings, commits(*sides)))))
                search.record(*sides, *bpb)
                say(f"  A {shown(bpb[0])}, B {shown(bpb[1])}; B - A: {effect} ({effect.verdict})")
                if isinstance(bpb[0], str):
                    raise UserError(f"side A does not train: {bpb[0]}")
    except KeyboardInterrupt:
        say(f"stopped; the pairs so far are in {results}, and the same command goes on from there")
    show(search, first, config)
    return 0


def check(side: Side) -> None:
    """UserError for a revision or a change that does not exist, before anything trains."""
    if side.revision:  # whose recipes may have other fields
        commit_of(side.revision)
    else:
        get_recipe(",".join(["default", *side.changes]))


def following(search: Search, config: Config) -> Side | None:
    """The next side to race; None when all is done."""
    if config.candidates:
        return search.next_candidate()
    b = search.candidates[0]
    effect = search.effect(b)
    return b if len(effect.differences) < config.seeds and not effect.failures else None


def race_settings(config: Config) -> dict[str, Any]:
    """What a pair's result depends on besides its sides: results of other settings do not count."""
    names = ("minutes", "common", "data", "vocab_size", "chars", "eval_bytes")
    changes = git("diff", "HEAD", "--", ".", ":(exclude)dev/LEADERBOARD.md").stdout  # --record writes there
    files = git("ls-tree", "-r", "HEAD").stdout.splitlines()
    code = json_hash([[line for line in files if not line.endswith("\tdev/LEADERBOARD.md")], changes])[:12]
    machine = {name: describe_machine()[name] for name in ("processor", "cores", "gpus")}
    return {**{name: getattr(config, name) for name in names}, "code": code, "machine": machine}


def known_results(path: Path, settings: dict[str, Any]) -> Iterator[Pair]:
    """The pairs of an earlier race of the same settings and code."""
    if path.exists():
        for number, line in enumerate(read_file(path).splitlines(), start=1):
            pair = parse_json(line, f"{path}, line {number}", Pair)
            if pair.settings == settings and pair.commits == commits(pair.a, pair.b):
                yield pair


def commits(*sides: str) -> list[str]:
    """The commit of each side's @REVISION, "" for the working tree: a branch may have moved since."""
    revisions = [Side.parse(text).revision for text in sides]
    return [commit_or_none(revision) if revision else "" for revision in revisions]


def commit_or_none(revision: str) -> str:
    """Of a branch of an earlier race, which may be gone."""
    try:
        return commit_of(revision)
    except UserError:
        return "none"


def show(search: Search, first: Side, config: Config) -> None:
    """Print the tables of all baselines; with --record the finished rows go into the leaderboard."""
    baselines = [Side.parse(text) for text in dict.fromkeys(base for base, _ in search.effects)] or [first]
    for baseline in baselines:
        rows = ranking(search, baseline)
        if rows:
            title = f"against {baseline.text or 'the working tree'}, {config.minutes:g} minutes"
            print_table(title, rows, ("side", "pairs", "bits per byte, B - A", "verdict"))
        if config.record:
            for text, pairs, effect, verdict in rows:
                if is_done(int(pairs), verdict, config):
                    write_row(LEADERBOARD, board_row(baseline.text, text, pairs, effect, verdict, config))


def is_done(pairs: int, verdict: str, config: Config) -> bool:
    """Whether a comparison is finished: what was stopped before is not recorded."""
    if config.candidates:
        return verdict != "not told apart" or pairs >= MAX_PAIRS
    return verdict == "failed" or pairs >= config.seeds


def board_row(a: str, b: str, pairs: str, effect: str, verdict: str, config: Config) -> str:
    machine = describe_machine()
    where = f"{machine['cores']} cores {machine['processor']}"
    length = f"{config.minutes:g} min, {pairs} pairs"
    commit = machine["commit"] or "-"
    given = {name: getattr(config, name) for name in CONDITIONS if getattr(config, name) != getattr(Config, name)}
    conditions = f"{length} {describe_flags(given)}".rstrip()
    return f"| {' | '.join((effect, verdict, b, a or 'as it was', conditions, str(date.today()), commit, where))} |"


def write_row(board: Path, row: str) -> None:
    """Append a row to the leaderboard, unless it is there with another date."""

    def undated(line: str) -> list[str]:
        cells = line.split("|")
        return cells[:6] + cells[7:]

    if not board.exists() or all(undated(line) != undated(row) for line in read_file(board).decode().splitlines()):
        append_line(board, row)


def append_line(path: Path, line: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def shown(bpb: float | str) -> str:
    return bpb if isinstance(bpb, str) else f"{bpb:.4f}"


if __name__ == "__main__":
    _cli.run(main)
