"""Evaluate a base model: `python -m scripts.base_eval --eval core,bpb,sample`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from nanochat.common import UserError, get_base_dir, is_writable, say, visible
from nanochat.common.ranges import Range
from nanochat.dataset import Corpus
from nanochat.evals.bits_per_byte import bpb_by_source, corpus_bpb, measured_tokens
from nanochat.evals.core_bundle import Bundle
from nanochat.evals.core_run import open_bundle, report_values, run_core, write_details
from nanochat.evals.samples import continuations
from nanochat.evals.subject import Subject, load_checkpoint, load_hf, open_evaluation_corpus
from nanochat.report import record_stage
from nanochat.reporting.curves import scoped
from nanochat.runtime import Runtime
from nanochat.scaling import reported_params
from nanochat.train.commands import command_line
from nanochat.train.config import DataConfig
from scripts import _cli

PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "The sun is",
    "A dog is an animal that",
    "If you want to bake bread, you",
    "hello, how are you?",
)
EVALUATIONS = ("core", "bpb", "sample")


@dataclass
class Config(DataConfig, _cli.ModelConfig):
    """Evaluate a base model on raw text. -1 means "off" or "the last"."""

    eval: str = "bpb,sample"
    """Which evaluations, separated by commas: core, bpb, sample."""
    hf_path: str = ""
    """A Hugging Face model to evaluate instead: its name on the hub, or a folder."""
    trust_remote_code: bool = False
    """Run the Python code in the folder of --hf-path, which a model with a network of its own needs."""
    data: str = ""
    """As for base_train; empty: the model's training data."""
    split_tokens: int = -1
    """Tokens per split for bpb; -1 is 2^18 on a CPU and 40 * 2^19 elsewhere."""
    device_batch_size: Annotated[int, Range(1, unset=-1)] = -1
    """Rows per forward pass; -1 chooses."""
    max_per_task: Annotated[int, Range(1, unset=-1)] = -1
    """Items per CORE task; -1 takes all."""
    eval_bundle: str = ""
    """Folder of the CORE bundle; empty: eval_bundle/ in the base folder, downloaded if it is not there."""
    core_tasks: str = ""
    """Only these CORE tasks, separated by commas."""
    core_mode: Literal["reference", "dclm"] = "reference"
    """Format of CORE prompts: reference (as in this system's published results) or dclm (as in DCLM's harness)."""
    baselines: Literal["v1", "v2"] = "v1"
    """Chance levels of CORE: v1 (as in the published GPT-2 results) or v2."""
    int8: bool = False
    """Evaluate the model with the 8-bit weights that decoding can use (packed_weights.py)."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    evaluations = [name.strip() for name in config.eval.split(",") if name.strip()]
    if not evaluations or not set(evaluations) <= set(EVALUATIONS):
        raise UserError(f"--eval takes {', '.join(EVALUATIONS)}, got {config.eval!r}")
    if config.core_tasks and "core" not in evaluations:
        raise UserError("--core-tasks needs --eval=core")
    with Runtime.create(config.device_type) as runtime:
        return evaluate(config, evaluations, runtime)


def evaluate(config: Config, evaluations: list[str], runtime: Runtime) -> int:
    started, base_dir, bundle = time.perf_counter(), get_base_dir(to_write=False), None
    if "core" in evaluations:  # before loading a model: it may be missing
        bundle = open_bundle(config.eval_bundle, base_dir, runtime, config.baselines, config.core_tasks)
    subject = load_subject(config, runtime)
    values: dict[str, Any] = {}
    if "bpb" in evaluations:
        corpus = open_evaluation_corpus(
            subject, config.data, runtime, base_dir, text_field=config.text_field, skip_bad=config.skip_bad_shards
        )
        values |= evaluate_bpb(subject, corpus, config.split_tokens, runtime)
    if "sample" in evaluations and not subject.meta:
        runtime.print0("no samples: --eval=sample is for nanochat models")
    elif "sample" in evaluations and runtime.is_main:
        values["samples"] = samples(subject)
        for item in values["samples"]:
            say(visible(f"  {item['prompt']}{item['text']}"))
    if bundle:
        core = evaluate_core(config, subject, bundle, runtime, base_dir)
        values |= core | {"tables": values.get("tables", {}) | core["tables"]}
    if runtime.is_main and subject.meta and not config.int8:  # the report shows the model as trained
        values |= {
            "model": subject.name,
            "step": subject.meta["step"],
            "weights": subject.meta["weights"],
            **reported_params(subject.model.num_scaling_params()),
            "seconds": time.perf_counter() - started,
            "command": command_line("base_eval", config),
        }
        record_stage(base_dir, "base_eval", values)
    return 0


def load_subject(config: Config, runtime: Runtime) -> Subject:
    if config.int8 and (config.hf_path or runtime.device.type != "cpu"):
        raise UserError("--int8 is for nanochat models on a CPU; add --device-type=cpu, or leave --int8 out")
    if config.trust_remote_code and not config.hf_path:
        raise UserError("--trust-remote-code needs --hf-path")
    if config.hf_path:
        return load_hf(config.hf_path, runtime, config.trust_remote_code)
    return load_checkpoint(config.model_tag, config.step, config.int8, config.device_batch_size, runtime)


def evaluate_bpb(subject: Subject, corpus: Corpus, split_tokens: int, runtime: Runtime) -> dict[str, Any]:
    """Bits per byte of both splits, and of each source for a nanochat model. Collective."""
    model, tokenizer, tables = subject.model, subject.tokenizer, {}
    values: dict[str, Any] = {"data": corpus.name}
    tokens = split_tokens if split_tokens > 0 else subject.bpb_tokens
    measured = f"{measured_tokens(tokens, model.config.sequence_len):,} tokens"
    for split in ("train", "val"):
        values[f"{split}_bpb"] = corpus_bpb(
            model, corpus, tokenizer, runtime, split=split, tokens=tokens, device_batch_size=subject.device_batch_size
        )
        values[f"{split}_bpb_of"] = measured
        runtime.print0(f"{scoped(f'{split} bits per byte', measured)}: {values[f'{split}_bpb']:.4f}")
    for split, name in (("train", "Training"), ("val", "Validation")) if subject.meta else ():
        rows = bpb_by_source(model, corpus, tokenizer, runtime, split=split, tokens=tokens // 8)
        if len(rows) > 1:
            tables[f"{name} bits per byte by source"] = rows
            for row in rows:
                line = f"{row['source']:<24}{row['bits per byte']:8.4f}   ({row['documents']} documents)"
                runtime.print0(f"  {split} {line}")
    return {**values, "tables": tables} if tables else values


def evaluate_core(config: Config, subject: Subject, bundle: Bundle, runtime: Runtime, base_dir: Path) -> dict[str, Any]:
    """CORE, with details in base_eval/; returns the report's values. Collective."""
    options = {"max_per_task": config.max_per_task, "mode": config.core_mode, "baselines": config.baselines}
    result = run_core(subject.scorer, subject.tokenizer, bundle, runtime, **options)  # type: ignore[arg-type]
    if runtime.is_main and is_writable(base_dir):
        folder = base_dir / "base_eval" / (subject.folder + options_suffix(config))
        say(f"details: {write_details(folder, result, subject.name)}")
    return report_values(result)


def options_suffix(config: Config) -> str:
    """Suffix of the details folder, so that a partial evaluation does not overwrite a complete one."""
    parts = [
        config.core_mode if config.core_mode != "reference" else "",
        "v2" if config.baselines == "v2" else "",
        f"first{config.max_per_task}" if config.max_per_task > 0 else "",
        "-".join(sorted(t.strip() for t in config.core_tasks.split(",") if t.strip())),
    ]
    return "".join(f"_{part}" for part in parts if part)


def samples(subject: Subject) -> list[dict[str, str]]:
    """Greedy continuations of the fixed prompts, then three unconditional samples at temperature 0.8."""
    model, tokenizer = subject.model, subject.tokenizer
    prompts = [(prompt, tokenizer.encode(prompt, prepend="<|bos|>")) for prompt in PROMPTS]
    unconditional = [("", tokenizer.encode("", prepend="<|bos|>"))] * 3
    return [
        *continuations(model, tokenizer, prompts, max_tokens=32),
        *continuations(model, tokenizer, unconditional, max_tokens=64, temperature=0.8),
    ]


if __name__ == "__main__":
    _cli.run(main, memory_flags="--device-batch-size")
