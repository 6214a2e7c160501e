"""Checkpoints come back exactly; damage is found, named and skipped."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from checkpoint_helpers import (
    FILES,
    STATES,
    assert_one_line_error,
    assert_same_bits,
    awkward_tensors,
    config,
    fail_at,
    flip_bit,
    hidden,
    other_tokenizer,
    record_of,
    save_model,
    save_small,
    seal,
    tokenizer,
    truncate,
    value_of,
)
from ranks import run_ranks
from stubs import stir

from nanochat import checkpoint_manager
from nanochat.checkpoint.folder import list_steps
from nanochat.checkpoint.manifest import DamagedCheckpoint, Manifest
from nanochat.checkpoint.runs import CHECKPOINT_FOLDERS, find_run, run_dir
from nanochat.checkpoint.saving import save_checkpoint
from nanochat.checkpoint_manager import load_model, load_model_state, open_checkpoint
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.runtime import Runtime


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """fsync does nothing: it takes time and no test here cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# ---------------------------------------------------------------------------------------------------
# Saving and loading


def test_layout_and_manifest(tmp_path):
    run = run_dir(tmp_path, "base", "d4")
    path = save_small(run, 120)
    assert path == tmp_path / "base_checkpoints" / "d4" / "000120"
    assert sorted(os.listdir(path)) == sorted(FILES)
    assert not hidden(run)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"] == {name: record_of(path / name) for name in FILES if name != "manifest.json"}
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    assert meta["tokenizer_hash"] == tokenizer().hash and meta["optimizer_steps"] == {"w": 120} and meta["step"] == 120
    os.umask(mask := os.umask(0))
    for name in FILES:
        assert os.stat(path / name).st_mode & 0o777 == 0o666 & ~mask


def test_only_what_was_given_is_written(tmp_path):
    path = save_model(tmp_path, 1, {"w": torch.ones(2)})
    assert sorted(os.listdir(path)) == ["manifest.json", "meta.json", "model.safetensors", "tokenizer.json"]
    checkpoint = open_checkpoint(tmp_path)
    for state in (lambda: dict(checkpoint.optimizer_state()[0]), checkpoint.loader_state, checkpoint.rng_state):
        assert_one_line_error(state, "safetensors", checkpoint.path)


def test_all_states_come_back_exactly(tmp_path):
    tensors, rng = awkward_tensors(), {"cpu": torch.get_rng_state()}
    loader = {"lane.0.rows": np.arange(12, dtype=np.uint16).reshape(3, 4), "step": np.asarray(7)}
    meta = {"model_config": {"n_layer": 4}, "user_config": {"data": "мой корпус", "lr": 0.1, "off": None}}
    save_checkpoint(
        tmp_path,
        3,
        model_state=tensors,
        meta=meta,
        tokenizer=tokenizer(),
        rng_state=rng,
        loader_state=loader,
        optimizer_state=(tensors, {"a": 3, "b": 2}),
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.step == 3 and checkpoint.path == tmp_path / "000003"
    assert meta.items() <= checkpoint.meta.items()
    assert_same_bits(checkpoint.model_state(), tensors)
    optimizer, steps = checkpoint.optimizer_state()
    assert_same_bits(dict(optimizer), tensors)
    assert steps == {"a": 3, "b": 2}
    assert_same_bits(checkpoint.rng_state(), rng)
    for name, array in checkpoint.loader_state().items():
        assert array.dtype == loader[name].dtype
        np.testing.assert_array_equal(array, loader[name])
    assert checkpoint.tokenizer().hash == tokenizer().hash
    text = "the lazy dog ĉ 名"
    assert checkpoint.tokenizer().encode(text) == tokenizer().encode(text)


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, model.config.vocab_size, (2, 9), generator=generator)
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)


