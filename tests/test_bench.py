"""The benchmarks at toy size: what they print, what they count, and how two revisions are compared."""

import gzip
import importlib
import json
import math
import mmap
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import _common, _run, decode, serve, train
from bench._common import Flags, LinearProducts, linear_shapes, model_config
from bench.data import CountedDocuments, count_epoch
from bench.optimizer import OrthogonalisationProducts
from nanochat.common import UserError
from nanochat.dataloader import PretrainLoader
from nanochat.gpt import GPT
from nanochat.planning.hardware import GPUS, expected_pace
from nanochat.runtime import Runtime
from nanochat.train.build import CPU_TOKENS
from nanochat.train.commands import flag_words
from scripts import _cli

TOY = [
    "--depth=1",
    "--head-dim=8",
    "--seq-len=16",
    "--batch=2",
    "--vocab-size=300",
    "--seconds=0.01",
    "--device-type=cpu",
    "--dtype=float32",
]
CONFIG = {
    "depth": 1,
    "head_dim": 8,
    "seq_len": 16,
    "batch": 2,
    "vocab_size": 300,
    "window_pattern": "SSSL",
    "recipe": "default",
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
}
POSITIVE = {
    "train": """tokens_per_second step_seconds forward_backward_seconds optimizer_seconds matmul_seconds matmul_share
        seconds_to_second_step peak_memory_bytes flops_per_second share_of_peak num_params state_bytes""",
    "attention": "full_forward_ms_1x short_forward_backward_ms_2x torch_us_per_token_4x",
    "loss_head": "head_ms plain_ms products_ms products_share",
    "optimizer": "step_ms muon_ms others_ms muon_share products_share products_flops_per_second",
    "data": "tokens_per_second tokens_per_cpu_second",
    "tokenizer": """train_seconds encode_single_mb_per_second encode_single_tokens_per_second
        encode_batch_mb_per_second encode_batch_tokens_per_second decode_mb_per_second bytes_per_token""",
    "distributed": "cores",
    "decode": """bytes_per_second num_matrix_params tokens_per_second_1 ms_per_step_3 model_ms_per_step_1
        bandwidth_share_3 arithmetic_share_3 flops_per_second first_token_ms_1 first_token_ms_of_7
        times_one_row_3""",
    "sandbox": "unsafe_warm_per_second unsafe_tested_per_second unsafe_cold_per_second",
}
SMALL_TEXT = {
    "tokenizer": ["--chars=20000"],
    "data": ["--chars=20000", "--documents=100", "--again=20"],
    "decode": ["--prompt=5", "--prompts", "7", "--rows", "1", "3"],
    "sandbox": ["--problems=0"],
    "distributed": ["--processes=2", "--rounds-of-all=1"],
}


@pytest.fixture
def runtime() -> Runtime:
    return Runtime.create("cpu", "float32")


@pytest.fixture
def toy() -> Flags:
    return Flags(depth=2, head_dim=8, seq_len=16, batch=2, vocab_size=300, recipe="later")


