"""Contents as facts: the dictionary that `nanochat info --json` prints.

Keys, each left out where it is not known:
  kind, path, stage, run, step, steps, saved_at (ISO time), route, notes [text]
  from        [{"stage", "run", "step", "tokens", "data", "val_bpb"}], what it was trained from, the first first
  model       {"config": {...}, "form", "changes": {...}, "features": [text], "windows": [per layer]}
              of another program's model {"config": {...}} alone, as its file has it
  parameters  by role (GPT.num_scaling_params) and "total"; of unknown networks "total"
  dtypes      {dtype: parameters}, as safetensors files name them
  memory      bytes: "float32", "bfloat16", "kv_cache_per_token", "kv_cache_full" (bfloat16, at the whole context)
  training    steps, planned_steps, tokens, tokens_per_parameter, flops, seconds, wall_seconds, recipe, seed, data,
              licence, device, dtype, world_size, processor
  figures     {"val_bpb", "best_val_bpb", ...}, accuracies by task in [0, 1], "before NAME" of RL
  tokenizer   {"kind", "vocab_size", "hash", "special_tokens", "bytes_per_token"}
  files       {name: bytes},  integrity "hashes verified", "sizes match" or "not recorded"
  exports     {"class": true/false, "lacks": [text]}: whether transformers' own NanoChat class can hold it
"""

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanochat.checkpoint.runs import CHECKPOINT_FOLDERS, STAGES
from nanochat.common import UserError
from nanochat.formats import hf_class
from nanochat.formats.features import features_in_words
from nanochat.formats.history import CHAT_EVALUATIONS, Stage, earlier_stages, reported_name, step_of
from nanochat.formats.portable import part
from nanochat.formats.training_data import CONVERSATIONS, OWN, TEXTS, data_sets
from nanochat.gpt_config import GPTConfig
from nanochat.inspection.contents import Contents
from nanochat.report import load_report
from nanochat.scaling import estimate, scaling_params

Record = dict[str, Any]
MAX_DATA = 500  # characters of --data that are read


def describe(found: Contents) -> Record:
    """The facts, in JSON types; see the module's docstring."""
    report, before = report_of(found), ancestors(found)
    facts: Record = {
        "kind": found.kind,
        "path": str(found.path),
        "stage": found.stage,
        "run": found.run,
        "step": number(found.meta.get("step")),
        "steps": found.steps,
        "saved_at": found.saved_at and datetime.fromtimestamp(found.saved_at, UTC).isoformat(timespec="seconds"),
        "route": found.route,
        "from": before,
        **network(found),
        "dtypes": dict(count_dtypes(found)),
        "training": training(found, report, before),
        "figures": figures(found, report),
        "tokenizer": tokenizer(found, report),
        "files": found.files,
        "integrity": "hashes verified" if found.verified else "sizes match" if found.hashes else "not recorded",
        "notes": found.notes,
    }
    return {name: value for name, value in facts.items() if value not in (None, "", [], {})}


# ---------------------------------------------------------------------------------------------------
# The network


def network(found: Contents) -> Record:
    """model, parameters, memory and exports."""
    config = found.config
    total = sum(tensor.numel for tensor in found.tensors.values())
    if config is None:
        counts = {"total": total} if total else {}
        return {"model": {"config": found.settings} if found.settings else {}, "parameters": counts}
    counts = estimate(config)[1]
    key_values = 2 * config.n_kv_head * config.head_dim  # numbers of a token in a layer
    slots = [min(config.sequence_len, left + 1) for left, _ in config.window_sizes()]
    form, changes = nearest_form(config)
    return {
        "model": {
            "config": config.to_dict(),
            "form": form,
            "changes": changes,
            "features": features_in_words(config),
            "windows": [left for left, _ in config.window_sizes()],
        },
        "parameters": counts,
        "memory": {
            "float32": 4 * counts["total"],
            "bfloat16": 2 * counts["total"],
            "kv_cache_per_token": 2 * key_values * config.n_layer,
            "kv_cache_full": 2 * key_values * sum(slots),
        },
        "exports": exports(config),
    }


def exports(config: GPTConfig) -> Record:
    """Whether transformers' own class can hold this network, and which of its features that class lacks."""
    lacks = hf_class.lacking(config)
    return {"class": not lacks, "lacks": lacks}


FORMS: dict[str, Callable[..., GPTConfig]] = {
    "plain": GPTConfig.plain,
    "published": GPTConfig,
    "later": GPTConfig.later,
    "small": GPTConfig.small,
}
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")


def effective(config: GPTConfig) -> Record:
    """The fields that decide what the network computes, apart from sizes: features that are off have no settings."""
    fields = {name: value for name, value in config.to_dict().items() if name not in (*SIZES, "init")}
    short = config.has_short_windows
    unused = {
        "short_window_divisor": short,
        "value_gate_channels": config.value_embeds,
        "value_gate_scale": config.value_embeds,
        "smear_channels": config.smear,
        "ngram_dim": config.ngram_rows > 0,
    }
    fields["window_pattern"] = config.window_pattern.upper() if short else "L"
    return {name: value for name, value in fields.items() if unused.get(name, True)}


def nearest_form(config: GPTConfig) -> tuple[str, Record]:
    """(one of FORMS, the fields that differ from it), with as few differences as there can be."""
    sizes = {name: getattr(config, name) for name in SIZES}
    fields, best = effective(config), ("", {"": None} | config.to_dict())
    for name, form in FORMS.items():
        other = effective(form(**sizes))
        changes = {key: value for key, value in fields.items() if other.get(key) != value}
        if len(changes) < len(best[1]):
            best = name, changes
    return best


