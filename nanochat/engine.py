"""Inference: prompts in, tokens out. One running batch (decoding.py) under every way of generating text.

Engine      a model ready to decode: generate and generate_batch for samples of one prompt, complete and
            generate_many for many prompts
TextStream  tokens to text, piece by piece, never cutting a character in two; AnswerStream, the same with
            tool calls told apart
"""

import codecs
import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nanochat.common import SPECIAL_TOKENS, warn
from nanochat.conversation import PART_TOKENS
from nanochat.gpt import GPT
from nanochat.inference.decoding import DecodingWeights, RunningBatch, Token, Tokenizer, TokenSequence
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.sampling import SamplingParams
from nanochat.inference.tools import DEFAULT_TOOLS, Tool, ToolUse

__all__ = ["AnswerStream", "Engine", "KVCache", "TextStream", "TokenSequence"]


class Engine:
    """A model and its tokenizer, ready to generate. Calls from several threads do not disturb each other."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, int8: bool = False, tools: Sequence[Tool] = DEFAULT_TOOLS
    ) -> None:
        """`int8`: decode with weights of eight bits (packed_weights.py), on a CPU."""
        self.model, self.tokenizer = model, tokenizer
        self.tools = ToolUse(tokenizer, tools)
        self.end_tokens = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.encode_special("<|bos|>")}
        self._weights = DecodingWeights(model, int8)

    @property
    def max_context(self) -> int:
        """Tokens a sequence may have, prompt included."""
        return self.model.config.sequence_len

    def generate(
        self,
        tokens: list[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        top_p: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Continue one prompt `num_samples` times; yields per step (a token per sample, a mask per sample).

        Mask 0: a tool forced the token. A sample ends with <|assistant_end|> or <|bos|>, which is yielded; until
        the others are done too its column shows <|assistant_end|> with mask 0. Every sample stops after
        `max_tokens` tokens (None: no limit) and where prompt and answer fill the model's context. `should_stop` is
        asked before each step, and while a tool keeps the answer waiting; where it says so, all end.
        Raises ValueError, before the first step, for an empty or overlong prompt or a value that is not allowed.
        """
        if not tokens:
            raise ValueError("the prompt is empty; start it with <|bos|>")
        if len(tokens) > self.max_context:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the model's context {self.max_context}; shorten it")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        rows = self._rows([tokens] * num_samples, max_tokens, SamplingParams(temperature, top_k, top_p), seed)
        return self._columns(rows, should_stop)

    def _columns(
        self, rows: list[TokenSequence], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[list[int], list[int]]]:
        filler = self.tokenizer.encode_special("<|assistant_end|>")
        batch = self._batch(rows, len(rows))
        batch.submit(rows)
        drawn: list[deque[Token]] = [deque() for _ in rows]  # a row that waits for a tool keeps the others' waiting
        with ending(batch, rows):
            while (not batch.idle or any(drawn)) and not should_stop():
                for token in batch.step():
                    drawn[token.row.index].append(token)
                while any(drawn) and all(tokens or row.done for tokens, row in zip(drawn, rows)):
                    got = [tokens.popleft() if tokens else None for tokens in drawn]
                    yield (
                        [filler if token is None else token.id for token in got],
                        [0 if token is None else token.mask for token in got],
                    )

    def generate_batch(
        self, tokens: list[int], num_samples: int = 1, **kwargs: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Continue one prompt `num_samples` times: (sequences with the prompt, masks of the same lengths).

        The token that ends a sample is left out; the prompt's mask is 0. Arguments as for generate.
        """
        sequences, masks = [list(tokens) for _ in range(num_samples)], [[0] * len(tokens) for _ in range(num_samples)]
        running = set(range(num_samples))
        for column, column_mask in self.generate(tokens, num_samples, **kwargs):
            running -= {i for i in running if column[i] in self.end_tokens}
            for i in running:
                sequences[i].append(column[i])
                masks[i].append(column_mask[i])
        return sequences, masks

    def complete(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        top_p: float | None = None,
        batch_size: int = 32,
        indices: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> list[TokenSequence]:
        """Continue many prompts, at most `batch_size` at a time; a finished row makes place for the next prompt.

        Returns a TokenSequence per prompt, in order: tokens, mask, and the token it ended with. A prompt is sample i of
        `seed`, i being its place in the list, or as `indices` has it; neighbours that are equal are prefilled once.
        `logprobs`: sum up the log probability of what the model chose, in TokenSequence.logprob. A prompt that leaves
        no room in the context gets an empty answer, with a warning. Raises ValueError for an empty prompt.
        """
        if not all(prompts):
            raise ValueError(f"prompt {[bool(p) for p in prompts].index(False)} is empty; start it with <|bos|>")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        rows = self._rows(prompts, max_tokens, SamplingParams(temperature, top_k, top_p), seed, indices)
        for row in rows if logprobs else ():
            row.top_logprobs = 0
        if overlong := sum(len(prompt) >= self.max_context for prompt in prompts):
            warn(f"{overlong} of {len(prompts)} prompts leave no room in the context of {self.max_context} tokens")
        if all(row.done for row in rows):
            return rows
        batch = self._batch(rows, batch_size)
        for _, group in itertools.groupby(rows, key=lambda row: row.prompt):
            batch.submit(list(group))
        with ending(batch, rows):
            while not batch.idle:
                batch.step()
        return rows

    def generate_many(self, prompts: Sequence[list[int]], **kwargs: Any) -> list[list[int]]:
        """What complete() answers to each prompt, as token ids without the one that ends it."""
        return [row.tokens for row in self.complete(prompts, **kwargs)]

    def _rows(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        sampling: SamplingParams,
        seed: int,
        indices: Sequence[int] | None = None,
    ) -> list[TokenSequence]:
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"max_tokens must be 0 or more, got {max_tokens}")
        limit = self.max_context if max_tokens is None else max_tokens
        return [
            TokenSequence(list(prompt), min(limit, self.max_context - len(prompt)), sampling, seed, index)
            for index, prompt in zip(range(len(prompts)) if indices is None else indices, prompts, strict=True)
        ]

    def _batch(self, rows: list[TokenSequence], batch_size: int) -> RunningBatch:
        longest = max((len(row.prompt) + row.max_tokens for row in rows if not row.done), default=1)
        return RunningBatch(
            self._weights.current(),
            self.tools,
            self.end_tokens,
            min(batch_size, len(rows)),
            longest,
            packed=self._weights.packed,
        )


@contextlib.contextmanager
def ending(batch: RunningBatch, rows: Sequence[TokenSequence]) -> Iterator[None]:
    """Whatever ends the loop inside, no tool of the rows is left open."""
    try:
        yield
    finally:
        for row in rows:
            if not row.done:
                batch.cancel(row)


class TextStream:
    """Tokens to text as they come. Bytes that begin a character wait for the rest of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that `token` completes, possibly none."""
        return self._decoder.decode(self.tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed. The stream may then start anew."""
        return self._decoder.decode(b"", final=True)


class AnswerStream:
    """An answer's tokens to (kind, text) pieces as they come: conversation.parse_answer, streamed.

    The kinds are those of an assistant's parts: text, python, python_output. Other special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = tokenizer.encode_special
        self._special = {special(name) for name in SPECIAL_TOKENS}
        self._kinds = {special(opening): kind for kind, (opening, _, _) in PART_TOKENS.items() if opening}
        self._kinds |= {special(closing): "text" for _, closing, _ in PART_TOKENS.values() if closing}
        self._kind, self._text = "text", TextStream(tokenizer)

    def feed(self, token: int) -> list[tuple[str, str]]:
        """The pieces that `token` completes: none, one, or (where a part ends inside a character) U+FFFD."""
        if token in self._kinds:
            pieces = self.finish()
            self._kind = self._kinds[token]
            return pieces
        text = "" if token in self._special else self._text.feed(token)
        return [(self._kind, text)] if text else []

    def finish(self) -> list[tuple[str, str]]:
        """What is left of the current part."""
        text = self._text.finish()
        return [(self._kind, text)] if text else []
