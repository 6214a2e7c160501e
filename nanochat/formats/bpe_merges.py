"""A vocabulary in the form of Hugging Face and GGUF: tokens as printable text, and the list of merges.

tiktoken needs no merges: it joins the two neighbours whose bytes together are the token of the lowest rank. Within one
token that leaves at most one pair to be joined last, so a list of one pair a token, in the order of ranks, gives the
same ids (`last_merge` says why).
"""

import itertools
from collections.abc import Mapping, Sequence

UNRANKED = 2**62  # above any rank
MAX_WORK = 2**28  # sum of the squares of the tokens' lengths; takes seconds, where usual vocabularies have 2**24


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
    parts = [token[i : i + 1] for i in range(len(token))]
    found = [ranks.get(left + right, UNRANKED) for left, right in itertools.pairwise(parts)]
    while len(parts) > 2 and (lowest := min(found)) < UNRANKED:
        i = found.index(lowest)  # of equal ones the leftmost
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del found[i]
        for j in range(max(i - 1, 0), min(i + 1, len(found))):
            found[j] = ranks.get(parts[j] + parts[j + 1], UNRANKED)
    return (parts[0], parts[1]) if len(parts) == 2 and found[0] < UNRANKED else None


def derive_merges(tokens: Sequence[bytes]) -> dict[bytes, tuple[bytes, bytes] | None]:
    """The last merge of each token of two bytes and more, in the order of ranks; None where merging does not reach it.

    A token that merging does not reach is used only for a piece of text that it equals. Raises ValueError if the
    tokens are too long.
    """
    if sum(len(token) ** 2 for token in tokens) > MAX_WORK:
        raise ValueError(f"its tokens are too long: one has {max(map(len, tokens)):,} bytes")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return {token: last_merge(token, ranks) for token in tokens if len(token) > 1}
