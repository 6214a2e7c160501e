"""Policy gradient against a worked example, on a bandit, and over ranks; rewards, curricula, resuming."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import sequence
from rl_helpers import Bandit, ChatBytes, loader_for, tiny
from stubs import TOKENIZER

from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.inference.request import TokenSequence
from nanochat.optim import MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.report import load_report
from nanochat.rl import SILENT_STEPS, Curriculum, Group, RolloutLoader, SignalWatch, as_batch, what_was_learnt
from nanochat.runtime import Runtime
from nanochat.train.reinforcement import RLConfig
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.step import TrainStep
from scripts import chat_rl, chat_sft
from tasks import rl_tasks
from tasks.common import keyed_random
from tasks.formats import Format
from tasks.registry import REWARDED, make_levels
from tasks.wordproblems import LEVELS, WordProblems, draw_problem

END = TOKENIZER.encode_special("<|assistant_end|>")


def answered(prompt: list[int], tokens: list[int], mask: list[int], end: int | None) -> TokenSequence:
    row = sequence(prompt, 50)
    row.tokens, row.mask, row.end = tokens, mask, end
    return row


def step_for(model: GPT, runtime: Runtime, micro: int = 4, steps: int = 50, lr: float = 1.0) -> TrainStep:
    groups = build_param_groups(model, OptimizerConfig(), lr_scale=lr, ns_dtype=torch.float32)
    schedule = ScheduleConfig(steps, warmdown_ratio=1.0)
    return TrainStep(model, MuonAdamW(groups), runtime, schedule, micro, model.loss)


@pytest.fixture
def runtime() -> Runtime:
    return Runtime.create("cpu", "float32")


# ---------------------------------------------------------------------------------------------------
# The gradient


def test_gradient_agrees_with_a_worked_example_in_float64(runtime: Runtime) -> None:
    """-sum over trained tokens of advantage * log p, divided by their number: by hand, one sequence at a time."""
    model = tiny()
    prompt, other = [5, 6, 7], [8, 9]
    groups = [
        Group(
            0,
            Bandit(),
            0,
            {},
            prompt,
            [
                answered(prompt, [10, 11, 12, 13], [1, 0, 0, 1], END),  # a tool forced the middle
                answered(prompt, [20], [1], END),
                answered(prompt, [30, 31], [1, 1], None),  # cut off: no end is trained
            ],
            rewards=[1.0, 0.0, 0.5],
        ),
        Group(
            0,
            Bandit(),
            1,
            {},
            other,
            [answered(other, [40, 41], [1, 1], END), answered(other, [42], [1], END)],
            rewards=[0.0, 0.25],
        ),
        Group(0, Bandit(), 2, {}, other, [answered(other, [50] * 9, [1] * 9, END)] * 2, rewards=[1.0, 1.0]),
    ]
    batch = as_batch(groups, "here")
    exact = GPT.create(model.config, compute_dtype=torch.float64).double()
    exact.load_state_dict(model.state_dict())
    objective, trained = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        mean = sum(group.rewards) / len(group.rewards)
        for row, reward in zip(group.rows, group.rewards):
            ids = torch.tensor([*row.prompt, *row.tokens, *([] if row.end is None else [row.end])])
            chosen = [False] * len(row.prompt) + [m == 1 for m in row.mask] + [True] * (row.end is not None)
            cap, hidden = model.config.softcap, exact.hidden(ids[None, :-1])[0]
            logprobs = torch.log_softmax(cap * torch.tanh(hidden @ exact.head_weight.T / cap), dim=-1)
            for place in range(1, len(ids)):
                if chosen[place]:
                    objective = objective + (reward - mean) * logprobs[place - 1, ids[place]]
                    trained += 1
    (-objective / trained).backward()
    for micro in (1, 3, 100):  # dead rows and padding are left out without a difference
        model.zero_grad(set_to_none=True)
        loss, num_targets = step_for(model, runtime, micro).accumulate(batch)
        assert num_targets == trained
        assert loss == pytest.approx(float(-objective.detach() / trained), abs=1e-6)
        for (name, p), q in zip(model.named_parameters(), exact.parameters()):
            if q.grad is None or not q.grad.any():
                assert p.grad is None or p.grad.abs().max() < 1e-7, name
                continue
            assert p.grad is not None
            error = (p.grad.double() - q.grad).norm() / q.grad.norm()
            assert error < 2e-4, f"{name}: {error}"


def test_batch_trains_chosen_tokens_and_the_end_of_turn() -> None:
    rows = [answered([1, 2], [3, 4, 5], [1, 0, 1], END), answered([1, 2], [6], [1], None)]
    batch = as_batch([Group(0, Bandit(), 0, {}, [1, 2], rows, rewards=[1.0, 0.0])], "x")
    assert batch.inputs.tolist() == [[1, 2, 0, 0, 0], [1, 2, 3, 4, 5]]  # the shorter first
    assert batch.targets.tolist() == [[-1, 6, -1, -1, -1], [-1, 3, -1, 5, END]]
    assert batch.weights is not None and batch.weights[:, 1].tolist() == [-0.5, 0.5]


def test_on_a_bandit_the_policy_finds_the_best_arm(runtime: Runtime) -> None:
    model = tiny()
    with torch.no_grad():  # it likes to stop: an answer that is cut off earns nothing
        model.lm_head.weight[END] += 0.5 * model.hidden(torch.tensor([[ord("b")]]))[0, 0]
    loader = loader_for(model, runtime, groups=8, num_samples=16, max_new_tokens=8)
    step = step_for(model, runtime, micro=128, steps=100, lr=0.5)
    first = None
    for _ in range(100):
        batch = loader.next_batch()
        first = first if first is not None else loader.figures["reward"]
        step(batch)
    assert first is not None and first < 0.1, "265 arms, three of which pay"
    assert loader.figures["reward"] > 0.95, loader.figures
    probs = torch.softmax(model(torch.tensor([ChatBytes().render_for_completion(Bandit()[2])]))[0, -1], -1)
    assert probs[ord("b")] > 0.9


def test_figures_of_a_step(runtime: Runtime) -> None:
    model = tiny()
    loader = loader_for(model, runtime, groups=3, num_samples=40, max_new_tokens=4)
    seen: list[list[Group]] = []
    loader.watch = lambda step, groups: seen.append(groups)
    loader.next_batch()
    (groups,) = seen
    rows = [row for group in groups for row in group.rows]
    rewards = [reward for group in groups for reward in group.rewards]
    figures = loader.figures
    assert len(rows) == len(rewards) == 120
    assert figures["reward"] == pytest.approx(sum(rewards) / 120)
    assert figures["answer_tokens"] == pytest.approx(sum(len(row.tokens) for row in rows) / 120)
    assert figures["cut_off"] == pytest.approx(sum(row.end is None for row in rows) / 120)
    assert figures["groups_without_signal"] == sum(len(set(group.rewards)) == 1 for group in groups) / 3
    # Sampled surprise is an estimate of entropy, which for this untrained model is nearly that of the uniform.
    assert figures["entropy"] == pytest.approx(math.log(265), rel=0.1)
    for row in rows[:5]:
        ids = torch.tensor([[*row.prompt, *row.tokens, *([] if row.end is None else [row.end])]])
        logprobs = torch.log_softmax(model(ids[:, :-1])[0].detach(), -1)
        own = sum(float(logprobs[i - 1, ids[0, i]]) for i in range(len(row.prompt), ids.size(1)))
        assert row.logprob == pytest.approx(own, abs=1e-3)


# ---------------------------------------------------------------------------------------------------
# World size, resuming


def test_two_ranks_draw_the_samples_of_one(runtime: Runtime) -> None:
    """Each takes every second group; together they have the samples and the gradient of one rank."""
    model = tiny()
    alone: list[list[Group]] = []
    single = loader_for(model, runtime, groups=5, batch_size=7)
    single.watch = lambda step, groups: alone.append(groups)
    for step in range(2):
        whole = single.next_batch()
        parts, rows = [], []
        for rank in range(2):
            other = Runtime.create("cpu", "float32")
            other.rank, other.world_size = rank, 2
            other.all_reduce_sum = lambda value, name: value  # type: ignore[method-assign]
            loader = loader_for(model, other, groups=5)
            loader.step = step
            loader.watch = lambda step, groups, rows=rows: rows.extend(groups)  # type: ignore[misc]
            parts.append(loader.next_batch())
        assert sum(part.inputs.size(0) for part in parts) == whole.inputs.size(0)
        by_prompt = {(g.index, tuple(g.rows[0].tokens)): g for g in rows}
        for group in alone[step]:
            twin = by_prompt[group.index, tuple(group.rows[0].tokens)]
            assert [r.tokens for r in group.rows] == [r.tokens for r in twin.rows]
            assert group.rewards == twin.rewards
        gradients = []
        num_targets = int((whole.targets >= 0).sum())
        for batches in ([whole], parts):
            model.zero_grad(set_to_none=True)
            train_step = step_for(model, runtime)
            for batch in batches:
                for micro in train_step.micro_batches(batch):
                    train_step.add_gradients(*micro, num_targets)
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_samples_depend_on_seed_step_and_place_only(runtime: Runtime) -> None:
    model, texts = tiny(), []
    for batch_size, step in ((32, 0), (3, 0), (32, 1)):
        loader = loader_for(model, runtime, batch_size=batch_size)
        loader.step = step
        loader.watch = lambda step, groups: texts.append([group.texts for group in groups])
        loader.next_batch()
    assert texts[0] == texts[1] != texts[2]
    assert len({tuple(samples) for samples in texts[0]}) == 4, "each group has samples of its own"
    assert all(len(set(samples)) > 1 for samples in texts[0]), "and they differ from each other"


def test_a_resumed_loader_continues_exactly(runtime: Runtime) -> None:
    def fresh() -> RolloutLoader:
        levels = [Curriculum([WordProblems(level, 50) for level in LEVELS], raise_at=0.0)]
        return loader_for(tiny(), runtime, levels)

    def kept(loader: RolloutLoader) -> list[list[str]]:
        seen: list[list[str]] = []
        loader.watch = lambda step, groups: seen.append(
            [g.task.name + g.conversation["messages"][0]["content"] + "".join(g.texts) for g in groups]
        )
        return seen

    straight, other = fresh(), fresh()
    seen = kept(straight)
    for _ in range(4):
        straight.next_batch()
    assert straight.curricula[0].level == 2
    for _ in range(2):
        other.next_batch()
    resumed = fresh()
    resumed.load_state_dict(other.state_dict())
    again = kept(resumed)
    for _ in range(2):
        resumed.next_batch()
    assert again == seen[2:]
    assert resumed.state_dict().keys() == straight.state_dict().keys()
    assert all((resumed.state_dict()[key] == value).all() for key, value in straight.state_dict().items())
    with pytest.raises(UserError, match="--tasks"):
        loader_for(tiny(), runtime, [Curriculum([Bandit()])] * 2).load_state_dict(other.state_dict())


# ---------------------------------------------------------------------------------------------------
# Curricula and rewards


def test_a_level_is_passed_when_its_reward_stays_high() -> None:
    curriculum = Curriculum([Bandit(), Bandit(), Bandit()], raise_at=0.8)
    for _ in range(10):
        curriculum.update(1.0)
    assert curriculum.level == 0, "one good moment is not enough"
    for _ in range(10):
        curriculum.update(1.0)
    assert curriculum.level == 1 and curriculum.mean < 0.8
    for _ in range(100):
        curriculum.update(0.7)
        curriculum.update(None)
    assert curriculum.level == 1
    for _ in range(100):
        curriculum.update(0.9)
    assert curriculum.level == 2, "and there is nothing after the last"


def test_other_levels_are_still_drawn() -> None:
    import numpy as np

    levels = [WordProblems(level, 10) for level in LEVELS]
    curriculum, rng = Curriculum(levels, level=2), np.random.default_rng(0)
    drawn = [curriculum.draw(rng)[0].name for _ in range(1000)]
    assert 650 < drawn.count("WordProblems/3") < 750 and drawn.count("WordProblems/1") > 100
    first = [Curriculum(levels).draw(rng)[0].name for _ in range(1000)]
    assert 650 < first.count("WordProblems/1") < 750 and "WordProblems/3" not in first


@pytest.mark.parametrize("level", LEVELS)
def test_word_problems_are_sound(level: int) -> None:
    train, test = WordProblems(level, 300), WordProblems(level, 300, "test")
    for task in (train, test):
        for index in range(len(task)):
            conversation = task[index]
            parts = conversation["messages"][-1]["content"]
            text = "".join(
                part["text"] if part["type"] == "text" else f"<|output_end|>{part['text']}<|output_end|>"
                for part in parts
            )
            assert task.reward(conversation, text) == 1.0
            assert task.reward(conversation, text + "1") == 0.0 and task.reward(conversation, "") == 0.0
            calls = [part["text"] for part in parts if part["type"] == "python"]
            results = [part["text"] for part in parts if part["type"] == "python_output"]
            assert len(calls) == level and all(eval(c) == float(r) for c, r in zip(calls, results))
            question = conversation["messages"][0]["content"]
            numbers = [
                n
                for call in calls
                for n in call.replace("+", " ").replace("-", " ").replace("*", " ").replace("/", " ").split()
            ]
            assert sum(n in question for n in numbers) >= level + 1, "every number of the problem is in the question"
    assert train[3] == WordProblems(level, 300)[3] != WordProblems(level, 300, seed=1)[3]
    drawn = [draw_problem(keyed_random(i), level) for i in range(2000)]
    assert 0.05 < sum(problem.held_out for problem in drawn) / 2000 < 0.15
    assert all(value >= 0 for problem in drawn for value in problem.results())


def test_format_gives_credit_for_parts() -> None:
    task = Format(200)
    kinds = set()
    for index in range(len(task)):
        conversation = task[index]
        question, wanted = (message["content"] for message in conversation["messages"])
        kinds.add(question.split()[2])
        assert task.reward(conversation, wanted + "<|assistant_end|>more") == 1.0
        assert task.reward(conversation, wanted + " and") < 1.0
        assert task.reward(conversation, "") == 0.0
        if ", " in wanted:
            assert 0.2 < task.reward(conversation, wanted.rpartition(", ")[0]) < 1.0
    assert len(kinds) >= 2
    words = set(Format(1, "train").words)
    assert not words & set(Format(1, "test").words)


def test_every_rewarded_task_can_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOCHAT_DATASETS_DIR", str(tmp_path))
    for name in REWARDED:
        if name == "GSM8K":
            with pytest.raises(UserError):
                make_levels(name, "train")
            continue
        for split in ("train", "test"):
            for task in make_levels(name, split, size=5):
                conversation = task[0]
                assert 0.0 <= task.reward(conversation, "nonsense") < 1.0
        assert [t[0] for t in make_levels(name, "test", 5, seed=1)] == [t[0] for t in make_levels(name, "test", 5)]
    with pytest.raises(UserError, match="WordProblems"):
        make_levels("nope", "train")


@pytest.mark.parametrize("flag", ["sample_every", "eval_tokens", "compile"])
def test_flags_that_chat_rl_does_not_use_are_refused(flag: str) -> None:
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')}"):
        chat_rl.Config(**{flag: "on" if flag == "compile" else 7})


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--num-samples=1", "--num-samples.*2"),
        ("--temperature=0", "--temperature"),
        ("--temperature=nan", "--temperature"),
        ("--max-new-tokens=0", "--max-new-tokens.*1"),
    ],
)
def test_ranges_of_the_sampling_flags(flag: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        chat_rl.main([flag])


# ---------------------------------------------------------------------------------------------------
# Nothing to learn


def steps_with(count: int = 3, **figures: float) -> list[dict[str, float]]:
    return [{"step": i, "reward": 0.0, "cut_off": 0.0, "groups_without_signal": 1.0} | figures for i in range(count)]


@pytest.mark.parametrize(
    ("records", "part"),
    [
        (steps_with(), "no answer earned a reward.*chat_sft"),
        (steps_with(cut_off=0.9), "90%.*--max-new-tokens"),
        (steps_with(reward=1.0), "same.*1 on average"),
    ],
)
def test_a_run_without_signal_says_why_nothing_was_learnt(records: list[dict[str, float]], part: str) -> None:
    assert re.search(part, what_was_learnt(records))
    assert what_was_learnt([*records, *steps_with(1, groups_without_signal=0.9)]) == ""
    assert what_was_learnt([{"step": 1, "loss": 2.0}]) == what_was_learnt([]) == ""


def test_steps_without_signal_draw_a_warning_meanwhile(runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    loader = loader_for(tiny(), runtime)
    watch = SignalWatch(loader, runtime)
    for silent in ([1.0] * (SILENT_STEPS - 1) + [0.5]) * 2:
        loader.figures = steps_with(1, groups_without_signal=silent)[0]
        assert watch(None) == loader.figures
    assert not capsys.readouterr().err
    for _ in range(SILENT_STEPS):
        loader.figures = steps_with(1)[0]
        watch(None)
    assert f"{SILENT_STEPS} step" in capsys.readouterr().err


def test_prompts_that_are_cut_are_counted(runtime: Runtime) -> None:
    class Long(Bandit):
        def __getitem__(self, index: int) -> Any:
            long = {"role": "user", "content": "x" * (200 if index % 2 else 5)}
            return {"messages": [long, {"role": "assistant", "content": "b"}]}

    loader = loader_for(tiny(), runtime, [Curriculum([Long()])], groups=40)
    loader.next_batch()
    assert 0.1 < loader.stats()["prompts_cut"] < 0.9
    other = loader_for(tiny(), runtime)
    other.next_batch()
    assert other.stats()["prompts_cut"] == 0


def test_a_run_whose_every_reward_is_0_says_so_in_log_and_report(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One new token is no answer: all are cut off."""
    chats = copied / "chats.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats.write_text((json.dumps(turns) + "\n") * 2)
    common = ["--device-type=cpu", "--num-iterations=2"]
    assert chat_sft.main([f"--data={chats}", "--total-batch-size=16", "--eval-tokens=16", *common]) == 0
    sizes = ["--examples-per-step=2", "--num-samples=2", "--max-new-tokens=1", "--eval-examples=1", "--eval-samples=1"]
    capsys.readouterr()
    assert chat_rl.main(["--tasks=Identity", "--minutes=9", *sizes, *common]) == 0
    output = capsys.readouterr()
    assert "bpb" not in output.out
    assert {"": "steps", "planned": "2"} in load_report(copied)["chat_rl"]["tables"]["Plan"]
    learnt = load_report(copied)["chat_rl"]["learnt"]
    assert "--max-new-tokens" in learnt and learnt in output.err
    last = next(line for line in reversed(output.out.splitlines()) if line.startswith("step 2/2"))
    assert "nothing to learn" in last and "tok/s" not in last


def test_tasks_are_checked_before_the_model_is_loaded(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "chatsft_checkpoints").mkdir()
    shutil.copytree(copied / "base_checkpoints" / "tiny", copied / "chatsft_checkpoints" / "tiny")
    monkeypatch.setattr(chat_rl, "open_starting_model", lambda *_: pytest.fail("the model was loaded"))
    for tasks in ("Juggling", ","):
        with pytest.raises(UserError, match="WordProblems"):
            chat_rl.main([f"--tasks={tasks}", "--device-type=cpu"])


def test_code_needs_its_sandbox_before_the_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(level: str) -> str:
        raise UserError("there is no sandbox on this machine")

    monkeypatch.setattr(rl_tasks, "choose_level", none)
    with pytest.raises(UserError, match="sandbox"):
        rl_tasks.open_tasks(RLConfig(tasks="Arithmetic,Code"))
    assert rl_tasks.open_tasks(RLConfig(tasks="Arithmetic"))
