"""The running batch: sequences decoded together, one token each per step.

    submit -> waiting -> prefill -> running -> done
                 ^                     |
                 +------ calling <-----+     while a slow tool runs, the sequence holds no batch slot

A sequence's tokens depend on its prompt, settings, seed and sample index, not on the sequences beside it. (With the C
decoder on a CPU that holds to the last bit; elsewhere a matrix product of another batch size adds up in another order.)

Shapes: B running sequences, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait

import torch

from nanochat.common import warn
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.grammar import grammar_compiler
from nanochat.inference.kv_cache import KVCache, plain_step
from nanochat.inference.logit_rules import LogitRules
from nanochat.inference.prefill import Prefill, token_logprobs
from nanochat.inference.prefix_cache import PrefixCache
from nanochat.inference.request import Token, TokenLogprobs, TokenSequence
from nanochat.inference.sampling import draw_tokens
from nanochat.inference.tools import ToolSession, ToolTable, start_call
from nanochat.runtime import to_device

CALL_WAIT_SECONDS = 0.005  # for a slow tool, when nothing else is to be decoded


class RunningBatch:
    """Sequences decoded together. Submit at any time; call `step` until it is `idle`; `close` it if that ends early.
    Not thread-safe."""

    def __init__(
        self,
        weights: DecodingWeights,
        tools: ToolTable,
        end_tokens: set[int],
        max_sequences: int,
        max_tokens: int,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """Allocates a cache of `max_sequences` slots of `max_tokens` tokens, prompt included."""
        self.model = model = weights.current()
        self.tools, self.end_tokens = tools, end_tokens
        self.cache = KVCache(model.config, max_sequences, max_tokens, model.device, model.compute_dtype, num_rows=0)
        self.decoder = weights.decoder(self.cache)
        self.prefill = Prefill(weights, max_tokens, prefixes)
        self.waiting: deque[list[TokenSequence]] = deque()  # groups with the same context; the first is being prefilled
        self.running: list[TokenSequence] = []  # running[i] is in slot i of the cache
        self.calling: dict[TokenSequence, Future[str | None]] = {}  # sequences that wait for a slow tool
        self._tools_of: dict[TokenSequence, ToolSession] = {}  # of every sequence that is not done
        self._rules_of: dict[TokenSequence, LogitRules] = {}  # of those that have some

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting and not self.calling

    def submit(self, group: Sequence[TokenSequence]) -> None:
        """Queue sequences with the same prompt. It is prefilled once, with log probabilities if the first requests
        them. Raises UserError for a grammar that cannot be followed."""
        group = [sequence for sequence in group if not sequence.done]
        if group:
            self._rules_of |= {sequence: self._rules(sequence) for sequence in group if LogitRules.needed(sequence)}
            for sequence in group:
                self._tools_of[sequence] = session = ToolSession(self.tools)
                begun = sequence.request.answer_begun
                if begun and (call := session.catch_up(sequence.prompt[-begun:], sequence.room)):
                    self.calling[sequence] = start_call(call)
            if ready := [sequence for sequence in group if sequence not in self.calling]:
                self.waiting.append(ready)

    def _rules(self, sequence: TokenSequence) -> LogitRules:
        grammar = sequence.request.grammar
        guide = None if grammar is None else grammar_compiler(self.tools.tokenizer).guide(grammar)
        return LogitRules(sequence, self.end_tokens, guide, self.model.device)

    def cancel(self, sequence: TokenSequence) -> None:
        """Remove a sequence, waiting, running or calling; a call under way is ended."""
        sequence.done = True
        if future := self.calling.pop(sequence, None):
            future.cancel()  # if it has not begun; closing the session ends one that has
        self._forget(sequence)
        first = self.waiting[0] if self.waiting else []
        groups = ([s for s in group if not s.done] for group in self.waiting)
        self.waiting = deque(group for group in groups if group)
        if first and all(s.done for s in first):
            self.prefill.reset()
        self._free_slots()

    def close(self) -> None:
        """End the tool calls of all sequences. The batch may be in any state, and is not used again."""
        for future in self.calling.values():
            future.cancel()
        for session in self._tools_of.values():
            session.close()

    @torch.inference_mode()
    def step(self, prefill_chunks: int | None = None) -> list[Token]:
        """Decode one token of each running sequence, and the first of each whose prefill is complete.

        At most `prefill_chunks` chunks of waiting prompts are prefilled; None: until every slot is taken.
        """
        self._resume_called()
        tokens = self._append_next(list(self.running), self.next_logits()) if self.running else []
        chunks = 0
        while self.waiting and len(self.running) < self.cache.batch_size:
            if self.prefill.logits is None:
                if chunks == prefill_chunks:
                    break
                self.prefill.run_chunk(self.waiting[0][0])
                chunks += 1
            if self.prefill.logits is not None:
                tokens += self._admit(self.prefill.logits)
        return tokens

    def next_logits(self) -> torch.Tensor:
        """Run the last token of each running sequence through the model -> logits (B, V) of the next."""
        last = [sequence.tokens[-1] for sequence in self.running]
        return self.decoder(last) if self.decoder else plain_step(self.model, self.cache, last)

    def _admit(self, logits: torch.Tensor) -> list[Token]:
        """Move sequences of the prefilled group into free slots; their first tokens. logits (1, V) after the prompt."""
        group = self.waiting[0]
        room = self.cache.batch_size - len(self.running)
        joining, self.waiting[0] = group[:room], group[room:]
        for _ in joining:
            self.cache.join(self.prefill.cache)
        self.running += joining
        if not self.waiting[0]:
            self.waiting.popleft()
            self.prefill.reset()
        return self._append_next(joining, logits.expand(len(joining), -1))

    def _append_next(self, sequences: list[TokenSequence], logits: torch.Tensor) -> list[Token]:
        """Append to each sequence its next token, forced or drawn from logits (B, V), and free the slots of finished
        sequences."""
        forced = [self._tools_of[sequence].forced for sequence in sequences]
        free = [i for i, queue in enumerate(forced) if not queue]
        if len(free) < len(sequences):
            logits = logits[to_device(torch.tensor(free, dtype=torch.long), logits.device)]
        drawing = [sequences[i] for i in free]
        changed = self._apply_rules(drawing, logits)
        ids = draw_tokens(changed, [s.request.sampling for s in drawing], [s.rng for s in drawing])
        logprobs = _requested_logprobs(drawing, ids, logits)
        drawn = iter([Token(s, id, 1, logprob) for s, id, logprob in zip(drawing, ids, logprobs)])
        tokens = [Token(s, queue.popleft(), 0) if queue else next(drawn) for s, queue in zip(sequences, forced)]
        for token in tokens:
            self._append(token)
        self._free_slots()
        return tokens

    def _apply_rules(self, sequences: list[TokenSequence], logits: torch.Tensor) -> torch.Tensor:
        """The logits (B, V) to draw from: a changed copy if any of the sequences has rules."""
        if not self._rules_of:
            return logits
        rules = [(row, self._rules_of[s]) for row, s in enumerate(sequences) if s in self._rules_of]
        if rules:
            logits = logits.clone()
            for row, each in rules:
                each.apply(logits[row])
        return logits

    def _append(self, token: Token) -> None:
        sequence = token.sequence
        sequence.logprob += token.logprobs.logprob if token.logprobs else 0.0
        if token.mask and (token.id in self.end_tokens or token.id in sequence.request.stop_token_ids):
            sequence.end, sequence.done = token.id, True
            return
        sequence.tokens.append(token.id)
        sequence.mask.append(token.mask)
        sequence.done = sequence.room <= 0
        if (rules := self._rules_of.get(sequence)) and not sequence.done and not rules.advance(token.id):
            warn("an answer was ended early: its grammar became too complex to follow")
            sequence.done = True
        call = self._tools_of[sequence].observe(token.id, sequence.room) if token.mask else None
        if call and not sequence.done:
            self.calling[sequence] = start_call(call)

    def _resume_called(self) -> None:
        """Queue the sequences whose slow call has ended, before all others; wait a moment if there are none."""
        if self.calling and not self.running and not self.waiting:
            wait(self.calling.values(), timeout=CALL_WAIT_SECONDS, return_when="FIRST_COMPLETED")
        for sequence in [sequence for sequence, future in self.calling.items() if future.done()]:
            result = self.calling.pop(sequence).result()
            if result is not None:
                self._tools_of[sequence].force(result, sequence.room)
            self.waiting.insert(1 if self.prefill.started else 0, [sequence])

    def _free_slots(self) -> None:
        """Take the sequences that are done or calling out of the cache."""
        for i in reversed(range(len(self.running))):
            sequence = self.running[i]
            if sequence.done:
                self._forget(sequence)
            if sequence.done or sequence in self.calling:
                self.cache.leave(i)  # moves the last slot here
                self.running[i] = self.running[-1]
                self.running.pop()

    def _forget(self, sequence: TokenSequence) -> None:
        self._rules_of.pop(sequence, None)
        if session := self._tools_of.pop(sequence, None):
            session.close()


def _requested_logprobs(
    sequences: list[TokenSequence], ids: list[int], logits: torch.Tensor
) -> list[TokenLogprobs | None]:
    """Log probabilities of the drawn `ids`, None for sequences that do not request them. logits (B, V)."""
    found: list[TokenLogprobs | None] = [None] * len(sequences)
    requesting = [i for i, s in enumerate(sequences) if s.request.top_logprobs is not None]
    if requesting:
        max_top = max(sequences[i].request.top_logprobs or 0 for i in requesting)
        rows = to_device(torch.tensor(requesting), logits.device)
        for i, logprobs in zip(requesting, token_logprobs(logits[rows], [ids[i] for i in requesting], max_top)):
            found[i] = TokenLogprobs(logprobs.logprob, logprobs.top[: sequences[i].request.top_logprobs])
    return found
