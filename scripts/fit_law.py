"""Fit a scaling law to a study: `python -m scripts.fit_law --runs='law_*'` after `bash runs/scaling_laws.sh`.

Reads the finished runs whose tags match, writes runs.csv, law.json, fit.json and plots, and prints the fitted
exponents and the best number of tokens per parameter, with errors.
"""

import csv
import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat.checkpoint.folder import list_steps
from nanochat.checkpoint.runs import run_dir
from nanochat.checkpoint_manager import open_checkpoint
from nanochat.common import UserError, atomic_write, format_count, get_base_dir, say, warn, write_json
from nanochat.gpt import GPTConfig
from nanochat.planning.fit import fit_law
from nanochat.planning.isoflop import Run, Study, best_sizes
from nanochat.planning.law import Law
from nanochat.planning.planner import MAX_EXTRAPOLATION
from nanochat.planning.study_plots import plot_isoflops, plot_series
from nanochat.recipe import first_meaning, with_changes
from nanochat.reporting.console import print_table
from nanochat.scaling import estimate, scaling_params
from scripts import _cli


@dataclass
class Config:
    """Fit a scaling law to finished runs and plot it."""

    runs: str = "law_*"
    """Tags of the base runs; * matches any characters."""
    out: str = ""
    """Folder for runs.csv, law.json and the plots; empty: study/ in the base folder."""
    fit: bool = True
    """Fit a law; --no-fit only plots loss over compute, with the forecasts of the law in use if it is of this text."""


def main(argv: Sequence[str] | None = None) -> None:
    config = _cli.parse(Config, argv)
    base_dir = get_base_dir()
    folder = Path(config.out or base_dir / "study")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={config.out} is a file; name a folder")
    runs, corpus = read_runs(base_dir, config.runs)
    if config.fit and len({run.budget for run in runs if run.budget}) < 2:
        raise UserError(
            "a law needs runs of at least two budgets (--target-flops); --no-fit plots the runs without one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "runs.csv", runs)
    if config.fit:
        law = fit_law([(r.params, r.tokens, r.bpb) for r in runs], corpus)
        law.save(folder / "law.json")
        study = best_sizes(runs, law)
        print_table(f"scaling law of {len(runs)} runs", list(law_rows(law, study)))
        optima = [asdict(optimum) for optimum in study.optima]
        write_json(folder / "fit.json", {**study._asdict(), "optima": optima, "errors": law.errors})
        plot_isoflops(runs, study, folder / "scaling_laws.svg")
    else:
        rows = [
            (
                f"depth {run.depth}",
                format_count(run.params),
                format_count(run.tokens),
                f"{run.flops:.2e}",
                f"{run.seconds:.0f}",
                f"{run.bpb:.4f}",
            )
            for run in sorted(runs, key=lambda run: run.flops)
        ]
        print_table(f"{len(runs)} runs", rows, ("", "parameters", "tokens", "FLOPs", "seconds", "bits per byte"))
        plot_series(runs, law_for(runs, corpus), folder / "miniseries.svg")
    say(f"written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


def read_runs(base_dir: Path, pattern: str) -> tuple[list[Run], str]:
    """(finished base runs whose tags match `pattern`, the corpus they share)."""
    folder = run_dir(base_dir, "base", "x").parent
    tags = sorted(p.name for p in folder.iterdir() if list_steps(p)) if folder.is_dir() else []
    runs, corpora, recipes = [], set(), set()
    for tag in fnmatch.filter(tags, pattern):
        if re.search(r"\.old\d+$", tag) and ".old" not in pattern:
            continue  # renamed by a later run with the same tag
        meta = open_checkpoint(folder / tag, verify=False).meta  # only the metadata is read, not the weights
        progress, plan, user = meta["progress"], meta["plan"], meta["user_config"]
        if progress["step"] < plan["num_steps"] or progress["val_bpb"] is None:
            warn(f"{tag} is not finished (step {progress['step']} of {plan['num_steps']}): skipped")
            continue
        config = GPTConfig.from_dict(meta["model_config"])
        flops_per_token, counts = estimate(config)
        tokens = progress["step"] * plan["total_batch_tokens"]
        # Older checkpoints do not name the corpus that was found where --data was left out.
        corpora.add(meta.get("corpus_name") or user["data"] or "the public shards")
        recipes.add(with_changes(meta.get("recipe") or first_meaning(user.get("recipe", "published")), config))
        runs.append(
            Run(
                tag=tag,
                depth=config.n_layer,
                params=scaling_params(counts),
                tokens=tokens,
                flops=tokens * flops_per_token,
                budget=max(user["target_flops"], 0.0),
                bpb=progress["val_bpb"],
                seconds=progress["wall_seconds"],
            )
        )
    if not runs:
        raise UserError(f"no finished base run matches --runs={pattern!r}; existing: {', '.join(tags) or 'none'}")
    if len(corpora) > 1:
        raise UserError(f"--runs={pattern!r} were trained on different data: {', '.join(sorted(corpora))}")
    if len(recipes) > 1:
        raise UserError(
            f"--runs={pattern!r} were trained by different recipes: {', '.join(sorted(recipes))}; sizes compare under "
            "one only, so give all runs of a study the same --recipe (not default, which depends on the size)"
        )
    return runs, corpora.pop()


def law_for(runs: Sequence[Run], corpus: str) -> Law | None:
    """The law in use, where it can forecast all of these runs: it is of their text, and none is too far beyond it."""
    law = Law.load()
    if law is None or law.corpus != corpus:
        return None
    farthest = max(law.forecast(run.params, run.tokens).extrapolation for run in runs)
    return law if farthest <= MAX_EXTRAPOLATION else None


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    """Write one line per run."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, list(asdict(runs[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(run) for run in runs)


def law_rows(law: Law, study: Study) -> Iterator[tuple[str, str]]:
    """(name, value) rows for the table."""
    yield "bits per byte", "((N0 / N)^(alpha/beta) + D0 / D)^beta"
    for name, error in law.errors.items():
        yield f"  {name}", f"{getattr(law, name):.4g} ± {error:.2g}"
    yield "best N grows as", f"C^({study.params_exponent[0]:.3f} ± {study.params_exponent[1]:.3f})"
    yield "best D grows as", f"C^({study.tokens_exponent[0]:.3f} ± {study.tokens_exponent[1]:.3f})"
    for o in study.optima:
        by_curve = f"; parabola: N {format_count(o.parabola[0])}, {o.parabola[1]:.4f}" if o.parabola else ""
        ratio = f"{o.ratio:.2g} ± {o.ratio * o.ratio_error:.1g} tokens per parameter"
        size = f"N {format_count(o.params)} ± {o.params_error:.0%}"
        yield f"best at {o.flops:.1e} FLOPs", f"{size}, {ratio}, bpb {o.bpb:.4f}{by_curve}"


if __name__ == "__main__":
    _cli.run(main)
