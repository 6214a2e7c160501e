"""README.md of an export: a model card whose front matter the hub reads, with the report's figures and curves.

A card is public. Only what is listed here gets into it: no path, no tag of a run, no name of a machine or of a file of
the user's own (training_data.py). Everything about the training may be missing, and is then left out.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nanochat.common import atomic_write, format_count, format_seconds, get_base_dir
from nanochat.formats.card_front import CardOptions, front_matter
from nanochat.formats.card_plots import draw_curves
from nanochat.formats.features import features_in_words
from nanochat.formats.history import Stage, history_of, own_report
from nanochat.formats.portable import PortableModel, part
from nanochat.formats.training_data import DataSet
from nanochat.gpt_config import GPTConfig
from nanochat.recipe import with_changes
from nanochat.reporting.curves import Record, is_number, scoped, task_words
from nanochat.reporting.machine import git_commit, package_version
from nanochat.reporting.pages import escape_markdown, fence
from nanochat.reporting.samples import Answer
from nanochat.reporting.view import skill_groups
from nanochat.scaling import estimate, ngram_share

SAMPLES, SAMPLE_LENGTH = 4, 300
SMALL = 10**9  # parameters below which a model is called small


def write_card(
    model: PortableModel,
    folder: Path,
    route: str,
    dtype: str,
    options: CardOptions | None = None,
    base_dir: Path | None = None,
) -> None:
    """Write README.md, and the pictures of its curves, into the folder of an export.

    `route` is class, code or onnx, `dtype` that of the weights. `base_dir` holds the model's runs and their report.
    """
    options = options or CardOptions()
    base_dir = (base_dir or get_base_dir(to_write=False)).resolve()
    stages = history_of(model, base_dir)
    report = own_report(stages, base_dir)
    values = {
        "front": front_matter(model, stages, report, options, route),
        "curves": draw_curves(stages, folder),
        "route": route,
        "int8": any(folder.glob("onnx/*quantized*")),
        "lossy": dtype == "bfloat16",
        "name": options.name,
        "command": options.command,
        **describe(model, stages, report),
        "licence": options.licence,
    }
    with atomic_write(folder / "README.md", "w") as file:
        file.write(re.sub(r"\n{3,}", "\n\n", environment().get_template("model_card.md.j2").render(**values)))


@cache
def environment() -> Environment:
    made = Environment(
        loader=PackageLoader("nanochat.formats"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {
        "alt": lambda text: re.sub(r"[\[\]\n]", " ", text),
        "fence": fence,
        "markdown": escape_markdown,
        "percent": "{:.1%}".format,
        "task_words": task_words,
    }
    return made


# ---------------------------------------------------------------------------------------------------
# Body


def describe(model: PortableModel, stages: Sequence[Stage], report: Record) -> dict[str, Any]:
    """The template's values that follow from the model and its training."""
    config, own = model.config, stages[-1]
    seconds = sum(stage.progress.get("seconds") or 0.0 for stage in stages)
    notes = part(own.meta, "imported").get("notes") or own.meta.get("notes") or []
    heading, samples = samples_of(model, report)
    return {
        "title": title_of(model),
        "summary": summary_of(model, stages),
        "is_chat": model.is_chat,
        "context": config.sequence_len,
        "facts": facts_of(model, stages),
        "figures": figures_of(stages, report),
        "skills": skill_groups(report),
        "stages": [stage_row(stage) for stage in stages],
        "machine": machine_of(report),
        "commands": [stage.command for stage in stages if stage.command],
        "notes": [note for note in notes if isinstance(note, str) and "/" not in note],  # none with a path
        "sample_heading": heading,
        "samples": samples,
        "data": data_rows(stages),
        "limits": list(limits_of(model, seconds)),
        "version": package_version(),
        "commit": git_commit(),
    }


def count_parameters(config: GPTConfig) -> int:
    return estimate(config)[1]["total"]


def parameters_in_words(config: GPTConfig) -> str:
    """`1.97M parameters`, and how many of them are in a table of n-grams."""
    counts = estimate(config)[1]
    return f"{format_count(counts['total'])} parameters{ngram_share(counts)}"


def title_of(model: PortableModel) -> str:
    """`nanochat, 1.97M parameters, finetuned for chat`."""
    kind = {"base": "base model", "sft": "finetuned for chat", "rl": "finetuned for chat, with reinforcement learning"}
    return f"nanochat, {parameters_in_words(model.config)}, {kind[model.source]}"


def summary_of(model: PortableModel, stages: Sequence[Stage]) -> str:
    """What the model is, in two sentences."""
    tokens = stages[0].progress.get("tokens") if stages[0].name == "base" else None
    text = f"{format_count(tokens)} tokens of text" if tokens else "text"
    words = {"base": "pretrained further", "sft": "finetuned on conversations", "rl": "trained on its own answers"}
    steps = ", ".join([f"pretrained on {text}", *(f"then {words[stage.name]}" for stage in stages[1:])])
    if stages[0].name != "base":
        steps = words[stages[0].name]
    small = "small " if count_parameters(model.config) < SMALL else ""
    imported = " It was imported from elsewhere." if any(stage.origin for stage in stages) else ""
    return (
        f"A {small}language model made with nanochat, {steps}.{imported} What it can and cannot do is measured below."
    )


