"""Model cards: front matter as the hub reads it, figures of the right model, nothing private, code that runs."""

import json
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nanochat.common import UserError
from nanochat.formats import model_card
from nanochat.formats.card_front import BENCHMARKS, CardOptions
from nanochat.formats.hf_folder import write_hf
from nanochat.formats.model_card import write_card
from nanochat.formats.portable import PortableModel, read_run
from nanochat.formats.training_data import (
    CONVERSATIONS,
    EARLIER,
    GSM8K,
    OWN,
    OWN_DATA,
    STARTER,
    TEXTS,
    data_sets,
    public_command,
    public_flags,
)
from nanochat.gpt import GPT
from nanochat.gpt_config import GPTConfig
from nanochat.report import accuracy_values, load_report, record_stage
from scripts import base_train, chat_rl, chat_sft, export

TAG = "secret-client"  # of all runs
FLAGS = [f"--model-tag={TAG}", "--eval-tokens=64", "--device-type=cpu", "--eval-every=1"]
SIZES = ["--depth=1", "--n-embd=16", "--head-dim=8", "--max-seq-len=64", "--total-batch-size=128", "--recipe=later"]
RL = ["--tasks=Arithmetic", "--examples-per-step=2", "--num-samples=2", "--max-new-tokens=4", "--eval-examples=4"]