def count_dtypes(found: Contents) -> Counter[str]:
    counts = Counter[str]()
    for tensor in found.tensors.values():
        counts[tensor.dtype] += tensor.numel
    return counts


# ---------------------------------------------------------------------------------------------------
# Its training


def base_dir_of(found: Contents) -> Path | None:
    """The base folder that a checkpoint lies in."""
    run = found.path.parent
    return run.parent.parent if found.kind == "checkpoint" and run.parent.name in CHECKPOINT_FOLDERS.values() else None


def stage_of(found: Contents) -> Stage:
    """Its own training, as the last of its history."""
    run = found.path.parent if base_dir_of(found) else None
    weights = found.hashes.get("model.safetensors", "")
    return Stage(found.stage, found.run, step_of(found.meta), found.meta, run, weights)


def ancestors(found: Contents) -> list[Record]:
    """The models that it was trained from, the first first; with figures where their folders are still there."""
    entries = []
    for stage in earlier_stages(stage_of(found), base_dir_of(found)):
        known = {**stage.progress, "data": data_of(stage.meta)}
        figures = {key: known[key] for key in ("tokens", "val_bpb", "data") if known.get(key) is not None}
        entries.append({"stage": stage.name, "run": stage.tag, "step": stage.step, **figures})
    return entries


def data_of(meta: Record) -> str | None:
    """The flag that says what a stage trained on."""
    flags = part(meta, "user_config")
    return str(flags.get("data") or flags.get("tasks") or "") or None


def training(found: Contents, report: Record, before: list[Record]) -> Record:
    """How it was trained, as far as that is recorded."""
    meta = found.meta
    progress, plan, flags, runtime = (part(meta, k) for k in ("progress", "plan", "user_config", "runtime"))
    stage = report.get(STAGES.get(found.stage, ""), {})
    tokens = number(progress.get("tokens"))
    values: Record = {
        "steps": number(progress.get("step", meta.get("step"))),
        "planned_steps": number(plan.get("num_steps")),
        "tokens": tokens,
        "seconds": number(progress.get("seconds")),
        "wall_seconds": number(progress.get("wall_seconds")),
        "recipe": meta.get("recipe") or flags.get("recipe") or part(meta, "base").get("recipe"),
        "seed": number(flags.get("seed")),
        "data": data_of(meta),
        "licence": licence(before, found.stage, flags),
        "device": runtime.get("device"),
        "dtype": runtime.get("dtype"),
        "world_size": number(runtime.get("world_size")),
    }
    if str(stage.get("metrics", "")).endswith(f"/{found.run}/metrics.jsonl"):
        machine = part(report, "machine")
        values["processor"] = machine.get("gpus") if runtime.get("device") == "cuda" else machine.get("processor")
    if found.config and tokens is not None:
        flops, counts = estimate(found.config)
        values["flops"] = float(flops * tokens)
        if found.stage == "base":
            values["tokens_per_parameter"] = tokens / scaling_params(counts)
    return {name: value for name, value in values.items() if value is not None}


def licence(before: list[Record], stage: str, flags: Record) -> str | None:
    """Of the data that it, and what it was trained from, learnt from, by data set."""
    stages = [(entry["stage"], {"data": entry.get("data"), "tasks": entry.get("data")}) for entry in before]
    stages = [(name, values) for name, values in [*stages, (stage, flags)] if name in STAGES]
    # A long list is of the user's own files, and the time it takes to part it grows with the square of its length.
    sets = [
        data_sets(name, values) if len(str(values.get("data"))) < MAX_DATA else [*data_sets(name, named(values)), OWN]
        for name, values in stages
    ]
    known = dict.fromkeys(data for stage_sets in sets for data in stage_sets)
    words = "; ".join(f"{data.short} ({data.licence})" for data in known)
    return f"{words}; of the stages before it not recorded" if words and [] in sets[:-1] else words or None


def named(flags: Record) -> Record:
    """Flags whose --data has only the entries that are known by name."""
    entries = [entry.strip() for entry in str(flags["data"]).split(",")]
    return {**flags, "data": ",".join(entry for entry in entries if entry.partition(":")[0] in TEXTS | CONVERSATIONS)}


def figures(found: Contents, report: Record) -> Record:
    """Bits per byte and accuracies: of the checkpoint itself, and those that the report has of the same weights."""
    progress = part(found.meta, "progress")
    recorded = {key: progress.get(key) for key in ("val_bpb", "best_val_bpb")}
    recorded |= {f"before {key}": value for key, value in part(found.meta, "before").items()}
    values: Record = {key: value for key, value in recorded.items() if number(value) is not None}
    evaluated = report.get(CHAT_EVALUATIONS.get(found.stage, ""), {})
    if evaluated.get("checkpoint") == reported_name(stage_of(found)):
        values |= {name: evaluated[name] for name in [*evaluated.get("counts", {}), "chatcore"] if name in evaluated}
    return values


def report_of(found: Contents) -> Record:
    """The report of the base folder that it lies in; empty if there is none that can be read."""
    base_dir = base_dir_of(found)
    try:
        return load_report(base_dir) if base_dir else {}
    except UserError:
        return {}


def tokenizer(found: Contents, report: Record) -> Record:
    if not (facts := found.tokenizer):
        return {}
    values: Record = {"kind": facts.kind, "vocab_size": facts.vocab_size, "special_tokens": facts.special_tokens}
    trained = part(report, "tokenizer")
    if facts.hash:
        values["hash"] = facts.hash
        if trained.get("hash") == facts.hash and "bytes_per_token" in trained:
            values["bytes_per_token"] = trained["bytes_per_token"]
    return values


def number(value: Any) -> Any:
    """`value` if it is a number that can be calculated with, else None."""
    return value if type(value) in (int, float) and abs(value) < 1e18 else None
