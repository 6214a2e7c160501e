"""Decoding: tokens a second by how many rows go together, and how near that is to what memory can give:
`python -m bench.decode`.

A step must read every matrix once, and each row's keys and values. The share of the bandwidth limit is the time that
takes at the speed at which this machine's cores read memory, over the time of a step of the model alone. A model that
fits in the CPU's cache is read faster than that, and its share says little. `--int8` counts by the bytes of int8.

It must also multiply each row by every matrix, and by its keys and values. The share of the arithmetic limit is the
time that takes at the speed of PyTorch's large matrix products (the CPU's own ceiling is higher), over the same time.
One row waits for memory, many for arithmetic: where the second share nears 1, more rows give no more tokens a second.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from bench import _run
from bench._common import Flags, model_config, tensor_bytes, time_in_turn
from bench._run import Result
from nanochat.common import SPECIAL_TOKENS, UserError
from nanochat.gpt import GPT
from nanochat.inference.decoding import RunningBatch
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.packed_weights import matrices
from nanochat.inference.request import GenerationRequest
from nanochat.inference.sampling import SamplingParams
from nanochat.inference.tools import ToolTable
from nanochat.runtime import Runtime
from nanochat.train.session import measure_peak_flops
from scripts import _cli

READ_BYTES = 2**28  # far more than any cache holds
BURST = 16  # steps timed together, as they follow each other in use: what fits in a cache is found there


@dataclass
class DecodeFlags(Flags):
    """Sizes of what is measured, and for how long. --batch is not used: --rows says how many go together."""

    rows: tuple[int, ...] = (1, 8, 32)
    """How many sequences are decoded together, each in turn."""
    prompt: int = 100
    """Tokens in each prompt."""
    temperature: float = 0.8
    """Of the draws; with top_k 50."""
    int8: bool = False
    """Weights in eight bits, on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rows or min(self.rows) < 1:
            raise UserError("--rows needs numbers from 1 up")
        if not 1 <= self.prompt < self.seq_len:
            raise UserError(f"--prompt must be from 1 to below --seq-len {self.seq_len}, got {self.prompt}")
        if self.prompt + max(self.rows) + 2 > self.seq_len:  # rows grow while the others are prefilled
            raise UserError(
                f"--prompt {self.prompt} and {max(self.rows)} --rows leave no room to decode in; "
                f"give --seq-len at least {self.prompt + max(self.rows) + 2}"
            )
        if not 0 <= self.temperature <= 1e6:
            raise UserError(f"--temperature must be from 0 to 1,000,000, got {self.temperature}")


class Ids:
    """As much of a tokenizer as a batch needs: the vocabulary ends in the special tokens."""

    def __init__(self, vocab_size: int) -> None:
        self.first_special = vocab_size - len(SPECIAL_TOKENS)

    def encode_special(self, name: str) -> int:
        return self.first_special + list(SPECIAL_TOKENS).index(name)

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b""


