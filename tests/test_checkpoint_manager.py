"""Checkpoints: exact, verified, and never half there, whatever fails and whenever."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time

import filelock
import numpy as np
import pytest
import safetensors.torch
import torch
from stubs import stir

from nanochat.checkpoint import folder, tensor_file
from nanochat.checkpoint.manifest import DamagedCheckpoint, Manifest
from nanochat.checkpoint.tensor_file import read_tensors, tensor_chunks, write_file
from nanochat.checkpoint_manager import (
    CHECKPOINT_FOLDERS,
    find_run,
    list_steps,
    load_model,
    load_model_state,
    open_checkpoint,
    run_dir,
    save_checkpoint,
)
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer

FILES = [
    "model.safetensors",
    "optimizer.safetensors",
    "loader.safetensors",
    "rng.safetensors",
    "meta.json",
    "tokenizer.json",
    "manifest.json",
]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Most tests cut no power: fsync does nothing. (test_everything_is_on_the_disk_in_order watches it.)"""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20] * 4, 270)


@pytest.fixture(scope="module")
def other_tokenizer():
    return RustBPETokenizer.train_from_iterator(["ein anderer Text mit ganz anderen Wörtern " * 20] * 4, 270)


@pytest.fixture(scope="module")
def config(tokenizer):
    sizes = {"sequence_len": 16, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    return GPTConfig.later(vocab_size=tokenizer.get_vocab_size(), **sizes)


def small(value: float) -> dict[str, torch.Tensor]:
    """A model state that is recognisable by its value."""
    return {"w": torch.full((3, 4), value), "b": torch.full((5,), value)}


def save_small(run, step, tokenizer, value=None, **kwargs):
    """A checkpoint with every file, all of it telling `value` (by default the step)."""
    value = float(step if value is None else value)
    return save_checkpoint(
        run,
        step,
        model_state=small(value),
        meta={"model_config": {}, "value": value},
        tokenizer=tokenizer,
        optimizer_state=({"exp_avg.w": torch.full((3, 4), value)}, {"w": step}),
        loader_state={"cursor": np.int64(step)},
        rng_state={"cpu": torch.arange(8, dtype=torch.uint8)},
        **kwargs,
    )


def value_of(run, step):
    """The value a small checkpoint tells, all files verified and in agreement."""
    checkpoint = open_checkpoint(run, step)
    values = {
        checkpoint.meta["value"],
        *checkpoint.model_state()["w"].flatten().tolist(),
        *dict(checkpoint.optimizer_state()[0])["exp_avg.w"].flatten().tolist(),
    }
    assert len(values) == 1
    return values.pop()


def hidden(run):
    """Leftover folders; the lock file is not one."""
    return sorted(name for name in os.listdir(run) if name.startswith(".") and name != ".lock")


def flip_bit(path, bit):
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def reseal(step_folder):
    """Rewrite the manifest so that it agrees with files changed on purpose: what a careful forger would do."""
    manifest = json.loads((step_folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (step_folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    seal_manifest(step_folder, manifest)


def seal_manifest(step_folder, manifest):
    manifest.pop("checksum", None)
    manifest["checksum"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (step_folder / "manifest.json").write_text(json.dumps(manifest))


def one_line_error(call, *words, kind=UserError):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, f"{word!r} not in {message!r}"
    return message


# ---------------------------------------------------------------------------------------------------
# Safetensors files


def awkward_tensors():
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


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        a, b = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (found[name], tensor))
        assert torch.equal(a, b), name


def test_tensor_files_agree_with_the_safetensors_library(tmp_path):
    tensors = awkward_tensors()
    record = write_file(tmp_path / "ours", tensor_chunks(tensors))
    assert_same_bits(safetensors.torch.load_file(tmp_path / "ours"), tensors)
    data = (tmp_path / "ours").read_bytes()
    assert record == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

    plain = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, tmp_path / "theirs", metadata={"format": "pt"})
    found, sha256 = read_tensors(tmp_path / "theirs")
    assert_same_bits(found, tensors)
    assert sha256 == hashlib.sha256((tmp_path / "theirs").read_bytes()).hexdigest()


def test_tensors_read_do_not_share_memory(tmp_path):
    write_file(tmp_path / "file", tensor_chunks({"a": torch.zeros(4), "b": torch.zeros(4)}))
    found, _ = read_tensors(tmp_path / "file")
    found["a"].fill_(1)
    assert found["b"].sum() == 0


def test_arrays_of_any_kind_are_written(tmp_path):
    read_only = np.arange(6, dtype=np.uint16).reshape(2, 3)
    read_only.flags.writeable = False
    arrays = {
        "read_only": read_only,
        "strided": np.arange(10)[::3],
        "int": np.int64(7),
        "none": np.zeros((0, 2), "f4"),
        "nothing": np.concatenate([np.empty(0, np.uint16)]),
    }
    write_file(tmp_path / "file", tensor_chunks(arrays))
    found = {name: tensor.numpy() for name, tensor in read_tensors(tmp_path / "file")[0].items()}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\xff" * 8,
        b"\xff" * 40,
        b"\x02\0\0\0\0\0\0\0{}extra",
        *(
            len(text).to_bytes(8, "little") + text + b"\0" * 16
            for text in (
                b'{"a": 1}',
                b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}',
                b'{"a": {"dtype": "X", "shape": [4], "data_offsets": [0, 16]}}',
                b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}',
                b'{"a": {"dtype": "F32", "shape": [-4, -1], "data_offsets": [0, 16]}}',
                b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}',
            )
        ),
    ],
)
def test_garbage_is_not_a_tensor_file(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_tensors(tmp_path / "file")


# ---------------------------------------------------------------------------------------------------
# What is saved comes back


def test_layout_and_manifest(tmp_path, tokenizer):
    run = run_dir(tmp_path, "base", "d4")
    path = save_small(run, 120, tokenizer)
    assert path == tmp_path / "base_checkpoints" / "d4" / "000120"
    assert sorted(os.listdir(path)) == sorted(FILES)
    assert not hidden(run)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
    for name, record in manifest["files"].items():
        data = (path / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    assert meta["tokenizer_hash"] == tokenizer.hash and meta["optimizer_steps"] == {"w": 120} and meta["step"] == 120
    assert os.stat(path / "model.safetensors").st_mode & 0o777 == 0o666 & ~checkpoint_umask()


def checkpoint_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_only_what_was_given_is_written(tmp_path, tokenizer):
    path = save_checkpoint(tmp_path, 1, model_state=small(1), meta={"model_config": {}}, tokenizer=tokenizer)
    assert sorted(os.listdir(path)) == ["manifest.json", "meta.json", "model.safetensors", "tokenizer.json"]
    checkpoint = open_checkpoint(tmp_path)
    for state in (lambda: dict(checkpoint.optimizer_state()[0]), checkpoint.loader_state, checkpoint.rng_state):
        one_line_error(state, "was saved without", checkpoint.path)


def test_all_states_come_back_exactly(tmp_path, tokenizer):
    tensors, rng = awkward_tensors(), {"cpu": torch.get_rng_state()}
    loader = {"lane.0.rows": np.arange(12, dtype=np.uint16).reshape(3, 4), "step": np.asarray(7)}
    meta = {"model_config": {"n_layer": 4}, "user_config": {"data": "мой корпус", "lr": 0.1, "off": None}}
    save_checkpoint(
        tmp_path,
        3,
        model_state=tensors,
        meta=meta,
        tokenizer=tokenizer,
        rng_state=rng,
        loader_state=loader,
        optimizer_state=(tensors, {"a": 3, "b": 2}),
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.step == 3 and checkpoint.path == tmp_path / "000003"
    assert meta.items() <= checkpoint.meta.items()
    assert_same_bits(checkpoint.model_state(), tensors)
    assert_same_bits(dict(checkpoint.optimizer_state()[0]), tensors)
    assert checkpoint.optimizer_state()[1] == {"a": 3, "b": 2}
    assert_same_bits(checkpoint.rng_state(), rng)
    for name, array in checkpoint.loader_state().items():
        assert array.dtype == loader[name].dtype
        np.testing.assert_array_equal(array, loader[name])
    assert checkpoint.tokenizer().hash == tokenizer.hash
    text = "the lazy dog ĉ 名"
    assert checkpoint.tokenizer().encode(text) == tokenizer.encode(text)


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, model.config.vocab_size, (2, 9), generator=generator)
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)


def test_training_goes_on_bit_for_bit(tmp_path, tokenizer, config):
    def fresh(seed):
        model = GPT.create(config, seed=seed)
        groups = build_param_groups(model, OptimizerConfig(), weight_decay=0.1, ns_dtype=torch.float32)
        return model, MuonAdamW(groups), {p: name for name, p in model.named_parameters()}

    model, optimizer, names = fresh(seed=1)
    train(model, optimizer, 2, seed=5)
    save_checkpoint(
        tmp_path,
        2,
        model_state=model.state_dict(),
        meta={"model_config": config.to_dict()},
        tokenizer=tokenizer,
        optimizer_state=optimizer.named_state(names),
    )
    train(model, optimizer, 2, seed=6)

    resumed, optimizer, names = fresh(seed=2)
    checkpoint = open_checkpoint(tmp_path)
    load_model_state(resumed, checkpoint.model_state(), checkpoint.path)
    optimizer.load_named_state(names, *checkpoint.optimizer_state())
    train(resumed, optimizer, 2, seed=6)
    assert_same_bits(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("where", ["cpu", torch.device("cpu"), Runtime(torch.device("cpu"), torch.float32, "", 1)])
def test_load_model(tmp_path, tokenizer, config, where):
    model = stir(GPT.create(config, seed=3))
    meta = {"model_config": config.to_dict(), "val_bpb": 1.5}
    save_checkpoint(run_dir(tmp_path, "sft", "tiny"), 9, model_state=model.state_dict(), meta=meta, tokenizer=tokenizer)
    loaded, found_tokenizer, found_meta = load_model("sft", where, base_dir=tmp_path)
    assert not loaded.training and loaded.config == config and found_meta["val_bpb"] == 1.5
    assert found_tokenizer.hash == tokenizer.hash
    rows = torch.randint(0, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(rows), model(rows))
    assert load_model("sft", where, base_dir=tmp_path, compute_dtype=torch.bfloat16)[0].compute_dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_not_used(tmp_path, tokenizer, config, value):
    model = GPT.create(config)
    for step in (4, 5):
        save_checkpoint(
            run_dir(tmp_path, "base", "r"),
            step,
            model_state=model.state_dict(),
            meta={"model_config": config.to_dict()},
            tokenizer=tokenizer,
        )
        model.lm_head.weight.data[1, 2] = value
    with pytest.raises(UserError, match=r"not finite \(lm_head.weight\).*earlier step"):
        load_model("base", "cpu", base_dir=tmp_path)
    assert load_model("base", "cpu", base_dir=tmp_path, step=4)[2]["step"] == 4


def test_load_model_skips_a_damaged_step_only_when_free_to_choose(tmp_path, tokenizer, config, capsys):
    run = run_dir(tmp_path, "base", "tiny")
    for step in (1, 2):
        save_checkpoint(
            run,
            step,
            model_state=GPT.create(config, seed=step).state_dict(),
            meta={"model_config": config.to_dict()},
            tokenizer=tokenizer,
        )
    flip_bit(run / "000002" / "model.safetensors", 80_001)
    assert load_model("base", "cpu", base_dir=tmp_path)[2]["step"] == 1
    assert "skipping step 2" in capsys.readouterr().err
    one_line_error(lambda: load_model("base", "cpu", base_dir=tmp_path, step=2), "model.safetensors", "sha256 mismatch")


# ---------------------------------------------------------------------------------------------------
# Which run, which step


def test_find_run(tmp_path, tokenizer):
    one_line_error(lambda: find_run(tmp_path, "base", None), "base", "there is none yet", tmp_path)
    for number, tag in enumerate(["d4", "ä b", "d2"]):
        path = save_small(run_dir(tmp_path, "base", tag), 10 - number, tokenizer)
        os.utime(path / "manifest.json", ns=(10**18 + number, 10**18 + number))
    (tmp_path / "base_checkpoints" / "started" / "000005").mkdir(parents=True)
    assert find_run(tmp_path, "base", None).name == "d2"
    assert find_run(tmp_path, "base", "d4").name == "d4"
    for tag in ("d6", "started"):
        one_line_error(lambda tag=tag: find_run(tmp_path, "base", tag), tag, "d4", "d2", "ä b")
    one_line_error(lambda: find_run(tmp_path, "rl", None), "rl")
    one_line_error(lambda: find_run(tmp_path, "bose", None), "bose", *CHECKPOINT_FOLDERS)


@pytest.mark.parametrize("tag", ["", ".", "..", "a/b", "../x", "a\\b", "\0", ".hidden"])
def test_a_tag_is_a_folder_name(tmp_path, tag):
    one_line_error(lambda: run_dir(tmp_path, "base", tag), "tag")


def test_missing_steps_are_named(tmp_path, tokenizer):
    run = tmp_path / "run"
    assert list_steps(run) == []
    one_line_error(lambda: open_checkpoint(run), run, "no such folder")
    for step in (20, 3, 1_000_000):
        save_small(run, step, tokenizer)
    assert list_steps(run) == [3, 20, 1_000_000]
    one_line_error(lambda: open_checkpoint(run, 7), "step 7", "3, 20, 1000000")
    (run / "000020" / "manifest.json").unlink()
    (run / "notes").mkdir()
    (run / "metrics.jsonl").touch()
    assert list_steps(run) == [3, 1_000_000]
    one_line_error(lambda: open_checkpoint(run, 20), "000020 has no manifest.json", "3, 1000000")


# ---------------------------------------------------------------------------------------------------
# Damage


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip_middle(path):
    flip_bit(path, path.stat().st_size * 4)


def grow(path):
    with open(path, "ab") as file:
        file.write(b" ")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut_short, empty, flip_middle, grow, os.unlink])