@pytest.fixture(scope="module")
def chain(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with a base, an SFT and an RL run on data in a folder named private."""
    base, own = tmp_path_factory.mktemp("chain") / "base", tmp_path_factory.mktemp("private")
    shutil.copytree(trained, base)
    (own / "text.jsonl").write_text("".join(json.dumps({"text": f"line {i} of text"}) + "\n" for i in range(200)))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (own / "chats.jsonl").write_text((json.dumps(turns) + "\n") * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        assert base_train.main([*FLAGS, *SIZES, f"--data={own / 'text.jsonl'}", "--num-iterations=3"]) == 0
        assert chat_sft.main([*FLAGS, f"--data={own / 'chats.jsonl'}:3", "--num-iterations=2"]) == 0
        assert chat_rl.main([*[f for f in FLAGS if "tokens" not in f], *RL, "--num-iterations=2"]) == 0
    return base


@pytest.fixture
def here(chain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of that base folder, as the base folder."""
    base = tmp_path / "base"
    shutil.copytree(chain, base)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return base


@pytest.fixture
def with_plots() -> None:
    """Asks for pictures."""


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws nothing where the pictures do not matter: they take most of the time."""
    if "with_plots" not in request.fixturenames:
        monkeypatch.setattr(model_card, "draw_curves", lambda stages, folder: [(s.name, "") for s in stages if s.run])


def card_of(model: PortableModel, folder: Path, options: CardOptions | None = None, **settings: Any) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_card(model, folder, **{"route": "code", "dtype": "float32", "options": options, **settings})
    return (folder / "README.md").read_text()


def front_of(card: str) -> dict[str, Any]:
    """The front matter, read as YAML and as the hub's client reads it."""
    from huggingface_hub import ModelCard

    values = yaml.safe_load(card.split("---\n")[1])
    ModelCard(card)
    return values


def table(card: str, first: str) -> dict[str, list[str]]:
    """The rows of all tables, by their first cell, whose head begins with `first`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]
    heads = [i for i, row in enumerate(rows) if row[0] == first]
    return {row[0]: row[1:] for row in rows[heads[0] + 2 :]} if heads else {}


def random_model(config: GPTConfig, source: str, meta: dict[str, Any], of: PortableModel) -> PortableModel:
    """A model of that config, with the tokenizer of another."""
    config = replace(config, vocab_size=of.tokenizer.get_vocab_size())
    state = {name: torch.randn(p.shape) * 0.1 for name, p in GPT.create(config).named_parameters()}
    return PortableModel(config, state, of.tokenizer, source, meta)


# ---------------------------------------------------------------------------------------------------
# What is in a card


def test_the_chain_of_stages(here: Path, tmp_path: Path, with_plots: None) -> None:
    card = card_of(read_run(here, "rl"), tmp_path / "out")
    rows = table(card, "stage")
    assert [row[0] for row in rows.values()][:3] == ["3", "2", "2"]
    assert "384" in rows["pretraining"][1]  # 3 steps of 128 tokens
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card)
    assert pictures == ["curves-base.png", "curves-sft.png", "curves-rl.png"]
    for name in pictures:
        data = (tmp_path / "out" / name).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 300 and height > 200
    commands = [line.split()[2] for line in card.splitlines() if line.startswith("python -m scripts.")]
    assert commands == ["scripts.base_train", "scripts.chat_sft", "scripts.chat_rl"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*pictures, "README.md"}


def test_a_base_model_has_no_chat(here: Path, tmp_path: Path) -> None:
    card = card_of(read_run(here, "base"), tmp_path / "out")
    assert "apply_chat_template" not in card and "(sft)" not in card
    assert front_of(card)["tags"] == ["nanochat"]
    documented = (Path(__file__).parents[1] / "docs" / "portable.md").read_text()
    (tested,) = re.findall(r"^\| transformers, .*?\| ([\d.]+) \|", documented, re.M)
    assert f"transformers {tested}." in card


def test_nothing_private_is_published(here: Path, tmp_path: Path) -> None:
    command = "python -m scripts.export --to=hf out"
    for source in ("base", "sft", "rl"):
        model = read_run(here, source)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        write_hf(model, tmp_path / "out", "float32", card=CardOptions(command=command))
        for path in (tmp_path / "out").iterdir():
            data = path.read_bytes()
            assert not re.search(rb"private|text\.jsonl|chats\.jsonl|pytest|/tmp|/root|/home", data), path.name
        card = (tmp_path / "out" / "README.md").read_text()
        assert TAG not in card and OWN_DATA in card and OWN.licence in card
        assert "language" not in front_of(card)


def test_figures_are_of_this_very_checkpoint(here: Path, tmp_path: Path) -> None:
    model = read_run(here, "sft")
    checkpoint = f"sft/{TAG}/{model.meta['step']}/{model.meta['weights'][:12]}"
    results = {"ARC-Easy": (60, 200), "SpellingBee": (10, 200)}
    values = accuracy_values(results, {"ARC-Easy": 0.27, "SpellingBee": 0.0})
    values |= {"splits": {"ARC-Easy": "test"}, "chatcore": 0.0123, "model": TAG, "step": model.meta["step"]}
    record_stage(here, "chat_eval", {"checkpoint": checkpoint, **values})
    base = {"model": TAG, "step": 3, "weights": read_run(here, "base").meta["weights"]}
    record_stage(here, "base_eval", {**base, "core": 0.0456, "core_interval": [0.04, 0.05]})
    card = card_of(model, tmp_path / "out", CardOptions(name="alice/model"))
    assert table(card, "after finetuning")["Science, easy (ARC)"] == ["30.0%", "24.1% – 36.7%", "60/200", "27.0%"]
    assert "0.0123" in card and "0.0456 (95% 0.0400 to 0.0500)" in card

    (index,) = front_of(card)["model-index"]
    (result,) = index["results"]  # only what the hub has a data set for
    assert index["name"] == "model" and result["dataset"]["type"] == BENCHMARKS["ARC-Easy"][0]
    assert result["metrics"][0]["value"] == 0.3 and result["metrics"][0]["args"]["num_items"] == 200

    trained = {**values, "GSM8K, train": 0.9, "counts": {"GSM8K, train": [9, 10]}}
    trained |= {"intervals": {"GSM8K, train": [0.6, 1.0]}, "splits": {"GSM8K, train": "train"}}
    record_stage(here, "chat_eval", {"checkpoint": checkpoint, **trained})
    assert "90.0%" not in card_of(model, tmp_path / "out")

    for other in (checkpoint[:-1] + "x", checkpoint.replace(TAG, "other")):
        record_stage(here, "chat_eval", {"checkpoint": other, **values})
        record_stage(here, "base_eval", {**base, "weights": "0" * 64, "core": 0.0456})
        card = card_of(model, tmp_path / "out")
        assert not table(card, "after finetuning") and "model-index" not in front_of(card) and "0.0456" not in card


def test_a_later_run_of_the_same_name_is_not_the_base(here: Path, tmp_path: Path) -> None:
    assert base_train.main([*FLAGS, *SIZES, "--data=starter", "--num-iterations=3"]) == 0
    card = card_of(read_run(here, "sft"), tmp_path / "out")
    assert "(base)" not in card and "(sft)" in card and "starter" not in card
    assert table(card, "stage")["pretraining"][:3] == ["3", "", ""]


def test_a_step_in_the_middle_has_its_own_figures(here: Path, tmp_path: Path) -> None:
    data = load_report(here)["base_train"]["command"].partition("--data=")[2].split()[0]
    flags = [*FLAGS, *SIZES, f"--data={data}", "--num-iterations=4", "--save-every=2", "--model-tag=two"]
    assert base_train.main([f for f in flags if TAG not in f]) == 0
    last, middle = read_run(here, "base", "two"), read_run(here, "base", "two", 2)
    assert load_report(here)["base_train"]["steps"] == 4
    rows = [table(card_of(model, tmp_path / "out"), "stage")["pretraining"] for model in (last, middle)]
    assert [row[0] for row in rows] == ["4", "2"] and rows[0][3] != rows[1][3]


def test_without_report_and_metrics(here: Path, tmp_path: Path) -> None:
    shutil.rmtree(here / "report")
    for path in here.rglob("metrics.jsonl"):
        path.unlink()
    shutil.rmtree(here / "base_checkpoints")
    card = card_of(read_run(here, "rl"), tmp_path / "out")
    assert "(base)" not in card and table(card, "stage").keys() >= {
        "pretraining",
        "finetuning",
        "reinforcement learning",
    }
    (here / "report").mkdir()
    (here / "report" / "report.json").write_text("{broken")
    assert card_of(read_run(here, "rl"), tmp_path / "out") == card


def test_a_model_of_which_nothing_is_known(here: Path, tmp_path: Path) -> None:
    for source in ("base", "sft", "rl"):
        card = card_of(random_model(GPTConfig.plain(n_layer=1), source, {}, read_run(here, "sft")), tmp_path / "out")
        front = front_of(card)
        assert set(front) == {"library_name", "pipeline_tag", "tags"}


def test_an_imported_model_names_its_base_model_and_no_path(here: Path, tmp_path: Path) -> None:
    tokenizer = read_run(here, "sft")
    for origin, name in (
        ("/home/me/models/x", None),
        ("models/mine", None),
        (f"hub:org/model@{'a' * 40}", "org/model"),
    ):
        meta = {
            "imported": {"from": origin, "notes": ["assumed RoPE base 10,000", "read /home/me/x"]},
            "model_tag": TAG,
        }
        card = card_of(random_model(GPTConfig.plain(n_layer=1), "base", meta, tokenizer), tmp_path / "out")
        assert front_of(card).get("base_model") == name
        assert "RoPE base 10,000" in card and "/home" not in card and "models/mine" not in card


def test_a_text_that_looks_like_markdown(here: Path, tmp_path: Path) -> None:
    model = read_run(here, "sft")
    values = load_report(here)["chat_sft"]
    values["samples"] = [{"prompt": "```\n# a", "text": "````\n<script>alert(1)</script>\n---\n![](http://x)"}]
    record_stage(here, "chat_sft", values)
    card = card_of(model, tmp_path / "out")
    fences = re.findall(r"^(`{5,})text\n(.*?)^\1$", card, re.M | re.S)
    assert len(fences) == 1 and "<script>" in fences[0][1] and "<script>" not in card.replace(fences[0][1], "")


# ---------------------------------------------------------------------------------------------------
# Options


def test_licences(here: Path, tmp_path: Path) -> None:
    model = read_run(here, "base")
    cases: list[tuple[str, dict[str, str]]] = [
        ("", {}),
        ("apache-2.0", {"license": "apache-2.0"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("MIT", {"license": "mit"}),
        ("My-Own-1", {"license": "other", "license_name": "my-own-1"}),
    ]
    for given, expected in cases:
        card = card_of(model, tmp_path / "out", CardOptions(given))
        assert {k: v for k, v in front_of(card).items() if k.startswith("license")} == expected
        assert f"`{given}`" in card if given else "--license" not in card
    for bad in ("mit\nx: y", "a b", "[1]", "x" * 100):
        with pytest.raises(UserError, match="--license"):
            CardOptions(bad)


def test_data_sets_and_licences() -> None:
    assert data_sets("base", {"data": "climbmix"})[0].licence == "CC BY-NC 4.0"
    assert data_sets("base", {"data": "climbmix,starter-val"}) == data_sets("base", {"data": "climbmix"})
    assert data_sets("sft", {"data": "starter,/home/me/x.jsonl:3"})[-1] is OWN
    assert GSM8K in data_sets("sft", {"data": "published:2"}) and data_sets("rl", {"tasks": "GSM8K"}) == [GSM8K]
    assert data_sets("base", {}) == [] and data_sets("base", {"data": "starter"}) == [STARTER]
    assert data_sets("base", {"data": "starter", "init_from": "other"}) == [STARTER, EARLIER]
    known = {one for sets in (*TEXTS.values(), *CONVERSATIONS.values()) for one in sets}
    assert all(one.licence and one.language == "en" for one in known)
    attribution = (resources.files("nanochat") / "starter" / "ATTRIBUTION.md").read_text()
    for licence in re.split(", ", STARTER.licence.partition(": ")[2]):
        assert licence.replace("BSD-3-Clause", "BSD 3-Clause") in attribution


def test_flags_that_are_published() -> None:
    flags = {
        "data": "s3://bucket/secret,starter",
        "run": "my wandb name",
        "model_tag": "secret",
        "eval_bundle": "/home/me",
        "init_from": "/home/me/run",
        "text_field": "secret",
        "depth": 4,
        "minutes": 5.0,
        "recipe": "later,smear=False",
        "resume": True,
    }
    public = public_flags("base", flags)
    expected = {"data": f"{OWN_DATA},starter", "init_from": "ANOTHER_RUN", "recipe": "later,smear=False"}
    assert public == expected | {"depth": 4, "minutes": 5.0}
    assert public_flags("base", public | {"init_from": ""}).items() <= public.items()  # an export of an import
    command = public_command("base", flags)
    assert "secret" not in command and "/home" not in command and "--depth=4" in command


def test_the_command_line(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "private" / "out"
    assert export.main([str(out), "-i", "base", "-g", TAG, "--license=mit", "--dtype=bfloat16"]) == 0
    card = (out / "README.md").read_text()
    assert "python -m scripts.export --to=hf --source=base --dtype=bfloat16 --license=mit out" in card
    assert "bfloat16, rounded" in card
    for flag, named in (("--private", "--push"), ("--existing", "--push"), ("--license=a b", "--license")):
        with pytest.raises(UserError, match=named):
            export.main([str(tmp_path / "new"), "-i", "base", flag])
    with pytest.raises(UserError, match="--license"):  # which has no card
        export.main([str(tmp_path / "new"), "--to=mlx", "--license=mit"])
    assert not (tmp_path / "new").exists()


def test_the_card_of_a_graph(here: Path, tmp_path: Path) -> None:
    model = read_run(here, "sft")
    card = card_of(model, tmp_path / "out", CardOptions(name="alice/graph"), route="onnx")
    assert front_of(card)["library_name"] == "transformers.js"
    assert "alice/graph" in card and "trust_remote_code" not in card and "q8" not in card


def test_the_code_of_a_card_runs(here: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = {"sequence_len": 128, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    program = []
    for config, source in ((GPTConfig.plain(**sizes), "base"), (GPTConfig.later(**sizes), "rl")):
        out = tmp_path / f"out-{source}"
        write_hf(random_model(config, source, {}, read_run(here, "sft")), out, "float32")
        code = "\n".join(re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S))
        assert ("trust_remote_code" in code) == (source == "rl")
        program += [f"import os; os.chdir({str(out)!r})", code]
        program += ["assert greedy.shape[1] > prompt['input_ids'].shape[1] and len(greedy) == len(sampled) == 1"]
    (tmp_path / "code.py").write_text("\n".join(program))
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "code.py")]
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
