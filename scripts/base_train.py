"""Pretrain a base model: `python -m scripts.base_train --depth=4`."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import load_model_state, open_checkpoint, run_dir
from nanochat.common import UserError, format_count, get_base_dir, write_json
from nanochat.dataloader import Batch, PretrainLoader
from nanochat.dataset import Corpus, resolve_corpus
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import record_stage
from nanochat.runtime import Runtime
from nanochat.scaling import REFERENCE_DEPTH, Plan, align_batch, derive_sizes, describe, make_plan, scaling_params
from nanochat.session import (
    choose_device_batch,
    command_line,
    measure_peak_flops,
    merge_saved_config,
    move_aside,
    prepare_run,
)  # fmt: skip
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.trainer import Hook, Record, ScheduleConfig, Trainer
from scripts import _cli
from scripts._train import (
    OPERATIONAL,
    TrainFlags,
    compiled_loss,
    drive,
    make_optimizer,
    print_table,
    relative_to,
    saved_steps,
    steps_for_minutes,
)  # fmt: skip

# In the minutes of a CPU run far fewer tokens than the compute-optimal ten per parameter can be seen, and finetuning
# adds as many again: below this many a shallower model ends better (dev/LOG.md).
MIN_TOKENS_PER_PARAM = 2
USUAL_SHARE_OF_PEAK = 0.4
EVAL_ROWS = 32  # per evaluation step over all processes: fixed, so that the figure does not depend on them
PROMPTS = ("The capital of France is", "Once upon a time", "The sun is", "My favourite food is")


@dataclass
class Config(TrainFlags):
    """Pretrain a base model from raw text. -1 means "off" or "derive it"."""

    data: str = ""
    """starter, fineweb-edu, climbmix, or a path or glob of parquet, jsonl(.gz, .zst) or txt; empty: what is there."""
    depth: int = 12
    """The one dial: layers. Width, heads, horizon, batch and rates follow. -1 with --minutes: what fits the time."""
    aspect_ratio: int = 64
    """Width per layer."""
    head_dim: int = 128
    """Size of an attention head."""
    n_embd: int = -1
    """Width, overriding depth * aspect ratio."""
    n_head: int = -1
    """Query heads."""
    n_kv_head: int = -1
    """Key/value heads, a divisor of the query heads."""
    max_seq_len: int = 2048
    """Context length in tokens."""
    window_pattern: str = "SSSL"
    """Per layer, tiled: S short window, L full context; the last layer is always L."""
    recipe: str = "published"
    """Model features and rates: published, later (smear, backout, quarter windows, …) or plain (no extras)."""
    target_flops: float = -1.0
    """Horizon in training FLOPs."""
    target_param_data_ratio: float = 10.5
    """Horizon in tokens per scaling parameter."""
    warmup_steps: int = 0
    """Linear warm-up, in steps."""
    warmup_ratio: float = -1.0
    """Linear warm-up as a share of the run; overrides --warmup-steps."""
    warmdown_ratio: float = 0.5
    """Share of the run over which the rates fall linearly."""
    final_lr_frac: float = 0.0
    """Where they end, as a share of the peak."""
    lr_scale: float = 1.0
    """All rates are multiplied by this: short runs on small batches want more than the square root of the batch."""
    init_from: str = ""
    """Folder of another base run (or its tag) whose weights to start from, with fresh schedules."""
    fp8: bool = False
    """fp8 matrix products; needs a Hopper-class GPU."""
    fp8_recipe: str = "tensorwise"
    """How fp8 scales are kept."""
    core_metric_every: int = -1
    """Steps between CORE evaluations."""
    core_metric_max_per_task: int = 500
    """Items per CORE task."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    if config.fp8:
        raise UserError("--fp8 is not available in this version; train in bf16 by leaving it out")
    if config.core_metric_every > 0:
        raise UserError("--core-metric-every: the CORE evaluation is not part of this version; leave it at -1")
    with Runtime.create(config.device_type, seed=config.seed) as runtime:
        return train(config, runtime)


