"""Scaling studies: best sizes under known laws, and scripts/fit_law.py on finished runs."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stubs import TINY

from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.planning.fit import fit_law
from nanochat.planning.hardware import Gpu, Pace
from nanochat.planning.isoflop import Run, best_sizes, lowest_point, parabola
from nanochat.planning.law import Law
from nanochat.runtime import Runtime
from nanochat.train import pace
from scripts.fit_law import law_for, main, read_runs

N0, D0, POWER = 1e8, 2e8, 0.14  # loss = (N0 / N + D0 / D)^POWER


def runs_of_a_known_law(noise: float) -> list[Run]:
    rng, runs = np.random.default_rng(0), []
    for budget in (1e13, 1e14, 1e15):
        for params in np.geomspace(3e5, 3e7, 7):
            tokens = budget / (6 * params)
            bpb = (N0 / params + D0 / tokens) ** POWER
            runs.append(
                Run(
                    "x",
                    1,
                    round(params),
                    round(tokens),
                    budget,
                    budget,
                    bpb * math.exp(noise * rng.standard_normal()),
                    1.0,
                )
            )
    return runs


def test_the_best_size_of_a_known_law() -> None:
    """With equal exponents, N and D both grow as C^0.5, and N* follows from setting the derivative to zero."""
    runs = runs_of_a_known_law(noise=0.0)
    optima, params_exponent, tokens_exponent = best_sizes(runs, fit_law([(r.params, r.tokens, r.bpb) for r in runs]))
    assert params_exponent[0] == pytest.approx(0.5, abs=0.02) and tokens_exponent[0] == pytest.approx(0.5, abs=0.02)
    for optimum in optima:
        n = (N0 / D0 * optimum.flops / 6) ** 0.5  # d/dN of N0 / N + D0 6N / C = 0
        assert optimum.params == pytest.approx(n, rel=0.05)
        assert optimum.ratio == pytest.approx(optimum.flops / 6 / n**2, rel=0.1)
        assert optimum.parabola is not None and optimum.parabola[0] == pytest.approx(n, rel=0.5)


def test_standard_errors_cover_the_noise() -> None:
    runs = runs_of_a_known_law(noise=0.003)
    _, params_exponent, _ = best_sizes(runs, fit_law([(r.params, r.tokens, r.bpb) for r in runs]))
    assert 0 < params_exponent[1] < 0.2 and abs(params_exponent[0] - 0.5) < 4 * params_exponent[1]


def test_a_parabola_without_a_minimum_inside() -> None:
    falling = [Run("x", 1, n, 1, 1.0, 1.0, bpb, 1.0) for n, bpb in ((10, 3.0), (100, 2.0), (1000, 1.5))]
    assert lowest_point(parabola(falling), falling) is None
    assert parabola(falling[:2]) is None


def test_fit_law_reads_finished_runs(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts import base_train

    flags = [f for f in TINY if not f.startswith(("--depth", "--num-iterations", "--model-tag"))]
    text = f"--data={copied / 'text.jsonl'}"
    for depth in (1, 2, 3):
        for budget in (6e6, 9e6, 12e6):
            base_train.main(
                [*flags, text, f"--depth={depth}", f"--target-flops={budget}", f"--model-tag=law_{depth}_{budget:.0e}"]
            )
    out = copied / "out"
    main(["--runs=law_*", f"--out={out}"])
    assert {p.name for p in out.iterdir()} == {"runs.csv", "law.json", "fit.json", "scaling_laws.svg"}
    rows = list(csv.DictReader((out / "runs.csv").read_text().splitlines()))
    assert len(rows) == 9 and all(float(r["flops"]) > 0 and float(r["bpb"]) > 0 for r in rows)
    law = Law.load(out / "law.json")
    assert law is not None and len(law.points) == 9 and json.loads((out / "fit.json").read_text())["errors"]
    assert law.corpus == str(copied / "text.jsonl")
    main(["--runs=law_1_*", "--no-fit", f"--out={out}"])
    assert (out / "miniseries.svg").read_text().startswith("<?xml")
    capsys.readouterr()
    with pytest.raises(UserError, match="--no-fit"):
        main(["--runs=tiny"])
    with pytest.raises(UserError, match=r"law_1_6e"):
        main(["--runs=nothing"])
    base_train.main([*flags, text, "--depth=1", "--recipe=later", "--num-iterations=1", "--model-tag=law_other"])
    with pytest.raises(UserError, match=r"later, small.*--recipe"):
        main(["--runs=law_*"])


def test_a_study_is_of_the_text_that_was_found_without_data(copied: Path) -> None:
    from scripts import base_train

    assert base_train.main([*TINY, "--model-tag=found"]) == 0
    runs, corpus = read_runs(copied, "found")
    assert corpus == "starter" and law_for(runs, corpus) == Law.load()


def test_forecasts_are_drawn_only_where_the_law_knows_the_text_and_the_size() -> None:
    law, (run,) = Law.load(), runs_of_a_known_law(noise=0.0)[:1]
    assert law and law_for([run], law.corpus) == law and law_for([run], "climbmix") is None
    assert law_for([run, replace(run, tokens=10**13)], law.corpus) is None


def test_the_depth_for_the_minutes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """More time gives a deeper model; a machine ten times slower gives that of a tenth of the time. Other programs
    on the cores while the pace is measured are warned of."""
    from nanochat.train.pretraining import ModelFlags

    of_depth = ModelFlags(head_dim=64, max_seq_len=512).network(4096)
    law = Law(N0, POWER, D0, POWER)
    speed, update_seconds = 1e11, 0.01
    within = set()  # seconds that a measurement may take

    def measure(config: GPTConfig, gpu: object, runtime: Runtime, seconds: float) -> Pace:
        within.add(seconds)
        return Pace(pace.estimate(config)[0] / speed, update_seconds, "test")

    monkeypatch.setattr(pace, "measure_pace", measure)
    runtime = Runtime.create("cpu")
    gpu = Gpu("", 1e12, 1e12, None, 0.0, None)
    chosen = [pace.best_depth(minutes, 4096, of_depth, law, gpu, runtime).key for minutes in (0.1, 30, 600)]
    assert chosen == sorted(chosen) and chosen[0] == 2 < chosen[1] < chosen[-1]
    assert within == {0.06, 18.0, 20.0}
    speed, update_seconds = 1e10, 0.1
    monkeypatch.setattr(pace.CoreWatch, "share", lambda watch: 0.0)
    capsys.readouterr()
    assert pace.best_depth(300, 4096, of_depth, law, gpu, runtime).key == chosen[1]
    assert "OMP_WAIT_POLICY" not in capsys.readouterr().err
    monkeypatch.setattr(pace.CoreWatch, "share", lambda watch: 0.9)
    pace.best_depth(300, 4096, of_depth, law, gpu, runtime)
    assert "OMP_WAIT_POLICY" in capsys.readouterr().err
    tokens: list[int] = []
    monkeypatch.setattr(Pace, "step_seconds", lambda self, own: tokens.append(own) or 1.0)
    pace.best_depth(300, 3 * 512, of_depth, law, gpu, runtime, ranks=2)
    assert set(tokens) == {2 * 512}, "ranks share whole rows"