class Case:
    """So many rows, decoded by the engine's batch; each is long enough never to end while it is timed."""

    def __init__(self, weights: DecodingWeights, rows: int, flags: DecodeFlags) -> None:
        tools, draw = ToolTable(Ids(flags.vocab_size)), random.Random(rows)
        self.flags, self.rows, self.weights = flags, rows, weights
        self.batch = RunningBatch(weights.current(), tools, set(), rows, flags.seq_len, packed=weights.packed)
        self.prompts = [[draw.randrange(flags.vocab_size) for _ in range(flags.prompt)] for _ in range(rows)]
        self.first_token_seconds = self.start()

    def start(self) -> float:
        """Prefill every prompt; how long the first row waited for its first token."""
        for sequence in list(self.batch.running):
            self.batch.cancel(sequence)
        room = self.flags.seq_len - self.flags.prompt
        for seed, prompt in enumerate(self.prompts):
            sampling = SamplingParams(self.flags.temperature, 50, seed=seed)
            self.batch.submit(GenerationRequest(prompt, room, sampling).sequences())
        began = time.perf_counter()
        self.batch.step(1)
        waited = time.perf_counter() - began
        while len(self.batch.running) < self.rows:
            self.batch.step(1)
        return waited

    def step(self) -> None:
        """One token for every row; starts anew where the context is full."""
        if not self.batch.running or self.batch.running[0].room <= 1:
            self.first_token_seconds = min(self.first_token_seconds, self.start())
        self.batch.step()

    def model_alone(self) -> None:
        """The same step without drawing and bookkeeping; the rows' cache does not move on."""
        lengths = [self.batch.cache.length(row) for row in range(self.rows)]
        with torch.inference_mode():
            self.batch.next_logits()
        self.batch.cache.rewind(lengths)

    def slots_seen(self) -> int:
        """Keys that all rows together look at in a step, over all layers."""
        cache = self.batch.cache
        return sum(min(ring.size(1), cache.length(row) + 1) for ring in cache.k for row in range(self.rows))

    def bytes_read(self) -> int:
        """What a step cannot do without: each matrix, and the keys and values that each row sees."""
        model, packed = self.weights.current(), self.weights.packed
        size = sum(
            tensor_bytes(packed.of(m)) if packed else m.weight.numel() * m.weight.element_size()
            for m in matrices(model)
        )
        keys = self.batch.cache.k[0]
        return size + 2 * keys[0, 0].numel() * keys.element_size() * self.slots_seen()

    def flops(self) -> int:
        """A multiplication and an addition for each weight and row, and twice for each query and key."""
        model = self.weights.current()
        weights = sum(m.weight.numel() for m in matrices(model))
        return 2 * weights * self.rows + 4 * model.config.n_embd * self.slots_seen()


def burst(step: Callable[[], None]) -> None:
    for _ in range(BURST):
        step()


def measure(flags: DecodeFlags, runtime: Runtime) -> Result:
    weights = DecodingWeights(GPT.create(model_config(flags), runtime.device, runtime.dtype), flags.int8)
    cases = {rows: Case(weights, rows, flags) for rows in flags.rows}
    memory = torch.ones(READ_BYTES // 4, device=runtime.device)
    actions: dict[str, Callable[[], Any]] = {"read": memory.sum}
    for rows, case in cases.items():
        actions |= {f"step {rows}": partial(burst, case.step), f"model {rows}": partial(burst, case.model_alone)}
    seconds = time_in_turn(actions, flags.seconds, runtime)
    bandwidth = READ_BYTES / seconds["read"]
    fastest = {runtime.dtype, torch.float32} if runtime.device.type == "cpu" else {runtime.dtype}
    peak = max(measure_peak_flops(replace(runtime, dtype=dtype)) for dtype in fastest)
    for case in cases.values():
        case.first_token_seconds = median(case.start() for _ in range(5))
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
        table.append(
            (
                str(rows),
                f"{1e3 * case.first_token_seconds:.1f}",
                f"{1e3 * step:.3f}",
                f"{1e3 * alone:.3f}",
                f"{rows / step:,.0f}",
                f"{of_memory:.0%}",
                f"{of_arithmetic:.0%}",
            )
        )
    one = values.get("tokens_per_second_1")
    if one:
        values |= {f"times_one_row_{rows}": values[f"tokens_per_second_{rows}"] / one for rows in flags.rows}
    columns = (
        "rows",
        "first token, ms",
        "step, ms",
        "model alone, ms",
        "tokens/s",
        "of the bandwidth limit",
        "of the arithmetic limit",
    )
    machine = f"{runtime.describe()}; memory read at {bandwidth / 1e9:.0f} GB/s, products at {peak / 1e9:,.0f} GFLOP/s"
    return Result(f"{num_params / 1e6:.0f}M weights in matrices, on {machine}", columns, table, values)


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("decode", DecodeFlags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
