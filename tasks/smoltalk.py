"""SmolTalk: general conversations for finetuning (the smol-smoltalk selection for small models)."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanochat.common import UserError, warn
from tasks.answers import Conversation
from tasks.common import Task, load_hub_rows

SPLITS = ("train", "test")
ROLES = ("system", "user", "assistant")


class SmolTalk(Task):
    """HuggingFaceTB/smol-smoltalk. Malformed conversations are skipped; `skipped` counts them."""

    def __init__(self, split: str = "train", *, sample: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        if split not in SPLITS:
            raise UserError(f"SmolTalk has the splits {', '.join(SPLITS)}, not {split!r}")
        self.split = split
        self.rows = load_hub_rows("HuggingFaceTB/smol-smoltalk", "default", split, sample=sample).require("messages")
        self.good = np.flatnonzero(well_formed(self.rows.table["messages"]))
        self.skipped = len(self.rows) - len(self.good)
        if not len(self.good):
            raise UserError(f"SmolTalk ({self.rows.origin}) holds no well-formed conversation; fetch it again")
        if self.skipped:
            warn(f"SmolTalk: {self.skipped} of {len(self.rows)} conversations are malformed and left out")

    def num_examples(self) -> int:
        return len(self.good)

    def get_example(self, index: int) -> Conversation:
        messages = self.rows[int(self.good[index])]["messages"]
        return {"messages": [{"role": message["role"], "content": message["content"]} for message in messages]}


def well_formed(messages: pa.ChunkedArray) -> np.ndarray:
    """For each conversation, bool: an optional system message, then user and assistant turns in
    alternation, ending with the assistant, none of them empty. Computed on columns: there are 460,000.
    """
    return np.concatenate([well_formed_chunk(chunk) for chunk in messages.chunks] or [np.zeros(0, dtype=bool)])


def well_formed_chunk(chunk: pa.ListArray) -> np.ndarray:
    lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = chunk.flatten()
    role = pc.fill_null(pc.index_in(flat.field("role"), pa.array(ROLES)), -1).to_numpy(zero_copy_only=False)
    said = pc.fill_null(pc.utf8_length(pc.utf8_trim_whitespace(flat.field("content"))), 0)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    # An optional system message shifts the turns by one.
    systems = np.bincount(owner[(place == 0) & (role == 0)], minlength=len(lengths))
    expected = np.where((place == 0) & (role == 0), 0, 1 + (place - systems[owner]) % 2)
    right = (role == expected) & (said.to_numpy(zero_copy_only=False) > 0)
    wrong = np.bincount(owner[~right], minlength=len(lengths))
    turns = lengths - systems
    return (wrong == 0) & (turns >= 2) & (turns % 2 == 0)
