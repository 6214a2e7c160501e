"""base_train, chat_sft and chat_rl as scripts: starting models, run folders, resuming, exit."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cli_helpers import refused
from ranks import run_ranks
from stubs import TINY
from toy_training import CPU, make_trainer

from nanochat.checkpoint.folder import list_steps
from nanochat.checkpoint.runs import run_dir
from nanochat.checkpoint_manager import open_checkpoint
from nanochat.common import UserError
from nanochat.common.files import read_json
from nanochat.dataloader import ConversationLoader
from nanochat.report import load_report
from nanochat.runtime import Runtime
from nanochat.train import pretraining
from nanochat.train.deadline import Deadline
from nanochat.train.run import Run
from nanochat.train.starting_model import finetuning_dir
from nanochat.trainer import Interrupted, Trainer
from scripts import base_train, chat_rl, chat_sft

SFT = ["--num-iterations=1", "--total-batch-size=16", "--eval-tokens=16", "--device-type=cpu"]


@pytest.fixture
def chats(copied: Path) -> str:
    """--data with two conversations of one's own, short enough for the tiny model."""
    path = copied / "chats.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text((json.dumps(turns) + "\n") * 2)
    return f"--data={path}"


def test_init_from_copies_the_weights_and_resuming_does_not_need_the_source(copied: Path) -> None:
    data = f"--data={copied / 'text.jsonl'}"
    flags = [*TINY, data, "--model-tag=next", "--init-from=tiny", "--num-iterations=2", "--save-every=1"]
    assert base_train.main([*flags, "--lr-scale=0"]) == 0
    first, second = (open_checkpoint(run_dir(copied, "base", tag)).model_state() for tag in ("tiny", "next"))
    assert all((first[name] == second[name]).all() for name in first)
    shutil.rmtree(copied / "base_checkpoints" / "tiny")
    assert base_train.main(["--model-tag=next", "--resume-from-step=1", "--eval-tokens=64", data]) == 0
    step = copied / "base_checkpoints" / "next" / "000001"
    assert base_train.main([*TINY, data, "--model-tag=third", f"--init-from={step}"]) == 0
    values = load_report(copied)["base_train"]  # the law knows no model that was trained before
    assert values["forecast"] == {} and "bpb" not in values["longer"] and values["val_bpb"] > 0
    assert [row[""] for row in values["tables"]["Plan and outcome"]] == ["steps", "tokens"]


def test_the_rates_flag_trains_as_the_recipes_factor_does(copied: Path) -> None:
    data = f"--data={copied / 'text.jsonl'}"
    for tag, flags in (("flag", ["--lr-scale=2"]), ("recipe", ["--recipe=default,lr_scale=2"])):
        assert base_train.main([*TINY, data, f"--model-tag={tag}", *flags]) == 0
    flag, recipe = (open_checkpoint(run_dir(copied, "base", tag)).model_state() for tag in ("flag", "recipe"))
    assert all((flag[name] == recipe[name]).all() for name in flag)


def test_the_tokens_named_are_those_measured(copied: Path) -> None:
    """Whole steps of 32 rows of 16 tokens."""
    from scripts import base_eval

    data = f"--data={copied / 'text.jsonl'}"
    assert base_train.main([*TINY, data, "--model-tag=next"]) == 0
    assert base_eval.main([data, "--eval=bpb", "--split-tokens=1100", "--model-tag=next", "--device-type=cpu"]) == 0
    found = read_json(copied / "report" / "report.json")
    assert found["base_train"]["val_bpb_of"] == "512 tokens"
    assert found["base_eval"]["val_bpb_of"] == found["base_eval"]["train_bpb_of"] == "1,024 tokens"


def test_a_resumed_run_says_when_it_takes_the_saved_number_of_threads(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, f"--data={copied / 'text.jsonl'}", "--num-iterations=2", "--save-every=1", "--model-tag=next"]
    assert base_train.main(flags) == 0
    torch.set_num_threads(2)
    try:
        assert base_train.main([*flags, "--resume-from-step=1"]) == 0
        assert torch.get_num_threads() == 1 and "instead of 2," in capsys.readouterr().out
    finally:
        torch.set_num_threads(1)


