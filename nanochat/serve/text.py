"""From a sample's tokens to what a client reads: whole characters, stop strings, tool calls told apart.

The same code makes the streamed and the whole answer, so that they are the same.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat.conversation import Tokenizer
from nanochat.inference.answer_text import AnswerStream, TextStream
from nanochat.inference.request import Token

Piece = tuple[str, str]  # (kind, text); kinds are text, python, python_output


@dataclass
class SampleText:
    """One sample. Feed it tokens; what it gives back is final and can be sent."""

    tokenizer: Tokenizer
    stop: Sequence[str] = ()
    chat: bool = True  # tool calls are parts of their own; otherwise everything is text
    stopped: bool = False  # a stop string came
    pieces: list[Piece] = field(default_factory=list)  # all that was given back, neighbours joined
    tokens: list[Token] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stream = AnswerStream(self.tokenizer) if self.chat else None
        self._plain = TextStream(self.tokenizer)
        self._held = ""  # text that a stop string may begin in

    @property
    def text(self) -> str:
        """What was said, tool calls left out."""
        return "".join(text for kind, text in self.pieces if kind == "text")

    def feed(self, token: Token) -> list[Piece]:
        """What `token` completes. Nothing once stopped."""
        if self.stopped:
            return []
        self.tokens.append(token)
        if self._stream is not None:
            found = self._stream.feed(token.id)
        else:
            found = [("text", text)] if (text := self._plain.feed(token.id)) else []
        return self._give(found)

    def finish(self) -> list[Piece]:
        """What is left when no more tokens come."""
        if self.stopped:
            return []
        if self._stream is not None:
            found = self._stream.finish()
        else:
            found = [("text", text)] if (text := self._plain.finish()) else []
        given = self._give(found)
        if self._held and not self.stopped:
            given.append(("text", self._held))
            self._keep([("text", self._held)])
            self._held = ""
        return given

    def _give(self, found: list[Piece]) -> list[Piece]:
        given: list[Piece] = []
        for kind, text in found:
            if self.stopped:
                break
            if kind != "text":
                if self._held:  # a tool call ends any match
                    given.append(("text", self._held))
                    self._held = ""
                given.append((kind, text))
                continue
            text, self._held = self._held + text, ""
            cut = min((at for s in self.stop if (at := text.find(s)) >= 0), default=-1)
            if cut >= 0:
                text, self.stopped = text[:cut], True
            elif hold := held_back(text, self.stop):
                text, self._held = text[:-hold], text[-hold:]
            if text:
                given.append(("text", text))
        self._keep(given)
        return given

    def _keep(self, given: list[Piece]) -> None:
        for kind, text in given:
            if self.pieces and self.pieces[-1][0] == kind:
                self.pieces[-1] = (kind, self.pieces[-1][1] + text)
            else:
                self.pieces.append((kind, text))


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` a stop string may begin with."""
    longest = 0
    for s in stop:
        for n in range(min(len(s) - 1, len(text)), longest, -1):
            if text.endswith(s[:n]):
                longest = n
                break
    return longest


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], top: int) -> Iterator[dict[str, Any]]:
    """Log probabilities in the shape of chat completions, of tokens that the model chose, one after the other: all
    together they would be hundreds of thousands of objects for Python to look through."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.decode_bytes([token])
        return {"token": raw.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(raw)}

    for token in tokens:
        if token.logprobs is not None:
            best = [entry(i, p) for i, p in token.logprobs.top[:top]]
            yield {**entry(token.id, token.logprobs.logprob), "top_logprobs": best}


class TextOffsets:
    """Where the tokens of a text stand in it, in characters: where their first whole one does, as a character may be
    of several tokens."""

    def __init__(self) -> None:
        self.end = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def take(self, piece: bytes) -> int:
        """Where the next token stands, its bytes being `piece`."""
        if not 0x80 <= piece[0] < 0xC0:  # no byte that continues a character: one that was begun stays broken
            self.break_off()
        place = self.end
        self.end += len(self._decoder.decode(piece))
        return place

    def break_off(self) -> None:
        """Whatever character was begun ends here."""
        self.end += len(self._decoder.decode(b"", final=True))


def completion_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], told: Sequence[Any], offsets: TextOffsets
) -> dict[str, Any]:
    """Log probabilities in the shape of the older completions: parallel lists. told[i] belongs to ids[i], or is None
    where nothing is known: of a prompt's first token, of one that a tool forced. `offsets` goes on from what came
    before."""
    pieces = [tokenizer.decode_bytes([i]) for i in ids]
    names = [piece.decode("utf-8", errors="replace") for piece in pieces]
    places = [offsets.take(piece) for piece in pieces]

    def top(one: Any) -> dict[str, float] | None:
        if one is None or not one.top:
            return None
        best: dict[str, float] = {}
        for i, logprob in one.top:  # two tokens may read alike; the likelier one is told
            best.setdefault(tokenizer.decode_bytes([i]).decode("utf-8", errors="replace"), logprob)
        return best

    return {
        "tokens": names,
        "token_logprobs": [None if one is None else one.logprob for one in told],
        "top_logprobs": [top(one) for one in told],
        "text_offset": places,
    }