def test_training_continues_bit_for_bit(tmp_path):
    def fresh(seed):
        model = GPT.create(config(), seed=seed)
        groups = build_param_groups(model, OptimizerConfig(), weight_decay=0.1, ns_dtype=torch.float32)
        return model, MuonAdamW(groups), {p: name for name, p in model.named_parameters()}

    model, optimizer, names = fresh(seed=1)
    train(model, optimizer, 2, seed=5)
    save_checkpoint(
        tmp_path,
        2,
        model_state=model.state_dict(),
        meta={"model_config": config().to_dict()},
        tokenizer=tokenizer(),
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
def test_load_model(tmp_path, where):
    model = stir(GPT.create(config(), seed=3))
    save_model(run_dir(tmp_path, "sft", "tiny"), 9, model.state_dict(), val_bpb=1.5)
    loaded, found_tokenizer, found_meta = load_model("sft", where, base_dir=tmp_path)
    assert not loaded.training and loaded.config == config() and found_meta["val_bpb"] == 1.5
    assert found_tokenizer.hash == tokenizer().hash
    rows = torch.randint(0, config().vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(rows), model(rows))
    assert found_meta["model_tag"] == "tiny"
    if not isinstance(where, Runtime):
        in_bf16, _, _ = load_model("sft", where, base_dir=tmp_path, compute_dtype=torch.bfloat16)
        assert in_bf16.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_weights_are_refused(tmp_path, value):
    model = GPT.create(config())
    for step in (4, 5):
        save_model(run_dir(tmp_path, "base", "r"), step, model.state_dict())
        model.lm_head.weight.data[1, 2] = value
    assert_one_line_error(lambda: load_model("base", "cpu", base_dir=tmp_path), "000005", "lm_head.weight", "step")
    assert load_model("base", "cpu", base_dir=tmp_path, step=4)[2]["step"] == 4


NAME = "transformer.h.0.attn.c_q.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop(NAME), [f"{NAME} is missing"]),
        (lambda state: state.update({"extra.weight": torch.zeros(1)}), ["extra.weight"]),
        (lambda state: state.update({NAME: torch.zeros(3, 3)}), [NAME, "(3, 3)", "(32, 32)"]),
        (lambda state: state.clear(), ["is missing", "more"]),
    ],
    ids=["missing", "extra", "shape", "empty"],
)
def test_weights_that_do_not_fit(tmp_path, change, words):
    state = dict(GPT.create(config()).state_dict())
    change(state)
    path = save_model(run_dir(tmp_path, "base", "d2"), 1, state)
    assert_one_line_error(lambda: load_model("base", "cpu", base_dir=tmp_path), *words, path)


def test_an_unknown_field_of_the_model_config_is_named(tmp_path):
    save_model(run_dir(tmp_path, "base", "d2"), 9, {}, model_config={**config().to_dict(), "n_moons": 2})
    assert_one_line_error(lambda: load_model("base", "cpu", base_dir=tmp_path), "n_moons")


def test_another_tokenizer(tmp_path):
    path = save_model(run_dir(tmp_path, "base", "d2"), 1, GPT.create(config()).state_dict())
    other_tokenizer().save(path)
    assert_one_line_error(
        lambda: load_model("base", "cpu", base_dir=tmp_path), "tokenizer.json", kind=DamagedCheckpoint
    )
    seal(path)
    hashes = [t.hash[:12] for t in (tokenizer(), other_tokenizer())]
    assert_one_line_error(lambda: load_model("base", "cpu", base_dir=tmp_path), path, *hashes)
    assert_one_line_error(open_checkpoint(path.parent).tokenizer, path, *hashes)
    with pytest.raises(AssertionError):
        save_model(path.parent, 2, {}, with_tokenizer=other_tokenizer(), tokenizer_hash=tokenizer().hash)


# ---------------------------------------------------------------------------------------------------
# Which run, which step


def test_find_run(tmp_path):
    assert_one_line_error(lambda: find_run(tmp_path, "base"), "base", "scripts.base_train", tmp_path)
    for number, tag in enumerate(["d4", "ä b", "d2"]):
        path = save_small(run_dir(tmp_path, "base", tag), 10 - number)
        os.utime(path / "manifest.json", ns=(10**18 + number, 10**18 + number))
    (tmp_path / "base_checkpoints" / "started" / "000005").mkdir(parents=True)
    assert find_run(tmp_path, "base").name == "d2"
    assert find_run(tmp_path, "base", "d4").name == "d4"
    for tag in ("d6", "started"):
        assert_one_line_error(lambda tag=tag: find_run(tmp_path, "base", tag), tag, "d4", "d2", "ä b")
    assert_one_line_error(lambda: find_run(tmp_path, "rl"), "rl")
    assert_one_line_error(lambda: find_run(tmp_path, "bose"), "bose", *CHECKPOINT_FOLDERS)


@pytest.mark.parametrize("tag", ["", ".", "..", "a/b", "../x", "a\\b", "\0", ".hidden"])
def test_a_tag_is_a_folder_name(tmp_path, tag):
    assert_one_line_error(lambda: run_dir(tmp_path, "base", tag), "tag")


