"""Decoding: tokens per second by batch size, against the limits of memory bandwidth and arithmetic:
`python -m bench.decode`.

A step must read every matrix once, and each sequence's keys and values. The share of the bandwidth limit is the time
this takes at the speed at which this machine reads memory, over the time of a step of the model alone. A model that
fits in the CPU's cache is read faster, and its share says little. `--int8` counts the bytes of int8.

A step must also multiply each sequence's activations by every matrix, and by its keys and values. The share of the
arithmetic limit is the time this takes at the speed of PyTorch's large matrix products (the CPU's own peak is higher),
over the same time. One sequence is bound by memory, many by arithmetic: where the second share nears 1, a larger batch
gives no more tokens per second.

On an NVIDIA GPU a step is one CUDA graph (inference/graph_decoder.py); beside it the same step is timed without one.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch

from bench import _run
from bench._common import Flags, model_config, tensor_bytes, time_in_turn
from bench._run import Result
from nanochat.common import UserError
from nanochat.common.ranges import Range
from nanochat.gpt import GPT
from nanochat.inference.decoding import RunningBatch
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.graph_decoder import GraphDecoder
from nanochat.inference.kv_cache import plain_step
from nanochat.inference.packed_weights import matrices
from nanochat.inference.request import GenerationRequest
from nanochat.inference.sampling import SamplingParams
from nanochat.inference.tools import ToolTable
from nanochat.runtime import Runtime
from nanochat.tokenizer import SPLIT_PATTERN, RustBPETokenizer
from nanochat.train.timing import measure_peak_flops
from scripts import _cli

READ_BYTES = 2**28  # larger than any cache
BURST = 16  # consecutive steps timed together: as in use, later ones find in the cache what fits there


@dataclass
class DecodeFlags(Flags):
    """Sizes of what is measured, and for how long. --rows is the batch size; --batch is not used."""

    rows: tuple[int, ...] = (1, 8, 32)
    """Sequences decoded together; each number is measured in turn."""
    prompt: Annotated[int, Range(1)] = 100
    """Tokens in each prompt."""
    prompts: tuple[int, ...] = ()
    """Tokens in further prompts, of which only the time to the first token is measured, one sequence at a time."""
    temperature: Annotated[float, Range(0, 1e6)] = 0.8
    """Sampling temperature, with top_k 50."""
    int8: bool = False
    """Decode with int8 weights, on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rows or min(self.rows) < 1:
            raise UserError(f"--rows needs numbers of at least 1, got {self.rows}")
        if self.prompts and min(self.prompts) < 1:
            raise UserError(f"--prompts needs numbers of at least 1, got {self.prompts}")
        longest = max((self.prompt, *self.prompts))
        needed = longest + max(self.rows) + 2  # sequences grow while the others are prefilled
        if needed > self.seq_len:
            raise UserError(
                f"prompts of {longest} and {max(self.rows)} --rows need --seq-len {needed}, got {self.seq_len}"
            )


class Case:
    """A running batch of `rows` sequences that do not end while they are timed."""

    def __init__(self, weights: DecodingWeights, rows: int, flags: DecodeFlags) -> None:
        rng = random.Random(rows)
        self.flags, self.rows, self.weights = flags, rows, weights
        self.batch = RunningBatch(weights, no_tools(), set(), rows, flags.seq_len)
        self.prompts = [[rng.randrange(flags.vocab_size) for _ in range(flags.prompt)] for _ in range(rows)]
        self.first_token_seconds = self.start()

    def start(self) -> float:
        """Prefill every prompt; returns the seconds to the first token of the first."""
        for sequence in list(self.batch.running):
            self.batch.cancel(sequence)
        room = self.flags.seq_len - self.flags.prompt
        for seed, prompt in enumerate(self.prompts):
            sampling = SamplingParams(self.flags.temperature, 50, seed=seed)
            self.batch.submit(GenerationRequest(prompt, room, sampling).sequences())
        began = time.perf_counter()
        while not self.batch.running:
            self.batch.step(1)
        waited = time.perf_counter() - began
        while len(self.batch.running) < self.rows:
            self.batch.step(1)
        return waited

    def step(self) -> None:
        """Decode one token of every sequence; start again when the context is full."""
        if not self.batch.running or self.batch.running[0].room <= 1:
            self.first_token_seconds = min(self.first_token_seconds, self.start())
        self.batch.step()

    def model_alone(self) -> None:
        """The same step without sampling and bookkeeping; the cache is rewound."""
        self._rewound(self.batch.next_logits)

    def model_without_graph(self) -> None:
        """The same in PyTorch, one launch after the other."""
        last = [sequence.tokens[-1] for sequence in self.batch.running]
        self._rewound(lambda: plain_step(self.batch.model, self.batch.cache, last))

    def _rewound(self, step: Callable[[], Any]) -> None:
        lengths = [self.batch.cache.length(row) for row in range(self.rows)]
        with torch.inference_mode():
            step()
        self.batch.cache.rewind(lengths)

    def slots_seen(self) -> int:
        """Keys that all sequences attend to in a step, summed over layers."""
        cache = self.batch.cache
        return sum(min(ring.size(1), cache.length(row) + 1) for ring in cache.k for row in range(self.rows))

    def bytes_read(self) -> int:
        """Bytes that a step must read: each matrix, and the keys and values in each sequence's windows."""
        model, packed = self.weights.current(), self.weights.packed
        size = sum(
            tensor_bytes(packed.of(m)) if packed else m.weight.numel() * m.weight.element_size()
            for m in matrices(model)
        )
        keys = self.batch.cache.k[0]
        return size + 2 * keys[0, 0].numel() * keys.element_size() * self.slots_seen()

    def flops(self) -> int:
        """A multiply and an add per weight and sequence, and twice that per query and key channel."""
        model = self.weights.current()
        weights = sum(m.weight.numel() for m in matrices(model))
        return 2 * weights * self.rows + 4 * model.config.n_embd * self.slots_seen()


