"""Evaluate a base model: `python -m scripts.base_eval --eval bpb,sample`."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nanochat.checkpoint_manager import find_run, load_model
from nanochat.common import UserError, get_base_dir
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import resolve_corpus
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import record_stage
from nanochat.runtime import Runtime
from nanochat.session import choose_device_batch, command_line
from nanochat.tokenizer import RustBPETokenizer
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
        for split in ("train", "val"):
            values[f"{split}_bpb"] = split_bpb(config, model, tokenizer, split, runtime)
            runtime.print0(f"{split} bits per byte: {values[f'{split}_bpb']:.4f}")
    if "sample" in wanted and runtime.is_main:
        values["samples"] = samples(model, tokenizer)
        for item in values["samples"]:
            print(f"  {item['prompt']}{item['text']}")
    if runtime.is_main:
        values |= {"seconds": time.perf_counter() - started, "command": command_line("base_eval", config)}
        record_stage(base_dir, "base_eval", values)
    return 0


def split_bpb(config: Config, model: GPT, tokenizer: RustBPETokenizer, split: str, runtime: Runtime) -> float:
    """Bits per byte over a fixed sample of a split; the same rows for any number of processes."""
    T, rows = model.config.sequence_len, 32
    tokens = config.split_tokens if config.split_tokens > 0 else 2**18 if runtime.device.type == "cpu" else 40 * 2**19
    corpus = resolve_corpus(config.data, get_base_dir())
    loader = PretrainLoader(corpus, tokenizer, sequence_len=T, rows_per_step=rows, split=split, seed=0,
                            rank=runtime.rank, world_size=runtime.world_size)  # fmt: skip
    micro = choose_device_batch(config.device_batch_size, rows, T, runtime)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(max(1, tokens // (rows * T))):
            batch = loader.next_batch()
            for start in range(0, batch.inputs.size(0), micro):
                yield batch.inputs[start : start + micro], batch.targets[start : start + micro]

    bpb = evaluate_bpb(model, batches(), 10**9, torch.tensor(tokenizer.token_bytes), runtime)
    loader.close()
    return bpb


def samples(model: GPT, tokenizer: RustBPETokenizer) -> list[dict[str, str]]:
    """Greedy continuations of the fixed prompts, then three free ones at temperature 0.8."""
    engine = Engine(model, tokenizer)
    generate = partial(engine.generate_batch, num_samples=1, seed=42)
    found: list[dict[str, str]] = []
    for prompt, temperature, length in [(p, 0.0, 32) for p in PROMPTS] + [("", 0.8, 64)] * 3:
        tokens = tokenizer.encode(prompt, prepend="<|bos|>")
        if len(tokens) >= engine.max_context:
            continue
        results, _ = generate(tokens, max_tokens=length, temperature=temperature, seed=42 + len(found))
        found.append({"prompt": prompt, "text": tokenizer.decode(results[0][len(tokens) :])})
    return found


if __name__ == "__main__":
    _cli.run(main)
