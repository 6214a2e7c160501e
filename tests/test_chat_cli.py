"""The terminal chat: real checkpoints for loading, a scripted model for what is printed and remembered."""

import io
import os
import signal
import sys
import threading
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from stubs import BOS, END, OUTPUT_END, PYTHON, PYTHON_END, START, TOKENIZER, Scripted, chain, stir

from nanochat.checkpoint.runs import run_dir
from nanochat.checkpoint.saving import save_checkpoint
from nanochat.common import UserError, visible
from nanochat.conversation import render_prompt
from nanochat.engine import Chat, Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.sampling import SamplingParams
from nanochat.inference.tools import Tool
from nanochat.tokenizer import RustBPETokenizer
from scripts import _chat, chat_cli

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT, RustBPETokenizer]:
    """A base folder with an sft and a base checkpoint of a small random model."""
    base_dir = tmp_path_factory.mktemp("base")
    tokenizer = RustBPETokenizer.train_from_iterator(["ab"], 265)
    config = GPTConfig(sequence_len=64, vocab_size=265, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = stir(GPT.create(config).eval(), 0.2)
    for source in ("sft", "base"):
        save_checkpoint(
            run_dir(base_dir, source, "d2"),
            7,
            model_state=model.state_dict(),
            tokenizer=tokenizer,
            meta={"model_config": config.to_dict()},
        )
    return base_dir, model, tokenizer


@pytest.fixture
def base_dir(trained: tuple[Path, GPT, RustBPETokenizer], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(trained[0]))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return trained[0]


def script(monkeypatch: pytest.MonkeyPatch, model: Scripted) -> Scripted:
    """Make the script load `model`."""
    monkeypatch.setattr(chat_cli, "load_model", lambda *which, **more: (model, TOKENIZER, {"step": 1}))
    return model


def answering(*parts: str | int, sequence_len: int = 200) -> Scripted:
    return Scripted(chain(START, *parts), sequence_len)


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | bytes) -> None:
    """Standard input is a pipe with these lines."""
    content = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def prompts(model: Scripted) -> list[str]:
    """The prompts that the model was given, turn by turn."""
    return [TOKENIZER.decode(step[0]) for step in model.fed if len(step[0]) > 1]


def make_chat(model: Scripted) -> Chat:
    return Chat(Engine(model, TOKENIZER), SamplingParams(0.0, seed=0), 50)  # type: ignore[arg-type]


def shown(model: Scripted) -> list[str]:
    """What the terminal prints of the model's answer to "hm", piece by piece."""
    return [piece for piece in _chat.printable(make_chat(model).stream("hm"), "calculator") if piece]


# ---------------------------------------------------------------------------------------------------
# Finding and loading a model


def test_one_answer(trained: Any, base_dir: Path, capsys: Capture) -> None:
    _, model, tokenizer = trained
    flags = ["-t", "0.8", "-k", "20", "--top-p", "0.9", "--min-p", "0", "--max-tokens", "9", "--seed", "3"]
    assert chat_cli.main(["-p", "hi", *flags]) == 0
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    settings: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3}
    (ids,), _ = Engine(model, tokenizer).generate_batch(prompt, max_tokens=9, **settings)
    text = "".join(
        _chat.printable([("text", tokenizer.decode([i for i in ids[len(prompt) :] if i < 256]))], "calculator")
    )
    assert capsys.readouterr().out == text + "\n"


