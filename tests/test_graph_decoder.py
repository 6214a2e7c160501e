"""Decoding with CUDA graphs, on a CPU: EmulatedGraph replays operations on fixed tensors, as a graph does."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from engine_helpers import answers, sequence
from stubs import TOKENIZER, stir
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import gpt
from nanochat.common import fast_path
from nanochat.cpu import kernels
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference import graph_decoder
from nanochat.inference.decoding import RunningBatch
from nanochat.inference.decoding_weights import DecodingWeights, cast_copy
from nanochat.inference.graph_decoder import GraphDecoder, StaticStep, round_up
from nanochat.inference.kv_cache import KVCache, plain_step, prefill
from nanochat.inference.sampling import SamplingParams, draw_tokens, make_rng
from nanochat.inference.tools import ToolTable

SIZES: dict[str, Any] = {"vocab_size": 265, "n_layer": 4, "n_head": 4, "n_embd": 32, "sequence_len": 48}
CONFIGS = {
    "published": GPTConfig(n_kv_head=4, **SIZES),
    "grouped": GPTConfig(n_kv_head=2, **SIZES),
    "ngrams": GPTConfig.later(n_kv_head=2, ngram_rows=97, ngram_dim=16, **SIZES),
    "later": GPTConfig.later(n_kv_head=2, **{**SIZES, "short_window_divisor": 2}),
    "plain": GPTConfig.plain(n_kv_head=4, **SIZES),
}
READS = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"}  # the host waits for them


class Recorder(TorchDispatchMode):
    """Records operations. `launches`: those that compute something, so on a GPU launch a kernel or more."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.launches: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS | {"lift_fresh"}:  # that makes a tensor of the host's numbers
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        if func._schema.is_mutable or is_new(out, args):
            self.launches.append(str(func))
        return out


def is_new(out: Any, args: Any) -> bool:
    """Whether an operation's result is a tensor, and not a view of an argument. (Lists are views: chunk, split.)"""
    storages = {x.untyped_storage()._cdata for x in args if torch.is_tensor(x)}
    return torch.is_tensor(out) and out.untyped_storage()._cdata not in storages