def test_a_horizon_that_does_not_count_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--num-iterations comes before --minutes and --target-flops; TINY has the first."""
    flags = [*TINY, f"--data={copied / 'text.jsonl'}", "--model-tag=next", "--minutes=5", "--target-flops=1e9"]
    assert base_train.main([f for f in flags if "minutes" not in f and "flops" not in f]) == 0
    assert "not used" not in capsys.readouterr().err
    assert base_train.main(flags) == 0
    assert "--minutes=5.0 --target-flops=1000000000.0" in capsys.readouterr().err.replace("\n", " ")


def test_init_from_keeps_the_context(copied: Path) -> None:
    data = f"--data={copied / 'text.jsonl'}"
    flags = ["--init-from=tiny", "--num-iterations=1", "--total-batch-size=32", "--eval-tokens=64", data]
    with pytest.raises(UserError, match=r"16.*--max-seq-len"):
        base_train.main([*flags, "--model-tag=next", "--max-seq-len=8"])
    with pytest.raises(UserError, match="--model-tag"):
        base_train.main(flags)
    assert base_train.main([*flags, "--model-tag=next"]) == 0
    saved = open_checkpoint(run_dir(copied, "base", "next")).meta
    assert saved["model_config"]["sequence_len"] == saved["user_config"]["max_seq_len"] == 16


def test_sft_tags(copied: Path, chats: str) -> None:
    """A new tag finetunes the newest base run; resuming without a tag goes on with the newest finetuning run."""
    assert chat_sft.main([*SFT, chats, "--model-tag=mine"]) == 0
    saved = open_checkpoint(run_dir(copied, "sft", "mine"))
    assert saved.meta["base"] == {"tag": "tiny", "step": 1, "recipe": "small", "source": "base"}
    assert base_train.main([*TINY, f"--data={copied / 'text.jsonl'}", "--model-tag=newer"]) == 0
    asked = [chat_sft.Config(resume=True), chat_sft.Config(), chat_sft.Config(model_tag="tiny")]
    assert [finetuning_dir("sft", "base", config, "", CPU).name for config in asked] == ["mine", "newer", "tiny"]


def test_sft_resumes_without_its_base_model(copied: Path, chats: str) -> None:
    assert chat_sft.main([*SFT, chats, "--model-tag=mine", "--num-iterations=2", "--save-every=1"]) == 0
    shutil.rmtree(copied / "base_checkpoints")
    assert chat_sft.main([chats, "--resume-from-step=1", "--eval-tokens=16"]) == 0


def test_after_going_back_the_command_names_the_step_saved_last(copied: Path) -> None:
    """Else a later step, saved before going back, would be taken, or the same steps repeated."""
    flags = [*TINY, f"--data={copied / 'text.jsonl'}", "--model-tag=back", "--save-every=1", "--keep-last=0"]
    assert base_train.main([*flags, "--num-iterations=3"]) == 0
    assert base_train.main([*flags, "--num-iterations=3", "--resume-from-step=1"]) == 0
    report = read_json(copied / "report" / "report.json")["base_train"]
    assert "--resume-from-step=3" in report["resume_command"]


def test_sft_does_not_go_on_with_one_other_conversation_of_many(copied: Path) -> None:
    path = copied / "many.jsonl"
    rows = [[{"role": "user", "content": str(n)}, {"role": "assistant", "content": "b"}] for n in range(2_500)]
    text = lambda: "".join(json.dumps(row) + "\n" for row in rows)  # noqa: E731
    path.write_text(text())
    flags = [*SFT, f"--data={path}", "--num-iterations=2", "--save-every=1"]
    assert chat_sft.main(flags) == 0
    rows[1237][1]["content"] = "c"
    path.write_text(text())
    with pytest.raises(UserError, match=r"step 1.*--data"):
        chat_sft.main([*flags, "--resume-from-step=1"])


def test_sft_does_not_go_on_with_other_conversations(copied: Path, chats: str) -> None:
    assert chat_sft.main([*SFT, chats, "--num-iterations=2", "--save-every=1"]) == 0
    path = Path(chats.removeprefix("--data="))
    path.write_text(path.read_text().replace('"b"', '"c"'))
    with pytest.raises(UserError, match=r"step 1.*--data"):
        chat_sft.main([chats, "--resume-from-step=1"])


def write_shards(folder: Path, word: str) -> None:
    folder.mkdir()
    for i in range(2):
        texts = [f"{i} {n} {word}" for n in range(200)]
        pq.write_table(pa.table({"text": texts}), folder / f"s{i}.parquet", row_group_size=20)


def write_texts(path: Path, word: str) -> None:
    path.write_text("".join(json.dumps({"text": f"{n} {word}"}) + "\n" for n in range(200)))


def write_chats(path: Path, word: str) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": word}]
    path.write_text((json.dumps(turns) + "\n") * 2)


@pytest.mark.parametrize(
    ("write", "main", "stage", "flags"),
    [
        (write_shards, base_train.main, "base", TINY),
        (write_texts, base_train.main, "base", TINY),
        (write_chats, chat_sft.main, "sft", SFT),
    ],
)
def test_a_resumed_run_may_find_its_data_at_another_path(
    write: Callable[[Path, str], None], main: Callable[[list[str]], int], stage: str, flags: list[str], copied: Path
) -> None:
    """The data must be the same; its path may be given again."""
    places = [copied / folder / "mine.jsonl" for folder in ("here", "there", "other")]
    for place in places:
        place.parent.mkdir()
    here, there, other = places
    write(here, "b")
    write(other, "c")
    given = [*flags, "--model-tag=moved", "--num-iterations=8", "--save-every=4"]
    assert main([*given, f"--data={here}"]) == 0
    whole = open_checkpoint(run_dir(copied, stage, "moved"), 8).model_state()
    here.rename(there)
    with pytest.raises(UserError, match=r"step 4.*--data"):
        main([*given, f"--data={other}", "--resume-from-step=4"])
    assert main([*given, f"--data={there}", "--resume-from-step=4"]) == 0
    again = open_checkpoint(run_dir(copied, stage, "moved"), 8)
    assert all((again.model_state()[name] == whole[name]).all() for name in whole)
    assert main(["--model-tag=moved", "--resume", "--eval-tokens=16"]) == 0  # the path of the last session


def test_unusable_data_leaves_the_earlier_run_in_place(copied: Path, chats: str) -> None:
    assert chat_sft.main([*SFT, chats]) == 0
    path = Path(chats.removeprefix("--data="))
    turns = [{"role": "user", "content": "a" * 99}, {"role": "assistant", "content": "b"}]
    path.write_text(path.read_text().splitlines()[0] + "\n" + json.dumps(turns) + "\n")  # only one of two fits
    with pytest.raises(UserError, match=r"nothing to train on.* 1 too long.*--max-seq-len"):
        chat_sft.main([*SFT, chats])
    assert [p.name for p in (copied / "chatsft_checkpoints").iterdir() if p.is_dir()] == ["tiny"]


@pytest.mark.parametrize("flag", ["--run=mine", "--tensorboard"])
def test_a_missing_extra_leaves_the_earlier_run_in_place(
    flag: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(UserError, match="pip install 'nanochat"):
        base_train.main([*TINY, f"--data={copied / 'text.jsonl'}", flag])
    assert list_steps(copied / "base_checkpoints" / "tiny") == [1]


def test_only_one_process_trains_in_a_folder(copied: Path) -> None:
    from filelock import FileLock

    with FileLock(copied / "base_checkpoints" / ".tiny.lock"), pytest.raises(UserError, match="--model-tag"):
        base_train.main([*TINY, f"--data={copied / 'text.jsonl'}"])
    assert list_steps(copied / "base_checkpoints" / "tiny") == [1]


def test_sft_takes_the_batch_that_pretraining_derived(copied: Path, chats: str) -> None:
    assert chat_sft.main([chats, "--num-iterations=1", "--eval-tokens=16", "--device-type=cpu"]) == 0
    sft, base = (open_checkpoint(run_dir(copied, stage, "tiny")).meta["plan"] for stage in ("sft", "base"))
    assert sft["total_batch_tokens"] == base["total_batch_tokens"] == 32


def spoil(path: Path) -> None:
    """Flip a bit in the middle of a file, which makes it no UTF-8."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 128
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [spoil, lambda path: path.write_text("[1]"), lambda path: path.write_text("")])
def test_damaged_files_beside_the_checkpoints_do_not_stop_a_resume(
    damage: Callable[[Path], None], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """plan.json, corpus.json and metrics.jsonl are written anew; the weights end like those of an undamaged run."""
    run, flags = copied / "base_checkpoints" / "kept", [*TINY, f"--data={copied / 'text.jsonl'}", "--model-tag=kept"]
    assert base_train.main([*flags, "--num-iterations=4", "--save-every=2"]) == 0
    before, whole = read_json(run / "corpus.json"), open_checkpoint(run, 4).model_state()
    for name in ("plan.json", "corpus.json", "metrics.jsonl"):
        damage(run / name)
    (run / ".metrics.jsonl.0123abcd.tmp").write_text("of a killed session")
    capsys.readouterr()
    assert base_train.main([*flags, "--resume-from-step=2"]) == 0
    warnings = capsys.readouterr().err
    assert "corpus.json" in warnings and (damage is not spoil or "metrics.jsonl.damaged1" in warnings)
    assert read_json(run / "corpus.json") == before and read_json(run / "plan.json")["num_steps"] == 4
    assert all((open_checkpoint(run, 4).model_state()[name] == whole[name]).all() for name in whole)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-2:] == [3, 4]
    assert not list(run.glob(".*.tmp"))


