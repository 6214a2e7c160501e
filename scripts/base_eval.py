"""Evaluate a base model: `python -m scripts.base_eval --eval bpb,sample`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.checkpoint_manager import find_run, load_model
from nanochat.common import UserError, get_base_dir
from nanochat.dataset import resolve_corpus
from nanochat.gpt import GPT
from nanochat.report import record_stage
from nanochat.runtime import Runtime
from nanochat.session import choose_device_batch, command_line
from nanochat.tokenizer import RustBPETokenizer
from scripts import _cli
from scripts._observe import EVAL_ROWS, continuations, corpus_bpb

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
    """Which evaluations, separated by commas: bpb, sample."""
    hf_path: str = ""
    """A Hugging Face model to evaluate instead."""
    model_tag: str = ""
    """Tag of the base run; empty takes the latest."""
    step: int = -1
    """Its step; -1 takes the last."""
    data: str = ""
    """As for base_train."""
    split_tokens: int = -1
    """Tokens per split for bpb; -1 is 2^18 on a CPU and 40 * 2^19 elsewhere."""
    device_batch_size: int = -1
    """Rows per forward pass; -1 chooses."""
    max_per_task: int = -1
    """Items per CORE task; -1 takes all."""
    device_type: str = ""
    """cuda, mps or cpu; empty picks the best there is."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    wanted = [name.strip() for name in config.eval.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in EVALUATIONS]
    if unknown or not wanted:
        raise UserError(f"--eval takes {', '.join(EVALUATIONS)}, got {config.eval!r}")
    if "core" in wanted or config.hf_path:
        raise UserError("CORE and --hf-path are not part of this version; use --eval bpb,sample on a nanochat model")
    with Runtime.create(config.device_type) as runtime:
        return evaluate(config, wanted, runtime)


def evaluate(config: Config, wanted: list[str], runtime: Runtime) -> int:
    started = time.perf_counter()
    base_dir = get_base_dir()
    run = find_run(base_dir, "base", config.model_tag or None)
    model, tokenizer, meta = load_model("base", runtime, base_dir=base_dir, model_tag=run.name,
                                        step=None if config.step < 0 else config.step,
                                        compute_dtype=runtime.dtype)  # fmt: skip
    runtime.print0(f"{runtime.describe()}\nbase model: {run.name}, step {meta['step']}")
    values: dict[str, Any] = {
        "model": run.name,
        "step": meta["step"],
        "num_params": model.num_scaling_params()["total"],
    }
    if "bpb" in wanted:
        corpus = resolve_corpus(config.data, base_dir)
        tokens = (
            config.split_tokens if config.split_tokens > 0 else 2**18 if runtime.device.type == "cpu" else 40 * 2**19
        )
        micro = choose_device_batch(config.device_batch_size, EVAL_ROWS, model.config.sequence_len, runtime)
        for split in ("train", "val"):
            values[f"{split}_bpb"] = corpus_bpb(
                model, corpus, tokenizer, runtime, split=split, tokens=tokens, device_batch_size=micro
            )
            runtime.print0(f"{split} bits per byte: {values[f'{split}_bpb']:.4f}")
    if "sample" in wanted and runtime.is_main:
        values["samples"] = samples(model, tokenizer)
        for item in values["samples"]:
            print(f"  {item['prompt']}{item['text']}")
    if runtime.is_main:
        values |= {"seconds": time.perf_counter() - started, "command": command_line("base_eval", config)}
        record_stage(base_dir, "base_eval", values)
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