class EmulatedGraph:
    """What `run` does to tensors, without its Python."""

    def __init__(self, run: Callable[[], None], *_: Any) -> None:
        run()
        with Recorder() as recorder:
            run()
        self.operations = recorder.operations

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable and is_new(out, args):
                out.copy_(again)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models decode with graphs, as on a GPU: without C, after one plain step, with sizes that change often."""
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(graph_decoder, "capture", EmulatedGraph)
    monkeypatch.setattr(graph_decoder, "EAGER_STEPS", 1)
    monkeypatch.setattr(graph_decoder, "MIN_SLOTS", 8)
    monkeypatch.setattr(fast_path, "_warned", set())
    monkeypatch.setattr(DecodingWeights, "decoder", lambda self, cache: GraphDecoder(self._copy, cache))


@contextmanager
def counted_replays() -> Iterator[list[int]]:
    """Grows with every replay, by one."""
    replays: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        replay = EmulatedGraph.replay
        patch.setattr(EmulatedGraph, "replay", lambda self: (replays.append(1), replay(self))[1])
        yield replays


def build(name: str = "later", dtype: torch.dtype = torch.float32) -> GPT:
    return stir(GPT.create(CONFIGS[name], compute_dtype=dtype).eval(), 0.2).requires_grad_(False)


def prefilled(model: GPT, lengths: list[int], batch_size: int = 4, max_tokens: int = 48) -> KVCache:
    """A cache with a row of each length, of tokens that are the same for the same length."""
    cache = KVCache(model.config, batch_size, max_tokens, dtype=model.compute_dtype, num_rows=0)
    for length in lengths:
        alone = KVCache(model.config, 1, max_tokens, dtype=model.compute_dtype)
        prefill(model, alone, tokens_of(length, length)[None])
        cache.join(alone)
    return cache


def tokens_of(seed: int, length: int) -> torch.Tensor:
    return torch.randint(265, (length,), generator=torch.Generator().manual_seed(seed))


def test_sizes() -> None:
    assert [round_up(n, 1) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert [round_up(n, 256) for n in (1, 256, 257, 513, 769, 1025, 1537, 2049)] == [
        *(256, 256, 512, 768, 1024, 1536, 2048, 3072),
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_come_and_go(name: str) -> None:
    """Through all sizes of step and past the windows: every row equal to the whole sequence at once."""
    model, dice = build(name), random.Random(0)
    ids = {seed: tokens_of(seed, 48) for seed in range(10)}
    with torch.inference_mode(), counted_replays() as replays:
        whole = {seed: model(x[None])[0] for seed, x in ids.items()}
        cache, running, waiting = KVCache(model.config, 4, 48, num_rows=0), [], list(ids)
        decoder, steps = GraphDecoder(model, cache), 0
        while waiting or running:
            if waiting and len(running) < 4 and dice.random() < 0.3:
                seed, length = waiting.pop(), dice.choice([1, 3, 20, 40])
                alone = KVCache(model.config, 1, 48)
                prefill(model, alone, ids[seed][None, :length])
                cache.join(alone)
                running.append([seed, length])
            if not running:
                continue
            logits, steps = decoder([int(ids[s][n]) for s, n in running]), steps + 1
            torch.testing.assert_close(logits, torch.stack([whole[s][n] for s, n in running]), atol=5e-5, rtol=1e-4)
            running = [[s, n + 1] for s, n in running]
            for row in reversed(range(len(running))):
                if running[row][1] == 48 or dice.random() < 0.05:
                    cache.leave(row)
                    running[row] = running[-1]
                    running.pop()
            assert cache.lengths.tolist() == [n for _, n in running]
    assert len(decoder._captured) > 8 and len(replays) > steps / 2


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 30, "seed": 5}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_those_of_the_plain_path(name: str, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Engine.complete, as RL and chat_eval decode: a prompt longer than a window too."""
    model, prompts = build(name), [tokens_of(n, n).tolist() for n in (3, 30, 1, 12, 7, 20)]
    with counted_replays() as replays:
        found = answers(Engine(model, TOKENIZER), prompts, max_tokens=24, batch_size=4, **settings)
    monkeypatch.setattr(DecodingWeights, "decoder", lambda self, cache: None)
    assert found == answers(Engine(model, TOKENIZER), prompts, max_tokens=24, batch_size=4, **settings)
    assert len(replays) > 10


def test_two_batches_at_once_and_renewed_weights() -> None:
    """Graphs follow weights that are renewed in place."""
    model = build(dtype=torch.bfloat16)
    weights = DecodingWeights(model)
    with torch.inference_mode():
        pairs = [[prefilled(weights.current(), lengths) for _ in range(2)] for lengths in ([5, 9], [33])]
        decoders = [GraphDecoder(weights.current(), mine) for mine, _ in pairs]
    for round in range(6):
        if round == 3:
            stir(model, 0.1, seed=9)
        current = weights.current()
        with torch.inference_mode(), counted_replays() as replays:
            for decoder, (mine, other) in zip(decoders, pairs):
                tokens = [round + row for row in range(mine.num_rows)]
                found, wanted = decoder(tokens), plain_step(current, other, tokens)
                assert (found - wanted).norm() < 0.02 * wanted.norm()
        assert round < 2 or len(replays) == 2