def train(config: Config, runtime: Runtime) -> int:
    """One pretraining run, fresh or resumed, to its end. Returns the exit code."""
    base_dir = get_base_dir()
    run = run_dir(base_dir, "base", config.model_tag or f"d{config.depth}")
    checkpoint = prepare_run(
        run, config.resume, None if config.resume_from_step < 0 else config.resume_from_step, runtime
    )
    if checkpoint:
        config = merge_saved_config(config, checkpoint.meta["user_config"], OPERATIONAL)
    tokenizer = checkpoint.tokenizer() if checkpoint else get_tokenizer()
    if config.depth == -1:
        config.depth = choose_depth(config, tokenizer, runtime)
    corpus = resolve_corpus(config.data, base_dir)
    if checkpoint and checkpoint.meta["corpus"] != corpus.fingerprint:
        raise UserError(f"the data has changed since step {checkpoint.step} was saved: cannot resume exactly; "
                        "give the same --data, or start a new run with --init-from")  # fmt: skip
    model = build_model(config, tokenizer, runtime, base_dir)
    runtime.print0(f"{runtime.describe()}\ndata: {corpus.name}; run folder: {run}")

    plan = fix_plan(config, model, runtime, saved_steps(checkpoint, config, run))
    if not checkpoint:
        move_aside(run, runtime)
    if runtime.is_main:
        write_json(run / "plan.json", {"num_steps": plan.num_steps, "user_config": asdict(config)})
        print_table("plan", describe(model.config, plan))
    loader = PretrainLoader(corpus, tokenizer, sequence_len=config.max_seq_len, seed=config.seed,
                            rows_per_step=plan.total_batch_tokens // config.max_seq_len,
                            rank=runtime.rank, world_size=runtime.world_size)  # fmt: skip
    trainer = build_trainer(config, plan, runtime, model, loader)
    trainer.hooks = [
        Hook(
            partial(evaluate, corpus=corpus, tokenizer=tokenizer, tokens=config.evaluation_tokens(runtime)),
            config.eval_every,
        ),
        Hook(partial(sample, tokenizer=tokenizer), config.sample_every),
    ]
    started = time.perf_counter()
    code = drive(trainer, script="base_train", run=run, config=config, tokenizer=tokenizer, checkpoint=checkpoint,
                 meta={"stage": "base", "corpus": corpus.fingerprint})  # fmt: skip
    if code == 0 and runtime.is_main:
        report(base_dir, run, config, trainer, plan, time.perf_counter() - started)
    return code


def choose_depth(config: Config, tokenizer: RustBPETokenizer, runtime: Runtime) -> int:
    """The deepest model, from 2 layers on, that sees MIN_TOKENS_PER_PARAM in --minutes at a usual share of peak."""
    if config.minutes <= 0:
        raise UserError("--depth=-1 derives the depth from --minutes: give --minutes, or a depth")
    flops = config.minutes * 60 * USUAL_SHARE_OF_PEAK * measure_peak_flops(runtime)
    best = 2
    for depth in range(2, REFERENCE_DEPTH + 1):
        sizes = derive_sizes(depth, config.aspect_ratio, config.head_dim)
        vocab_size = tokenizer.get_vocab_size()
        model_config = GPTConfig(sequence_len=config.max_seq_len, vocab_size=vocab_size, **asdict(sizes))
        with torch.device("meta"):
            model = GPT(model_config)
        tokens = flops / model.estimate_flops()
        if tokens >= MIN_TOKENS_PER_PARAM * scaling_params(model.num_scaling_params()):
            best = depth
    chosen = torch.tensor(best, device=runtime.device)
    if runtime.world_size > 1:
        torch.distributed.broadcast(chosen, 0)
    runtime.print0(f"{config.minutes:g} minutes on this machine suit depth {int(chosen)}")
    return int(chosen)


