"""Scores of token sequences: the mean loss of their scored tokens, and whether greedy decoding would produce them.

GPTScorer batches sequences of similar length and computes a long shared prefix of an item's options once.
Shapes: B rows, T positions, C channels, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch

from nanochat.data.batches import by_length
from nanochat.evals.core_prompts import Example, Scored, common_prefix
from nanochat.gpt import GPT
from nanochat.inference.kv_cache import KVCache, prefill
from nanochat.loss_head import head_logits

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # with padding: fits a CPU's caches, fills a GPU
MIN_SAVED_TOKENS = 256  # per item; below that, recomputing the shared prefix is faster than a cache
CACHED_ROWS = 32  # options that continue cached prefixes together


class Score(NamedTuple):
    """A model's result on the scored tokens of one sequence."""

    mean_loss: float  # nats
    greedy: bool  # each of them has the highest logit


class Scorer(Protocol):
    """A model that scores examples: nanochat's (GPTScorer) or a Hugging Face one (HFModel)."""

    max_tokens: int

    def score(self, examples: Sequence[Example]) -> list[list[Score]]: ...


class GPTScorer:
    """Scores with a nanochat model, in eval mode. Only the scored tokens go through the output head."""

    def __init__(self, model: GPT, batch_tokens: int | None = None) -> None:
        self.model, self.batch_tokens = model, batch_tokens or BATCH_TOKENS.get(model.device.type, 8192)
        self.max_tokens = model.config.sequence_len

    @torch.no_grad()
    def score(self, examples: Sequence[Example]) -> list[list[Score]]:
        """Scores of each example's sequences, in order."""
        common = [shared_tokens(example) for example in examples]
        saved = [n * (len(example.sequences) - 1) for n, example in zip(common, examples)]
        whole = [i for i, n in enumerate(saved) if n < MIN_SAVED_TOKENS]
        cached = sorted(((common[i], i) for i, n in enumerate(saved) if n >= MIN_SAVED_TOKENS), reverse=True)
        scores: dict[int, list[Score]] = {}
        self.model.eval()
        scores.update(zip(whole, score_batches([examples[i] for i in whole], self.batch_tokens, self._score_whole)))
        for group in cache_groups(cached, examples):
            items = [(examples[i].sequences, n) for n, i in group]
            scores.update(zip([i for _, i in group], regroup(self._score_cached(items), [s for s, _ in items])))
        return [scores[i] for i in range(len(examples))]

    def _score_whole(self, sequences: Sequence[Scored]) -> list[Score]:
        """Score sequences of similar length, padded on the right, which causal attention ignores."""
        x = self.model.hidden(pad_rows([s.ids for s in sequences], self.model.device))  # (B, T, C)
        return self._read(x, sequences, [0] * len(sequences))

    def _score_cached(self, items: Sequence[tuple[Sequence[Scored], int]]) -> list[Score]:
        """Score the options of (sequences, shared tokens) items: each shared prefix once into a KV cache, then the
        rest of every option in one batch."""
        model = self.model
        # The last shared token is in the rest: its logits predict the first token after the prefix.
        options = [(s, common - 1) for sequences, common in items for s in sequences]
        rests = [s.ids[start:] for s, start in options]
        longest = max(start for _, start in options) + max(map(len, rests))
        like: dict[str, Any] = {"device": model.device, "dtype": model.compute_dtype}
        cache = KVCache(model.config, len(options), longest, num_rows=0, **like)
        for sequences, common in items:
            prefix = KVCache(model.config, 1, common, **like)
            prefill(model, prefix, pad_rows([sequences[0].ids[: common - 1]], model.device))
            for _ in sequences:
                cache.join(prefix)
        x = model.hidden(pad_rows(rests, model.device), cache)  # (B, T, C)
        return self._read(x, [s for s, _ in options], [start for _, start in options])

    def _read(self, x: torch.Tensor, sequences: Sequence[Scored], first: Sequence[int]) -> list[Score]:
        """Scores from hidden states (B, T, C), whose row i begins at position first[i] of its sequence."""
        places = [(row, t) for row, s in enumerate(sequences) for t in range(s.start, s.end)]
        row, t = torch.tensor(places, device=x.device).T
        at = t - 1 - torch.tensor(first, device=x.device)[row]
        logits = head_logits(x[row, at], self.model.head_weight, self.model.config.softcap)  # (scored tokens, V)
        return scores_of(logits, sequences)


def scores_of(logits: torch.Tensor, sequences: Sequence[Scored]) -> list[Score]:
    """Scores of sequences from the logits (N, V) of all their scored tokens, concatenated."""
    targets = torch.tensor([token for s in sequences for token in s.ids[s.start : s.end]], device=logits.device)
    losses = torch.logsumexp(logits, dim=-1) - logits.gather(1, targets[:, None]).squeeze(1)
    hits = logits.argmax(-1) == targets
    lengths = [s.end - s.start for s in sequences]
    parts = zip(losses.cpu().split(lengths), hits.cpu().split(lengths))
    return [Score(float(loss.double().mean()), bool(hit.all())) for loss, hit in parts]


def score_batches(
    examples: Sequence[Example], batch_tokens: int, score: Callable[[Sequence[Scored]], list[Score]]
) -> list[list[Score]]:
    """Scores of each example's sequences, in order; `score` gets batches of similar length."""
    sequences = [s for example in examples for s in example.sequences]
    scores: dict[int, Score] = {}
    for batch in by_length([len(s.ids) for s in sequences], batch_tokens):
        scores.update(zip(batch, score([sequences[i] for i in batch]), strict=True))
    return list(regroup([scores[i] for i in range(len(sequences))], [example.sequences for example in examples]))


def regroup(scores: Sequence[Score], items: Sequence[Sequence[Any]]) -> Iterator[list[Score]]:
    """Consecutive scores, as many per item as it has sequences."""
    remaining = iter(scores)
    return (list(islice(remaining, len(item))) for item in items)


def cache_groups(cached: Sequence[tuple[int, int]], examples: Sequence[Example]) -> list[Sequence[tuple[int, int]]]:
    """Consecutive (shared tokens, example) pairs in groups of one size, with at most CACHED_ROWS sequences each."""
    most = max((len(examples[i].sequences) for _, i in cached), default=1)
    size = max(1, CACHED_ROWS // most)
    return [cached[start : start + size] for start in range(0, len(cached), size)]


def shared_tokens(example: Example) -> int:
    """Length of the prefix that all sequences share and of which no token is scored, leaving each at least one more
    token; 0 for a single sequence."""
    if len(example.sequences) < 2:
        return 0
    common = common_prefix([s.ids for s in example.sequences])
    return min(common, *(s.start for s in example.sequences), *(len(s.ids) - 1 for s in example.sequences))


def is_right(example: Example, scores: Sequence[Score]) -> bool:
    """Whether the model answers the item correctly. The first of equal losses counts, as with torch.argmin."""
    if example.kind == "language_modeling":
        return scores[0].greedy
    return min(range(len(scores)), key=lambda i: scores[i].mean_loss) == example.gold


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """(B, longest) token ids, padded on the right with 0."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