def test_a_step_may_be_repeated() -> None:
    """It reads nothing that it writes: a warm-up, a capture and a replay leave the cache as one of them does."""
    model, (mine, other) = build(), (prefilled(build(), [3, 30, 11]) for _ in range(2))
    with torch.inference_mode():
        step = StaticStep(model, mine, (4, 48))
        step.fill([1, 2, 3], [3, 30, 11])
        addresses = {x.data_ptr() for x in [step.inputs, *mine.k, *mine.v]}
        for _ in range(3):
            step.run()
        torch.testing.assert_close(step.logits[:3], plain_step(model, other, [1, 2, 3]), atol=2e-5, rtol=1e-4)
        assert step.logits.shape == (4, 265) and step.logits.isfinite().all()
        torch.testing.assert_close([k[:3] for k in mine.k], [k[:3] for k in other.k], atol=2e-5, rtol=1e-4)
    assert addresses == {x.data_ptr() for x in [step.inputs, *mine.k, *mine.v]}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    ("name", "per_layer", "more"),
    [("published", 37, 16), ("grouped", 37, 16), ("later", 39, 31), ("ngrams", 39, 59), ("plain", 31, 15)],
)
def test_launches(name: str, per_layer: int, more: int, rows: int) -> None:
    """Operations of a step that launch a kernel, on the weights that a GPU decodes with. May only fall."""
    model = gpu_weights(CONFIGS[name])
    with torch.inference_mode():
        step = StaticStep(model, KVCache(model.config, rows, 48, dtype=torch.bfloat16), (rows, 48))
        step.fill(range(rows), range(rows))
        with Recorder() as recorder:
            step.run()
    assert len(recorder.launches) <= per_layer * model.config.n_layer + more, recorder.launches


def gpu_weights(config: GPTConfig) -> GPT:
    model = GPT.create(config, compute_dtype=torch.bfloat16)
    copy = cast_copy(model)
    for name in ("cos", "sin"):  # on a CPU they stay in float32
        setattr(copy, name, getattr(copy, name).to(torch.bfloat16))
    return copy


def test_rotary_tables_are_cast_once_except_on_a_cpu() -> None:
    with torch.device("meta"):
        model = GPT(CONFIGS["plain"], torch.bfloat16)
    assert cast_copy(model).cos.dtype == torch.bfloat16
    assert cast_copy(build(dtype=torch.bfloat16)).cos.dtype == torch.float32


