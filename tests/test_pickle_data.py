"""Pickles as plain data: the same values that unpickling gives, and nothing of a hostile one is run."""

import collections
import os
import pickle
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from nanochat.common import UserError
from nanochat.formats.pickle_data import Call, Global, read_pickle

PLAIN: list[Any] = [
    None,
    True,
    {"a": [1, -1, 255, 65536, -(2**31), 2**63 - 1, -(2**63)], "b": (1.5, float("inf")), "": ()},
    [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, [[], [[]]]],
    {b"\x00\xff": 1, b"x" * 300: "é 你好 😀" * 100, 7: False},
    collections.OrderedDict(a=1, b=2),
]
KNOWN = {"collections.OrderedDict", "_codecs.encode", "tiktoken.core.Encoding"}


def refusal(data: bytes, known: set[str] = KNOWN) -> str:
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        read_pickle(data, "file.pkl", known)
    assert time.perf_counter() - began < 30 and "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("value", PLAIN, ids=range(len(PLAIN)))
def test_plain_values(value: Any, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol), "x", KNOWN) == value


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_tokenizer(protocol: int) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {bytes([i, 255 - i]): 256 + i for i in range(200)}
    encoding = tiktoken.Encoding("mine", pat_str=r"\p{L}+|.", mergeable_ranks=ranks, special_tokens={"<|a|>": 456})
    value = read_pickle(pickle.dumps(encoding, protocol), "x", KNOWN)
    assert isinstance(value, Call) and (value.name, value.args) == ("tiktoken.core.Encoding", ())
    assert value.state["mergeable_ranks"] == ranks and value.state["special_tokens"] == {"<|a|>": 456}


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_not_run(protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    attacks = [
        Runs(os.system, f"touch {canary}"),
        Runs(eval, f"open({str(canary)!r}, 'w')"),
        Runs(getattr, dict, "fromkeys"),
        Runs(Path.touch, canary),
        [1, {"deep": (Runs(exec, f"open({str(canary)!r}, 'w')"),)}],
    ]
    for attack in attacks:
        refusal(pickle.dumps(attack, protocol))
    assert not canary.exists()


def test_names_are_not_looked_up() -> None:
    assert "no_such_module" in refusal(b"cno_such_module\nname\n.")
    assert read_pickle(b"cno_such_module\nname\n.", "x", {"no_such_module.name"}) == Global("no_such_module.name")
    assert "\\n" in refusal(b"\x80\x04\x8c\x02a\n\x8c\x01b\x93.")
    # A name that the data itself puts together is on no list either.
    refusal(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x04N",
        b"\x80\x06N.",
        b"NN.",
        b"\x80\x04h\x05.",
        b"\x80\x04\x85.",
        b"\x80\x04(.",
        b"\x80\x04(" * 1000 + b".",
        b"\x8b\x10\x00\x00\x00" + b"\x01" * 16 + b".",
        b"\x8a\x09" + b"\x01" * 9 + b".",
        b"\x8e" + (2**60).to_bytes(8, "little") + b".",
        b"X\xff\xff\xff\x7fab.",
        b"L" + b"9" * 5000 + b"L\n.",
        b"S'\\d\\q'\n.",
        b"I1\n.",
        b"Vtext\n.",
        b"\x80\x04]]s.",
        b"\x80\x04}]Ns.",
        b"\x80\x04}(N1e.",
        b"\x80\x04NNb.",
        b"\x80\x04N)R.",
        b"\x80\x04]\x94h\x00b.",
        b"\x82\x01.",
        b"Pid\n.",
    ],
)
def test_what_is_no_plain_data(data: bytes) -> None:
    refusal(data)


def test_large_and_circular_ones_end(monkeypatch: pytest.MonkeyPatch) -> None:
    circular = read_pickle(b"\x80\x04]\x94h\x00a.", "x", KNOWN)
    assert circular[0] is circular
    value: Any = ()
    for _ in range(200):
        value = (value, value)  # 2^200 leaves
    read_pickle(pickle.dumps(value, 4), "x", KNOWN)
    read_pickle(b"\x80\x04)" + b"\x85" * 100_000 + b".", "x", KNOWN)  # nested, and taken apart again
    monkeypatch.setattr("nanochat.formats.pickle_data.MAX_INSTRUCTIONS", 1000)
    assert "1,000" in refusal(b"N" * 2000 + b".")
    monkeypatch.setattr("nanochat.formats.pickle_data.MAX_BYTES", 100)
    assert "101" in refusal(b"N" * 101)


def test_fuzz() -> None:
    rng = random.Random(1)
    seeds = [pickle.dumps(value, protocol) for value in PLAIN for protocol in (2, 4)]
    for _ in range(4000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice([1, 1, 2, 5])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read_pickle(bytes(data), "x", KNOWN)
        except UserError as error:
            assert "\n" not in str(error)
