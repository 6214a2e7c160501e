"""Small checkpoints: saved, damaged on purpose, and read back."""

import errno
import functools
import hashlib
import json
import os

import numpy as np
import pytest
import torch

from nanochat.checkpoint.saving import save_checkpoint
from nanochat.checkpoint_manager import open_checkpoint
from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import RustBPETokenizer

STATES = ["model.safetensors", "optimizer.safetensors", "loader.safetensors", "rng.safetensors"]
FILES = [*STATES, "meta.json", "tokenizer.json", "manifest.json"]


@functools.cache
def tokenizer():
    return RustBPETokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20] * 4, 270)


@functools.cache
def other_tokenizer():
    return RustBPETokenizer.train_from_iterator(["ein anderer Text mit ganz anderen Wörtern " * 20] * 4, 270)


@functools.cache
def config():
    sizes = {"sequence_len": 16, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    return GPTConfig.later(vocab_size=tokenizer().get_vocab_size(), **sizes)


def save_model(run, step, model_state, with_tokenizer=None, keep_last=0, **meta):
    """A checkpoint of a model of `config()`, without the state of training."""
    meta, tokenize = {"model_config": config().to_dict(), **meta}, with_tokenizer or tokenizer()
    return save_checkpoint(run, step, model_state=model_state, meta=meta, tokenizer=tokenize, keep_last=keep_last)


def save_small(run, step, value=None, with_tokenizer=None, **kwargs):
    """A checkpoint with every file, all of whose numbers are `value` (by default the step)."""
    value = float(step if value is None else value)
    return save_checkpoint(
        run,
        step,
        model_state={"w": torch.full((3, 4), value), "b": torch.full((5,), value)},
        meta={"model_config": {}, "value": value},
        tokenizer=with_tokenizer or tokenizer(),
        optimizer_state=({"exp_avg.w": torch.full((3, 4), value)}, {"w": step}),
        loader_state={"cursor": np.int64(step)},
        rng_state={"cpu": torch.arange(8, dtype=torch.uint8)},
        **kwargs,
    )


def value_of(run, step):
    """The value of a small checkpoint; all files are verified, and agree."""
    checkpoint = open_checkpoint(run, step)
    values = {
        checkpoint.meta["value"],
        *checkpoint.model_state()["w"].flatten().tolist(),
        *dict(checkpoint.optimizer_state()[0])["exp_avg.w"].flatten().tolist(),
    }
    assert len(values) == 1
    return values.pop()


def hidden(run):
    """Hidden step folders; the lock file is not one."""
    return sorted(name for name in os.listdir(run) if name.startswith(".") and name != ".lock")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def seal(step_folder, manifest=None):
    """Write `manifest`, or one that fits the files as they are now, with a valid checksum."""
    if manifest is None:
        manifest = json.loads((step_folder / "manifest.json").read_text())
        manifest["files"] = {name: record_of(step_folder / name) for name in manifest["files"]}
    manifest.pop("checksum", None)
    manifest["checksum"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (step_folder / "manifest.json").write_text(json.dumps(manifest))


def record_of(path):
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def refusal(call, kind=UserError):
    """The message of the error that `call` raises; of one line that fits a screen."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


def assert_one_line_error(call, *words, kind=UserError):
    """`call` raises `kind` with a message of one line that contains all `words`."""
    message = refusal(call, kind)
    for word in words:
        assert str(word) in message, f"{word!r} not in {message!r}"


def assert_same_bits(found, expected):
    """Two dicts of tensors are equal, NaNs included."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        a, b = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (found[name], tensor))
        assert torch.equal(a, b), name


def awkward_tensors():
    """Views, strides, every dtype, empty tensors, NaNs, names outside ASCII."""
    stack = torch.randn(3, 4, 6)
    return {
        "view.of.stack.0": stack[0],
        "view.of.stack.1": stack[1],
        "transposed": stack[2].T,
        "strided": stack[:, ::2, 1],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 7),
        "bf16": torch.randn(5).bfloat16(),
        "fp16": torch.randn(3).half(),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "long": torch.tensor([2**62, -1]),
        "int32": torch.tensor([-(2**31)], dtype=torch.int32),
        "u16": torch.tensor([65535], dtype=torch.uint16),
        "fp8": torch.randn(3).to(torch.float8_e4m3fn),
        "grad": torch.nn.Parameter(torch.randn(2)),
        "naïve/名前": torch.tensor([float("nan"), float("-inf")]),
    }


def no_space():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_at(patch, number, calls, act=None):
    """Make call `number` of these os functions, counted together, run `act` and raise; returns the counter."""
    count = [0]

    def wrap(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == number + 1:
                if act:
                    act()
                raise no_space()
            return real(*args, **kwargs)

        patch.setattr(os, name, call)

    for name in calls:
        wrap(name)
    return count
