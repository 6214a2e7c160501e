"""Tools: quick ones run within a step, slow ones beside the batch, Python in the sandbox."""

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from engine_helpers import answers, sequence
from live import until
from stubs import TOKENIZER, Scripted, chain

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.execution import choose_level
from nanochat.inference.decoding import RunningBatch
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.request import TokenSequence
from nanochat.inference.tools import CALCULATOR, WITH_PYTHON, Python, Tool, ToolSession, ToolTable
from tasks.code import Code

START, STOP = (TOKENIZER.encode_special(f"<|python_{name}|>") for name in ("start", "end"))
OUT, OUT_END = (TOKENIZER.encode_special(f"<|output_{name}|>") for name in ("start", "end"))
END = TOKENIZER.encode_special("<|assistant_end|>")


def sandboxed() -> bool:
    try:
        choose_level("")
    except UserError:
        return False
    return True


class Slow:
    """Reverses text, once `may_go` is set."""

    def __init__(self, may_go: threading.Event) -> None:
        self.may_go, self.closed, self.calls = may_go, 0, 0

    def __call__(self, text: str) -> str | None:
        self.calls += 1
        assert self.may_go.wait(10)
        return None if text == "no" else text[::-1]

    def close(self) -> None:
        self.closed += 1


def slow_tool(may_go: threading.Event) -> tuple[Tool, list[Slow]]:
    made: list[Slow] = []

    def make() -> Slow:
        made.append(Slow(may_go))
        return made[-1]

    return Tool("reverse", "<|python_start|>", "<|python_end|>", make, slow=True), made


def calls(text: str) -> Scripted:
    """A model that, given "?", calls a tool with `text` and ends after the result."""
    return Scripted({**chain("?", START, text, STOP), OUT_END: END}, sequence_len=200)


def batch_of(model: Scripted, tools: tuple[Tool, ...], max_sequences: int) -> RunningBatch:
    weights = DecodingWeights(model)  # type: ignore[arg-type]
    return RunningBatch(weights, ToolTable(TOKENIZER, tools), {END}, max_sequences, 200)


def run(batch: RunningBatch, steps: int = 500) -> None:
    for _ in range(steps):
        if batch.idle:
            return
        batch.step()
    raise AssertionError(f"not idle after {steps} steps")


def asking(prompt: str = "?", index: int = 0) -> TokenSequence:
    return sequence(TOKENIZER.encode(prompt), 60, index=index)


def test_a_slow_tool_does_not_delay_other_sequences() -> None:
    may_go = threading.Event()
    tool, made = slow_tool(may_go)
    model = Scripted({**chain("?", START, "abc", STOP), OUT_END: END, **chain("!", "xyzXYZ0123456789")}, 200)
    batch = batch_of(model, (tool,), 4)
    caller, talking = asking(), asking("!", 1)
    batch.submit([caller])
    batch.submit([talking])
    for _ in range(40):
        batch.step()
    assert talking.done and TOKENIZER.decode(talking.tokens) == "xyzXYZ0123456789"
    assert not caller.done and not batch.idle and caller.tokens == [START, *b"abc", STOP]
    may_go.set()
    run(batch)
    assert caller.tokens == [START, *b"abc", STOP, OUT, *b"cba", OUT_END] and caller.end == END
    assert caller.mask == [1] * 5 + [0] * 5
    assert [(runner.calls, runner.closed) for runner in made] == [(1, 1)]


def test_a_slow_call_at_the_end_of_a_given_beginning() -> None:
    """It runs beside the batch, as one that the model wrote."""
    may_go = threading.Event()
    tool, _ = slow_tool(may_go)
    model = Scripted({OUT_END: END, **chain("!", "xyz")}, 200)
    batch = batch_of(model, (tool,), 4)
    begun = sequence([ord("?"), START, *b"abc", STOP], 60, answer_begun=5)
    talking = asking("!", 1)
    batch.submit([begun])
    batch.submit([talking])
    for _ in range(20):
        batch.step()
    assert talking.done and not begun.tokens and not batch.idle
    may_go.set()
    run(batch)
    assert begun.tokens == [OUT, *b"cba", OUT_END] and begun.mask == [0] * 5 and begun.end == END


def test_cancelling_during_a_call_closes_the_tool() -> None:
    may_go = threading.Event()
    tool, made = slow_tool(may_go)
    batch = batch_of(calls("abc"), (tool,), 2)
    row = asking()
    batch.submit([row])
    for _ in range(10):
        batch.step()
    batch.cancel(row)
    assert batch.idle and made[0].closed == 1, "closing ends the running call"
    may_go.set()
    assert made[0].closed == 1 and OUT not in row.tokens


def test_the_next_tool_gets_a_refused_call_and_nothing_is_forced_if_all_refuse() -> None:
    may_go = threading.Event()
    may_go.set()
    tool, made = slow_tool(may_go)
    for text, forced in (("1+2", "3"), ("abc", "cba"), ("no", None)):
        engine = Engine(calls(text), TOKENIZER, tools=(CALCULATOR, tool))  # type: ignore[arg-type]
        (tokens,) = answers(engine, [[ord("?")]], max_tokens=30, temperature=0.0)
        output = [] if forced is None else [OUT, *forced.encode(), OUT_END]
        assert tokens == [START, *text.encode(), STOP, *output], text
    assert len(made) == 2, "the calculator answered the first call"


def test_columns_of_samples_wait_for_a_slow_tool() -> None:
    may_go = threading.Event()
    may_go.set()
    tool, _ = slow_tool(may_go)
    engine = Engine(calls("abc"), TOKENIZER, tools=(tool,))  # type: ignore[arg-type]
    sequences, masks = engine.generate_batch([ord("?")], 3, max_tokens=30, temperature=0.0)
    wanted = [ord("?"), START, *b"abc", STOP, OUT, *b"cba", OUT_END]
    assert sequences == [wanted] * 3 and masks == [[0, *[1] * 5, *[0] * 5]] * 3