def test_missing_steps_are_named(tmp_path):
    run = tmp_path / "run"
    assert list_steps(run) == []
    assert_one_line_error(lambda: open_checkpoint(run), run)
    for step in (20, 3, 1_000_000):
        save_small(run, step)
    assert list_steps(run) == [3, 20, 1_000_000]
    assert_one_line_error(lambda: open_checkpoint(run, 7), "step 7", "3, 20, 1000000")
    (run / "000020" / "manifest.json").unlink()
    (run / "notes").mkdir()
    (run / "metrics.jsonl").touch()
    assert list_steps(run) == [3, 1_000_000]
    assert_one_line_error(lambda: open_checkpoint(run, 20), "000020", "manifest.json", "3, 1000000")


# ---------------------------------------------------------------------------------------------------
# Damage


def empty(path):
    os.truncate(path, 0)


def flip_middle(path):
    flip_bit(path, path.stat().st_size * 4)


def grow(path):
    with open(path, "ab") as file:
        file.write(b" ")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, empty, flip_middle, grow, os.unlink])
def test_damage_is_found_named_and_skipped(tmp_path, capsys, name, damage):
    for step in (1, 2):
        save_small(tmp_path, step)
    damage(tmp_path / "000002" / name)
    if (name, damage) == ("manifest.json", grow):
        assert open_checkpoint(tmp_path).step == 2  # trailing white space changes nothing
        return
    assert_one_line_error(lambda: open_checkpoint(tmp_path, 2), tmp_path / "000002", name, kind=DamagedCheckpoint)
    assert open_checkpoint(tmp_path).step == 1
    warning = capsys.readouterr().err
    assert (name, damage) == ("manifest.json", os.unlink) or ("step 2" in warning and name in warning)


@pytest.mark.parametrize("name", STATES)
def test_damage_after_opening_is_found_on_reading(tmp_path, name):
    path = save_small(tmp_path, 1) / name
    checkpoint = open_checkpoint(tmp_path, verify=False)
    state = getattr(checkpoint, path.stem + "_state")
    read = (lambda: dict(state()[0])) if path.stem == "optimizer" else state
    read()
    for bit in (3, 100, path.stat().st_size * 8 - 3):
        flip_bit(path, bit)
        assert_one_line_error(read, name, kind=DamagedCheckpoint)
        flip_bit(path, bit)
    read()
    truncate(path)
    assert_one_line_error(read, name, kind=DamagedCheckpoint)


def test_a_flipped_bit_in_the_manifest_is_found(tmp_path):
    path = save_small(tmp_path, 1) / "manifest.json"
    expected, size, found = Manifest.read(path.parent), path.stat().st_size, 0
    for bit in range(0, size * 8, 5):  # every byte, every position
        flip_bit(path, bit)
        try:
            assert Manifest.read(path.parent) == expected  # white space may change without harm
        except DamagedCheckpoint:
            found += 1
        flip_bit(path, bit)
    assert found > 0.9 * size * 8 / 5


def test_when_every_step_is_damaged(tmp_path):
    for step in (1, 2):
        truncate(save_small(tmp_path, step) / "model.safetensors")
    assert_one_line_error(lambda: open_checkpoint(tmp_path), tmp_path, "000002", "model.safetensors")


def test_load_model_skips_a_damaged_step_unless_one_is_requested(tmp_path, capsys):
    run = run_dir(tmp_path, "base", "tiny")
    for step in (1, 2):
        save_model(run, step, GPT.create(config(), seed=step).state_dict())
    flip_bit(run / "000002" / "model.safetensors", 80_001)
    assert load_model("base", "cpu", base_dir=tmp_path)[2]["step"] == 1
    assert "step 2" in capsys.readouterr().err
    with pytest.raises(DamagedCheckpoint, match=r"000002/model.safetensors"):
        load_model("base", "cpu", base_dir=tmp_path, step=2)


def test_another_version_is_an_error_not_damage(tmp_path):
    for step in (1, 2):
        path = save_small(tmp_path, step)
    content = json.loads((path / "manifest.json").read_text()) | {"version": 99}
    seal(path, content)
    for step in (2, None):  # the newer step is not skipped in favour of the older
        assert_one_line_error(
            lambda step=step: open_checkpoint(tmp_path, step), "manifest.json", "version 99", "version 1"
        )