def facts_of(model: PortableModel, stages: Sequence[Stage]) -> list[tuple[str, str]]:
    """(label, text) of sizes and recipe."""
    config = model.config
    recipe = (
        stages[-1].meta.get("recipe") or stages[0].meta.get("recipe") or part(stages[-1].meta, "base").get("recipe")
    )
    heads = f"{config.n_head} of {config.head_dim}, {config.n_kv_head} for keys and values"
    return [
        ("parameters", f"{count_parameters(config):,}{ngram_share(estimate(config)[1])}"),
        ("layers, width", f"{config.n_layer}, {config.n_embd}"),
        ("heads", heads),
        ("context", f"{config.sequence_len:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,} (byte-level BPE)"),
        ("recipe", with_changes(str(recipe), config) if recipe else "not recorded"),
        ("beside the plain transformer", ", ".join(features_in_words(config)) or "nothing"),
    ]


def figures_of(stages: Sequence[Stage], report: Record) -> list[tuple[str, str]]:
    """(label, text) of bits per byte after each stage, CORE and ChatCORE."""
    found = []
    for stage in stages:
        if is_number(bpb := stage.progress.get("val_bpb")):
            text = "conversations" if stage.name == "sft" else "text"
            found.append((f"bits per byte of held-out {text}, after {stage.title}", f"{bpb:.3f}"))
    for key, label in (("base_eval", "CORE"), ("chat_eval", "ChatCORE"), ("chat_eval_rl", "ChatCORE after RL")):
        values = report.get(key) or {}
        name = "core" if key == "base_eval" else "chatcore"
        if is_number(values.get(name)):
            low, high = values.get(f"{name}_interval") or (None, None)
            interval = f" (95% {low:.4f} to {high:.4f})" if is_number(low) and is_number(high) else ""
            found.append((scoped(label, values.get(f"{name}_of")), f"{values[name]:.4f}{interval}"))
    return found


def stage_row(stage: Stage) -> list[str]:
    """Of the table of stages."""
    progress = stage.progress
    tokens, seconds, bpb = (progress.get(key) for key in ("tokens", "seconds", "val_bpb"))
    return [
        stage.title,
        f"{stage.step:,}" if stage.step else "",
        format_count(tokens) if is_number(tokens) else "",
        format_seconds(seconds) if is_number(seconds) else "",
        f"{bpb:.3f}" if is_number(bpb) else "",
        ", ".join(one.short for one in stage.data()) or "not recorded",
    ]


def machine_of(report: Record) -> str:
    """`2 cores of AMD EPYC` or the GPUs; "" if unknown."""
    machine = report.get("machine") or {}
    if machine.get("gpus"):
        return str(machine["gpus"])
    return f"{machine['cores']} cores of {machine['processor']}" if machine.get("processor") else ""


def samples_of(model: PortableModel, report: Record) -> tuple[str, list[tuple[str, str]]]:
    """(where they are from, [(prompt, what the model wrote)]): of the model's own stage, not chosen."""
    keys = {"base": ("base_eval", "base_train"), "sft": ("chat_sft", "chat_eval"), "rl": ("chat_rl", "chat_eval_rl")}
    for key in keys[model.source]:
        found = [s for s in (report.get(key) or {}).get("samples") or () if s.get("prompt") and s.get("text")]
        if found:
            texts = [(shorten(str(s["prompt"])), shorten(Answer(str(s["text"])).plain)) for s in found[:SAMPLES]]
            return "The first of the report's samples, the most likely token each time; not chosen.", texts
    return "", []


def shorten(text: str) -> str:
    return text if len(text) <= SAMPLE_LENGTH else text[:SAMPLE_LENGTH] + "…"


def data_rows(stages: Sequence[Stage]) -> list[list[str]]:
    """Of the table of data: name, stages, licence."""
    used: dict[DataSet, list[str]] = {}
    for stage in stages:
        for one in stage.data():
            used.setdefault(one, []).append(stage.title)
    return [
        [one.name + (f" (`{one.hub}`)" if one.hub else ""), ", ".join(dict.fromkeys(titles)), one.licence]
        for one, titles in used.items()
    ]


def limits_of(model: PortableModel, seconds: float) -> list[str]:
    """Sentences about what not to expect."""
    config = model.config
    time = f", and was trained for {format_seconds(seconds)}" if seconds else ""
    limits = [
        f"It has {parameters_in_words(config)}{time}. What it writes is often wrong or makes no sense, and always "
        "sounds sure.",
        "Nothing was done for safety: it refuses nothing, and its texts have the errors and prejudices of what it "
        "learnt from.",
        f"It cannot read or write more than {config.sequence_len:,} tokens at once.",
    ]
    if model.is_chat:
        limits.append(
            "It may call a calculator (`<|python_start|>`), which nanochat's own programs answer. Other programs do "
            "not, and it goes on without the result."
        )
    return limits
