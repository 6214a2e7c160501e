"""Files that others wrote: damaged, of wrong types, huge or no files at all. Read right, or refused in one line."""

import json
import os
import pickle
import random
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_helpers import STATES, config, refusal, seal, tokenizer
from export_helpers import export, make_model
from hostile_files import ODD_FILES, fifo, huge, mutate_bytes, mutate_file, reseal
from import_helpers import make_model as make_published, write_published

from nanochat.checkpoint.runs import run_dir
from nanochat.checkpoint.saving import save_checkpoint
from nanochat.checkpoint.tensor_file import read_shapes, read_tensors, tensor_chunks, write_file
from nanochat.checkpoint_manager import load_model, open_checkpoint
from nanochat.common import UserError
from nanochat.common.files import JSON_BYTES, read_file, read_json
from nanochat.data.batches import saved_numbers
from nanochat.data.corpus import STATE_KEY, BadShards
from nanochat.formats.read_model import read_model
from nanochat.gpt import GPT
from nanochat.planning.law import Law
from nanochat.report import load_report, record_stage, render_report
from nanochat.tokenizer import RustBPETokenizer

MUTATIONS = 200


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with one complete step of a small model."""
    base = tmp_path_factory.mktemp("saved")
    model = GPT.create(config(), seed=3)
    save_checkpoint(
        run_dir(base, "base", "tiny"),
        5,
        model_state=model.state_dict(),
        meta={
            "model_config": config().to_dict(),
            "plan": {"num_steps": 5, "total_batch_tokens": 32},
            "progress": {"step": 5, "val_bpb": None, "seconds": 1.5},
            "user_config": {"data": "starter", "depth": 2},
        },
        tokenizer=tokenizer(),
        optimizer_state=({"exp_avg.lm_head.weight": torch.zeros(3, 4)}, {"lm_head.weight": 5}),
        loader_state={"cursor": np.arange(6)},
        rng_state={"cpu": torch.get_rng_state()},
    )
    return base


@pytest.fixture
def step(saved: Path, tmp_path: Path) -> Path:
    """The folder of the step, in a copy."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return run_dir(tmp_path, "base", "tiny") / "000005"


def load(step: Path) -> dict[str, Any]:
    """Everything in the checkpoint; returns its meta."""
    _, _, meta = load_model("base", "cpu", base_dir=step.parent.parent.parent)
    checkpoint = open_checkpoint(step.parent, verify=False)
    for state in (lambda: dict(checkpoint.optimizer_state()[0]), checkpoint.loader_state, checkpoint.rng_state):
        state()
    return meta


def test_a_mutated_checkpoint_is_loaded_right_or_refused(saved: Path, tmp_path: Path) -> None:
    outcomes = Counter[tuple[str, bool]]()
    names = sorted(path.name for path in (run_dir(saved, "base", "tiny") / "000005").iterdir())
    for number in range(MUTATIONS):
        rng = random.Random(number)
        base = tmp_path / str(number)
        shutil.copytree(saved, base)
        step, name = run_dir(base, "base", "tiny") / "000005", rng.choice(names)
        mutate_file(step / name, rng)
        if rng.random() < 0.8:
            reseal(step, name)
        began = time.perf_counter()
        try:
            load(step)
            outcomes[name, True] += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, number
            outcomes[name, False] += 1
        assert time.perf_counter() - began < 20, number
        shutil.rmtree(base)
    assert all(outcomes[name, False] > 5 for name in names), outcomes
    assert outcomes["meta.json", True] and outcomes["loader.safetensors", True], outcomes


@pytest.mark.parametrize("make", ODD_FILES, ids=lambda make: getattr(make, "__name__", "link"))
@pytest.mark.parametrize("name", [*STATES, "meta.json", "tokenizer.json", "manifest.json"])
def test_other_kinds_of_files_are_refused_at_once(name: str, make: Callable[[Path], Any], step: Path) -> None:
    (step / name).unlink()
    make(step / name)
    reseal(step, name)
    refusal(lambda: load(step))


