"""Rows of tokens decoded together: who is in the batch, what each is given next, when it is done.

    TokenSequence           one sequence: its prompt, what it said so far, its random numbers, its tool calls
    RunningBatch  each step feeds every row its last token and draws the next; rows join once their prompt is
                  prefilled and leave when they are done

A row's tokens depend on its prompt, settings, seed and sample index, not on who is beside it. (On a CPU with the C
decoder that holds to the last bit; elsewhere a matrix product adds up in another order for another number of rows.)

Shapes: B rows, T tokens of a piece of prompt, V vocabulary.
"""

import functools
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

import torch

from nanochat.common import UserError, warn
from nanochat.gpt import GPT
from nanochat.inference import cpu_decoder
from nanochat.inference.cpu_decoder import CpuDecoder
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.packed_weights import PackedWeights
from nanochat.inference.prefix_cache import PrefixCache
from nanochat.inference.sampling import SamplingParams, choose, make_rng
from nanochat.inference.tools import Call, Runners, ToolUse

PREFILL_CHUNK = 256  # tokens: bounds how long one prompt can keep the other rows waiting, and its attention's memory


class Tokenizer(Protocol):
    """The part of a tokenizer that generating needs."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...
    def encode_special(self, name: str) -> int: ...


@dataclass(eq=False)
class TokenSequence:
    """One sequence being continued. `tokens` holds what came after the prompt, without the token that ended it."""

    prompt: list[int]
    max_tokens: int  # how many may come after the prompt
    sampling: SamplingParams
    seed: int
    index: int  # which sample of the request this is
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)  # 1 where the model chose the token, 0 where a tool forced it
    end: int | None = None  # the token the model stopped with; None while it runs, and if it ran out of room
    done: bool = False
    top_logprobs: int | None = None  # how many likeliest tokens to tell with each token's log probability; None: none
    prompt_logprobs: bool = False  # tell them of the prompt's tokens too
    logprob: float = 0.0  # of all tokens that the model chose, if top_logprobs is given
    told: list["TokenLogprobs"] = field(default_factory=list)  # of the prompt's tokens but the first, if asked
    forced: deque[int] = field(default_factory=deque)  # tokens that come next whatever the model says
    call: list[int] | None = None  # tokens of the tool call under way, None outside of one
    calling: int = -1  # the token that began it
    runners: Runners = field(default_factory=Runners)  # the tools it has called

    def __post_init__(self) -> None:
        self.rng = make_rng(self.seed, self.index)
        self.done = self.max_tokens <= 0

    @property
    def context(self) -> list[int]:
        """The prompt and what came after it."""
        return self.prompt + self.tokens if self.tokens else self.prompt


@dataclass(slots=True)
class TokenLogprobs:
    """A token's log probability, in nats, and the likeliest tokens in its place with theirs."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False, slots=True)
class Token:
    """What one step gave one row: an id, and 1 if the model chose it, 0 if a tool forced it."""

    row: TokenSequence
    id: int
    mask: int
    told: TokenLogprobs | None = None


