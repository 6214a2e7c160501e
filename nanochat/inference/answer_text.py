"""Tokens to text as they are decoded, without splitting a UTF-8 character."""

import codecs

from nanochat.common import SPECIAL_TOKENS
from nanochat.conversation import Tokenizer, part_starts


class TextStream:
    """Tokens to text as they come. The first bytes of a character wait for the rest of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that `token` completes, possibly none."""
        return self._decoder.decode(self.tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """The rest: U+FFFD for a character that was never completed. The stream may then be used again."""
        return self._decoder.decode(b"", final=True)


class AnswerStream:
    """An answer's tokens to (kind, text) pieces as they come: conversation.parse_answer, streamed.

    The kinds are those of an assistant's parts: text, python, python_output. Other special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special = {tokenizer.encode_special(name) for name in SPECIAL_TOKENS}
        self._kinds = part_starts(tokenizer)
        self._kind, self._text = "text", TextStream(tokenizer)

    def feed(self, token: int) -> list[tuple[str, str]]:
        """The pieces that `token` completes: none, one, or U+FFFD where a part ends inside a character."""
        if token in self._kinds:
            pieces = self.finish()
            self._kind = self._kinds[token]
            return pieces
        text = "" if token in self._special else self._text.feed(token)
        return [(self._kind, text)] if text else []

    def finish(self) -> list[tuple[str, str]]:
        """The rest of the current part."""
        text = self._text.finish()
        return [(self._kind, text)] if text else []