@pytest.mark.parametrize("name", POSITIVE)
def test_prints_a_table_and_last_a_line_of_json(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "/nonexistent/never")  # nothing of the user's is needed
    assert importlib.import_module(f"bench.{name}").main([*TOY, *SMALL_TEXT.get(name, [])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 4 and "─" in lines[-2]
    values: dict[str, Any] = json.loads(lines[-1])
    assert values.items() >= CONFIG.items()
    assert all(
        value is None or isinstance(value, str | dict | list) or math.isfinite(value) for value in values.values()
    )
    for key in POSITIVE[name].split():
        assert values[key] > 0, key
    if name == "data":
        assert values["never_seen_share"] == values["seen_again_share"] == 0
        assert values["tokenised_tokens_per_second"] > 0
    if name == "distributed":
        for found in values["processes"].values():  # small tensors, which stay whole, count for much at this size
            assert found["measured_bytes"] == pytest.approx(found["planned_bytes"], rel=0.1)
        assert values["processes"]["2x1"]["state_share"] == pytest.approx(0.5, abs=0.05)
    if name == "train":
        assert values["forward_backward_seconds"] < values["step_seconds"] < values["seconds_to_second_step"]
        assert values["peak_memory_bytes"] > values["state_bytes"]


@pytest.mark.parametrize("hostile", [False, True])
def test_a_server_under_load(
    hostile: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few seconds of either kind; how fast is another question."""
    sizes = ["--seq-len=256", "--vocab-size=300", "--chars=20000", "--clients=6", "--seconds=2", "--max-tokens=8"]
    monkeypatch.setattr(serve, "complaints", lambda *about: [])  # two seconds say nothing about memory
    serve.main([*TOY, *sizes, *(["--hostile"] if hostile else [])])
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["tokens_per_second"] > 0 and values["exit_code"] is None and not any(values["left_over"].values())


# ---------------------------------------------------------------------------------------------------
# Counting


@pytest.mark.parametrize("recipe", ["published", "later", "small", "plain"])
def test_the_linear_products_are_all_there(toy: Flags, runtime: Runtime, recipe: str) -> None:
    toy.recipe = recipe
    model = GPT.create(model_config(toy))
    products = LinearProducts(linear_shapes(model), toy.tokens, runtime)
    with FlopCounterMode(display=False) as counter:
        products()
    config = model.config
    attention = 12 * config.n_head * config.head_dim * sum(min(left, 16) for left, _ in model.window_sizes)
    padding = 6 * (config.padded_vocab_size - config.vocab_size) * config.n_embd
    assert products.flops == counter.get_total_flops() == toy.tokens * (model.estimate_flops() - attention - padding)


def test_the_linear_products_are_the_right_ones(runtime: Runtime) -> None:
    products = LinearProducts([(3, 5)], 4, runtime)
    products()
    (x, w_t, y), (g, w, dx), (g_t, x_again, dw) = products.products
    assert (x.shape, w.shape, g.shape) == ((4, 3), (5, 3), (4, 5))
    assert x is x_again and torch.equal(w.T, w_t) and torch.equal(g.T, g_t)
    torch.testing.assert_close([y, dx, dw], [x @ w.T, g @ w, g.T @ x])


def test_orthogonalisation_products(runtime: Runtime) -> None:
    group = {"params": [torch.zeros(8, 6)] * 3, "ns_steps": 5, "ns_dtype": torch.float32}
    products = OrthogonalisationProducts([group], runtime.device)
    with FlopCounterMode(display=False) as counter:
        products()
    assert products.flops == counter.get_total_flops() == 5 * 3 * (2 * 6 * 8 * 6 * 2 + 2 * 6 * 6 * 6)


def test_state_is_counted_once(runtime: Runtime) -> None:
    toy = train.TrainFlags(depth=2, head_dim=8, seq_len=16, batch=2, vocab_size=300, recipe="published")
    step = train.make_step(toy, runtime)
    step(train.random_batch(toy.batch, toy.seq_len, toy.vocab_size, runtime))
    numbers = step.model.num_scaling_params()["total"]
    second = sum(max(p.shape) - p.numel() for p in step.model.transformer["h"].parameters())
    assert train.state_bytes(step) == 4 * (4 * numbers + second)  # one number a row instead of one a weight
    assert len(step.gradient_seconds) == 1


def test_rows_as_base_train_chooses_them_and_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "profile"
    train.main([*TOY, "--fit", f"--profile={table}"])
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["batch"] == CPU_TOKENS // 16
    assert values["share_of_data_sheet"] is values["share_of_forecast"] is values["busy_share"] is None  # unknown here
    assert "aten::mm" in table.read_text()
    with gzip.open(f"{table}.trace.json.gz") as file:
        assert json.load(file)["traceEvents"]


def test_time_of_kernels_is_counted_once() -> None:
    kinds = torch.autograd.DeviceType
    operations = [
        SimpleNamespace(device_type=kinds.CPU, is_user_annotation=False, self_device_time_total=7.0),
        SimpleNamespace(device_type=kinds.CUDA, is_user_annotation=False, self_device_time_total=7.0),
        SimpleNamespace(device_type=kinds.CUDA, is_user_annotation=True, self_device_time_total=9.0),
    ]
    assert train.kernel_seconds(operations) == pytest.approx(7e-6)


def test_a_known_gpu_is_compared_with_its_data_sheet_and_forecast(
    toy: Flags, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, config = GPUS["h100"], model_config(toy)
    monkeypatch.setattr(train, "known_gpu", lambda runtime: gpu)
    tokens = 1 / expected_pace(config, gpu).token_seconds
    shares = train.shares(config, 0.45 * gpu.peak_flops, 2 * tokens, runtime)
    assert shares == pytest.approx({"share_of_data_sheet": 0.45, "share_of_forecast": 2.0})


def test_lost_tokens_are_noticed(toy: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = CountedDocuments(50, toy.seq_len)
    lengths = [len(ids) for ids in corpus.next_ids]
    assert min(lengths) >= 1 and sum(lengths) == corpus.num_tokens and 5 < sum(lengths) / 50 < 30
    assert count_epoch(corpus, toy) == (0, 0)

    class Forgetful(PretrainLoader):
        def next_batch(self) -> Any:
            batch = super().next_batch()
            batch.targets[1] = batch.targets[0]
            return batch

    monkeypatch.setattr("bench.data.PretrainLoader", Forgetful)
    never, again = count_epoch(CountedDocuments(50, toy.seq_len), toy)
    assert never == pytest.approx(0.5, abs=0.15) and again == pytest.approx(0.5, abs=0.15)


def test_things_are_timed_in_turn(runtime: Runtime) -> None:
    calls: list[str] = []
    actions = {name: lambda name=name: calls.append(name) for name in "ab"}
    samples = _common.sample_in_turn(actions, 0, runtime)  # type: ignore[arg-type]
    assert calls == list("ab" * 4) and [len(times) for times in samples.values()] == [3, 3]


def test_memory_of_an_action(runtime: Runtime) -> None:
    def write() -> None:  # to memory of its own: the allocator may have enough left from other tests
        with mmap.mmap(-1, 2**27) as memory:
            for start in range(0, 2**27, mmap.PAGESIZE):
                memory[start] = 1

    around = _common.peak_during(write, runtime)
    if around is not None:  # a system that can forget a peak
        assert 0.9 * 2**27 < around[1] - around[0] < 1.5 * 2**27


@pytest.mark.parametrize("flag", ["--seq-len=1", "--batch=0", "--seconds=-1", "--rounds=0", "--depth=0", "--recipe=x"])
def test_mistakes(flag: str) -> None:
    with pytest.raises(UserError, match=flag.partition("=")[0]):
        train.main([*TOY, flag])


# ---------------------------------------------------------------------------------------------------
# --against

FAKE = """
import json, os, sys
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write("{name} " + " ".join(sys.argv[1:]) + "\\n")
print("a table")
print(json.dumps({{"speed": {speed}, "seconds": 9, "threads": 1, "nothing": None, "kind": "{name}", "depth": 1}}))
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose HEAD has bench.fake with a speed of 2, and its working tree one with a speed of 3."""
    root = tmp_path / "repository"
    fake = root / "bench" / "fake.py"
    fake.parent.mkdir(parents=True)
    fake.write_text(FAKE.format(name="old", speed=2))
    for words in (
        ["init", "--quiet"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false", "commit", "--quiet", "-m", "old"],
    ):
        subprocess.run(["git", *words], cwd=root, check=True)
    fake.write_text(FAKE.format(name="new", speed=3))
    monkeypatch.setattr(_run, "ROOT", root)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return root


def worktrees(root: Path) -> int:
    done = subprocess.run(["git", "worktree", "list"], cwd=root, capture_output=True, text=True, check=True)
    return len(done.stdout.splitlines())


def test_against(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run.compare("fake", Flags(against="HEAD", rounds=2, depth=7, window_pattern="L")).show()
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["working_tree"] == {"speed": 3} and values["revision"] == {"speed": 2}
    assert values["ratio"] == {"speed": 1.5} and values["rounds"] == 2
    log = (repository.parent / "log").read_text().splitlines()
    assert log == ["new --depth=7 --window-pattern=L", "old --depth=7 --window-pattern=L"] * 2
    assert worktrees(repository) == 1


@pytest.mark.parametrize(
    "flags",
    [decode.DecodeFlags(int8=True, rows=(1, 4), prompts=(5,), temperature=0.0, depth=2), train.TrainFlags(fit=True)],
)
def test_against_gives_the_same_flags(flags: Flags) -> None:
    assert _cli.parse(type(flags), flag_words(_run.changed_flags(flags))) == flags


def test_against_another_setting_is_said(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = repository / "bench" / "fake.py"
    fake.write_text(fake.read_text().replace('"depth": 1', '"depth": 2'))
    _run.compare("fake", Flags(against="HEAD", rounds=1))
    assert "the two differ in depth: 2 here, 1 at HEAD" in capsys.readouterr().err


def test_against_a_revision_without_the_benchmark(repository: Path) -> None:
    with pytest.raises(UserError, match=r"has no bench/train\.py"):
        train.main(["--against=HEAD"])
    assert worktrees(repository) == 1


def test_against_something_that_fails(repository: Path) -> None:
    (repository / "bench" / "fake.py").write_text("raise SystemExit('cannot do it')")
    with pytest.raises(UserError, match="cannot do it"):
        _run.compare("fake", Flags(against="HEAD"))
    assert worktrees(repository) == 1


def test_the_worktree_is_gone_after_ctrl_c(repository: Path) -> None:
    with pytest.raises(KeyboardInterrupt), _run.worktree("HEAD") as tree:
        assert (tree / "bench" / "fake.py").exists() and worktrees(repository) == 2
        raise KeyboardInterrupt
    assert not tree.exists() and worktrees(repository) == 1


@pytest.mark.parametrize("revision", ["nonsense", "--all", "HEAD~99"])
def test_an_unknown_revision(repository: Path, capsys: pytest.CaptureFixture[str], revision: str) -> None:
    with pytest.raises(SystemExit) as stop:
        _cli.run(lambda: train.main([f"--against={revision}"]))
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(said) == 1 and repr(revision) in said[0]