def edit(step: Path, name: str, change: Callable[[Any], None]) -> None:
    content = json.loads((step / name).read_text())
    change(content)
    (step / name).write_text(json.dumps(content))
    seal(step)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda meta: meta["model_config"].update(n_layer=10**9), "n_layer"),
        (lambda meta: meta["model_config"].update(n_embd=2**40), "n_embd"),
        (lambda meta: meta["model_config"].update(n_layer=1000), "is missing"),
        (lambda meta: meta["model_config"].update(vocab_size=300_000), "shape"),
        (lambda meta: meta["model_config"].update(sequence_len=10**12), "sequence_len"),
        (lambda meta: meta["model_config"].update(n_layer="2"), "n_layer"),
        (lambda meta: meta["model_config"].update(n_layer=True), "n_layer"),
        (lambda meta: meta.pop("model_config"), "model_config"),
        (lambda meta: meta.update(model_config=[]), "model_config"),
        (lambda meta: meta.update(step="5"), "step"),
        (lambda meta: meta.update(tokenizer_hash=7), "tokenizer_hash"),
        (lambda meta: meta["plan"].update(num_steps=-1), "plan.num_steps"),
        (lambda meta: meta.update(user_config=3), "user_config"),
    ],
)
def test_wrong_values_are_named_before_there_is_memory_for_them(
    change: Callable[[Any], None], word: str, step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(step, "meta.json", change)
    real = torch.empty

    def bounded(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = real(*args, **kwargs)
        assert tensor.device.type == "meta" or tensor.nbytes < 2**24
        return tensor

    monkeypatch.setattr(torch, "empty", bounded)
    assert word in refusal(lambda: load(step))


def test_what_another_program_left_out_is_named_where_it_is_needed(step: Path) -> None:
    edit(step, "meta.json", lambda meta: meta.pop("plan"))
    meta = load(step)
    assert "plan" in refusal(lambda: meta["plan"])


def test_a_tokenizer_of_another_size_is_refused(step: Path) -> None:
    """Also one that the checkpoint vouches for."""
    text = "five thousand other words are made of some more letters, and then of numbers: 12 345 67890 " * 30
    other = RustBPETokenizer.train_from_iterator([text], tokenizer().get_vocab_size() + 10)
    other.save(step)
    edit(step, "meta.json", lambda meta: meta.update(tokenizer_hash=other.hash))
    message = refusal(lambda: load(step))
    assert f"{other.get_vocab_size()}" in message and f"{tokenizer().get_vocab_size()}" in message


@pytest.mark.parametrize("name", ["../meta.json", "/etc/passwd", "a/b", "..", ".hidden", "", "a\nb", "x" * 300])
def test_names_in_the_manifest_are_plain(name: str, step: Path) -> None:
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["meta.json"]
    seal(step, manifest)
    assert "manifest.json" in refusal(lambda: load(step))


def test_a_header_that_lies_allocates_nothing(tmp_path: Path) -> None:
    def header(**entries: Any) -> Path:
        text = json.dumps(entries).encode()
        (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 16)
        return tmp_path / "file"

    def entry(shape: list[int], end: int, dtype: str = "F32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}

    for path in (
        header(a=entry([2**40], 2**42)),
        header(a=entry([0, 2**48, 2**48], 0)),
        header(a=entry([2**70], 2**72)),
        header(a=entry([4], 16), b=entry([4], 16)),  # overlapping
        header(**{"a\nb": entry([4], 16)}),
    ):
        assert str(path) in refusal(lambda path=path: read_tensors(path))
    write_file(tmp_path / "good", tensor_chunks({"a": torch.zeros(2, 3)}))
    assert read_shapes(tmp_path / "good") == {"a": [2, 3]}


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == read_json(path, dict[str, int]) == {"a": 1}
    (tmp_path / "link").symlink_to(path)
    assert read_json(tmp_path / "link") == {"a": 1}
    refusal(lambda: read_json(tmp_path / "link", follow_links=False))
    for content in ('{"a": "1"}', '{"a": 1.0}', '{"a": true}', "[]", "", "{", "\xff", "[" * 100_000, '{"a": 1} 2'):
        path.write_text(content, encoding="latin-1")
        assert str(path) in refusal(lambda: read_json(path, dict[str, int]))
    path.unlink()
    assert "does not exist" in refusal(lambda: read_json(path))
    for make in (fifo, Path.mkdir):
        make(tmp_path / make.__name__)
        assert "regular" in refusal(lambda make=make: read_json(tmp_path / make.__name__))
    huge(path)
    assert f"{JSON_BYTES:,}" in refusal(lambda: read_file(path))
    with pytest.raises(UserError, match="regular"):
        read_file(os.devnull)


def test_positions_in_the_data(tmp_path: Path) -> None:
    good = {"a": np.array([0, 5])}
    assert saved_numbers(good, "a", (2,), 6).tolist() == [0, 5]
    for bad, shape, below in (
        (good["a"], (2,), 5),
        (good["a"], (3,), 6),
        (good["a"], (2, 1), 6),
        (-good["a"], (2,), 6),
        (good["a"] / 2, (2,), 6),
        (None, (2,), 6),
    ):
        refusal(lambda bad=bad, shape=shape, below=below: saved_numbers({"a": bad}, "a", shape, below))
    for text in (b"[" * 100_000, b'{"shard": 3}', b"\xff"):
        refusal(lambda text=text: BadShards.from_arrays({STATE_KEY: np.frombuffer(text, np.uint8)}))


@pytest.mark.parametrize(
    "damage",
    [
        {"base_train": 3},
        {"base_train": {"val_bpb": "good"}},
        {"base_train": {"counts": {"ARC": 3}}},
        {"base_train": {"tables": {"t": ["row"]}}},
        {"chat_eval": {"samples": [{"prompt": 3}]}},
        {"total_seconds": "long"},
        {"plan": [["one"]]},
        [],
    ],
)
def test_a_damaged_report_is_refused_and_then_replaced(damage: Any, tmp_path: Path, capsys: Any) -> None:
    record_stage(tmp_path, "base_train", {"val_bpb": 1.5, "tables": {"t": [{"a": 1, "b": None}]}})
    path = tmp_path / "report" / "report.json"
    path.write_text(json.dumps(damage if isinstance(damage, list) else json.loads(path.read_text()) | damage))
    assert str(path) in refusal(lambda: load_report(tmp_path))
    assert str(path) in refusal(lambda: render_report(tmp_path))
    record_stage(tmp_path, "chat_sft", {"val_bpb": 1.25})
    assert "report.json" in capsys.readouterr().err and load_report(tmp_path)["chat_sft"]["val_bpb"] == 1.25


def test_a_scaling_law_of_other_types(tmp_path: Path) -> None:
    law = Law(1e7, 0.1, 2e8, 0.2, [(1e6, 1e7, 1.5)], [[1e7, 0.1, 2e8, 0.2]])
    law.save(tmp_path / "law.json")
    assert Law.load(tmp_path / "law.json") == law
    for change in ({"N0": "0.5"}, {"points": [[1, 2]]}, {"resamples": 3}, {"alpha": None}):
        content = json.loads((tmp_path / "law.json").read_text()) | change
        (tmp_path / "bad.json").write_text(json.dumps(content))
        assert next(iter(change)) in refusal(lambda: Law.load(tmp_path / "bad.json"))


# ---------------------------------------------------------------------------------------------------
# Models to import


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published base folder and an export."""
    folder = tmp_path_factory.mktemp("theirs")
    write_published(folder, make_published("later"))
    export(make_model("class"), folder / "export")
    return folder


PUBLISHED_FILES = [
    "base_checkpoints/d3/model_000100.pt",
    "base_checkpoints/d3/meta_000100.json",
    "tokenizer/tokenizer.pkl",
]
EXPORT_FILES = [f"export/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json", "nanochat.json")]


def import_of(name: str, base: Path) -> Path:
    return base / ("export" if name in EXPORT_FILES else "base_checkpoints/d3")


@pytest.mark.parametrize("name", [*PUBLISHED_FILES, *EXPORT_FILES])
def test_a_mutated_model_is_imported_right_or_refused(name: str, theirs: Path, tmp_path: Path) -> None:
    shutil.copytree(theirs, tmp_path, dirs_exist_ok=True)
    data, path, refused = (theirs / name).read_bytes(), tmp_path / name, 0
    for number in range(25):
        rng = random.Random(number)
        if path.suffix in (".pt", ".pkl"):
            path.write_bytes(mutate_bytes(data, rng))
        else:
            mutate_file(path, rng)
        began = time.perf_counter()
        try:
            read_model(import_of(name, tmp_path))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, number
            refused += 1
        assert time.perf_counter() - began < 20, number
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(data)
    assert refused > 5


@pytest.mark.parametrize("make", ODD_FILES, ids=lambda make: getattr(make, "__name__", "link"))
@pytest.mark.parametrize("name", [*PUBLISHED_FILES, *EXPORT_FILES[:3]])
def test_odd_files_are_no_models(name: str, make: Callable[[Path], Any], theirs: Path, tmp_path: Path) -> None:
    shutil.copytree(theirs, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    refusal(lambda: read_model(import_of(name, tmp_path)))


class Runs:
    """Creates the file `canary` when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def rezip(path: Path, change: Callable[[dict[str, bytes]], Any], compression: int = zipfile.ZIP_STORED) -> None:
    """Write a zip file again with other entries."""
    with zipfile.ZipFile(path) as old:
        entries = {info.filename: old.read(info) for info in old.infolist()}
    change(entries)
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in entries.items():
            new.writestr(name, data)


def test_code_in_models_is_not_run(theirs: Path, tmp_path: Path) -> None:
    shutil.copytree(theirs, tmp_path, dirs_exist_ok=True)
    model, tokenizer = tmp_path / PUBLISHED_FILES[0], tmp_path / PUBLISHED_FILES[2]
    canary, attack = tmp_path / "canary", Runs(tmp_path / "canary")
    good = tokenizer.read_bytes()
    tokenizer.write_bytes(pickle.dumps(attack))
    assert "touch" in refusal(lambda: read_model(model.parent)) or "Path" in refusal(lambda: read_model(model.parent))
    tokenizer.write_bytes(good)
    torch.save({"transformer.wte.weight": attack}, model)
    refusal(lambda: read_model(model.parent))
    model.write_bytes(pickle.dumps(attack))
    refusal(lambda: read_model(model.parent))
    export_folder = tmp_path / "export"
    (export_folder / "modeling_nanochat_gpt.py").write_text(f"open({str(canary)!r}, 'w')")
    config = json.loads((export_folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_nanochat_gpt.X"}
    (export_folder / "config.json").write_text(json.dumps(config))
    read_model(export_folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"n": torch.zeros(1).expand(2**40)}, "damaged"),
        ({"n": torch.zeros(4)[:0].expand(2**40, 0)}, ""),
        ({"n": torch.zeros(4, dtype=torch.int64)}, ""),
        ({"n": {"m": torch.zeros(4)}}, "'n'"),
        ([torch.zeros(4)], "state dict"),
        ({"a\nb": torch.zeros(4)}, "name"),
        ({1: torch.zeros(4)}, "name"),
        ({f"n{i}": tensor for tensor in [torch.zeros(1000)] for i in range(9)}, "larger"),
    ],
)
def test_hostile_tensors(values: Any, word: str, theirs: Path, tmp_path: Path) -> None:
    shutil.copytree(theirs, tmp_path, dirs_exist_ok=True)
    torch.save(values, tmp_path / PUBLISHED_FILES[0])
    assert word in refusal(lambda: read_model(tmp_path / PUBLISHED_FILES[0]))


@pytest.mark.parametrize("name", ["model_000100/../x", "/etc/passwd", "model_000100/code/x.py", "other/data/0"])
def test_hostile_containers(name: str, theirs: Path, tmp_path: Path) -> None:
    shutil.copytree(theirs, tmp_path, dirs_exist_ok=True)
    path = tmp_path / PUBLISHED_FILES[0]
    rezip(path, lambda entries: entries.update({name: b"x"}))
    assert repr(name) in refusal(lambda: read_model(path.parent))
    shutil.copy(theirs / PUBLISHED_FILES[0], path)
    rezip(path, lambda entries: None, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(lambda: read_model(path.parent))
