"""Evaluate a base model: `python -m scripts.base_eval --eval core,bpb,sample`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from nanochat.checkpoint_manager import find_run, load_model
from nanochat.common import UserError, get_base_dir, say
from nanochat.dataset import Corpus, open_corpus
from nanochat.evals.bits_per_byte import EVAL_ROWS, bpb_by_source, corpus_bpb
from nanochat.evals.core_bundle import Bundle
from nanochat.evals.core_prompts import MODES
from nanochat.evals.core_run import open_bundle, report_values, run_core, write_details
from nanochat.evals.samples import continuations
from nanochat.evals.scoring import GPTScorer
from nanochat.gpt import GPT
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.ranges import Range
from nanochat.report import record_stage
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.device_batch import choose_device_batch
from nanochat.train.run import command_line
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
class Config:
    """Evaluate a base model on raw text. -1 means "off" or "the last"."""

    eval: str = "bpb,sample"
    """Which evaluations, separated by commas: core, bpb, sample."""
    hf_path: str = ""
    """A Hugging Face model to evaluate instead: its name on the hub, or a folder."""
    model_tag: str = ""
    """Tag of the base run; empty takes the latest."""
    step: int = -1
    """Its step; -1 takes the last."""
    data: str = ""
    """As for base_train; empty: what the model was trained on."""
    skip_bad_shards: bool = False
    """Go on without files of the data that are missing or damaged, and say which."""
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
    core_mode: str = "reference"
    """How CORE prompts are written: reference (as published figures of this system) or dclm (as DCLM's harness)."""
    baselines: Literal["v1", "v2"] = "v1"
    """Chance levels of CORE: v1 (the published GPT-2 figures') or v2."""
    int8: bool = False
    """Evaluate what the model is when it decodes with weights of eight bits (packed_weights.py)."""
    device_type: str = ""
    """cuda, mps or cpu; empty picks the best there is."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    wanted = [name.strip() for name in config.eval.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in EVALUATIONS]
    if unknown or not wanted:
        raise UserError(f"--eval takes {', '.join(EVALUATIONS)}, got {config.eval!r}")
    if config.core_tasks and "core" not in wanted:
        raise UserError("--core-tasks is for --eval=core: give both, or neither")
    if config.core_mode not in MODES:
        raise UserError(f"--core-mode takes {' or '.join(MODES)}, got {config.core_mode!r}")
    with Runtime.create(config.device_type) as runtime:
        return evaluate(config, wanted, runtime)


def evaluate(config: Config, wanted: list[str], runtime: Runtime) -> int:
    started = time.perf_counter()
    base_dir = get_base_dir()
    # What can be wrong is found before a model is loaded.
    bundle = None
    if "core" in wanted:
        bundle = open_bundle(config.eval_bundle, base_dir, runtime, config.baselines, config.core_tasks)
    if config.int8 and (config.hf_path or runtime.device.type != "cpu"):
        raise UserError("--int8 is for our own models on a CPU; add --device-type=cpu, or leave --int8 out")
    if config.hf_path:
        return evaluate_hf(config, wanted, bundle, runtime, base_dir)
    run = find_run(base_dir, "base", config.model_tag or None)
    model, tokenizer, meta = load_model(
        "base",
        runtime,
        base_dir=base_dir,
        model_tag=run.name,
        step=None if config.step < 0 else config.step,
        compute_dtype=runtime.dtype,
    )
    if config.int8:
        model = DecodingWeights(model, int8=True).current()
    runtime.print0(f"{runtime.describe()}\nbase model: {run.name}, step {meta['step']}{', int8' * config.int8}")
    values: dict[str, Any] = {
        "model": run.name,
        "step": meta["step"],
        "num_params": model.num_scaling_params()["total"],
    }
    if "bpb" in wanted:
        corpus = text_to_measure_on(config, meta, runtime, base_dir)
        values["data"] = corpus.name
        tokens = (
            config.split_tokens if config.split_tokens > 0 else 2**18 if runtime.device.type == "cpu" else 40 * 2**19
        )
        micro = choose_device_batch(config.device_batch_size, EVAL_ROWS, model.config.sequence_len, runtime)
        for split in ("train", "val"):
            values[f"{split}_bpb"] = corpus_bpb(
                model, corpus, tokenizer, runtime, split=split, tokens=tokens, device_batch_size=micro
            )
            runtime.print0(f"{split} bits per byte: {values[f'{split}_bpb']:.4f}")
        for split, name in (("train", "Training"), ("val", "Validation")):
            by_source = bpb_by_source(model, corpus, tokenizer, runtime, split=split, tokens=tokens // 8)
            if len(by_source) > 1:
                values.setdefault("tables", {})[f"{name} bits per byte by source"] = by_source
                for row in by_source:
                    runtime.print0(
                        f"  {split} {row['source']:<24}{row['bits per byte']:8.4f}   ({row['documents']} documents)"
                    )
    if "sample" in wanted and runtime.is_main:
        values["samples"] = samples(model, tokenizer)
        for item in values["samples"]:
            say(f"  {item['prompt']}{item['text']}")
    if bundle:
        result = run_core(
            GPTScorer(model),
            tokenizer,
            bundle,
            runtime,
            max_per_task=config.max_per_task,
            mode=config.core_mode,
            baselines=config.baselines,
        )
        of_core = report_values(result)
        values |= of_core | {"tables": values.get("tables", {}) | of_core["tables"]}
        if runtime.is_main:
            folder = base_dir / "base_eval" / (f"{run.name}_{meta['step']:06d}" + what_was_asked(config))
            say(f"details: {write_details(folder, result, run.name)}")
    if runtime.is_main:
        values |= {"seconds": time.perf_counter() - started, "command": command_line("base_eval", config)}
        if not config.int8:  # the report is about the model as it was trained
            record_stage(base_dir, "base_eval", values)
    return 0


def text_to_measure_on(config: Config, meta: dict[str, Any], runtime: Runtime, base_dir: Path) -> Corpus:
    """What --data names, else what the model was trained on."""
    try:
        data = config.data or meta.get("user_config", {}).get("data", "")
        corpus = open_corpus(data, base_dir, runtime, skip_bad=config.skip_bad_shards)
    except UserError as error:
        if config.data:
            raise
        raise UserError(
            f"the text that the model was trained on cannot be read ({error}); give another as --data, or "
            "--eval without bpb"
        ) from error
    if corpus.fingerprint != meta.get("corpus", corpus.fingerprint):
        runtime.print0(f"bits per byte are of {corpus.name}, which is not what the model was trained on")
    return corpus


def what_was_asked(config: Config) -> str:
    """Part of a folder's name, so that part of an evaluation does not replace a whole one."""
    parts = [
        config.core_mode if config.core_mode != "reference" else "",
        "v2" if config.baselines == "v2" else "",
        f"first{config.max_per_task}" if config.max_per_task > 0 else "",
        "-".join(sorted(t.strip() for t in config.core_tasks.split(",") if t.strip())),
    ]
    return "".join(f"_{part}" for part in parts if part)


def evaluate_hf(config: Config, wanted: list[str], bundle: Bundle | None, runtime: Runtime, base_dir: Path) -> int:
    """The same of a Hugging Face model; printed and written beside the others, but no stage of the report."""
    from nanochat.evals.hf_model import load_hf_model

    model, tokenizer = load_hf_model(config.hf_path, runtime)
    runtime.print0(f"{runtime.describe()}\nHugging Face model: {config.hf_path}, context {model.max_tokens}")
    if "bpb" in wanted:
        corpus = open_corpus(config.data, base_dir, runtime, skip_bad=config.skip_bad_shards)
        tokens = config.split_tokens if config.split_tokens > 0 else 2**18
        for split in ("train", "val"):
            bpb = corpus_bpb(
                model,  # type: ignore[arg-type]
                corpus,
                tokenizer,  # type: ignore[arg-type]
                runtime,
                split=split,
                tokens=tokens,
                device_batch_size=max(1, 8192 // model.max_tokens),
            )
            runtime.print0(f"{split} bits per byte: {bpb:.4f}")
    if bundle:
        result = run_core(
            model,
            tokenizer,
            bundle,
            runtime,
            max_per_task=config.max_per_task,
            mode=config.core_mode,
            baselines=config.baselines,
        )
        if runtime.is_main:
            name = config.hf_path.strip("/").replace("/", "-") + what_was_asked(config)
            say(f"details: {write_details(base_dir / 'base_eval' / name, result, config.hf_path)}")
    return 0


def samples(model: GPT, tokenizer: RustBPETokenizer) -> list[dict[str, str]]:
    """Greedy continuations of the fixed prompts, then three from nothing at temperature 0.8."""
    prompts = [(prompt, tokenizer.encode(prompt, prepend="<|bos|>")) for prompt in PROMPTS]
    free = [("", tokenizer.encode("", prepend="<|bos|>"))] * 3
    return [
        *continuations(model, tokenizer, prompts, max_tokens=32),
        *continuations(model, tokenizer, free, max_tokens=64, temperature=0.8),
    ]


if __name__ == "__main__":
    _cli.run(main)
