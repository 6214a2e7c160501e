"""Inference: prompts in, tokens out, from one running batch (inference/decoding.py).

Engine  a model ready to generate: generate and generate_batch for samples of one prompt, stream and complete for
        GenerationRequests
Chat    a conversation with a model, in memory
"""

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from nanochat.common import is_out_of_memory, warn
from nanochat.conversation import Message, Tokenizer, end_tokens, parse_answer
from nanochat.gpt import GPT
from nanochat.inference.answer_text import AnswerStream
from nanochat.inference.calculator import use_calculator
from nanochat.inference.chat_prompt import fit_prompt
from nanochat.inference.decoding import RunningBatch
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.request import GenerationRequest, Token, TokenSequence
from nanochat.inference.sampling import SamplingParams
from nanochat.inference.tools import DEFAULT_TOOLS, Tool, ToolTable

__all__ = ["AnswerStream", "Chat", "Engine", "KVCache", "use_calculator"]

Column = tuple[list[int], list[int]]  # a token per sample, and a mask per sample


class Engine:
    """A model and its tokenizer, ready to generate. Thread-safe."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, int8: bool = False, tools: Sequence[Tool] = DEFAULT_TOOLS
    ) -> None:
        """`int8`: decode with int8 weights (inference/packed_weights.py), on a CPU."""
        self.model, self.tokenizer = model, tokenizer
        self.tools = ToolTable(tokenizer, tools)
        self.end_tokens = end_tokens(tokenizer)
        self.weights = DecodingWeights(model, int8)
        self.max_batch = sys.maxsize  # sequences that memory is large enough for, as far as `complete` has found out

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
    ) -> Iterator[Column]:
        """Continue one prompt `num_samples` times; yields as stream does. max_tokens None: up to the context's end."""
        limit = self.max_context if max_tokens is None else max_tokens
        sampling = SamplingParams(temperature, top_k, top_p, seed)
        return self.stream(GenerationRequest(tokens, limit, sampling, num_samples), should_stop)

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

    def stream(self, request: GenerationRequest, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Column]:
        """Decode a request; yields per step (a token per sample, a mask per sample). Mask 0: a tool forced the token.

        A sample ends with <|assistant_end|> or <|bos|>, which is yielded; until the others are done its column has
        <|assistant_end|> with mask 0. `should_stop` is called before each step and while a tool delays the answer;
        True ends all samples. Raises ValueError, before the first step, if the prompt is longer than the context.
        """
        return self._columns(request.fit(self.max_context).sequences(), should_stop)

    def _columns(self, sequences: list[TokenSequence], should_stop: Callable[[], bool]) -> Iterator[Column]:
        filler = self.tokenizer.encode_special("<|assistant_end|>")
        drawn: dict[TokenSequence, deque[Token]] = {s: deque() for s in sequences}  # one in a tool call delays the rest
        with self._batch(sequences, len(sequences)) as batch:
            batch.submit(sequences)
            while (not batch.idle or any(drawn.values())) and not should_stop():
                for token in batch.step():
                    drawn[token.sequence].append(token)
                while any(drawn.values()) and all(tokens or s.done for s, tokens in drawn.items()):
                    column = [tokens.popleft() if tokens else None for tokens in drawn.values()]
                    yield [t.id if t else filler for t in column], [t.mask if t else 0 for t in column]

    def complete(self, requests: Sequence[GenerationRequest], batch_size: int = 32) -> list[TokenSequence]:
        """Decode many requests, at most `batch_size` sequences at a time. Returns all samples of the first request,
        then of the second and so on.

        Where memory is too small for so many, with a warning, from then on fewer: that changes no answer. A prompt that
        fills the context, or more, gets empty answers, with a warning.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if overlong := sum(len(request.prompt) >= self.max_context for request in requests):
            warn(f"{overlong} of {len(requests)} prompts leave no room in the context of {self.max_context} tokens")
        # A longer prompt than the context is fitted to its own length: no token may follow.
        fitted = [request.fit(max(self.max_context, len(request.prompt))) for request in requests]
        while True:
            groups = [request.sequences() for request in fitted]
            sequences = [sequence for group in groups for sequence in group]
            size = min(batch_size, self.max_batch, max(1, len(sequences)))
            try:
                self._decode(groups, sequences, size)
                return sequences
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
            self.max_batch = size // 2
            warn(f"not enough memory to decode {size} sequences at a time; from now on {self.max_batch}")

    def _decode(self, groups: list[list[TokenSequence]], sequences: list[TokenSequence], size: int) -> None:
        """Decode all sequences of the groups, `size` at a time."""
        if all(sequence.done for sequence in sequences):
            return
        with self._batch(sequences, size) as batch:
            for group in groups:
                batch.submit(group)
            while not batch.idle:
                batch.step()

    @contextlib.contextmanager
    def _batch(self, sequences: list[TokenSequence], batch_size: int) -> Iterator[RunningBatch]:
        """A batch for these sequences. No tool call outlives the block."""
        longest = max((len(s.prompt) + s.room for s in sequences if not s.done), default=1)
        size = min(batch_size, len(sequences))
        batch = RunningBatch(self.weights, self.tools, self.end_tokens, size, longest)
        try:
            yield batch
        finally:
            batch.close()


class Chat:
    """A conversation with a model. `stream` an answer, then `remember` as much of it as was shown."""

    def __init__(
        self, engine: Engine, sampling: SamplingParams, max_tokens: int | None = None, chat_model: bool = True
    ) -> None:
        """`max_tokens` of an answer; None: what the prompt leaves of the context. `chat_model`: finetuned to answer; a
        base model continues the text instead."""
        self.engine, self.sampling, self.chat_model = engine, sampling, chat_model
        self.max_tokens = engine.max_context if max_tokens is None else max_tokens
        self.system = ""
        self.clear()

    def clear(self, system: str | None = None) -> None:
        """Start a new conversation; `system`: with another system message, empty for none."""
        self.system = self.system if system is None else system
        self.messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self.answer: list[int] = []
        self.turn = self.dropped = 0

    def stream(self, text: str, should_stop: Callable[[], bool] = lambda: False) -> Iterator[tuple[str, str]]:
        """The answer to `text` as (kind, text) pieces (AnswerStream), until `should_stop` returns True.

        Raises UserError, and leaves `text` out of the conversation, if it is too long for the model.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, kept = fit_prompt(self.engine.tokenizer, messages, self.engine.max_context, self.chat_model)
        if self.chat_model:
            self.messages, self.dropped = kept, len(messages) - len(kept)
        sampling = replace(self.sampling, seed=self.sampling.seed + self.turn)
        self.turn, self.answer = self.turn + 1, []
        return self._pieces(GenerationRequest(prompt, self.max_tokens, sampling), should_stop)

    @property
    def cut(self) -> bool:
        """Whether the answer has ended at its limit of tokens, or was stopped, before the model ended it."""
        return bool(self.answer) and self.answer[-1] not in self.engine.end_tokens

    def _pieces(self, request: GenerationRequest, should_stop: Callable[[], bool]) -> Iterator[tuple[str, str]]:
        text = AnswerStream(self.engine.tokenizer)
        for (token,), _ in self.engine.stream(request, should_stop):
            self.answer.append(token)
            yield from text.feed(token)
        yield from text.finish()

    def remember(self) -> None:
        """Keep the answer as the assistant's turn; a question without any answer is removed."""
        if not self.chat_model or not self.messages or self.messages[-1]["role"] != "user":
            return
        if self.answer:
            content = parse_answer(self.engine.tokenizer, self.answer)
            self.messages.append({"role": "assistant", "content": content})
        else:
            self.messages.pop()