def test_damage_is_found_named_and_skipped(tmp_path, tokenizer, capsys, name, damage):
    for step in (1, 2):
        save_small(tmp_path, step, tokenizer)
    damage(tmp_path / "000002" / name)
    if (name, damage) == ("manifest.json", grow):
        assert open_checkpoint(tmp_path).step == 2  # a space more changes nothing
        return
    message = one_line_error(lambda: open_checkpoint(tmp_path, 2), tmp_path / "000002", name, kind=DamagedCheckpoint)
    if damage is flip_middle and name != "manifest.json":
        assert "sha256 mismatch" in message
    assert open_checkpoint(tmp_path).step == 1
    warning = capsys.readouterr().err
    assert (name, damage) == ("manifest.json", os.unlink) or ("skipping step 2" in warning and name in warning)


@pytest.mark.parametrize("name", FILES[:4])
def test_damage_after_opening_is_found_on_reading(tmp_path, tokenizer, name):
    save_small(tmp_path, 1, tokenizer)
    checkpoint = open_checkpoint(tmp_path, verify=False)
    state = getattr(checkpoint, f"{name.split('.')[0]}_state")
    read = (lambda: dict(state()[0])) if name == "optimizer.safetensors" else state
    read()
    for bit in (3, 100, (tmp_path / "000001" / name).stat().st_size * 8 - 3):
        flip_bit(tmp_path / "000001" / name, bit)
        one_line_error(read, name, "damaged", kind=DamagedCheckpoint)
        flip_bit(tmp_path / "000001" / name, bit)
    cut_short(tmp_path / "000001" / name)
    one_line_error(read, name, "damaged", kind=DamagedCheckpoint)


