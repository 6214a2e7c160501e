"""Conversations: validation, rendering to token ids and a training mask, parsing of answers.

A conversation is a dict with a list of messages: an optional system message, then user and assistant turns in
alternation, the user first:

    {"messages": [{"role": "system",    "content": "Be brief."},
                  {"role": "user",      "content": "2+2?"},
                  {"role": "assistant", "content": [{"type": "python", "text": "2+2"},
                                                    {"type": "python_output", "text": "4"},
                                                    {"type": "text", "text": "It is 4."}]}]}

User and system content is a string; an assistant's is a string or a list of such parts. An assistant message with
"weight": 0 is context, not trained on. It renders as below; the mask
is 1 on the tokens between brackets, which the assistant must produce:

    <|bos|><|user_start|>Be brief.\\n\\n2+2?<|user_end|><|assistant_start|>
    [<|python_start|>2+2<|python_end|>]<|output_start|>4<|output_end|>[It is 4.<|assistant_end|>]

Text is always encoded as ordinary text and only this module writes special tokens, so a user cannot forge a turn by
typing one. Messages whose roles do not alternate are brought into this form by `merge_messages`.
"""

from collections.abc import Sequence
from itertools import accumulate, takewhile
from typing import Any, Protocol

from nanochat.common import SPECIAL_TOKENS

Message = dict[str, Any]
Conversation = dict[str, Any]
Rendered = tuple[list[int], list[int]]  # ids and mask, of the same length

PART_TOKENS = {  # part type -> (opening token, closing token, does the assistant produce it)
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


class Tokenizer(Protocol):
    """What engine, server, RL and tasks need of a tokenizer; RustBPETokenizer has more."""

    def encode(self, text: str) -> list[int]: ...
    def encode_special(self, name: str) -> int: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...
    def get_vocab_size(self) -> int: ...
    def render_for_completion(self, conversation: Conversation) -> list[int]: ...


# ---------------------------------------------------------------------------------------------------
# Validation


def validate_conversation(conversation: Any, for_training: bool = False) -> None:
    """Raise ValueError, with the reason in one line, if this is not a conversation.

    for_training: it must also have an assistant message.
    """
    if not isinstance(conversation, dict):
        raise ValueError(f"a conversation is an object with 'messages', not {_kind(conversation)}")
    if "messages" not in conversation:
        found = ", ".join(map(repr, conversation)) or "nothing"
        raise ValueError(f"a conversation needs 'messages'; found {found}")
    validate_messages(conversation["messages"])
    if for_training and not any(message["role"] == "assistant" for message in conversation["messages"]):
        raise ValueError("there is no assistant message to train on")


def validate_messages(messages: Any) -> None:
    """Raise ValueError, with the reason in one line, if these are not the messages of a conversation."""
    if not isinstance(messages, list | tuple):
        raise ValueError(f"'messages' must be a list, not {_kind(messages)}")
    if not messages:
        raise ValueError("'messages' is empty")
    first_turn = 0
    for index, message in enumerate(messages):
        where = f"message {index + 1}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} must be an object with 'role' and 'content', not {_kind(message)}")
        if missing := [key for key in ("role", "content") if key not in message]:
            raise ValueError(f"{where} has no {missing[0]!r}")
        if index == 0 and message["role"] == "system":
            first_turn = 1
        else:
            expected = ("user", "assistant")[(index - first_turn) % 2]
            if message["role"] != expected:
                raise ValueError(
                    f"{where} must have role {expected!r}, not {message['role']!r}: "
                    "user and assistant alternate after an optional system message"
                )
        if message.get("weight") not in (None, 0, 1):
            raise ValueError(f"{where}: the weight must be 0 (not trained on) or 1, not {_kind(message['weight'])}")
        _validate_content(message["role"], message["content"], where)


def _validate_content(role: str, content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if role != "assistant":
        raise ValueError(f"{where}: the content of a {role} message must be a string, not {_kind(content)}")
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where}: content must be a string or a list of parts, not {_kind(content)}")
    if not content:
        raise ValueError(f"{where}: the list of parts is empty")
    for number, part in enumerate(content, start=1):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: part {number} must be an object with 'type' and a string 'text'")
        if not isinstance(part.get("type"), str) or part["type"] not in PART_TOKENS:
            raise ValueError(f"{where}: part {number} has type {part.get('type')!r}; allowed: {', '.join(PART_TOKENS)}")


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


# ---------------------------------------------------------------------------------------------------
# Messages in any order


def merge_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages of the roles system, user and assistant in any order, as those of a conversation.

    System messages become one at the front, neighbours of one role become one, both joined by blank lines; assistant
    messages without content are left out; an empty user turn precedes an assistant who speaks first, or stands where
    nobody does. "merged" counts the given messages that each is made of.
    """
    merged: list[Message] = []
    for message in sorted(messages, key=lambda message: message["role"] != "system"):  # keeps the order otherwise
        role, content, count = message["role"], message["content"], message.get("merged", 1)
        if merged and merged[-1]["role"] == role:
            before = merged[-1]
            merged[-1] = {
                **before,
                "content": _join_contents(before["content"], content),
                "merged": before["merged"] + count,
            }
        elif content or role == "user":
            if role == "assistant" and (not merged or merged[-1]["role"] == "system"):
                merged.append({"role": "user", "content": "", "merged": 0})
            merged.append({**message, "merged": count})
    if not merged or merged[-1]["role"] == "system":
        merged.append({"role": "user", "content": "", "merged": 0})
    return merged


def _join_contents(first: Any, second: Any) -> Any:
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    first, second = ([{"type": "text", "text": c}] if isinstance(c, str) else c for c in (first, second))
    blank_line = [{"type": "text", "text": "\n\n"}] if first[-1]["type"] == second[0]["type"] == "text" else []
    return [*first, *blank_line, *second]


def plain_text(content: str | Sequence[dict[str, str]]) -> str:
    """A message's content without tool calls and their results."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


