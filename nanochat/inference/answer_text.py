"""Tokens to text as they are decoded, without splitting a UTF-8 character."""

import codecs

from nanochat.common import SPECIAL_TOKENS
from nanochat.conversation import Tokenizer, part_starts


class AnswerStream:
    """An answer's tokens to (kind, text) pieces as they come: conversation.parse_answer, streamed.

    The kinds are those of an assistant's parts: text, python, python_output. Other special tokens have no text. A call
    or a result without text is a piece with "". With `chat` False everything is text, special tokens by name. The first
    bytes of a character wait for the rest of it.
    """

    def __init__(self, tokenizer: Tokenizer, chat: bool = True) -> None:
        self._tokenizer = tokenizer
        self._without_text = {tokenizer.encode_special(name) for name in SPECIAL_TOKENS} if chat else set()
        self._kinds = part_starts(tokenizer) if chat else {}
        self._kind, self._began = "text", False  # of the current part: its kind, whether a piece of it was returned
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> list[tuple[str, str]]:
        """The pieces that `token` completes: none or one, as U+FFFD where a part ends inside a character."""
        if token in self._kinds:
            pieces = self.finish()
            self._kind, self._began = self._kinds[token], False
            return pieces
        return [] if token in self._without_text else self._piece(self._tokenizer.decode_bytes([token]))

    def finish(self) -> list[tuple[str, str]]:
        """The rest of the current part: U+FFFD for a character that was never completed. The stream may go on."""
        return self._piece(b"", final=True)

    def _piece(self, raw: bytes, final: bool = False) -> list[tuple[str, str]]:
        text = self._decoder.decode(raw, final)
        if not text and (self._began or not final or self._kind == "text"):
            return []
        self._began = True
        return [(self._kind, text)]