def test_the_manifest_guards_itself(tmp_path, tokenizer):
    save_small(tmp_path, 1, tokenizer)
    path = tmp_path / "000001" / "manifest.json"
    expected, size, found = Manifest.read(path.parent), path.stat().st_size, 0
    for bit in range(0, size * 8, 5):  # every byte, every position
        flip_bit(path, bit)
        try:
            assert Manifest.read(path.parent) == expected  # white space may change without harm
        except DamagedCheckpoint:
            found += 1
        flip_bit(path, bit)
    assert found > 0.9 * size * 8 / 5


def test_when_everything_is_damaged(tmp_path, tokenizer):
    for step in (1, 2):
        cut_short(save_small(tmp_path, step, tokenizer) / "model.safetensors")
    one_line_error(lambda: open_checkpoint(tmp_path), "every checkpoint", "000002", "model.safetensors")


@pytest.mark.parametrize("name", ["meta.json", "manifest.json"])
def test_another_version_is_an_error_not_a_damage(tmp_path, tokenizer, name):
    for step in (1, 2):
        path = save_small(tmp_path, step, tokenizer)
    content = json.loads((path / name).read_text()) | {"version": 99}
    (path / name).write_text(json.dumps(content))
    seal_manifest(path, content) if name == "manifest.json" else reseal(path)
    for step in (2, None):  # newer work is not passed over in favour of older
        one_line_error(lambda step=step: open_checkpoint(tmp_path, step), name, "version 99", "version 1")