def build_model(config: Config, tokenizer: RustBPETokenizer, runtime: Runtime, base_dir: Path) -> GPT:
    """The model that depth and the explicit sizes give, initialised, or with another run's weights."""
    forms: dict[str, Any] = {"published": GPTConfig, "later": GPTConfig.later, "plain": GPTConfig.plain}
    if config.recipe not in forms:
        raise UserError(f"--recipe must be one of {', '.join(forms)}, got {config.recipe!r}")
    if config.max_seq_len < 2:
        raise UserError(f"--max-seq-len must be at least 2, got {config.max_seq_len}")
    sizes = derive_sizes(
        config.depth, config.aspect_ratio, config.head_dim, config.n_embd, config.n_head, config.n_kv_head
    )
    pattern = "L" if config.recipe == "plain" else config.window_pattern
    model_config = forms[config.recipe](sequence_len=config.max_seq_len, vocab_size=tokenizer.get_vocab_size(),
                                      window_pattern=pattern, **asdict(sizes))  # fmt: skip
    if not config.init_from:
        return GPT.create(model_config, runtime.device, runtime.dtype, config.seed)
    path = Path(config.init_from)
    source = open_checkpoint(path if path.is_dir() else run_dir(base_dir, "base", config.init_from))
    if source.tokenizer().hash != tokenizer.hash:
        raise UserError(f"--init-from: {source.path} was trained with another tokenizer")
    model = GPT.create(GPTConfig.from_dict(source.meta["model_config"]), runtime.device, runtime.dtype, config.seed)
    load_model_state(model, source.model_state(runtime.device), source.path)
    runtime.print0(f"weights from {source.path}; its sizes are kept, the schedules start anew")
    return model


def fix_plan(config: Config, model: GPT, runtime: Runtime, num_steps: int | None) -> Plan:
    """Every number of the run. With --minutes the horizon is what fits, by timing real steps."""
    total = config.total_batch_size
    if total == -1 and config.minutes > 0:
        total = 2**19 if runtime.device.type != "cpu" else 2**13
    make = partial(make_plan, model.config, flops_per_token=model.estimate_flops(), params=model.num_scaling_params(),
                   target_flops=config.target_flops, target_param_data_ratio=config.target_param_data_ratio,
                   total_batch_size=total, decay_by_horizon=config.recipe == "later",
                   weight_decay=config.optimizer_config(config.recipe).weight_decay)  # fmt: skip
    if num_steps is not None:
        return make(num_iterations=num_steps)
    if config.minutes <= 0 or config.num_iterations > 0:
        return make(num_iterations=config.num_iterations)
    trial_plan = make(num_iterations=1000)
    rows = align_batch(total, config.max_seq_len) // config.max_seq_len
    own = len(range(runtime.rank, rows, runtime.world_size))
    random = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(model.config.vocab_size, (own, config.max_seq_len + 1), generator=random)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, "timing")
    make_trainer = partial(build_trainer, config, trial_plan, runtime, loader=None)
    plan = make(num_iterations=steps_for_minutes(config, make_trainer, model, batch, runtime))
    plan.horizon = f"--minutes={config.minutes:g}"
    return plan


def build_trainer(config: Config, plan: Plan, runtime: Runtime, model: GPT, loader: PretrainLoader | None) -> Trainer:
    """Optimizer and loop around `model`."""
    lr_scale = plan.lr_scale * config.lr_scale
    optimizer = make_optimizer(model, config.optimizer_config(config.recipe), runtime, lr_scale, plan.weight_decay)
    warmup = round(config.warmup_ratio * plan.num_steps) if config.warmup_ratio >= 0 else config.warmup_steps
    schedule = ScheduleConfig(plan.num_steps, warmup, config.warmdown_ratio, config.final_lr_frac)
    if config.recipe == "later":
        schedule.momentum_peak, schedule.momentum_warmdown, schedule.decay_shape = 0.97, True, "cosine"
    rows = plan.total_batch_tokens // config.max_seq_len
    micro = choose_device_batch(config.device_batch_size, rows, config.max_seq_len, runtime)
    return Trainer(model, optimizer, loader, runtime, schedule, micro,  # type: ignore[arg-type]
                   loss_fn=compiled_loss(model, config.compile, runtime))  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Observers


