"""SmolTalk: general conversations for finetuning (the smol-smoltalk selection for small models)."""

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanochat.common import UserError, warn
from nanochat.conversation import Conversation
from tasks.hub import HubTask

ROLES = ("system", "user", "assistant")


class SmolTalk(HubTask):
    """HuggingFaceTB/smol-smoltalk. Malformed conversations are skipped; `skipped` counts them."""

    repo = "HuggingFaceTB/smol-smoltalk"
    splits: ClassVar = {"default": ("train", "test")}
    columns = ("messages",)

    def __init__(self, split: str = "train", **kwargs: Any):
        super().__init__("default", split, **kwargs)
        self.well_formed = np.flatnonzero(well_formed(self.rows.table["messages"]))
        self.skipped = len(self.rows) - len(self.well_formed)
        if not len(self.well_formed):
            raise UserError(f"SmolTalk ({self.rows.origin}) holds no well-formed conversation; download it again")
        if self.skipped:
            warn(f"SmolTalk: {self.skipped} of {len(self.rows)} conversations are malformed and left out")

    def num_examples(self) -> int:
        return len(self.well_formed)

    def get_example(self, index: int) -> Conversation:
        messages = self.rows[int(self.well_formed[index])]["messages"]
        return {"messages": [{"role": message["role"], "content": message["content"]} for message in messages]}


def well_formed(messages: pa.ChunkedArray) -> np.ndarray:
    """(N,) bool, per conversation: an optional system message, then alternating user and assistant turns, ending with
    the assistant, none empty. Computed on columns, because there are 460,000 conversations.
    """
    return np.concatenate([well_formed_chunk(chunk) for chunk in messages.chunks] or [np.zeros(0, dtype=bool)])


def well_formed_chunk(chunk: pa.ListArray) -> np.ndarray:
    lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = chunk.flatten()
    role = pc.fill_null(pc.index_in(flat.field("role"), pa.array(ROLES)), -1).to_numpy(zero_copy_only=False)
    text_length = pc.fill_null(pc.utf8_length(pc.utf8_trim_whitespace(flat.field("content"))), 0)
    owner = np.repeat(np.arange(len(lengths)), lengths)  # of each message, its conversation
    place = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    # An optional system message shifts the turns by one.
    systems = np.bincount(owner[(place == 0) & (role == 0)], minlength=len(lengths))
    expected = np.where((place == 0) & (role == 0), 0, 1 + (place - systems[owner]) % 2)
    valid = (role == expected) & (text_length.to_numpy(zero_copy_only=False) > 0)
    invalid = np.bincount(owner[~valid], minlength=len(lengths))
    turns = lengths - systems
    return (invalid == 0) & (turns >= 2) & (turns % 2 == 0)