def test_a_base_model_continues_the_text(trained: Any, base_dir: Path, capsys: Capture) -> None:
    flags = ["-i", "base", "-g", "d2", "-s", "7", "-t", "0", "--max-tokens", "5"]
    assert chat_cli.main([*flags, "-p", "Once upon a time"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("source", "maker"), [("sft", "chat_sft"), ("base", "base_train"), ("rl", "chat_rl")])
def test_no_model_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, maker: str) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=maker) as error:
        chat_cli.main(["-i", source, "-p", "hi"])
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-g", "d99"], "d2"),
        (["-s", "8"], "7"),
        (["-i", "other"], "base.*sft.*rl"),
        (["-t", "-1"], "temperature"),
        (["-k", "-2"], "top_k"),
        (["--top-p", "-0.1"], "top_p"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["-p", "x" * 100], "64"),
        (["--nonsense"], "nonsense"),
        (["-t", "warm"], "warm"),
        (["-p", "-what is this?"], "--prompt=-"),
    ],
)
def test_wrong_flags_get_one_line(base_dir: Path, argv: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        chat_cli.main(["-p", "hi", *argv])
    assert "\n" not in str(error.value) and str(error.value).lower().count("invalid") <= 1


# ---------------------------------------------------------------------------------------------------
# Talking through a pipe


def test_a_conversation_is_remembered(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    model = script(monkeypatch, answering("Yes."))
    typed(monkeypatch, "one", "", "two")
    assert chat_cli.main([]) == 0
    assert capsys.readouterr() == ("Yes.\nYes.\n", "")
    first = "<|bos|><|user_start|>one<|user_end|><|assistant_start|>"
    assert prompts(model) == [first, first + "Yes.<|assistant_end|><|user_start|>two<|user_end|><|assistant_start|>"]


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    model = script(monkeypatch, answering("Yes."))
    typed(
        monkeypatch,
        "one",
        "/clear",
        "two",
        "/system Be brief.",
        "three",
        "/clear",
        "four",
        "/system",
        "five",
        "/help",
        "/nonsense",
        "/quit",
        "six",
    )
    assert chat_cli.main([]) == 0
    said = capsys.readouterr()
    assert said.out.count("Yes.\n") == 5 and "/clear" in said.out
    assert "/nonsense" in said.err
    asked = ["one", "two", "Be brief.\n\nthree", "Be brief.\n\nfour", "five"]
    assert prompts(model) == [f"<|bos|><|user_start|>{text}<|user_end|><|assistant_start|>" for text in asked]


def test_a_base_model_has_no_system_message(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    script(monkeypatch, answering("Yes."))
    typed(monkeypatch, "/system Be brief.", "/system", "quit")
    assert chat_cli.main(["-i", "base"]) == 0
    assert capsys.readouterr().err.count("system message") == 1


def test_only_commands_are_commands(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    model = script(monkeypatch, answering("Yes.", sequence_len=2000))
    messages = [
        "/etc/hosts is what?",
        "/usr/bin",
        "/ and \\",
        "//",
        "/clearly not",
        " /clear",
        "quit it",
        "/system/bin",
    ]
    typed(monkeypatch, *messages, "/clear the table", "/help me", "/quit smoking?", "/foo", "/system", "quit")
    assert chat_cli.main([]) == 0
    said = capsys.readouterr()
    assert said.out == "Yes.\n" * len(messages)
    for text, prompt in zip(messages, prompts(model), strict=True):
        assert prompt.endswith(f"<|user_start|>{text.strip()}<|user_end|><|assistant_start|>")
    assert [line.split()[:3] for line in said.err.splitlines()] == [
        ["/clear", "takes", "no"],
        ["/help", "takes", "no"],
        ["/quit", "takes", "no"],
        ["unknown", "command", "/foo;"],
    ]


def test_pasted_lines_that_begin_with_a_path_are_one_message(capsys: Capture) -> None:
    lines = iter(["/etc/hosts:\n127.0.0.1 localhost\n", "/system\nBe brief.\nAlways.", "hi"])
    model = answering("Yes.")
    chat_cli.converse(make_chat(model), lambda: next(lines, None) or "/quit")
    first, second = prompts(model)
    assert "<|user_start|>/etc/hosts:\n127.0.0.1 localhost<|user_end|>" in first
    assert "<|user_start|>Be brief.\nAlways.\n\nhi<|user_end|>" in second


@pytest.mark.parametrize("text", ["-5 plus 3?", "--help me", "/quit", "/etc/hosts is what?"])
def test_one_question_may_begin_with_anything(monkeypatch: pytest.MonkeyPatch, capsys: Capture, text: str) -> None:
    model = script(monkeypatch, answering("Yes."))
    assert chat_cli.main([f"--prompt={text}"]) == 0
    assert capsys.readouterr().out == "Yes.\n" and f"<|user_start|>{text}<|user_end|>" in prompts(model)[0]


def test_closed_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    script(monkeypatch, answering("Yes."))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="--prompt"):
        chat_cli.main([])
    assert chat_cli.main(["-p", "hi"]) == 0 and capsys.readouterr().out == "Yes.\n"


def test_long_chats_drop_the_oldest_turns(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    model = script(monkeypatch, answering("Yes.", sequence_len=60))
    typed(monkeypatch, "/system S", *(f"question {i}" for i in range(12)))
    assert chat_cli.main([]) == 0
    said = capsys.readouterr()
    assert said.out == "Yes.\n" * 12 and said.err
    assert all(len(step[0]) <= 53 for step in model.fed), "an eighth of the context is left to the answer"
    assert "S\n\nquestion 10" in prompts(model)[-1] and "question 1<" not in prompts(model)[-1]


def test_a_message_too_long_is_refused_and_the_chat_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    model = script(monkeypatch, answering("Yes.", sequence_len=60))
    typed(monkeypatch, "one", "x" * 100, "two")
    assert chat_cli.main([]) == 0
    said = capsys.readouterr()
    assert said.out == "Yes.\nYes.\n" and said.err.count("error: ") == 1
    assert "xx" not in prompts(model)[-1] and "two" in prompts(model)[-1]


@pytest.mark.parametrize(("flags", "answer"), [([], "Yes."), (["--max-tokens=4"], "Yes."), (["--max-tokens=3"], "Yes")])
def test_an_answer_that_was_cut_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, flags: list[str], answer: str
) -> None:
    script(monkeypatch, answering("Yes."))
    assert chat_cli.main([*flags, "-p", "hm"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{answer}\n" and ("--max-tokens" in said.err) == bool(flags)


def test_invalid_utf8_input(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    script(monkeypatch, answering("Yes."))
    typed(monkeypatch, b"\xff\xfe caf\xe9", "ok")
    assert chat_cli.main([]) == 0 and capsys.readouterr().out == "Yes.\nYes.\n"


# ---------------------------------------------------------------------------------------------------
# What is printed


def test_tool_calls_are_legible_and_remembered() -> None:
    model = answering("So ", PYTHON, "12*3", PYTHON_END)
    model.table[OUTPUT_END, :] = -20.0
    model.table[OUTPUT_END, ord("!")] = 20.0
    chat = make_chat(model)
    assert "".join(_chat.printable(chat.stream("hm"), "calculator")) == "So [calculator: 12*3 = 36]!"
    chat.remember()
    parts = [("text", "So "), ("python", "12*3"), ("python_output", "36"), ("text", "!")]
    assert chat.messages[-1] == {"role": "assistant", "content": [{"type": t, "text": x} for t, x in parts]}


def test_a_refused_tool_call_is_closed() -> None:
    assert "".join(shown(answering(PYTHON, "os.x", PYTHON_END, "?"))) == "[calculator: os.x]?"
    assert "".join(shown(answering(PYTHON, "12*3"))) == "[calculator: 12*3]"


def test_no_piece_cuts_a_character() -> None:
    text = "añ€𝄞"
    assert shown(answering(text)) == list(text)  # a token is a byte here, a piece is a character


def test_control_characters_are_visible() -> None:
    assert "".join(shown(answering("a\x1b[2J\tb\n\x07\x9b"))) == "a\\x1b[2J\tb\n\\x07\\x9b"


def test_every_line_end_is_one() -> None:
    pieces = [("text", character) for character in "a\rb\r\nc\n\rd\r\r\ne\vf\u2028g\r"]
    assert "".join(_chat.printable(pieces, "tool")) == "a\nb\nc\n\nd\n\ne\nf\ng\n"
    pieces = [("python", "1\r"), ("python_output", "\r"), ("python_output", "\n2"), ("text", "\r\n")]
    assert "".join(_chat.printable(pieces, "tool")) == "[tool: 1\n = \n2]\n"


def test_no_character_can_command_a_terminal() -> None:
    text = visible("".join(map(chr, range(sys.maxunicode + 1))))
    assert {c for c in set(text) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} == {"\n", "\t"}
    directions = {unicodedata.bidirectional(c) for c in set(text)}
    assert "R" in directions and not directions & {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    kept = "naïve – \u05e9\u05dc\u05d5\u05dd \u200f\u00a0👩\u200d🔬 日本"
    assert visible(kept) == kept


# ---------------------------------------------------------------------------------------------------
# The keyboard


class Interrupted(Scripted):
    """A model that presses Ctrl-C during its n-th step."""

    def __init__(self, follows: dict[int, int], step: int) -> None:
        super().__init__(follows, 200)
        self.step = step

    def __call__(self, idx: torch.Tensor, kv_cache: Any) -> torch.Tensor:
        if len(self.fed) == self.step:
            signal.raise_signal(signal.SIGINT)
        return super().__call__(idx, kv_cache)


def test_ctrl_c_stops_the_answer_not_the_program(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    before = signal.getsignal(signal.SIGINT)
    model = script(monkeypatch, Interrupted(chain(START, "Helo, yu!"), 3))
    typed(monkeypatch, "one", "two")
    assert chat_cli.main([]) == 0
    assert capsys.readouterr().out == "Helo [stopped]\nHelo, yu!\n"
    assert "Helo<|assistant_end|>" in prompts(model)[-1]  # the part that was printed is remembered
    assert signal.getsignal(signal.SIGINT) is before


class Endless:
    """A tool that presses Ctrl-C and runs until it is closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def __call__(self, text: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        assert self.closed.wait(60), "not closed"
        return "late"

    def close(self) -> None:
        self.closed.set()


def test_ctrl_c_does_not_wait_for_a_tool(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    endless = Endless()
    tool = Tool("endless", "<|python_start|>", "<|python_end|>", lambda: endless, slow=True)
    monkeypatch.setattr(chat_cli, "DEFAULT_TOOLS", (tool,))
    script(monkeypatch, answering("So ", PYTHON, "1", PYTHON_END, "nev"))
    assert chat_cli.main(["-p", "hi"]) == 130
    assert endless.closed.is_set()
    assert capsys.readouterr().out == "So [endless: 1] [stopped]\n"


def test_ctrl_c_with_one_answer(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    script(monkeypatch, Interrupted(chain(START, "Helo."), 0))
    assert chat_cli.main(["-p", "hi"]) == 130
    assert "[stopped]" in capsys.readouterr().out


def test_ctrl_c_at_the_prompt_leaves_the_second_time(capsys: Capture) -> None:
    def keys(*presses: Any) -> Any:
        left = iter(presses)

        def read() -> str:
            press = next(left)
            if isinstance(press, type):
                raise press
            return press

        return read, left

    read, left = keys(KeyboardInterrupt, "hi", KeyboardInterrupt, KeyboardInterrupt, "never")
    assert chat_cli.converse(make_chat(answering("Yes.")), read) == 0 and next(left) == "never"
    chat = make_chat(Interrupted(chain(START, "Yes."), 1))
    read, left = keys("hi", KeyboardInterrupt, "never")  # the first stopped the answer
    assert chat_cli.converse(chat, read) == 0 and next(left) == "never"
    read, left = keys(EOFError, "never")
    assert chat_cli.converse(chat, read) == 0 and next(left) == "never"
    capsys.readouterr()


def test_typing_in_a_terminal(tmp_path: Path) -> None:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        read = _chat.terminal_reader(tmp_path / "history")
        keyboard.send_text("héllo\r")
        assert read() == "héllo"
        keyboard.send_text("two\x1b\rlines\r")  # Alt-Enter
        assert read() == "two\nlines"
        again = _chat.terminal_reader(tmp_path / "history")
        keyboard.send_text("\x1b[A\x1b[A\x1b[A\r")  # up, past both lines of the last one
        assert again() == "héllo"
        keyboard.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            read()
        keyboard.send_text("\x04")
        with pytest.raises(EOFError):
            read()


def test_an_empty_answer_is_remembered() -> None:
    chat = make_chat(Scripted({}))
    assert list(chat.stream("hm")) == []
    chat.remember()
    assert chat.messages[-1] == {"role": "assistant", "content": ""} and chat.answer == [END]
    assert BOS not in chat.answer