def validation_batches(
    corpus: Corpus, tokenizer: RustBPETokenizer, trainer: Trainer, tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same validation rows every time, in micro-batches; each process takes its lanes."""
    T, runtime = trainer.model.config.sequence_len, trainer.runtime
    loader = PretrainLoader(corpus, tokenizer, sequence_len=T, rows_per_step=EVAL_ROWS, split="val", seed=0,
                            rank=runtime.rank, world_size=runtime.world_size)  # fmt: skip
    try:
        for _ in range(max(1, tokens // (EVAL_ROWS * T))):
            batch = loader.next_batch()
            for start in range(0, batch.inputs.size(0), trainer.device_batch_size):
                rows = slice(start, start + trainer.device_batch_size)
                yield batch.inputs[rows], batch.targets[rows]
    finally:
        loader.close()


def evaluate(trainer: Trainer, corpus: Corpus, tokenizer: RustBPETokenizer, tokens: int) -> Record:
    """Validation bits per byte."""
    batches = validation_batches(corpus, tokenizer, trainer, tokens)
    bpb = evaluate_bpb(trainer.model, batches, 10**9, torch.tensor(tokenizer.token_bytes), trainer.runtime)
    trainer.progress.val_bpb = bpb
    trainer.progress.best_val_bpb = min(bpb, trainer.progress.best_val_bpb or bpb)
    return {"val_bpb": bpb}


def sample(trainer: Trainer, tokenizer: RustBPETokenizer) -> None:
    """Print what the model makes of a few prompts."""
    if trainer.runtime.is_main:
        print()
        for item in sample_texts(trainer.model, tokenizer):
            print(f"  {item['prompt']}{item['text']!r}", flush=True)


def sample_texts(model: GPT, tokenizer: RustBPETokenizer) -> list[dict[str, str]]:
    """Greedy continuations of the fixed prompts."""
    engine, samples = Engine(model, tokenizer), []
    for prompt in PROMPTS:
        tokens = tokenizer.encode(prompt, prepend="<|bos|>")
        if len(tokens) >= engine.max_context:
            continue
        results, _ = engine.generate_batch(tokens, num_samples=1, max_tokens=24, temperature=0.0)
        samples.append({"prompt": prompt, "text": tokenizer.decode(results[0][len(tokens) :])})
    return samples


def report(base_dir: Path, run: Path, config: Config, trainer: Trainer, plan: Plan, seconds: float) -> None:
    """Hand the run's figures to the report."""
    now = trainer.progress
    values: dict[str, Any] = {
        "seconds": seconds, "train_seconds": now.seconds, "val_bpb": now.val_bpb, "best_val_bpb": now.best_val_bpb,
        "loss": now.debiased_loss(), "steps": now.step, "tokens": plan.tokens,
        "tokens_per_second": plan.tokens / max(now.seconds, 1e-9), "num_params": plan.params["total"],
        "flops": plan.tokens * plan.flops_per_token, "plan": describe(trainer.model.config, plan),
        "loader": trainer.loader.stats(),  # type: ignore[attr-defined]
        "metrics": relative_to(run / "metrics.jsonl", base_dir), "command": command_line("base_train", config),
    }  # fmt: skip
    record_stage(base_dir, "base_train", values)
    print(f"{now.step} steps, {format_count(plan.tokens)} tokens in {seconds:.0f} s; val bpb {now.val_bpb:.4f}")
    cropped = values["loader"]["cropped_share"]
    print(f"{cropped:.1%} of documents were cut at a row's end (their rest came later); saved in {run}")


if __name__ == "__main__":
    _cli.run(main)