def test_a_folder_that_holds_another_steps_files_is_damaged(tmp_path, capsys):
    for step in (10, 20):
        save_small(tmp_path, step)
    shutil.rmtree(tmp_path / "000020")
    shutil.copytree(tmp_path / "000010", tmp_path / "000020")
    manifest = json.loads((tmp_path / "000020" / "manifest.json").read_text())
    for old_format in (False, True):
        if old_format:  # whose manifests had no step
            seal(tmp_path / "000020", {name: value for name, value in manifest.items() if name != "step"})
        assert_one_line_error(lambda: open_checkpoint(tmp_path, 20), "000020", "step 10", kind=DamagedCheckpoint)
        assert open_checkpoint(tmp_path).step == 10
        assert "step 20" in capsys.readouterr().err
    (tmp_path / "000020" / "manifest.json").write_text(json.dumps(manifest))
    save_small(tmp_path, 30, keep_last=2)
    assert list_steps(tmp_path) == [10, 20, 30], "it does not count as kept"


# ---------------------------------------------------------------------------------------------------
# Reading while a run saves and deletes


@pytest.fixture
def pruned(tmp_path, monkeypatch):
    """A run with step 1; once a reader has hashed NAME of it, step 2 replaces it. Calling it sets NAME."""
    run, real, moment = run_dir(tmp_path, "base", "tiny"), Manifest.check_hash, []

    def check_hash(self, name, sha256=None):
        real(self, name, sha256)
        if [name] == moment:
            moment.clear()
            save_model(run, 2, GPT.create(config(), seed=2).state_dict(), keep_last=1)

    save_model(run, 1, GPT.create(config(), seed=1).state_dict())
    monkeypatch.setattr(Manifest, "check_hash", check_hash)
    return run, moment.append


@pytest.mark.parametrize("name", ["meta.json", "model.safetensors", "tokenizer.json"])
def test_a_reader_whose_step_is_deleted_takes_the_newer_one(tmp_path, capsys, pruned, name):
    run, set_moment = pruned
    set_moment(name)
    model, _, meta = load_model("base", "cpu", base_dir=tmp_path)
    expected = GPT.create(config(), seed=meta["step"])
    assert_same_bits(model.state_dict(), expected.state_dict())
    assert list_steps(run) == [2] and not capsys.readouterr().err


def test_a_step_that_was_requested_and_is_deleted_meanwhile_is_named(tmp_path, pruned):
    pruned[1]("meta.json")
    assert_one_line_error(lambda: load_model("base", "cpu", base_dir=tmp_path, step=1), "000001")


def load_after_a_save(runtime, base, gate):
    """The step that this rank loads; before rank 1 reads, step 2 is saved."""
    real = checkpoint_manager.open_checkpoint

    def later(run, step=None, verify=True):
        if runtime.rank == 1 and verify is False and not (run / "000002").exists():
            save_model(run, 2, GPT.create(config(), seed=2).state_dict(), keep_last=gate)
        return real(run, step, verify)

    checkpoint_manager.open_checkpoint = later
    return load_model("base", runtime, base_dir=base)[2]["step"]


@pytest.mark.parametrize(("keep_last", "step"), [(0, 1), (1, 2)])
def test_all_ranks_load_the_same_step(tmp_path, keep_last, step):
    save_model(run_dir(tmp_path, "base", "tiny"), 1, GPT.create(config(), seed=1).state_dict())
    assert run_ranks(2, load_after_a_save, tmp_path, keep_last) == [step, step]


# ---------------------------------------------------------------------------------------------------
# Keeping the last few


@pytest.mark.parametrize(
    ("before", "step", "keep_last", "after"),
    [
        (range(5), 5, 0, [0, 1, 2, 3, 4, 5]),
        (range(5), 5, 3, [3, 4, 5]),
        (range(5), 6, 1, [6]),
        ([6], 6, 1, [6]),
        ([10, 20, 30, 40], 25, 2, [20, 25, 30, 40]),  # resumed from 20: later steps stay
    ],
)
def test_keep_last(tmp_path, before, step, keep_last, after):
    for old in before:
        save_small(tmp_path, old)
    save_small(tmp_path, step, keep_last=keep_last)
    assert list_steps(tmp_path) == after and not hidden(tmp_path)


def test_a_damaged_step_does_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        save_small(tmp_path, step)
    truncate(tmp_path / "000003" / "optimizer.safetensors")
    save_small(tmp_path, 4, keep_last=2)
    assert list_steps(tmp_path) == [2, 3, 4]
    assert value_of(tmp_path, 2) == 2


def test_a_failed_save_deletes_nothing(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save_small(tmp_path, step)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        fail_at(patch, 0, ("fsync",))
        save_small(tmp_path, 4, keep_last=1)
    assert [value_of(tmp_path, step) for step in list_steps(tmp_path)] == [1, 2, 3]
