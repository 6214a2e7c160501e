"""The training loop: gradients, hooks, stop signals, failures, saves, and which flags a resumed run keeps."""

import contextlib
import dataclasses
import gc
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stubs import stir
from toy_training import CONFIG, CPU, RandomBatches, make_trainer

from nanochat import trainer as trainer_module
from nanochat.common import UserError
from nanochat.dataloader import Batch
from nanochat.distributed.rank_checks import NonFiniteLoss
from nanochat.distributed.signals import StopRequested
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.train import metrics as metrics_module
from nanochat.train.build import choose_device_batch
from nanochat.train.config import OnResume, TrainConfig, merge_saved_config, resume_rules
from nanochat.train.metrics import Metrics, cut_metrics
from nanochat.train.run import run_to_end
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.snapshot import check_disk
from nanochat.train.step import TrainStep
from nanochat.trainer import Hook, Interrupted, Record, Trainer, frozen_objects


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_does_not_depend_on_the_device_batch(weighted: bool) -> None:
    batch = RandomBatches(weights=weighted).next_batch()
    grads, losses = [], []
    for size in (6, 4, 1):
        trainer = make_trainer(device_batch_size=size)
        stir(trainer.model)
        losses.append(trainer.step.accumulate(batch)[0])
        grads.append({name: p.grad for name, p in trainer.model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-6)
    for other in grads[1:]:
        for name, value in grads[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_loss_is_the_mean_over_all_targets_of_the_global_batch() -> None:
    trainer = make_trainer(steps=1, device_batch_size=1)
    reference = GPT.create(CONFIG, seed=1)
    batch = RandomBatches().next_batch()
    logits = reference(batch.inputs).double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-1)
    records = []
    trainer.log = lambda t, record: records.append(record)
    trainer.run()
    assert records[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert records[0]["tokens"] == int((batch.targets >= 0).sum())


@pytest.mark.parametrize("read_before", [0, 3, 6])
def test_text_that_was_read_before_trains_ngrams_less(read_before: int) -> None:
    """By the share of such rows in the batch, and no other parameter."""

    def step(read_before: int) -> dict[str, torch.Tensor]:
        """How far each parameter moves."""
        model = GPT.create(dataclasses.replace(CONFIG, ngram_rows=50, ngram_dim=8), seed=1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        groups = build_param_groups(model, OptimizerConfig(), ns_dtype=torch.float32)
        train = TrainStep(model, MuonAdamW(groups), CPU, ScheduleConfig(4), 6, model.loss)
        train(dataclasses.replace(RandomBatches().next_batch(), read_before=read_before))
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}

    new, moved = step(0), step(read_before)
    assert new["ngram_embed.weight"].abs().max() > 1e-3
    new["ngram_embed.weight"] *= 1 - (1 - OptimizerConfig.ngram_reread_ratio) * read_before / 6
    torch.testing.assert_close(moved, new)


def test_num_steps_counts_optimizer_steps() -> None:
    trainer = make_trainer(steps=3, device_batch_size=2)  # three micro-batches a step
    progress = trainer.run()
    assert progress.step == 3 and trainer.loader.served == 3  # type: ignore[attr-defined]


def test_smoothed_loss_is_unbiased_from_the_first_step() -> None:
    trainer = make_trainer(steps=1)
    records = []
    trainer.log = lambda t, record: records.append(record)
    progress = trainer.run()
    assert progress.debiased_loss() == pytest.approx(records[0]["loss"])


def test_hooks_run_when_due_and_join_the_record() -> None:
    trainer = make_trainer(steps=5)
    seen, records = [], []
    trainer.hooks = [Hook(lambda t: seen.append(t.progress.step) or {"x": t.progress.step}, every=2)]
    trainer.log = lambda t, record: records.append(dict(record))
    trainer.run()
    assert seen == [2, 4, 5]
    assert [r.get("x") for r in records] == [None, 2, None, 4, 5]


class SlowBatches(RandomBatches):
    """Each batch is there after the clock has moved on by `seconds`."""

    seconds, advice = 0.0, "buy a faster disk"

    def wait(self, timeout: float) -> bool:
        clock.now += self.seconds
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


clock = Clock()


@pytest.mark.parametrize(("seconds", "warnings"), [(0.001, 0), (0.1, 1)])
def test_a_run_that_waits_for_its_data_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: float, warnings: int
) -> None:
    monkeypatch.setattr(trainer_module.time, "perf_counter", clock)
    monkeypatch.setattr(metrics_module, "WAIT_WATCH_SECONDS", 0.5)
    trainer = make_trainer(steps=40)
    trainer.loader = SlowBatches()
    trainer.loader.seconds = seconds
    with contextlib.closing(Metrics(tmp_path / "metrics.jsonl", CPU, flops_per_token=1, peak_flops=0)) as trainer.log:
        trainer.run()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(record["wait_seconds"] == pytest.approx(seconds, abs=0.01) for record in records)
    assert capsys.readouterr().err.count("buy a faster disk") == warnings


def test_nan_stops_before_the_update_and_names_step_batch_and_checkpoint() -> None:
    trainer = make_trainer(steps=5)

    def save_and_poison(t: Trainer) -> Callable[[], None]:
        if t.progress.step == 2:
            t.model.lm_head.weight.data.fill_(math.nan)
        return lambda: None

    trainer.snapshot, trainer.save_every = save_and_poison, 1
    with pytest.raises(NonFiniteLoss, match=r"step 2 .*batch 3.*checkpoint.* step 2"):
        trainer.run()
    assert trainer.progress.step == 2


@pytest.mark.parametrize("hook_fails", [False, True])
def test_non_finite_weights_are_not_saved(hook_fails: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, saved = make_trainer(steps=5), []
    trainer.snapshot, trainer.save_every = lambda t: partial(saved.append, t.progress.step), 1

    def poison(t: Trainer) -> None:
        t.model.lm_head.weight.data[3, 1] = math.inf
        if hook_fails:
            raise FloatingPointError("the model's logits are not finite")

    trainer.hooks = [Hook(poison, every=3)]
    assert run_to_end(trainer, tmp_path, lambda: "python -m scripts.base_train --resume") == 1
    assert saved == [1, 2]
    error = capsys.readouterr().err
    assert all(part in error for part in ("not finite", "step 3", "lm_head.weight", "step 2"))


def test_a_stop_signal_during_a_hook_saves_the_step(tmp_path: Path) -> None:
    trainer, saved = make_trainer(steps=5), []
    trainer.snapshot = lambda t: partial(saved.append, t.progress.step)

    def evaluate(t: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        t.raise_if_stop_requested()
        raise AssertionError("not stopped")

    trainer.hooks = [Hook(evaluate, every=2)]
    assert run_to_end(trainer, tmp_path, lambda: "python -m scripts.chat_rl --resume") == 128 + signal.SIGTERM
    assert saved == [2]


def test_a_stop_signal_during_the_last_hook_is_not_lost(tmp_path: Path) -> None:
    """The run is finished and saved, but a script shall not go on to the next stage."""
    trainer, saved = make_trainer(steps=3), []
    trainer.snapshot = lambda t: partial(saved.append, t.progress.step)
    trainer.hooks = [Hook(lambda t: os.kill(os.getpid(), signal.SIGTERM))]
    assert run_to_end(trainer, tmp_path, lambda: "again") == 128 + signal.SIGTERM
    assert saved == [3]


def test_answers_that_are_not_finite_end_a_run_like_a_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RL samples its next batch with the weights of the last step."""
    trainer = make_trainer(steps=5)
    trainer.snapshot, trainer.save_every = lambda t: lambda: None, 1
    real = trainer.loader.next_batch

    def sample() -> Any:
        if trainer.progress.step == 2:
            raise FloatingPointError("the model's logits are not finite")
        return real()

    trainer.loader.next_batch = sample  # type: ignore[method-assign]
    assert run_to_end(trainer, tmp_path, lambda: "again") == 1
    assert isinstance(trainer.stopped_by, NonFiniteLoss) and "step 2" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(signum: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(steps=50)
    saved = []
    trainer.snapshot = lambda t: partial(saved.append, t.progress.step)
    trainer.log = lambda t, record: os.kill(os.getpid(), signum) if record["step"] == 3 else None
    inherited = signal.signal(signum, signal.default_int_handler)  # which nohup may have ignored
    code = run_to_end(trainer, tmp_path, lambda: "python -m scripts.base_train --resume")
    assert code == 128 + signum and saved == [3] and trainer.progress.step == 3
    assert "--resume" in capsys.readouterr().out
    assert signal.signal(signum, inherited) is signal.default_int_handler


@pytest.mark.parametrize(("signum", "caught"), [(signal.SIGINT, True), (signal.SIGHUP, False)])
def test_signals_that_the_shell_ignores(signum: int, caught: bool, tmp_path: Path) -> None:
    """A script's `command &` ignores SIGINT, and `kill -INT` must still save; a SIGHUP that nohup ignores stays so."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        trainer = make_trainer(steps=5)
        trainer.log = lambda t, record: os.kill(os.getpid(), signum) if record["step"] == 3 else None
        code = run_to_end(trainer, tmp_path, lambda: "")
        assert (code, trainer.progress.step) == ((128 + signum, 3) if caught else (0, 5))
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def save_every_step(trainer: Trainer, write: Callable[[int], None]) -> None:
    trainer.snapshot, trainer.save_every = lambda t: partial(write, t.progress.step), 1


def test_training_continues_while_a_save_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, written, gate, reached = make_trainer(steps=3), [], threading.Event(), []

    def write(step: int) -> None:
        assert gate.wait(30)
        written.append(step)

    save_every_step(trainer, write)
    trainer.save_every = 2
    trainer.log = lambda t, record: (reached.append(list(written)), record["step"] == 3 and gate.set())
    trainer.run()
    assert reached == [[], [], []] and written == [2, 3] and trainer.saver.last_step == 3


def test_only_one_save_is_written_at_a_time_and_training_waits_briefly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.checkpoint.async_save.MAX_WAIT_SECONDS", 0.01)
    trainer, written, gate = make_trainer(steps=4), [], threading.Event()
    save_every_step(trainer, lambda step: written.append((gate.wait(30), step)[1]))
    trainer.log = lambda t, record: gate.set() if record["step"] == 4 else None
    trainer.run()
    assert written == [1, 4] and trainer.saver.last_step == 4
    warning = capsys.readouterr().err
    assert "step 2" in warning and "step 1" in warning


def test_a_failed_periodic_save_is_reported_and_training_continues(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(steps=4)

    def write(step: int) -> None:
        if step in (2, 3):
            raise OSError(28, "No space left on device")

    save_every_step(trainer, write)
    trainer.run()
    assert trainer.progress.step == 4
    warnings = capsys.readouterr().err
    assert "step 2" in warnings and "step 3" in warnings and "save step 1" not in warnings
    assert trainer.saver.last_step == 4


def test_a_failed_first_save_ends_the_run_before_the_next_is_due(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(steps=400)

    def write(step: int) -> None:
        raise OSError(28, "No space left on device")

    save_every_step(trainer, write)
    trainer.save_every = 2
    trainer.log = lambda t, record: wait([t.saver.writing[1]]) if t.saver.writing else None
    assert run_to_end(trainer, tmp_path, lambda: "the same command") == 1
    error = capsys.readouterr().err
    assert trainer.progress.step == 3 and "step 2" in error and "No space left" in error
    assert "None" not in error and "the same command" in error


def test_a_disk_without_room_for_a_checkpoint_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(steps=10)
    trainer.run()  # the optimizer's state exists now
    names = {p: name for name, p in trainer.model.named_parameters()}
    state = trainer.step.optimizer.named_state(names)[0]
    size = sum(t.nbytes for t in (*trainer.model.state_dict().values(), *state.values()))
    usage = shutil.disk_usage(tmp_path)
    config = TrainConfig(save_every=2, keep_last=2)
    for free, refused, warned in ((size - 1, True, False), (size, False, True), (3 * size, False, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        with pytest.raises(UserError, match="NANOCHAT_BASE_DIR") if refused else contextlib.nullcontext():
            check_disk(trainer, tmp_path, config)
        assert ("--keep-last" in capsys.readouterr().err) == warned
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    check_disk(trainer, tmp_path, TrainConfig())  # one save, at the end
    assert not capsys.readouterr().err


def test_a_failed_final_save_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(steps=2)

    def write(step: int) -> None:
        raise OSError(28, "No space left on device")

    save_every_step(trainer, write)
    trainer.save_every = -1
    assert run_to_end(trainer, tmp_path, lambda: "") == 1
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("batches", [4, 2], ids=["to the last step", "the data ends early"])
def test_a_hook_that_a_signal_stops_leaves_the_run_to_its_end(batches: int) -> None:
    trainer = make_trainer(steps=4)
    left = [RandomBatches().next_batch() for _ in range(batches)]

    def next_batch() -> Batch:
        if not left:
            raise StopIteration
        return left.pop()

    def stopped(trainer: Trainer) -> None:
        raise StopRequested("stop requested")

    trainer.loader.next_batch = next_batch  # type: ignore[method-assign]
    trainer.hooks = [Hook(stopped)]
    records: list[dict] = []
    trainer.log = lambda t, record: records.append(record)
    assert trainer.run().step == batches == len(records)


def test_the_loss_goes_down() -> None:
    trainer = make_trainer(steps=30, lr_scale=0.5)
    fixed = RandomBatches().next_batch()
    trainer.loader.next_batch = lambda: fixed  # type: ignore[method-assign]
    records: list[dict] = []
    trainer.log = lambda t, record: records.append(record)
    trainer.run()
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    assert records[-1]["lr_multiplier"] < 0.1


def test_cut_metrics_drops_later_steps_and_a_broken_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(1, 8)) + '{"step": 8, "lo')
    cut_metrics(path, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"], "a line cut short is usual: no copy"


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2, "lo\xf3s": 1.0}',
        b'{"step": 2, "loss": 1.0',
        b"[1, 2]",
        b"7",
        b'{"loss": 1.0}',
        b'{"step": "2"}',
        b'{"step": null}',
        b"not JSON",
        b"[" * 100_000,
        b'\x00{"step": 2}',
        b'{"step": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_damaged_line_of_the_metrics_is_dropped_and_a_copy_kept(
    line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, good = tmp_path / "metrics.jsonl", [b'{"step": %d, "loss": 1.0}' % step for step in (1, 3, 4)]
    for copy in (1, 2):
        before = b"\n".join([good[0], line, *good[1:]]) + b"\n"
        path.write_bytes(before)
        cut_metrics(path, 3)
        assert path.read_bytes() == good[0] + b"\n" + good[1] + b"\n"
        assert (tmp_path / f"metrics.jsonl.damaged{copy}").read_bytes() == before
        warning = capsys.readouterr().err
        assert "line 2)" in warning and f"metrics.jsonl.damaged{copy}" in warning


def test_a_resumed_run_keeps_what_could_change_its_numbers() -> None:
    from scripts.base_train import Config

    given = Config(depth=4, matrix_lr=0.5, eval_every=7, resume=True)
    saved = {**Config(depth=4, matrix_lr=0.1, eval_every=99).__dict__}
    merged, ignored = merge_saved_config(given, saved)
    assert (merged.matrix_lr, merged.eval_every, merged.resume) == (0.1, 7, True)
    assert ignored == {"matrix_lr": 0.5}


def test_which_flags_a_resumed_run_may_change() -> None:
    from scripts import base_train, chat_rl, chat_sft

    common = {
        "run",
        "tensorboard",
        "device_type",
        "eval_every",
        "eval_tokens",
        "sample_every",
        "save_every",
        "resume",
        "resume_from_step",
        "timeout",
    }
    core = {"skip_bad_shards", "core_metric_every", "core_metric_max_per_task", "eval_bundle"}
    for config, new, if_given in (
        (base_train.Config(), common | core, {"data", "keep_last", "device_batch_size", "deterministic"}),
        (chat_sft.Config(), common | {"strict"}, {"data", "keep_last", "device_batch_size", "deterministic"}),
        (chat_rl.Config(), common, {"keep_last", "device_batch_size", "deterministic"}),
    ):
        rules = resume_rules(config)
        assert {name for name, rule in rules.items() if rule is OnResume.NEW} == new
        assert {name for name, rule in rules.items() if rule is OnResume.IF_GIVEN} == if_given


def test_interrupted_carries_the_signal() -> None:
    assert str(Interrupted(signal.SIGTERM)) == "SIGTERM"


def test_device_batch_is_as_requested_or_by_the_device() -> None:
    assert choose_device_batch(-1, 64, 512, CPU) == 8 and choose_device_batch(16, 4, 512, CPU) == 4


def test_a_hook_that_fails_on_one_of_several_ranks_begins_no_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as samples, which the main rank takes alone: a save is collective, and the others are not in it."""
    trainer, saved = make_trainer(steps=5), []
    trainer.snapshot = lambda t: partial(saved.append, t.progress.step)

    def fail(t: Trainer) -> None:
        monkeypatch.setattr(t.runtime, "world_size", 2)
        raise OSError("no space left on device")

    trainer.hooks = [Hook(fail, every=2)]
    with pytest.raises(OSError, match="no space"):
        trainer.run()
    assert saved == []


def test_a_failing_hook_saves_the_steps_before_it() -> None:
    trainer = make_trainer(steps=5)
    saved: list[int] = []
    trainer.snapshot = lambda t: partial(saved.append, t.progress.step)

    def fail(t: Trainer) -> None:
        raise ZeroDivisionError

    trainer.hooks = [Hook(fail, every=3)]
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert saved == [3]


def test_data_that_ends_early_ends_the_run_with_a_save(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(steps=9)
    fetch, saved = trainer.loader.next_batch, []

    def two() -> Batch:
        if trainer.progress.step == 2:
            raise StopIteration
        return fetch()

    trainer.loader.next_batch = two  # type: ignore[method-assign]
    trainer.snapshot = lambda t: partial(saved.append, t.progress.step)
    trainer.run()
    warning = capsys.readouterr().err
    assert saved == [2] and "2" in warning and "9" in warning


@pytest.mark.parametrize("fails", [False, True])
def test_loaded_objects_are_not_collected_again_during_a_run(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage collection is frozen from the first step to the end of the run, however it ends."""
    monkeypatch.setattr(trainer_module, "frozen_objects", frozen_objects)  # in place of conftest.py's
    gc.unfreeze()
    trainer = make_trainer(steps=3)
    frozen: list[int] = []

    def log(trainer: Trainer, record: Record) -> None:
        frozen.append(gc.get_freeze_count())
        if fails:
            raise ZeroDivisionError

    trainer.log = log
    assert gc.get_freeze_count() == 0
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        trainer.run()
    assert min(frozen) > 10_000 and len(frozen) == (1 if fails else 3) and gc.get_freeze_count() == 0