def test_a_foreign_tokenizer(tmp_path, tokenizer, other_tokenizer, config):
    path = save_checkpoint(
        run_dir(tmp_path, "base", "d2"),
        1,
        model_state=GPT.create(config).state_dict(),
        meta={"model_config": config.to_dict()},
        tokenizer=tokenizer,
    )
    other_tokenizer.save(path)
    one_line_error(lambda: load_model("base", "cpu", base_dir=tmp_path), "tokenizer.json", "damaged")
    reseal(path)
    one_line_error(lambda: load_model("base", "cpu", base_dir=tmp_path), path, "not the one", tokenizer.hash[:12])
    one_line_error(open_checkpoint(path.parent).tokenizer, path, "not the one", other_tokenizer.hash[:12])
    with pytest.raises(AssertionError):
        save_checkpoint(
            path.parent,
            2,
            model_state=small(1),
            tokenizer=other_tokenizer,
            meta={"model_config": {}, "tokenizer_hash": tokenizer.hash},
        )


def test_weights_that_do_not_fit(tmp_path, tokenizer, config):
    state = GPT.create(config).state_dict()
    name = "transformer.h.0.attn.c_q.weight"
    wrong = {
        f"{name} is missing": {k: v for k, v in state.items() if k != name},
        "extra.weight is not in the model": state | {"extra.weight": torch.zeros(1)},
        f"{name} has shape (3, 3), the model's has (32, 32)": state | {name: torch.zeros(3, 3)},
        "more": {},
    }
    for step, (words, tensors) in enumerate(wrong.items()):
        path = save_checkpoint(
            run_dir(tmp_path, "base", "d2"),
            step,
            model_state=tensors,
            tokenizer=tokenizer,
            meta={"model_config": config.to_dict()},
        )
        one_line_error(lambda: load_model("base", "cpu", base_dir=tmp_path), words, path)
    unknown = {"model_config": {**config.to_dict(), "n_moons": 2}}
    save_checkpoint(run_dir(tmp_path, "base", "d2"), 9, model_state=state, tokenizer=tokenizer, meta=unknown)
    one_line_error(lambda: load_model("base", "cpu", base_dir=tmp_path), "n_moons")