RL = ["--tasks=Format", "--examples-per-step=2", "--num-samples=2", "--max-new-tokens=4", "--eval-examples=1"]


@pytest.mark.parametrize("stage", ["base", "sft", "rl"])
def test_a_finished_run_says_how_to_train_on(
    stage: str, copied: Path, chats: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked for more, a finished run changes nothing and exits with 2; the command it prints trains on."""
    script, flags = {
        "base": (base_train, [*TINY, f"--data={copied / 'text.jsonl'}", "--lr-scale=0"]),
        "sft": (chat_sft, [*SFT, chats, "--embedding-lr=0"]),
        "rl": (chat_rl, [*RL, "--device-type=cpu"]),
    }[stage]
    if stage == "rl":
        assert chat_sft.main([*SFT, chats]) == 0
    flags = [*flags, "--model-tag=done", "--num-iterations=2"]
    assert script.main(flags) == 0
    folder = run_dir(copied, stage, "done")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    message = refused(script.main, [*flags, "--num-iterations=5", "--resume"], capsys)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "2 steps" in message and "--num-iterations=5" in message
    words = shlex.split(message[message.index("python -m ") :])
    assert words[2] == script.__name__ and {"--num-iterations=3", "--model-tag=done-2"} < set(words)
    assert script.main(words[3:]) == 0
    on = open_checkpoint(run_dir(copied, stage, "done-2"))
    assert on.step == 3 and on.meta["model_config"] == open_checkpoint(folder).meta["model_config"]
    if stage == "base":
        first, second = open_checkpoint(folder).model_state(), on.model_state()
        assert all((first[name] == second[name]).all() for name in first)
    else:
        assert (on.meta["base"]["tag"], on.meta["base"]["source"], on.meta["base"]["step"]) == ("done", stage, 2)
    capsys.readouterr()
    assert script.main([*flags, "--resume"]) == 0, "without a change it is done already"
    assert "--model-tag=done-3" in capsys.readouterr().out and list_steps(folder) == [2]


def test_a_run_whose_data_ended_early_is_finished(
    copied: Path, chats: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [chats, "--model-tag=short", "--total-batch-size=16", "--eval-tokens=16", "--device-type=cpu"]
    monkeypatch.setattr(ConversationLoader, "num_steps", lambda self: 50)
    assert chat_sft.main(flags) == 0
    (done,) = list_steps(run_dir(copied, "sft", "short"))
    assert done < 50
    assert f"{done} steps" in refused(chat_sft.main, [*flags, "--num-epochs=2", "--resume"], capsys)


def plan_of(copied: Path, tag: str) -> dict[str, Any]:
    return read_json(copied / "base_checkpoints" / tag / "plan.json")


def test_a_resumed_run_keeps_the_planned_steps_when_a_deadline_moved_the_horizon(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates and decay follow from the steps planned first; only the schedule follows the current horizon."""
    seen: list[tuple[int, int, list[float]]] = []
    real = Run.train

    def watch(self: Run, trainer: Trainer, *args: Any, **rest: Any) -> int:
        code = real(self, trainer, *args, **rest)
        groups = trainer.step.optimizer.param_groups
        seen.append(
            (
                trainer.schedule.num_steps,
                trainer.progress.step,
                [g["initial_lr"] for g in groups] + [g.get("initial_weight_decay", 0.0) for g in groups],
            )
        )
        return code

    monkeypatch.setattr(Run, "train", watch)
    flags = [*TINY, f"--data={copied / 'text.jsonl'}", "--model-tag=moved", "--keep-last=0", "--save-every=1"]
    monkeypatch.setattr(Deadline, "horizon", lambda self, step, num_steps, now: 3)
    monkeypatch.setattr(pretraining, "steps_for_minutes", lambda *_: 40)
    assert base_train.main([f for f in flags if "num-iterations" not in f] + ["--minutes=1"]) == 0
    again = [f for f in flags if "num-iterations" not in f and "keep-last" not in f]
    assert base_train.main([*again, "--minutes=1", "--resume-from-step=2"]) == 0
    assert seen[0] == seen[1] and seen[0][:2] == (3, 3)
    assert plan_of(copied, "moved")["num_steps"] == 40
    assert list_steps(copied / "base_checkpoints" / "moved") == [1, 2, 3], "--keep-last=0 is kept"


def test_a_resumed_run_keeps_its_batch_on_another_device(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --minutes the batch follows from the kind of device; a resumed run has the one it began with."""
    own = [flag for flag in TINY if not flag.startswith(("--num-iterations", "--total-batch-size", "--model-tag"))]
    flags = [*own, f"--data={copied / 'text.jsonl'}", "--model-tag=moved", "--save-every=1", "--minutes=1"]
    monkeypatch.setattr(Deadline, "horizon", lambda self, step, num_steps, now: 2)
    monkeypatch.setattr(pretraining, "steps_for_minutes", lambda *_: 40)
    for batch, more in ((32, []), (256, ["--resume-from-step=1"])):
        monkeypatch.setattr(pretraining, "batch_for_minutes", lambda kind, batch=batch: batch)
        assert base_train.main([*flags, *more]) == 0
        saved = open_checkpoint(run_dir(copied, "base", "moved"))
        assert saved.step == 2 and saved.meta["plan"]["total_batch_tokens"] == 32


def test_a_closed_pipe_does_not_end_the_run(copied: Path) -> None:
    """`base_train | head -1`: the run continues to its last save."""
    flags = [
        *TINY,
        f"--data={copied / 'text.jsonl'}",
        "--model-tag=piped",
        "--num-iterations=3",
        "--sample-every=1",
        "--eval-every=1",
    ]
    command = [sys.executable, "-m", "scripts.base_train", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 0, errors
    assert list_steps(copied / "base_checkpoints" / "piped") == [3]


def stopped_on_rank_1(runtime: Runtime) -> object:
    """One of two ranks; only the second gets the signal."""
    trainer = make_trainer(steps=50, runtime=runtime)
    if runtime.rank == 1:
        trainer.log = lambda trainer, record: setattr(trainer, "stop_signal", 15 if record["step"] == 3 else None)
    try:
        trainer.run()
        return "ran on"
    except Interrupted as stop:
        return stop.signum, trainer.progress.step


def test_a_signal_to_one_rank_stops_all_after_the_same_step() -> None:
    assert run_ranks(2, stopped_on_rank_1) == [(15, 3), (15, 3)]