def test_the_benchmark_times_both(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.decode import main

    sizes = ["--depth=1", "--head-dim=8", "--dtype=float32", "--seq-len=32", "--vocab-size=300", "--seconds=0"]
    assert main([*sizes, "--device-type=cpu", "--prompt=5", "--rows", "2"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["model_without_graph_ms_per_step_2"] > 0 and values["bandwidth_share_2"] > 0


# ---------------------------------------------------------------------------------------------------
# Where graphs do not work


def run_steps(model: GPT, count: int = 6) -> tuple[GraphDecoder, bool]:
    """A decoder after some steps, and whether all were like plain ones."""
    with torch.inference_mode():
        mine, other = (prefilled(model, [3, 9]) for _ in range(2))
        decoder = GraphDecoder(model, mine)
        same = all(
            bool((decoder([i, i + 1]) - plain_step(model, other, [i, i + 1])).norm() < 1e-3) for i in range(count)
        )
    return decoder, same


def reads_the_device(self: gpt.MLP, x: torch.Tensor) -> torch.Tensor:
    return self.c_proj(self.c_fc(x).relu() if x.sum() < 1e9 else self.c_fc(x))


def needs_the_host(self: gpt.MLP, x: torch.Tensor) -> torch.Tensor:
    return self.c_proj(self.c_fc(x).relu() + torch.tensor([1.0]).to(x))


def fails_to_capture(run: Any, *_: Any) -> Any:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")


class WrongGraph(EmulatedGraph):
    def replay(self) -> None:
        super().replay()
        self.operations[-1][3].add_(1.0)


@pytest.mark.parametrize("how", [reads_the_device, needs_the_host, "capture", "result"])
def test_plain_steps_where_a_graph_fails(
    how: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if callable(how):
        monkeypatch.setattr(gpt.MLP, "forward", how)
    else:
        monkeypatch.setattr(graph_decoder, "capture", {"capture": fails_to_capture, "result": WrongGraph}[how])
    model = build()
    for _ in range(2):
        decoder, same = run_steps(model)
        assert same and not decoder._captured
    (line,) = capsys.readouterr().err.splitlines()
    assert "CUDA graphs" in line


def test_an_edited_layer_is_captured_as_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt.MLP, "forward", lambda self, x: self.c_proj(torch.sin(self.c_fc(x))))
    decoder, same = run_steps(build())
    assert same and decoder._captured


def test_weights_that_are_not_finite_are_no_fault_of_the_graph(capsys: pytest.CaptureFixture[str]) -> None:
    model = build()
    model.lm_head.weight.fill_(torch.nan)
    run_steps(model)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("fails", ["", "run", "end"])
def test_capture_calls_cuda_in_order(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real capture(), with torch.cuda replaced; `run` fails when captured, and for good measure the end too."""
    calls: list[Any] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            calls.append(f"begin {pool} {capture_error_mode}")

        def capture_end(self) -> None:
            calls.append("end")
            if fails == "end" and "run" in calls:
                raise RuntimeError("CUDA error: the capture was invalidated")

        def pool(self) -> str:
            return "pool"

    @contextmanager
    def inside(what: Any) -> Iterator[None]:
        calls.append(f"in {getattr(what, 'name', what)}")
        yield

    def run() -> None:
        calls.append("run")
        if fails and calls.count("run") % 2 == 0:
            raise RuntimeError("CUDA error: of run")

    fake = {"Stream": lambda device: Stream("side"), "current_stream": lambda: Stream("main"), "CUDAGraph": Graph}
    for name, value in {**fake, "stream": inside, "device": inside}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: calls.append("zeros"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *of: calls.append(f"leave {of}"), raising=False)
    graph_decoder._side.cache_clear()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="of run") if fails else nullcontext():
            real_capture(run, "cuda:0")  # type: ignore[arg-type]
    graph_decoder._side.cache_clear()
    once = ["in side", "begin None thread_local", "zeros", "end"]
    each = ["side waits for main", "in side", "run", "begin pool thread_local", "run", "end"]
    each += ["leave (3, 'pool')"] if fails == "end" else []
    each += ["main waits for side"]
    assert calls == ["in cuda:0", *once, *each, "in cuda:0", *each]
    assert not graph_decoder._capturing.locked()


real_capture = graph_decoder.capture


# ---------------------------------------------------------------------------------------------------
# One wait for the device per step


class Reads(TorchDispatchMode):
    """Counts what makes the host wait: numbers read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    tolist = torch.Tensor.tolist
    with Reads() as mode:

        def counted(self: torch.Tensor) -> Any:
            mode.count += 1
            return tolist(self)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)
        yield mode


def test_a_draw_reads_once(reads: Reads) -> None:
    """Whatever the mixture of settings."""
    kinds = [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.5, "top_k": 5}]
    settings = [SamplingParams(**kind) for kind in kinds]  # type: ignore[arg-type]
    draw_tokens(torch.randn(5, 265), settings, [make_rng(1, i) for i in range(5)])
    assert reads.count == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_a_row_that_is_not_finite_fails_the_draw(settings: Any, bad: float) -> None:
    """Without an index out of range before, which would end the process on a GPU."""
    logits = torch.randn(3, 265)
    logits[1, 7] = bad
    with pytest.raises(FloatingPointError):
        draw_tokens(logits, [SamplingParams(**settings)] * 3, [make_rng(1, i) for i in range(3)])


@pytest.mark.parametrize(
    ("more", "count"),
    [
        ({}, 1),
        ({"top_logprobs": 3}, 2),
        ({"min_tokens": 9}, 1),
        ({"sampling": SamplingParams(logit_bias=((5, 1.0),))}, 1),
    ],
    ids=["plain", "logprobs", "min_tokens", "bias"],
)
def test_a_step_reads_once(more: Any, count: int, reads: Reads) -> None:
    """And once more where log probabilities are requested."""
    batch = RunningBatch(DecodingWeights(build()), ToolTable(TOKENIZER), set(), 4, 48)
    batch.submit([sequence([3, 1, 4], 20, **more) for _ in range(1)])
    batch.submit([sequence([5, 9], 20) for _ in range(2)])
    while len(batch.running) < 3 or batch.decoder._seen[batch.decoder._size()] < 2:  # type: ignore[union-attr]
        batch.step()
    reads.count = 0
    for _ in range(3):
        batch.step()
    assert reads.count == 3 * count
