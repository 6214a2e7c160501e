"""One sample of an answer: tokens in, final text out. Streamed and whole answers are made by the same code."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nanochat.conversation import Tokenizer
from nanochat.inference.answer_text import AnswerStream
from nanochat.inference.request import Token

Piece = tuple[str, str]  # (kind, text); kinds are text, python, python_output
FinishReason = Literal["stop", "length"]


@dataclass
class Sample:
    """What a client gets of one sample. Text that a stop string may begin in is withheld until that is decided."""

    tokenizer: Tokenizer
    stop: Sequence[str] = ()
    chat: bool = True  # tool calls are pieces of their own; otherwise everything is text
    choice: int = 0  # its index among the answer's choices
    stopped: bool = False  # at a stop string
    finish_reason: FinishReason | None = None  # None while it runs
    pieces: list[Piece] = field(default_factory=list)  # all final text; neighbours of one kind are joined
    tokens: list[Token] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stream = AnswerStream(self.tokenizer, self.chat)
        self._withheld = ""

    @property
    def text(self) -> str:
        """The answer without its tool calls."""
        return "".join(text for kind, text in self.pieces if kind == "text")

    def begin(self, tokens: Sequence[int]) -> list[Piece]:
        """The final pieces of an answer's beginning that the request gave."""
        self._finalize([piece for token in tokens for piece in self._stream.feed(token)])
        return list(self.pieces)

    def feed(self, token: Token) -> list[Piece]:
        """The final pieces that `token` completes; none once stopped."""
        if self.stopped:
            return []
        self.tokens.append(token)
        return self._finalize(self._stream.feed(token.id))

    def finish(self) -> list[Piece]:
        """The rest, when no more tokens come."""
        return [] if self.stopped else self._finalize(self._stream.finish(), last=True)

    def _finalize(self, decoded: list[Piece], last: bool = False) -> list[Piece]:
        final: list[Piece] = []
        for kind, text in decoded:
            if kind != "text":  # a stop string does not extend over a tool call
                final += [("text", self._withheld), (kind, text)]
                self._withheld = ""
                continue
            text, self._withheld = self._withheld + text, ""
            cut = min((at for s in self.stop if (at := text.find(s)) >= 0), default=None)
            if cut is not None:
                self.stopped = True
                final.append((kind, text[:cut]))
                break
            safe = len(text) - overlap(text, self.stop)
            final.append((kind, text[:safe]))
            self._withheld = text[safe:]
        if last:
            final.append(("text", self._withheld))
        final = [(kind, text) for kind, text in final if text or kind != "text"]
        for kind, text in final:
            if self.pieces and self.pieces[-1][0] == kind:
                self.pieces[-1] = (kind, self.pieces[-1][1] + text)
            else:
                self.pieces.append((kind, text))
        return final


def overlap(text: str, stop: Sequence[str]) -> int:
    """The most characters at the end of `text` that a stop string begins with."""
    prefixes = (s[:length] for s in stop for length in range(1, len(s)))
    return max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
