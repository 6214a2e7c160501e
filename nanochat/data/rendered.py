"""Conversations as token ids that fit a row; those that do not fit are cut to whole turns, or left out with a reason.

One int32 array holds ids and mask: `id` where the assistant must produce the token, `~id` elsewhere.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np

from nanochat.common import UserError
from nanochat.conversation import Conversation, Tokenizer, render, truncate_turns

CACHE_TOKENS = 32 * 2**20  # rendered conversations kept in memory, 4 bytes each
CACHE_ENTRY_TOKENS = 64  # overhead of an entry of the cache

# What becomes of a conversation. The last two are left out.
WHOLE, TRUNCATED, TOO_LONG, NO_ANSWER = "whole", "truncated", "too long", "no answer"
USES = (WHOLE, TRUNCATED, TOO_LONG, NO_ANSWER)


class Dataset(Protocol):
    """The part of a task that loading needs."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Rendered(NamedTuple):
    """A conversation for a row. `use` is one of USES; `ids`, (T,) int32 with the mask in the sign, None if left out."""

    ids: np.ndarray | None
    use: str


def render_row(tokenizer: Tokenizer, conversation: Conversation, row_tokens: int) -> Rendered:
    """Render a conversation, without the last turns if it has more than `row_tokens` tokens.

    NO_ANSWER: it has no answer to train on. TOO_LONG: it has, but the turns that fit have none. Raises ValueError if it
    is not a conversation.
    """
    ids, mask = render(tokenizer, conversation)
    use = WHOLE
    if not any(mask):
        return Rendered(None, NO_ANSWER)
    if len(ids) > row_tokens:
        shorter = truncate_turns(tokenizer, conversation, row_tokens)
        ids, mask = render(tokenizer, shorter) if shorter else ([], [])
        if not any(mask):
            return Rendered(None, TOO_LONG)
        use = TRUNCATED
    signed = np.array(ids, np.int32)
    np.invert(signed, out=signed, where=np.array(mask) == 0)
    return Rendered(signed, use)


class RenderedConversations:
    """The conversations of a data set, rendered when first needed.

    The first CACHE_TOKENS are kept, the others rendered again in every epoch.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, row_tokens: int) -> None:
        self.dataset, self.tokenizer, self.row_tokens = dataset, tokenizer, row_tokens
        self._cache: dict[int, Rendered] = {}
        self._cached_tokens = 0

    def get(self, index: int) -> Rendered:
        """Conversation `index`. Raises UserError, naming it, if it is not valid."""
        if index in self._cache:
            return self._cache[index]
        try:
            rendered = render_row(self.tokenizer, self.dataset[index], self.row_tokens)
        except ValueError as error:
            raise UserError(f"conversation {index + 1} of {len(self.dataset)}: {error}") from error
        size = CACHE_ENTRY_TOKENS + (0 if rendered.ids is None else len(rendered.ids))
        if self._cached_tokens + size <= CACHE_TOKENS:
            self._cache[index] = rendered
            self._cached_tokens += size
        return rendered
