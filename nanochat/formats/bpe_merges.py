"""A vocabulary in the form of Hugging Face and GGUF: tokens as printable text, and the list of merges.

tiktoken needs no merges: it joins the two neighbours whose bytes together are the token of the lowest rank. Within one
token that leaves at most one pair to be joined last, so a list of one pair a token, in the order of ranks, gives the
same ids (`last_merge` says why).
"""

import heapq
from collections.abc import Mapping, Sequence

MAX_TOKEN_BYTES, MAX_VOCAB_BYTES = 2**14, 2**23  # a token, and all tokens, of which merges are derived: takes seconds


def _byte_characters() -> dict[int, str]:
    """GPT-2's character for each byte: Latin-1's where it is visible, else the next from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in visible else next(hidden)) for byte in range(256)}


CHARACTERS = _byte_characters()
BYTES = {character: byte for byte, character in CHARACTERS.items()}


def to_byte_level(token: bytes) -> str:
    """The text that stands for a token's bytes, one visible character a byte."""
    return token.decode("latin-1").translate(CHARACTERS)


def from_byte_level(text: str) -> bytes:
    """The bytes of to_byte_level's text. Raises ValueError if it has another character."""
    try:
        return bytes([BYTES[character] for character in text])
    except KeyError as error:
        raise ValueError(f"the token {text!r:.60} is not in the byte-level alphabet") from error


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that are joined last when `token` is encoded by merging alone; None if merging does not reach it.

    Inside a longer text the same pairs are joined in the same order as long as nothing is joined across the token's
    ends. So no other pair of neighbours ever has the bytes of this token.
    """
    size = len(token)
    ends, begins = list(range(1, size + 1)), list(range(-1, size))  # of the part that begins, or ends, at an index

    def candidate(begin: int, middle: int, end: int) -> None:
        rank = ranks.get(token[begin:end])
        if rank is not None:
            heapq.heappush(heap, (rank, begin, middle, end))

    heap: list[tuple[int, int, int, int]] = []
    for begin in range(size - 1):
        candidate(begin, begin + 1, begin + 2)
    while heap:
        _, begin, middle, end = heapq.heappop(heap)  # the lowest rank, of equal ones the leftmost
        if ends[begin] != middle or ends[middle] != end:
            continue  # one of the two was joined to another part meanwhile
        if end - begin == size:
            return token[:middle], token[middle:]
        ends[begin], ends[middle], begins[end] = end, 0, begin
        if begin:
            candidate(begins[begin], begin, end)
        if end < size:
            candidate(begin, end, ends[end])
    return None


def derive_merges(tokens: Sequence[bytes]) -> dict[bytes, tuple[bytes, bytes] | None]:
    """The last merge of each token of two bytes and more, in the order of ranks; None where merging does not reach it.

    A token that merging does not reach is used only for a piece of text that it equals. Raises ValueError if the
    tokens are too long.
    """
    if max(map(len, tokens)) > MAX_TOKEN_BYTES or sum(map(len, tokens)) > MAX_VOCAB_BYTES:
        raise ValueError(f"it has tokens of more than {MAX_TOKEN_BYTES:,} bytes, or of {MAX_VOCAB_BYTES:,} together")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return {token: last_merge(token, ranks) for token in tokens if len(token) > 1}