# ---------------------------------------------------------------------------------------------------
# Keeping the last few


def test_keep_last(tmp_path, tokenizer):
    for step in range(5):
        save_small(tmp_path, step, tokenizer)
    assert list_steps(tmp_path) == [0, 1, 2, 3, 4]
    save_small(tmp_path, 5, tokenizer, keep_last=3)
    assert list_steps(tmp_path) == [3, 4, 5]
    save_small(tmp_path, 6, tokenizer, keep_last=1)
    assert list_steps(tmp_path) == [6] and not hidden(tmp_path)
    save_small(tmp_path, 6, tokenizer, keep_last=1)
    assert list_steps(tmp_path) == [6]


def test_keep_last_after_going_back_keeps_what_was_just_written(tmp_path, tokenizer):
    for step in (10, 20, 30, 40):
        save_small(tmp_path, step, tokenizer)
    save_small(tmp_path, 25, tokenizer, keep_last=2)
    assert list_steps(tmp_path) == [20, 25, 30, 40]


def test_a_damaged_step_does_not_count_as_kept(tmp_path, tokenizer):
    for step in (1, 2, 3):
        save_small(tmp_path, step, tokenizer)
    cut_short(tmp_path / "000003" / "optimizer.safetensors")
    save_small(tmp_path, 4, tokenizer, keep_last=2)
    assert list_steps(tmp_path) == [2, 3, 4]
    assert value_of(tmp_path, 2) == 2


def test_nothing_is_deleted_by_a_save_that_fails(tmp_path, tokenizer, monkeypatch):
    for step in (1, 2, 3):
        save_small(tmp_path, step, tokenizer)
    with monkeypatch.context() as patch:
        fail_at(patch, 0, ("fsync",))
        with pytest.raises(OSError):
            save_small(tmp_path, 4, tokenizer, keep_last=1)
    assert [value_of(tmp_path, step) for step in list_steps(tmp_path)] == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------
# Failures while saving


CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def fail_at(monkeypatch, number, calls, act=None):
    """Make the `number`-th of these os calls fail, counted together; returns the counter."""
    count = [0]

    def wrap(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == number + 1:
                if act:
                    act()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in calls:
        wrap(name)
    return count


@pytest.mark.parametrize("step", [2, 3], ids=["same step again", "a new step"])
def test_a_full_disk_at_any_moment_loses_nothing(tmp_path, tokenizer, monkeypatch, step):
    failed = 0
    for number in range(100):
        run = tmp_path / str(number)
        for old in (1, 2):
            save_small(run, old, tokenizer)
        with monkeypatch.context() as patch:
            count = fail_at(patch, number, ("fsync", "rename", "replace", "mkdir"))
            try:
                save_small(run, step, tokenizer, value=77)
            except OSError as error:
                failed += 1
                assert error.errno == errno.ENOSPC
                assert value_of(run, 2) == 2
            else:
                assert value_of(run, step) == 77
        if count[0] <= number:
            break  # nothing was left to fail
        assert not hidden(run)
        assert list_steps(run)[:2] == [1, 2] and value_of(run, 1) == 1
        save_small(run, step, tokenizer, value=78)
        assert value_of(run, step) == 78
        shutil.rmtree(run)
    assert failed >= 12


@pytest.mark.parametrize("budget", [0, 100, 300, 600])
def test_a_write_that_fails_half_way(tmp_path, tokenizer, monkeypatch, budget):
    save_small(tmp_path, 1, tokenizer)

    left = [budget]

    def limited_open(*args, **kwargs):
        file = open(*args, **kwargs)  # noqa: SIM115
        real = file.write

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *exc):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, data):
                left[0] -= memoryview(data).nbytes
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(data)

        return Full()

    monkeypatch.setattr(tensor_file, "open", limited_open, raising=False)
    with pytest.raises(OSError, match="No space left"):
        save_small(tmp_path, 1, tokenizer, value=5)
    assert not hidden(tmp_path) and value_of(tmp_path, 1) == 1


def test_a_really_full_disk(tmp_path, tokenizer):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small disk")
    try:
        save_small(disk / "run", 1, tokenizer)
        for step in (1, 2):
            with pytest.raises(OSError) as caught:
                save_checkpoint(
                    disk / "run",
                    step,
                    model_state={"w": torch.zeros(2**20)},
                    meta={"model_config": {}},
                    tokenizer=tokenizer,
                )
            assert caught.value.errno == errno.ENOSPC
            assert list_steps(disk / "run") == [1] and value_of(disk / "run", 1) == 1 and not hidden(disk / "run")
        save_small(disk / "run", 2, tokenizer)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written(tmp_path, tokenizer):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        save_small(tmp_path / "file" / "run", 1, tokenizer)
    if os.geteuid():
        save_small(tmp_path / "run", 1, tokenizer)
        (tmp_path / "run").chmod(0o500)
        with pytest.raises(PermissionError):
            save_small(tmp_path / "run", 2, tokenizer)
        assert value_of(tmp_path / "run", 1) == 1
        (tmp_path / "run").chmod(0o700)