def test_limits_of_a_tool() -> None:
    class Echo:
        def __call__(self, text: str) -> str:
            return text * 100

        def close(self) -> None:
            pass

    tool = Tool("echo", "<|python_start|>", "<|python_end|>", Echo, max_call_tokens=3, max_output_chars=5)
    for text, wanted in (("ab", "ababa"), ("abcd", None)):
        engine = Engine(calls(text), TOKENIZER, tools=(tool,))  # type: ignore[arg-type]
        (tokens,) = answers(engine, [[ord("?")]], max_tokens=30, temperature=0.0)
        assert (OUT in tokens) == (wanted is not None)
        if wanted:
            assert tokens[-6:] == [*wanted.encode(), OUT_END]


@pytest.mark.parametrize("slow", [False, True])
def test_a_failing_tool_does_not_end_the_answer(slow: bool) -> None:
    class Broken:
        def __call__(self, text: str) -> str:
            raise RuntimeError("broken")

        def close(self) -> None:
            pass

    tool = Tool("broken", "<|python_start|>", "<|python_end|>", Broken, slow=slow)
    engine = Engine(calls("ab"), TOKENIZER, tools=(tool,))  # type: ignore[arg-type]
    assert answers(engine, [[ord("?")]], max_tokens=30, temperature=0.0) == [[START, *b"ab", STOP]]


@pytest.mark.skipif(not sandboxed(), reason="no safe sandbox on this machine")
def test_python_variables_live_for_one_answer() -> None:
    def ask(session: ToolSession, text: str) -> str:
        for token in [START, *text.encode()]:
            session.observe(token, room=60)
        call = session.observe(STOP, room=60)
        return f"calculator {bytes(list(session.forced)[1:-1]).decode()}" if call is None else str(call())

    table = ToolTable(TOKENIZER, WITH_PYTHON)
    one, two = ToolSession(table), ToolSession(table)
    try:
        assert ask(one, "2+3") == "calculator 5"
        assert ask(one, "secret = 6 * 7") == ""
        assert ask(one, "secret") == "42"
        assert "NameError" in ask(two, "secret")
        assert ask(two, "print('a'); 'b'") == "a\n'b'"
        assert "Error" in ask(two, "open('/etc/passwd').read()")
    finally:
        one.close()
        two.close()


@pytest.mark.skipif(not sandboxed(), reason="no safe sandbox on this machine")
def test_code_is_graded_by_its_tests() -> None:
    task: Any = Code(40)
    for index in range(0, 40, 4):
        conversation = task[index]
        reference = conversation["messages"][-1]["content"]
        assert task.reward(conversation, f"```python\n{reference}\n```<|assistant_end|>") == 1.0
        head = reference.partition("\n")[0]
        assert task.reward(conversation, f"{head}\n    return None") == 0.0
        assert task.reward(conversation, f"import os\n{head}\n    os._exit(0)") == 0.0
        assert task.reward(conversation, "I do not know") == 0.0
    numbers = [
        {
            int(t)
            for t in str(Code(200, split)[i]["messages"][0]["content"]).replace(".", " ").replace(",", " ").split()
            if t.isdigit()
        }
        for split in ("train", "test")
        for i in range(200)
    ]
    assert not set().union(*numbers[:200]) & set().union(*numbers[200:])


def test_a_queued_call_of_a_cancelled_sequence_does_not_run() -> None:
    may_go = threading.Event()
    tool, made = slow_tool(may_go)
    batch = batch_of(calls("abc"), (tool,), 20)
    rows = [asking(index=i) for i in range(20)]  # more than there are threads
    batch.submit(rows)
    for _ in range(10):
        batch.step()
    assert len(batch.calling) == 20
    for row in rows:
        batch.cancel(row)
    may_go.set()
    after = asking(index=20)
    batch.submit([after])
    run(batch)
    assert after.end == END and sum(runner.calls for runner in made) < 20


def test_closing_the_generator_closes_its_tools() -> None:
    may_go = threading.Event()
    may_go.set()
    tool, made = slow_tool(may_go)
    engine = Engine(calls("abc"), TOKENIZER, tools=(tool,))  # type: ignore[arg-type]
    columns = engine.generate([ord("?")], max_tokens=30, temperature=0.0)
    for (token,), _ in columns:
        if token == OUT:
            break
    columns.close()  # type: ignore[attr-defined]
    assert made[0].closed == 1


@pytest.mark.skipif(not sandboxed(), reason="no safe sandbox on this machine")
def test_cancelling_ends_a_running_program() -> None:
    batch = batch_of(calls("while 1:0"), WITH_PYTHON, 2)
    row = asking()
    batch.submit([row])
    while not batch.calling:
        batch.step()
    future, runners = batch.calling[row], batch._tools_of[row]._runners
    until(lambda: "python" in runners and runners["python"].session._lock.locked())  # its run() has begun
    began = time.monotonic()
    batch.cancel(row)
    assert batch.idle
    future.exception(timeout=4)
    assert time.monotonic() - began < 3, "without cancel it would run for five seconds"


@pytest.mark.skipif(not sandboxed(), reason="no safe sandbox on this machine")
def test_python_after_a_timeout_and_errors_after_long_output() -> None:
    python = Python()
    try:
        python.session.limits = replace(python.session.limits, timeout=0.5)
        assert "variables are gone" in python("x = 1\nwhile 1: pass")
        assert python("1 + 1") == "2"
        assert python("print('a' * 5000)\n1 / 0").endswith("ZeroDivisionError: division by zero")
    finally:
        python.close()