def first_token_seconds(weights: DecodingWeights, flags: DecodeFlags) -> float:
    """From one prompt of flags.prompt tokens to its first token."""
    case = Case(weights, 1, flags)
    return median(case.start() for _ in range(7))


def no_tools() -> ToolTable:
    """For a batch without tools. The ids of its vocabulary, single bytes, are not used."""
    return ToolTable(RustBPETokenizer(SPLIT_PATTERN, [bytes([value]) for value in range(256)]), ())


def burst(step: Callable[[], None]) -> None:
    for _ in range(BURST):
        step()


def measure(flags: DecodeFlags, runtime: Runtime) -> Result:
    weights = DecodingWeights(GPT.create(model_config(flags), runtime.device, runtime.dtype), flags.int8)
    cases = {rows: Case(weights, rows, flags) for rows in flags.rows}
    graphs = isinstance(cases[flags.rows[0]].batch.decoder, GraphDecoder)
    memory = torch.ones(READ_BYTES // 4, device=runtime.device)
    actions: dict[str, Callable[[], Any]] = {"read": memory.sum}
    for rows, case in cases.items():
        actions |= {f"step {rows}": partial(burst, case.step), f"model {rows}": partial(burst, case.model_alone)}
        if graphs:
            actions[f"plain {rows}"] = partial(burst, case.model_without_graph)
    seconds = time_in_turn(actions, flags.seconds, runtime)
    bandwidth = READ_BYTES / seconds["read"]
    fastest = {runtime.dtype, torch.float32} if runtime.device.type == "cpu" else {runtime.dtype}
    peak = max(measure_peak_flops(replace(runtime, dtype=dtype)) for dtype in fastest)
    for case in cases.values():
        case.first_token_seconds = median(case.start() for _ in range(5))
    first_token = {n: first_token_seconds(weights, replace(flags, prompt=n)) for n in flags.prompts}
    num_params = sum(m.weight.numel() for m in matrices(weights.current()))
    values: dict[str, Any] = {"bytes_per_second": bandwidth, "flops_per_second": peak, "num_matrix_params": num_params}
    table = []
    for rows, case in cases.items():
        step, alone = seconds[f"step {rows}"] / BURST, seconds[f"model {rows}"] / BURST
        of_memory, of_arithmetic = case.bytes_read() / bandwidth / alone, case.flops() / peak / alone
        values |= {
            f"tokens_per_second_{rows}": rows / step,
            f"ms_per_step_{rows}": 1e3 * step,
            f"model_ms_per_step_{rows}": 1e3 * alone,
            f"bandwidth_share_{rows}": of_memory,
            f"arithmetic_share_{rows}": of_arithmetic,
            f"first_token_ms_{rows}": 1e3 * case.first_token_seconds,
        }
        row = {
            "rows": str(rows),
            "prompt": str(flags.prompt),
            "first token, ms": f"{1e3 * case.first_token_seconds:.1f}",
            "step, ms": f"{1e3 * step:.3f}",
            "model alone, ms": f"{1e3 * alone:.3f}",
            "tokens/s": f"{rows / step:,.0f}",
            "of the bandwidth limit": f"{of_memory:.0%}",
            "of the arithmetic limit": f"{of_arithmetic:.0%}",
        }
        if graphs:
            plain = 1e3 * seconds[f"plain {rows}"] / BURST
            values[f"model_without_graph_ms_per_step_{rows}"] = plain
            row["model without a graph, ms"] = f"{plain:.3f}"
        table.append(row)
    for n, waited in first_token.items():
        values[f"first_token_ms_of_{n}"] = 1e3 * waited
        table.append(
            dict.fromkeys(table[0], "") | {"rows": "1", "prompt": str(n), "first token, ms": f"{1e3 * waited:.1f}"}
        )
    one = values.get("tokens_per_second_1")
    if one:
        values |= {f"times_one_row_{rows}": values[f"tokens_per_second_{rows}"] / one for rows in flags.rows}
    machine = f"{runtime.describe()}; memory read at {bandwidth / 1e9:.0f} GB/s, products at {peak / 1e9:,.0f} GFLOP/s"
    return Result(
        f"{num_params / 1e6:.0f}M weights in matrices, on {machine}",
        tuple(table[0]),
        [tuple(row.values()) for row in table],
        values,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("decode", DecodeFlags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