def test_an_interrupt_leaves_nothing_behind(tmp_path, tokenizer):
    class Interrupting:
        hash = tokenizer.hash

        def save(self, folder):
            raise KeyboardInterrupt

    save_small(tmp_path, 1, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        save_small(tmp_path, 2, Interrupting())
    assert list_steps(tmp_path) == [1] and not hidden(tmp_path)


def test_half_of_a_withdrawn_step_never_passes_for_whole(tmp_path, tokenizer, monkeypatch):
    save_small(tmp_path, 1, tokenizer)

    def half_way(folder):
        os.unlink(folder / "model.safetensors")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        real = folder.fsync
        fail = OSError(errno.EIO, os.strerror(errno.EIO))
        patch.setattr(folder, "fsync", lambda path: real(path) if path != tmp_path else raise_(fail))
        patch.setattr(folder.shutil, "rmtree", half_way)
        with pytest.raises(OSError):
            save_small(tmp_path, 1, tokenizer, value=77)
    assert hidden(tmp_path) == [".000001.new"]
    assert value_of(tmp_path, 1) == 1


def raise_(error):
    raise error


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to see what is synced")
def test_everything_is_on_the_disk_in_order(tmp_path, tokenizer, monkeypatch):
    run, events, rename = tmp_path / "runs" / "d4", [], os.rename

    def watched_rename(source, target):
        events.append(("rename", os.path.basename(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: events.append(("fsync", os.readlink(f"/proc/self/fd/{handle}"))))
    monkeypatch.setattr(os, "rename", watched_rename)
    save_small(run, 1, tokenizer)
    new = str(run / ".000001.new")
    # The folders made on the way are entries of their parents.
    assert {events[0], events[1]} == {("fsync", str(tmp_path)), ("fsync", str(tmp_path / "runs"))}
    manifest = next(i for i, (_, path) in enumerate(events) if path.startswith(f"{new}/.manifest.json"))
    synced = {path for what, path in events[:manifest] if what == "fsync"}
    assert {f"{new}/{name}" for name in FILES if name != "manifest.json"} | {new} <= synced
    assert events[manifest + 1 :] == [("fsync", new), ("rename", "000001"), ("fsync", str(run))]


# ---------------------------------------------------------------------------------------------------
# Death while saving


def die_at(number, save):
    """Run `save` in a child that kills itself just before its `number`-th file operation; True if it died."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            fail_at(pytest.MonkeyPatch(), number, CALLS, act=lambda: os.kill(os.getpid(), signal.SIGKILL))
            save()
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer Pythons dislike forking with threads about
@pytest.mark.parametrize("step", [2, 3], ids=["same step again", "a new step"])
def test_killed_at_any_moment_loses_nothing(tmp_path, tokenizer, step):
    seen = set()
    for number in range(200):
        run = tmp_path / str(number)
        for old in (1, 2):
            save_small(run, old, tokenizer)
        died = die_at(number, lambda: save_small(run, step, tokenizer, value=77, keep_last=2))  # noqa: B023
        steps = list_steps(run)
        assert 2 in steps and set(steps) <= {1, 2, 3}
        values = {s: value_of(run, s) for s in steps}  # every step that shows is whole
        assert values.pop(1, 1) == 1
        assert values[2] in ((2, 77) if step == 2 else (2,)) and values.get(3, 77) == 77
        seen.add(values.get(step))
        save_small(run, 5, tokenizer)
        assert not hidden(run) and value_of(run, 5) == 5
        shutil.rmtree(run)
        if not died:
            break
    assert not died and number > 15
    assert seen == {2 if step == 2 else None, 77}


def test_only_a_dead_process_is_cleaned_up_after(tmp_path, tokenizer):
    save_small(tmp_path, 1, tokenizer)
    os.rename(tmp_path / "000001", tmp_path / ".000001.new")
    (tmp_path / ".000002.new").mkdir()
    with filelock.FileLock(tmp_path / ".lock"):  # a living one is about to rename it
        assert list_steps(tmp_path) == []
    assert list_steps(tmp_path) == [1]
    assert hidden(tmp_path) == [".000002.new"]  # a reader publishes, only the next save deletes
    save_small(tmp_path, 3, tokenizer)
    assert not hidden(tmp_path) and list_steps(tmp_path) == [1, 3]


def test_a_swap_cut_in_two_is_put_right(tmp_path, tokenizer):
    save_small(tmp_path, 1, tokenizer)
    os.rename(tmp_path / "000001", tmp_path / ".000001.old")
    assert value_of(tmp_path, 1) == 1
    os.rename(tmp_path / "000001", tmp_path / ".000001.old")
    save_small(tmp_path / "elsewhere", 1, tokenizer, value=2)
    os.rename(tmp_path / "elsewhere" / "000001", tmp_path / ".000001.new")
    assert value_of(tmp_path, 1) == 2  # the newer of two complete ones


def test_two_threads_take_turns(tmp_path, tokenizer):
    def save(step):
        time.sleep(0.001 * step)
        save_small(tmp_path, step, tokenizer, keep_last=2)

    threads = [threading.Thread(target=save, args=(step,)) for step in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list_steps(tmp_path)[-1] == 5 and not hidden(tmp_path)
    for step in list_steps(tmp_path):
        assert value_of(tmp_path, step) == step


def test_a_folder_that_will_not_go_does_not_fail_the_save(tmp_path, tokenizer, monkeypatch, capsys):
    for step in (1, 2):
        save_small(tmp_path, step, tokenizer)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(folder.shutil, "rmtree", refuse)
        save_small(tmp_path, 3, tokenizer, keep_last=1)
    assert list_steps(tmp_path) == [3]
    assert "cannot delete" in capsys.readouterr().err
    save_small(tmp_path, 4, tokenizer)
    assert not hidden(tmp_path)