def tell(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Log probabilities of `tokens` under logits (N, V), before temperature and the like, and the `top` likeliest."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    of_tokens = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1).tolist()
    if not top:
        return [TokenLogprobs(value, []) for value in of_tokens]
    best = logprobs.topk(min(top, logprobs.size(-1)), dim=-1)
    return [
        TokenLogprobs(value, list(zip(ids, values)))
        for value, ids, values in zip(of_tokens, best.indices.tolist(), best.values.tolist())
    ]


# ---------------------------------------------------------------------------------------------------
# The running batch


class RunningBatch:
    """Rows decoded together. Submit prompts at any time, call `step` until it is `idle`. Not for several threads."""

    def __init__(
        self,
        model: GPT,
        tools: ToolUse,
        end_tokens: set[int],
        max_rows: int,
        max_tokens: int,
        prefixes: PrefixCache | None = None,
        packed: PackedWeights | None = None,
    ) -> None:
        """Reserves a cache of `max_rows` rows of `max_tokens` tokens, prompt included. `packed`: of DecodingWeights."""
        device, dtype = model.device, model.compute_dtype
        self.prefixes = prefixes
        self.model, self.tools, self.end_tokens = model, tools, end_tokens
        self.cache = KVCache(model.config, max_rows, max_tokens, device, dtype, num_rows=0)
        packed = (packed or PackedWeights(model)) if cpu_decoder.supported(model) else None
        self._cpu_decoder = packed and CpuDecoder(model, self.cache, packed)
        self.rows: list[TokenSequence] = []  # row i of the cache is rows[i]
        self.waiting: deque[list[TokenSequence]] = deque()  # groups that share a prompt
        self.scratch = KVCache(model.config, 1, max_tokens, device, dtype)  # the prompt being prefilled
        self._short_prompts = packed and CpuDecoder(model, self.scratch, packed)
        self.prompt_logits: torch.Tensor | None = None  # (1, V) once it is
        self.calling: dict[TokenSequence, Future[str | None]] = {}  # rows that wait for a slow tool, outside the batch

    @property
    def idle(self) -> bool:
        return not self.rows and not self.waiting and not self.calling

    def submit(self, group: Sequence[TokenSequence]) -> None:
        """Queue rows with the same prompt: it is prefilled once for all of them, and told of as the first row asks."""
        group = [row for row in group if not row.done]
        if group:
            self.waiting.append(group)

    def cancel(self, row: TokenSequence) -> None:
        """Take a row out, wherever it is."""
        row.done = True
        if future := self.calling.pop(row, None):
            future.cancel()  # if it has not begun; else what it runs is stopped
        row.runners.close()
        first = self.waiting[0] if self.waiting else None
        self.waiting = deque(left for group in self.waiting if (left := [r for r in group if not r.done]))
        if first is not None and all(r.done for r in first):
            self._forget_prompt()
        self._drop_done()

    @torch.inference_mode()
    def step(self, prefill_chunks: int | None = None) -> list[Token]:
        """One token for every running row, and for rows whose prompt got ready meanwhile.

        At most `prefill_chunks` pieces of waiting prompts are prefilled in between; None fills every free row.
        """
        self._take_back()
        new = self._decode()
        done_chunks = 0
        while self.waiting and len(self.rows) < self.cache.batch_size:
            if self.prompt_logits is None:
                if done_chunks == prefill_chunks:
                    break
                self._prefill_chunk()
                done_chunks += 1
            if self.prompt_logits is not None:
                new += self._admit(self.prompt_logits)
        return new

    def _decode(self) -> list[Token]:
        """Feed every running row its last token and draw the next ones."""
        return self._take(list(self.rows), self.next_logits()) if self.rows else []

    def next_logits(self) -> torch.Tensor:
        """Feed every running row its last token -> logits (B, V) of the next ones. Only `step` draws from them."""
        last = [row.tokens[-1] for row in self.rows]
        if self._cpu_decoder:
            return self._cpu_decoder(last)
        column = torch.tensor(last, device=self.model.device)[:, None]  # (B, 1)
        return self.model(column, kv_cache=self.cache)[:, -1]

    def _prefill_chunk(self) -> None:
        """Run the next piece of the oldest waiting prompt through the model."""
        first = self.waiting[0][0]
        prompt, start = first.context, self.scratch.length(0)
        telling = first.prompt_logprobs and not first.tokens
        prefixes = None if telling else self.prefixes  # what is told must be computed
        if start == 0 and prefixes:
            start = prefixes.fill(self.scratch, prompt)
        end = min(start + PREFILL_CHUNK, len(prompt))
        short = self._short_prompts if end == len(prompt) and not telling else None
        if short and short.takes(start, end - start):
            self.prompt_logits = short.prompt(prompt[start:end])
            return
        piece = torch.tensor([prompt[start:end]], device=self.model.device)  # (1, T)
        if telling:
            self._tell_prompt(first, self.model(piece, kv_cache=self.scratch), start)
        elif end == len(prompt):
            self.prompt_logits = self.model.last_logits(piece, self.scratch)
        else:
            self.model.fill(piece, self.scratch)
        if prefixes and piece.size(1) == PREFILL_CHUNK:
            prefixes.add(self.scratch, prompt, start)

    def _tell_prompt(self, row: TokenSequence, logits: torch.Tensor, start: int) -> None:
        """Log probabilities of the prompt's tokens that follow those of a piece, from its logits (1, T, V)."""
        following = row.prompt[start + 1 : start + 1 + logits.size(1)]
        if following:
            row.told += tell(logits[0, : len(following)], following, row.top_logprobs or 0)
        if start + logits.size(1) == len(row.prompt):
            self.prompt_logits = logits[:, -1]

    def _admit(self, logits: torch.Tensor) -> list[Token]:
        """Let as many rows of the prefilled group in as there is room for. logits (1, V) after their prompt."""
        group = self.waiting[0]
        room = self.cache.batch_size - len(self.rows)
        joining, self.waiting[0] = group[:room], group[room:]
        for _ in joining:
            self.cache.join(self.scratch)
        self.rows += joining
        if not self.waiting[0]:
            self.waiting.popleft()
            self._forget_prompt()
        return self._take(joining, logits.expand(len(joining), -1))

    def _take(self, rows: list[TokenSequence], logits: torch.Tensor) -> list[Token]:
        """Give each of `rows` its next token, forced or drawn from logits (B, V), and let the finished go."""
        drawing = [i for i, row in enumerate(rows) if not row.forced]
        if len(drawing) < len(rows):
            logits = logits[torch.tensor(drawing, dtype=torch.long, device=logits.device)]
        picked = choose(logits, [rows[i].sampling for i in drawing], [rows[i].rng for i in drawing])
        told = dict(self._tell_drawn([rows[i] for i in drawing], picked, logits))
        chosen = iter(picked)
        new = []
        for row in rows:
            mask = int(not row.forced)
            token = next(chosen) if mask else row.forced.popleft()
            new.append(Token(row, token, mask, told.get(id(row)) if mask else None))
            row.logprob += new[-1].told.logprob if new[-1].told else 0.0
            self._append(row, token, mask)
        self._drop_done()
        return new

    @staticmethod
    def _tell_drawn(
        rows: list[TokenSequence], picked: list[int], logits: torch.Tensor
    ) -> list[tuple[int, TokenLogprobs]]:
        """(id of the row, what is told of its token) for the rows that ask. logits (B, V)."""
        asking = [i for i, row in enumerate(rows) if row.top_logprobs is not None]
        if not asking:
            return []
        most = max(rows[i].top_logprobs or 0 for i in asking)
        at = torch.tensor(asking, device=logits.device)
        told = tell(logits[at], [picked[i] for i in asking], most)
        return [(id(rows[i]), TokenLogprobs(t.logprob, t.top[: rows[i].top_logprobs])) for i, t in zip(asking, told)]

    def _append(self, row: TokenSequence, token: int, mask: int) -> None:
        if mask and token in self.end_tokens:
            row.end, row.done = token, True
            return
        row.tokens.append(token)
        row.mask.append(mask)
        row.done = len(row.tokens) >= row.max_tokens
        call = self.tools.watch(row, token) if mask else None
        if call and not row.done:
            self.calling[row] = run_aside(call)

    def _take_back(self) -> None:
        """Let rows whose slow call has ended back in line, before the others; wait a moment if there are none."""
        if not self.calling:
            return
        idle = not self.rows and not self.waiting
        for row in [row for row, future in self.calling.items() if future.done() or (idle and came_soon(future))]:
            result = self.calling.pop(row).result()
            if result is not None:
                self.tools.answer(row, result)
            self.waiting.insert(1 if self.scratch.length(0) else 0, [row])

    def _drop_done(self) -> None:
        for i in reversed(range(len(self.rows))):
            if self.rows[i].done or self.rows[i] in self.calling:
                if self.rows[i].done:
                    self.rows[i].runners.close()
                self.cache.leave(i)  # moves the last row here
                self.rows[i] = self.rows[-1]
                self.rows.pop()

    def _forget_prompt(self) -> None:
        self.scratch.clear()
        self.prompt_logits = None


TOOL_THREADS = 8  # slow calls at once; more wait, as do the rows that make them


@functools.cache
def tool_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(TOOL_THREADS, "nanochat-tool")


def run_aside(call: Call) -> "Future[str | None]":
    """Start a slow call on a thread. What fails there must not end the batch: it counts as not understood."""

    def guarded() -> str | None:
        try:
            return call()
        except Exception as error:
            warn(f"a tool failed: {error!r}")
            return None

    return tool_threads().submit(guarded)


def came_soon(future: "Future[str | None]") -> bool:
    """Whether a call ends within a few milliseconds."""
    return bool(wait([future], timeout=0.005).done)


# ---------------------------------------------------------------------------------------------------
# The model, ready to decode


class DecodingWeights:
    """A model for decoding: its weights in the dtype it multiplies in, and packed for a CPU's decode step.

    Training keeps weights in fp32 and casts them for every product. A decode step has so few products per weight
    that the cast would cost more than they do, so it is done once, ahead; the numbers are the same. The copies
    follow their model: they are renewed when a weight has been changed in place, as optimizers do.
    """

    def __init__(self, model: GPT, int8: bool = False) -> None:
        """`int8`: in eight bits; current() then has the values these stand for."""
        if int8 and model.device.type != "cpu":
            raise UserError("int8 weights are for decoding on a CPU; leave int8 out")
        self.model = model
        self._cast_needed = int8 or any(p.dtype != _decoding_dtype(p, model.compute_dtype) for p in model.parameters())
        with torch.inference_mode(False):  # else they could not be renewed outside of it
            self._copy = self._cast(model.compute_dtype) if self._cast_needed else model
            self.packed = PackedWeights(self._copy, int8) if int8 or cpu_decoder.supported(model) else None
        if int8 and not cpu_decoder.supported(model):
            warn("int8 weights save nothing here: without a C compiler, or in this size, they decode as they were")
        self._versions = self._current_versions()
        self._lock = threading.Lock()

    def current(self) -> GPT:
        """A model with today's weights, the original where nothing needs casting; `packed` follows it."""
        with self._lock:
            if (versions := self._current_versions()) != self._versions:
                with torch.inference_mode(False), torch.no_grad():
                    if self._cast_needed:
                        for mine, theirs in zip(self._copy.parameters(), self.model.parameters()):
                            mine.copy_(theirs)
                    if self.packed:
                        self.packed.follow(self._copy)
                self._versions = versions
            return self._copy

    def _current_versions(self) -> list[tuple[int, int]]:
        """What changes with the weights: where they are and how often they were written to. (`p.data` does not count,
        nor do inference tensors: whoever writes to them needs a new engine.)"""
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.model.parameters()]

    def _cast(self, dtype: torch.dtype) -> GPT:
        with torch.device("meta"):
            copy = GPT(self.model.config, dtype)
        state = {name: p.detach().to(_decoding_dtype(p, dtype), copy=True) for name, p in self.model.named_parameters()}
        copy.load_state_dict(state, strict=True, assign=True)
        copy.cos, copy.sin = self.model.cos, self.model.sin
        return copy.requires_grad_(False).eval()


def _decoding_dtype(parameter: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """Scalars stay as they are: they multiply in fp32."""
    return dtype if parameter.dim() > 1 else parameter.dtype
