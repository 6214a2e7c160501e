"""Talk to a model in the terminal: `python -m scripts.chat_cli`, or `-p "a question"` for one answer."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, get_base_dir, visible
from nanochat.common.ranges import Range
from nanochat.engine import Chat, Engine
from nanochat.execution import choose_level
from nanochat.inference.sampling import SamplingParams
from nanochat.inference.tools import DEFAULT_TOOLS, WITH_PYTHON
from nanochat.runtime import Runtime
from scripts import _cli
from scripts._chat import command, noted_interrupts, printable, terminal_reader


@dataclass
class Config(_cli.ModelConfig):
    """Talk to a model. A base model continues your text; sft and rl models answer it."""

    source: Annotated[Literal["base", "sft", "rl"], tyro.conf.arg(aliases=["-i"])] = "sft"
    """Which model: base, sft or rl."""
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = ""
    """Print one answer to this and exit."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.6
    """0 takes the most likely token; higher is more varied."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """Sample among the k most likely tokens; 0 is off."""
    min_p: float = 0.1
    """Sample among tokens at least this likely compared with the likeliest; 0 is off."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities sum to this; 1 is off."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were there before, in the question too, become less likely."""
    max_tokens: Annotated[int, Range(1, unset=-1)] = -1
    """Tokens of the longest answer; -1: what the conversation leaves of the context."""
    seed: int = 42
    """The same conversation with the same seed gets the same answers."""
    python: bool = False
    """Let the model run Python in the sandbox (dev/SANDBOX.md), besides the calculator."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    sampling = SamplingParams().override(config)
    if config.python:
        choose_level("")  # raises now if there is no sandbox
    for stream in (sys.stdin, sys.stdout):  # invalid UTF-8 must not end a chat
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    with Runtime.create(config.device_type) as runtime:
        model, tokenizer, meta = load_model(config.source, runtime, model_tag=config.model_tag, step=config.step)
        engine = Engine(model, tokenizer, tools=WITH_PYTHON if config.python else DEFAULT_TOOLS)
        max_tokens = None if config.max_tokens < 0 else config.max_tokens
        chat = Chat(engine, sampling, max_tokens, chat_model=config.source != "base")
        if sys.stdin is None and not config.prompt:
            raise UserError("standard input is closed: give one question as --prompt=...")
        if config.prompt:
            return 0 if say(chat, config.prompt) else 130
        if sys.stdin.isatty() and sys.stdout.isatty():
            print(f"{config.source} model, step {meta['step']}, on {runtime.describe()}\n/help lists the commands.")
            return converse(chat, terminal_reader(get_base_dir(to_write=False) / "chat_history"))
        return converse(chat, input)


# ---------------------------------------------------------------------------------------------------
# The conversation


def converse(chat: Chat, read: Callable[[], str]) -> int:
    """Read and answer messages until the input ends, /quit, or Ctrl-C twice without an answer in between."""
    interrupted = False
    while True:
        try:
            line = read()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            if interrupted:
                return 0
            interrupted = True
            print("(press Ctrl-C again, Ctrl-D or type /quit to leave)", file=sys.stderr)
            continue
        text = line.strip()
        if text in ("/quit", "/exit", "quit", "exit"):
            return 0
        try:
            interrupted = bool(text) and not ((line.startswith("/") and command(chat, text)) or say(chat, text))
        except UserError as error:
            print(f"error: {visible(str(error))}", file=sys.stderr)


def say(chat: Chat, text: str) -> bool:
    """Stream the model's answer to the terminal; False if Ctrl-C stopped it."""
    interrupts: list[int] = []
    tools = chat.engine.tools.tools
    label = tools[0].name if len(tools) == 1 else "tool"  # the pieces do not say which tool answered
    pieces = printable(chat.stream(text, should_stop=lambda: bool(interrupts)), label)
    with noted_interrupts(interrupts):
        for piece in pieces:
            print(piece, end="", flush=True)
        if interrupts:
            print(" [stopped]", end="")
        chat.remember()
        print(flush=True)
    if chat.dropped:
        print(f"(the context is full: the first {chat.dropped} messages were forgotten)", file=sys.stderr)
    if chat.chat_model and chat.cut and not interrupts:
        print("(the answer was cut: it reached --max-tokens, or the end of the context)", file=sys.stderr)
    return not interrupts


if __name__ == "__main__":
    _cli.run(main, memory_flags="--max-tokens")
