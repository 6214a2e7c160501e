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
from nanochat.runtime import to_device


class LogitRules:
    """The rules of one sequence, and how often each token is in it."""

    def __init__(
        self, sequence: TokenSequence, end_tokens: Collection[int], guide: Guide | None, device: torch.device
    ) -> None:
        """`end_tokens`: of the model. `guide`: at the beginning of the answer. `device`: of the logits."""
        self.sequence, self.guide, self.device = sequence, guide, device
        self._end_tokens = self._ids(end_tokens)
        self._all_ends = self._ids([*end_tokens, *sequence.request.stop_token_ids])
        tokens, biases = zip(*sequence.request.sampling.logit_bias or [(0, 0.0)])
        self._biased, self._biases = self._ids(tokens), to_device(torch.tensor(biases), device)
        self._counts: torch.Tensor | None = None  # (V) of each token in the answer
        self._counted = 0  # tokens of the sequence
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
            bias = to_device(self.guide.bias, self.device)
            logits[: len(bias)] += bias
            logits[len(bias) :] = -torch.inf  # a model may have more ids than the tokenizer
        if request.answer_begun + len(self.sequence.tokens) < request.min_tokens:
            logits.index_fill_(0, self._all_ends, -torch.inf)
        elif request.ignore_eos:
            logits.index_fill_(0, self._end_tokens, -torch.inf)
        if sampling.logit_bias:
            logits[self._biased] += self._biases
        if sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty:
            self._penalize(logits)

    def _penalize(self, logits: torch.Tensor) -> None:
        sampling, counts = self.sequence.request.sampling, self._count(logits)
        if sampling.repetition_penalty != 1:
            if self._in_prompt is None:
                self._in_prompt = torch.zeros_like(logits, dtype=torch.bool)
                self._in_prompt[self._ids(self.sequence.prompt)] = True
            factor = sampling.repetition_penalty
            penalized = torch.where(logits > 0, logits / factor, logits * factor)
            logits.copy_(torch.where(self._in_prompt | (counts > 0), penalized, logits))
        logits -= sampling.frequency_penalty * counts
        logits -= sampling.presence_penalty * (counts > 0)

    def _count(self, logits: torch.Tensor) -> torch.Tensor:
        """How often each token is in the answer (V), its beginning in the prompt included."""
        if self._counts is None:
            prompt, begun = self.sequence.request.prompt, self.sequence.request.answer_begun
            self._counts = self._ids(prompt[len(prompt) - begun :]).bincount(minlength=len(logits)).to(logits.dtype)
        new = self.sequence.tokens[self._counted :]
        self._counted += len(new)
        return self._counts.index_add_(0, self._ids(new), torch.ones(len(new), device=self.device))

    def _ids(self, tokens: Collection[int]) -> torch.Tensor:
        return to_device(torch.tensor(list(tokens), dtype=torch.long), self.device)

    def advance(self, token: int) -> bool:
        """Follow a token of the answer. False if the grammar cannot be followed on."""
        return self.guide is None or self.guide.advance(token)
