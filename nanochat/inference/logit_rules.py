"""Changes to the logits of one sequence before a token is drawn: what may not come, biases, penalties.

Definitions and order are vLLM's: forbidden tokens, logit_bias, then repetition, frequency and presence penalties.
Sequences without any of these have no LogitRules, and nothing is done for them. Log probabilities are those of the
model, from the logits before these changes.

Shapes: V vocabulary.
"""

from collections.abc import Collection

import torch

from nanochat.inference.grammar import Guide
from nanochat.inference.request import TokenSequence
from nanochat.inference.sampling import LOGIT_FIELDS


class LogitRules:
    """The rules of one sequence, and how often each token is in it."""

    def __init__(self, sequence: TokenSequence, end_tokens: Collection[int], guide: Guide | None) -> None:
        """`end_tokens`: of the model. `guide`: at the beginning of the answer."""
        self.sequence, self.guide = sequence, guide
        self._end_tokens = list(end_tokens)
        self._all_ends = [*end_tokens, *sequence.request.stop_token_ids]
        self._counts: torch.Tensor | None = None  # (V) of each token in the answer
        self._counted = 0  # tokens of the answer
        self._in_prompt: torch.Tensor | None = None  # (V) bool

    @staticmethod
    def needed(sequence: TokenSequence) -> bool:
        request = sequence.request
        changed = not request.sampling.changed_fields.isdisjoint(LOGIT_FIELDS)
        return changed or request.grammar is not None or request.min_tokens > 0 or request.ignore_eos

    def apply(self, logits: torch.Tensor) -> None:
        """Change logits (V) in place."""
        request, sampling = self.sequence.request, self.sequence.request.sampling
        if self.guide:
            bias = self.guide.bias.to(logits.device)
            logits[: len(bias)] += bias
            logits[len(bias) :] = -torch.inf  # a model may have more ids than the tokenizer
        if len(self.sequence.tokens) < request.min_tokens:
            logits[self._all_ends] = -torch.inf
        elif request.ignore_eos:
            logits[self._end_tokens] = -torch.inf
        if sampling.logit_bias:
            ids, biases = zip(*sampling.logit_bias)
            logits[list(ids)] += torch.tensor(biases, device=logits.device)
        if sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty:
            self._penalize(logits)

    def _penalize(self, logits: torch.Tensor) -> None:
        sampling, counts = self.sequence.request.sampling, self._count(logits)
        if sampling.repetition_penalty != 1:
            if self._in_prompt is None:
                self._in_prompt = torch.zeros_like(logits, dtype=torch.bool)
                self._in_prompt[self.sequence.prompt] = True
            factor = sampling.repetition_penalty
            penalized = torch.where(logits > 0, logits / factor, logits * factor)
            logits.copy_(torch.where(self._in_prompt | (counts > 0), penalized, logits))
        logits -= sampling.frequency_penalty * counts
        logits -= sampling.presence_penalty * (counts > 0)

    def _count(self, logits: torch.Tensor) -> torch.Tensor:
        """How often each token is in the answer (V)."""
        if self._counts is None:
            self._counts = torch.zeros_like(logits)
        new = self.sequence.tokens[self._counted :]
        self._counted += len(new)
        ids = torch.tensor(new, dtype=torch.long, device=logits.device)
        return self._counts.index_add_(0, ids, torch.ones(len(new), device=logits.device))

    def advance(self, token: int) -> bool:
        """Follow a token of the answer. False if the grammar cannot be followed on."""
        return self.guide is None or self.guide.advance(token)