# ---------------------------------------------------------------------------------------------------
# Rendering


def render(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int | None = None) -> Rendered:
    """Ids and mask of a whole conversation, two lists of the same length.

    max_tokens cuts anywhere, also within a turn; training uses truncate_turns instead. Raises ValueError if it is not a
    conversation.
    """
    validate_conversation(conversation)
    turns = join_system(conversation["messages"])
    if not turns:
        raise ValueError("there is only a system message")
    ids, mask = _join(tokenizer, [render_turn(tokenizer, turn) for turn in turns])
    return ids[:max_tokens], mask[:max_tokens]


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message], continue_last: bool = False) -> list[int]:
    """Prompt ids for the assistant's next turn; they end in <|assistant_start|>.

    A trailing assistant turn is left out: it is the answer to be generated. With `continue_last` the prompt ends with
    that turn, without its end token: the answer goes on from there. Raises ValueError if these are not the messages of
    a conversation, have no user turn, or there is no assistant turn to continue.
    """
    validate_messages(messages)
    turns = join_system(messages)
    answered = bool(turns) and turns[-1]["role"] == "assistant"
    if continue_last and not answered:
        raise ValueError(f"the last message must have role 'assistant', not {messages[-1]['role']!r}")
    if answered and not continue_last:
        turns = turns[:-1]
    if not turns:
        raise ValueError("there is no user message to answer")
    ids, _ = _join(tokenizer, [render_turn(tokenizer, turn) for turn in turns])
    return ids[:-1] if continue_last else [*ids, tokenizer.encode_special("<|assistant_start|>")]


def join_system(messages: Sequence[Message]) -> list[Message]:
    """The messages, a system message joined to the first user turn by a blank line."""
    if messages[0]["role"] != "system":
        return list(messages)
    if len(messages) == 1:
        return []
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _join(tokenizer: Tokenizer, rendered: Sequence[Rendered]) -> Rendered:
    """<|bos|>, then the rendered turns."""
    ids, mask = [tokenizer.encode_special("<|bos|>")], [0]
    for turn_ids, turn_mask in rendered:
        ids += turn_ids
        mask += turn_mask
    return ids, mask


def render_turn(tokenizer: Tokenizer, turn: Message) -> Rendered:
    """One turn with its start and end tokens. The assistant produces its end token, but not its start."""
    role, content = turn["role"], turn["content"]
    spoken = int(role == "assistant" and turn.get("weight") != 0)
    ids, mask = [tokenizer.encode_special(f"<|{role}_start|>")], [0]
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        opening, closing, supervised = PART_TOKENS[part["type"]]
        piece = tokenizer.encode(part["text"])
        if opening and closing:
            piece = [tokenizer.encode_special(opening), *piece, tokenizer.encode_special(closing)]
        ids += piece
        mask += [spoken & supervised] * len(piece)
    return [*ids, tokenizer.encode_special(f"<|{role}_end|>")], [*mask, spoken]


def part_starts(tokenizer: Tokenizer) -> dict[int, str]:
    """The type of the part after each opening or closing token, by id."""
    special = tokenizer.encode_special
    opening = {special(tokens[0]): kind for kind, tokens in PART_TOKENS.items() if tokens[0]}
    return opening | {special(tokens[1]): "text" for tokens in PART_TOKENS.values() if tokens[1]}


def end_tokens(tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer."""
    return {tokenizer.encode_special("<|assistant_end|>"), tokenizer.encode_special("<|bos|>")}


def parse_answer(tokenizer: Tokenizer, ids: Sequence[int]) -> str | list[dict[str, str]]:
    """The assistant content of `ids`, the tokens after <|assistant_start|>: a string if it is all text, else its parts.

    <|assistant_end|> or <|bos|> ends it. Accepts anything a model may produce: a part left open ends with the ids,
    other special tokens are dropped.
    """
    special = {tokenizer.encode_special(name) for name in SPECIAL_TOKENS}
    ends, starts = end_tokens(tokenizer), part_starts(tokenizer)
    runs: list[tuple[str, list[int]]] = [("text", [])]
    for token in takewhile(lambda token: token not in ends, ids):
        if token in starts:
            runs.append((starts[token], []))
        elif token not in special:
            runs[-1][1].append(token)
    parts = [{"type": kind, "text": tokenizer.decode(run)} for kind, run in runs if run or kind != "text"]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


# ---------------------------------------------------------------------------------------------------
# Fitting into a length by whole turns, for training (for chatting: inference/chat_prompt.py)


def truncate_turns(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int) -> Conversation | None:
    """The first turns that render to at most max_tokens, ending with an assistant turn: for training.

    The same object if all of it fits, None if not even the first exchange does.
    """
    validate_conversation(conversation)
    messages = conversation["messages"]
    turns = join_system(messages)
    lengths = accumulate((len(render_turn(tokenizer, turn)[0]) for turn in turns), initial=1)  # 1 for bos
    fitting = sum(length <= max_tokens for length in list(lengths)[1:])
    fitting -= fitting % 2  # the assistant has the even turns: end on one
    if fitting == 0:
        return None
    if fitting == len(turns):
        return conversation
    return {**conversation, "messages": list(messages[: len(messages) - len(turns) + fitting])}
