"""The prompt of a chat's next answer: the conversation, fitted into the model's context by whole turns."""

from collections.abc import Sequence

from nanochat.conversation import (
    Message,
    Tokenizer,
    join_system,
    plain_text,
    render_prompt,
    render_turn,
    validate_messages,
)
from nanochat.inference.request import ContextExceeded

ANSWER_RESERVE = 64  # tokens that a prompt leaves for the answer; an eighth of a context below 512 (answer_reserve)


def drop_oldest_turns(
    tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int, continue_last: bool = False
) -> list[Message]:
    """The messages that render to a prompt of at most max_tokens: for chatting. `continue_last` as for render_prompt.

    The oldest exchanges are dropped first; the system message and the last user turn are kept, even if these alone are
    longer. Raises ValueError if the messages do not end with the turn that is to be answered or continued.
    """
    validate_messages(messages)
    last = "assistant" if continue_last else "user"
    if messages[-1]["role"] != last:
        raise ValueError(f"the last message must have role {last!r}, not {messages[-1]['role']!r}")
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns = list(messages[len(system) :])
    lengths = [len(render_turn(tokenizer, turn)[0]) for turn in turns]
    system_length = len(tokenizer.encode(system[0]["content"])) if system else 0
    around = 0 if continue_last else 2  # bos, and assistant_start or without the last turn's end token
    length, last_start = around + sum(lengths), 2 * ((len(turns) - 1) // 2)
    for start in range(0, last_start, 2):
        rest = length - lengths[start]
        # Not with a long system message at every turn that may come first: encoding it takes time.
        if rest + system_length // 2 <= max_tokens:
            first, *_ = join_system([*system, turns[start]])
            if rest + len(render_turn(tokenizer, first)[0]) <= max_tokens:
                return [*system, *turns[start:]]
        length -= lengths[start] + lengths[start + 1]
    return [*system, *turns[last_start:]]


def answer_reserve(max_context: int) -> int:
    """Tokens of the context that a prompt leaves for the answer, or its oldest exchanges are dropped."""
    return min(ANSWER_RESERVE, max_context // 8)


def fit_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    max_context: int,
    chat_model: bool = True,
    continue_last: bool = False,
) -> tuple[list[int], list[Message]]:
    """Prompt ids, and the messages they contain. The answer gets the rest of the context.

    The oldest exchanges are dropped (drop_oldest_turns) only if the prompt would leave less than answer_reserve; the
    last one may leave less. A base model (chat_model False) continues the text of the last message alone. Raises
    ValueError as drop_oldest_turns does, ContextExceeded if no token is left for the answer.
    """
    if chat_model:
        limit = max_context - answer_reserve(max_context)
        kept = drop_oldest_turns(tokenizer, messages, limit, continue_last)
        ids = render_prompt(tokenizer, kept, continue_last)
    else:
        kept = [message for message in messages if message["content"]][-1:] or list(messages[-1:])
        ids = [tokenizer.encode_special("<|bos|>"), *tokenizer.encode(plain_text(kept[0]["content"]))]
    if len(ids) >= max_context:
        system = " with the system message" if kept[0]["role"] == "system" else ""
        raise ContextExceeded(f"the last message{system}", len(ids), max_context)
    return ids, kept
