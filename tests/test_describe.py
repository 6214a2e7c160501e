"""nanochat info and diff: what they say is what is there, and files that others wrote are described or refused."""

import dataclasses
import json
import math
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import config, other_tokenizer, refusal, tokenizer
from hostile_files import ODD_FILES, fifo, mutate_file

from nanochat.checkpoint import tensor_file
from nanochat.checkpoint.runs import run_dir
from nanochat.checkpoint.saving import save_checkpoint
from nanochat.checkpoint.tensor_file import DTYPES, read_tensor, tensor_chunks, write_file
from nanochat.common import UserError
from nanochat.formats.hf_folder import write_hf
from nanochat.formats.portable import PortableModel
from nanochat.formats.training_data import OWN, STARTER
from nanochat.gpt import GPT, GPTConfig
from nanochat.inspection.describe import describe
from nanochat.inspection.differences import compare
from nanochat.inspection.read_contents import read_contents
from nanochat.report import record_stage
from scripts import diff, info

SIZES = {"sequence_len": 16, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}


def random_state(network: GPTConfig, seed: int = 3) -> dict[str, torch.Tensor]:
    """Weights none of which are zero."""
    torch.manual_seed(seed)
    return {name: torch.randn_like(p) for name, p in GPT.create(network).named_parameters()}


def save(folder: Path, stage: str, step: int, network: GPTConfig | None = None, seed: int = 3, **meta: Any) -> Path:
    network = network or config()
    values: dict[str, Any] = {
        "stage": stage,
        "model_config": network.to_dict(),
        "recipe": "small",
        "user_config": {"data": "starter", "seed": 7, "depth": 2},
        "plan": {"num_steps": 40, "total_batch_tokens": 32},
        "progress": {"step": step, "tokens": 32 * step, "seconds": 1.5, "wall_seconds": 90.0, "val_bpb": 1.25},
        "runtime": {"device_batch_size": 1, "num_threads": 1, "dtype": "float32", "device": "cpu", "kernels": True},
    }
    run = run_dir(folder, stage, "tiny")
    state = random_state(network, seed)
    return save_checkpoint(run, step, model_state=state, meta={**values, **meta}, tokenizer=tokenizer())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with two steps of a base run, and an sft run made from the second."""
    base = tmp_path_factory.mktemp("saved")
    save(base, "base", 20, seed=4)
    save(base, "base", 40)
    start = {"source": "base", "tag": "tiny", "step": 40, "recipe": "small"}
    save(base, "sft", 6, seed=5, base=start)
    return base


def step_of(base: Path, stage: str = "base", step: int = 40) -> Path:
    return run_dir(base, stage, "tiny") / f"{step:06d}"


def portable(network: GPTConfig, source: str = "base") -> PortableModel:
    meta = {"model_tag": "tiny", "step": 40, "recipe": "plain", "progress": {"step": 40, "val_bpb": 1.25}}
    return PortableModel(network, random_state(network), tokenizer(), source, meta)


def plain() -> GPTConfig:
    return GPTConfig.plain(vocab_size=tokenizer().get_vocab_size(), **SIZES)


# ---------------------------------------------------------------------------------------------------
# info


def test_a_checkpoint(saved: Path) -> None:
    facts = describe(read_contents(step_of(saved)))
    real = GPT.create(config())
    assert facts["parameters"]["total"] == sum(p.numel() for p in real.parameters())
    assert facts["memory"]["float32"] == sum(p.numel() * 4 for p in real.parameters())
    assert facts["dtypes"] == {"F32": facts["parameters"]["total"]}
    matrices = sum(p.numel() for name, p in real.named_parameters() if ".h." in name)
    assert facts["parameters"]["transformer_matrices"] == matrices
    training = facts["training"]
    assert training["steps"] == 40 and training["tokens"] == 1280 and training["seed"] == 7
    assert training["flops"] == 1280 * real.estimate_flops()
    assert training["tokens_per_parameter"] == pytest.approx(1280 / (matrices + real.lm_head.weight.numel()))
    assert facts["figures"]["val_bpb"] == 1.25 and facts["steps"] == [20, 40] and facts["run"] == "tiny"
    assert facts["tokenizer"]["hash"] == tokenizer().hash and facts["integrity"] == "sizes match"
    sizes = {path.name: path.stat().st_size for path in step_of(saved).iterdir()}
    assert facts["files"] == {name: size for name, size in sizes.items() if name != "manifest.json"}
    assert not facts["exports"]["class"] and "smear" in facts["exports"]["lacks"]


def test_a_run_is_its_latest_step_and_knows_where_it_is_from(saved: Path) -> None:
    assert describe(read_contents(step_of(saved).parent))["step"] == 40
    assert describe(read_contents(step_of(saved).parent, step=20))["step"] == 20
    assert "20, 40" in refusal(lambda: read_contents(step_of(saved).parent, step=30))
    facts = describe(read_contents(step_of(saved, "sft", 6)))
    origin = {"stage": "base", "run": "tiny", "step": 40, "tokens": 1280, "data": "starter", "val_bpb": 1.25}
    assert facts["stage"] == "sft" and facts["from"] == [origin]


def test_a_step_by_other_paths(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From within its folder, and through a link with another name."""
    step = step_of(saved)
    link = tmp_path / "latest"
    link.symlink_to(step)
    monkeypatch.chdir(step)
    for path in (Path("."), link):
        assert describe(read_contents(path))["step"] == 40


def test_flags_that_would_change_nothing_are_refused(saved: Path) -> None:
    file = step_of(saved) / "model.safetensors"
    for flags in ({"step": 7}, {"verify": True}):
        with pytest.raises(UserError, match="leave --"):
            read_contents(file, **flags)  # type: ignore[arg-type]


def test_another_run_of_the_same_name_is_not_its_origin(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    os.utime(step_of(tmp_path) / "manifest.json", (2e9, 2e9))
    facts = describe(read_contents(step_of(tmp_path, "sft", 6)))
    assert facts["from"] == [{"stage": "base", "run": "tiny", "step": 40}]


def test_a_long_list_of_files_is_own_data(saved: Path, tmp_path: Path) -> None:
    start = {"source": "base", "tag": "tiny", "step": 40, "recipe": "small"}
    save(tmp_path, "base", 40)
    save(tmp_path, "sft", 6, base=start, user_config={"data": ",".join(f"chats-{i}.jsonl" for i in range(99))})
    words = describe(read_contents(step_of(tmp_path, "sft", 6)))["training"]["licence"].split("; ")
    assert [word.partition(" (")[0] for word in words if "data" in word] == [STARTER.short, OWN.short]
    save(tmp_path, "base", 41, user_config={"data": ",".join(["starter", *(f"texts-{i}.txt" for i in range(99))])})
    words = describe(read_contents(step_of(tmp_path, "base", 41)))["training"]["licence"]
    assert STARTER.short in words and OWN.short in words


def test_the_cache_and_the_windows(tmp_path: Path) -> None:
    network = GPTConfig(
        vocab_size=tokenizer().get_vocab_size(), **{**SIZES, "n_layer": 4}, window_pattern="SSSL", qk_scale=1.5
    )
    save(tmp_path, "base", 1, network)
    facts = describe(read_contents(step_of(tmp_path, step=1)))
    assert facts["model"]["windows"] == [8, 8, 8, 16]
    per_token = 2 * 16 * 2  # keys and values of one head of 16, in bfloat16
    assert facts["memory"]["kv_cache_per_token"] == 4 * per_token
    assert facts["memory"]["kv_cache_full"] == (9 + 9 + 9 + 16) * per_token
    assert facts["model"]["form"] == "published" and facts["model"]["changes"] == {"qk_scale": 1.5}


@pytest.mark.parametrize("form", ["plain", "published", "later", "small"])
def test_forms(form: str) -> None:
    from nanochat.inspection.describe import FORMS, nearest_form

    network = FORMS[form](**{**SIZES, "n_layer": 4})
    assert nearest_form(network) == (form, {})
    assert nearest_form(dataclasses.replace(network, softcap=20.0)) == (form, {"softcap": 20.0})
    wider = {"ngram_dim": 64}  # counts only where there are n-grams
    assert nearest_form(dataclasses.replace(network, **wider)) == (form, wider if form == "small" else {})


def test_evaluations_count_if_they_are_of_these_weights(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    sha = json.loads((step_of(tmp_path, "sft", 6) / "manifest.json").read_text())["files"]["model.safetensors"][
        "sha256"
    ]
    for weights, known in ((sha[:12], True), ("0" * 12, False)):
        values = {"checkpoint": f"sft/tiny/6/{weights}", "ARC": 0.5, "counts": {"ARC": [1, 2]}}
        record_stage(tmp_path, "chat_eval", values)
        figures = describe(read_contents(step_of(tmp_path, "sft", 6)))["figures"]
        assert (figures.get("ARC") == 0.5) is known


def test_verify_hashes_what_sizes_do_not_show(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    assert describe(read_contents(step_of(tmp_path), verify=True))["integrity"] == "hashes verified"
    weights = step_of(tmp_path) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert describe(read_contents(step_of(tmp_path)))["integrity"] == "sizes match"
    assert "model.safetensors" in refusal(lambda: read_contents(step_of(tmp_path), verify=True))


@pytest.mark.parametrize("route", ["class", "code"])
def test_an_export(route: str, tmp_path: Path) -> None:
    network = plain() if route == "class" else config()
    write_hf(portable(network, "sft"), tmp_path / "out", "bfloat16")
    facts = describe(read_contents(tmp_path / "out"))
    assert facts["kind"] == "huggingface" and facts["route"] == route and facts["stage"] == "sft"
    assert facts["dtypes"] == {"BF16": sum(p.numel() for p in cropped(random_state(network)).values())}
    assert facts["exports"]["class"] is (route == "class") and "notes" not in facts
    assert facts["figures"]["val_bpb"] == 1.25 and facts["step"] == 40
    assert facts["tokenizer"]["vocab_size"] == tokenizer().get_vocab_size()
    assert "--step" in refusal(lambda: read_contents(tmp_path / "out", step=40))


def cropped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    vocab = tokenizer().get_vocab_size()
    return {name: t[:vocab] if t.dim() == 2 and t.size(0) == -(-vocab // 64) * 64 else t for name, t in state.items()}


def test_another_programs_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "vocab_size": 9}))
    write_file(tmp_path / "model-00001-of-00002.safetensors", tensor_chunks({"a": torch.zeros(3, 4).bfloat16()}))
    write_file(tmp_path / "model-00002-of-00002.safetensors", tensor_chunks({"b": torch.zeros(5)}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    vocab = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": vocab, "added_tokens": [{"id": 2, "content": "</s>", "special": True}]})
    )
    facts = describe(read_contents(tmp_path))
    assert facts["parameters"] == {"total": 17} and facts["dtypes"] == {"BF16": 12, "F32": 5}
    assert facts["model"]["config"]["model_type"] == "llama" and "exports" not in facts
    assert facts["tokenizer"]["vocab_size"] == 3 and "pytorch_model.bin" in facts["notes"][0]


def test_a_published_checkpoint(tmp_path: Path) -> None:
    network = GPTConfig.later(vocab_size=tokenizer().get_vocab_size(), **SIZES)
    folder = tmp_path / "base_checkpoints" / "d2"
    folder.mkdir(parents=True)
    torch.save(random_state(network), folder / "model_000100.pt")
    sizes = {key: network.to_dict()[key] for key in (*SIZES, "vocab_size", "window_pattern")}
    meta = {"step": 100, "val_bpb": 1.5, "model_config": sizes, "user_config": {"total_batch_size": 64}}
    (folder / "meta_000100.json").write_text(json.dumps(meta))
    for path in (folder, folder / "model_000100.pt", folder / "meta_000100.json"):
        facts = describe(read_contents(path))
        assert facts["kind"] == "published" and facts["step"] == 100 and facts["training"]["tokens"] == 6400
        assert facts["parameters"]["total"] == sum(t.numel() for t in random_state(network).values())
        assert facts["model"]["form"] == "later" and facts["figures"]["val_bpb"] == 1.5 and facts["stage"] == "base"
    save(tmp_path / "ours", "base", 40, dataclasses.replace(network, init="published"))
    found = compare(read_contents(folder), read_contents(step_of(tmp_path / "ours")))
    assert found["same"], found["verdict"]


def test_single_files(saved: Path, tmp_path: Path) -> None:
    facts = describe(read_contents(step_of(saved) / "model.safetensors"))
    assert facts["parameters"]["total"] == sum(t.numel() for t in random_state(config()).values())
    facts = describe(read_contents(step_of(saved) / "tokenizer.json"))
    assert facts["tokenizer"]["hash"] == tokenizer().hash
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (21).to_bytes(8, "little") + bytes(8))
    assert "21" in describe(read_contents(tmp_path / "x.gguf"))["notes"][0]
    (tmp_path / "x.gguf").write_bytes(b"GGML")
    assert "x.gguf" in refusal(lambda: read_contents(tmp_path / "x.gguf"))


# ---------------------------------------------------------------------------------------------------
# diff


def test_the_same_weights_in_two_runs(saved: Path, tmp_path: Path) -> None:
    save(tmp_path, "base", 40, user_config={"data": "starter", "seed": 8})
    one, two = read_contents(step_of(saved)), read_contents(step_of(tmp_path))
    found = compare(one, two)
    assert found["same"] and found["weights"]["compared"] == "hashes"
    assert found["flags"] == {"seed": [7, 8]} and found["training"] == {"seed": [7, 8]}


def test_values_against_numpy_style_sums(saved: Path) -> None:
    one, two = step_of(saved, step=20), step_of(saved)
    found = compare(read_contents(one), read_contents(two))
    assert not found["same"] and found["weights"]["identical"] == 0 and found["config"] == {}
    a, b = random_state(config(), 4), random_state(config(), 3)
    assert len(found["weights"]["changed"]) == len(a)
    relative = [tensor["relative"] for tensor in found["weights"]["changed"]]
    assert relative == sorted(relative, reverse=True)
    for tensor in found["weights"]["changed"]:
        name, rows = tensor["name"], tokenizer().get_vocab_size()
        x, y = (t[name].double().tolist() for t in (a, b))
        x, y = ([n for row in v[:rows] for n in (row if isinstance(row, list) else [row])] for v in (x, y))
        assert tensor["max"] == max(abs(u - v) for u, v in zip(x, y))
        norms = [math.sqrt(math.fsum(n * n for n in v)) for v in (x, y)]
        gap = math.sqrt(math.fsum((u - v) ** 2 for u, v in zip(x, y)))
        assert tensor["relative"] == pytest.approx(gap / norms[0], rel=1e-9)
        cosine = math.fsum(u * v for u, v in zip(x, y)) / math.prod(norms)
        assert tensor["cosine"] == pytest.approx(cosine, abs=1e-9)


@pytest.mark.parametrize("route", ["class", "code"])
def test_a_checkpoint_and_its_export_are_the_same_model(route: str, tmp_path: Path) -> None:
    network = plain() if route == "class" else config()
    save(tmp_path, "base", 40, network)
    ours = read_contents(step_of(tmp_path))
    for dtype in ("float32", "bfloat16"):
        write_hf(portable(network), tmp_path / dtype, dtype)
        found = compare(ours, read_contents(tmp_path / dtype))
        assert found["same"] is (dtype == "float32") and not found["config"], found["verdict"]
        assert found["weights"]["rounded"] is (dtype == "bfloat16") and not found["weights"]["only_a"]
        assert found["tokenizer"]["same"]
    state = random_state(network)
    state["lm_head.weight"][3, 4] += 1
    write_hf(dataclasses.replace(portable(network), state=state), tmp_path / "other", "float32")
    found = compare(ours, read_contents(tmp_path / "other"))
    assert [tensor["name"] for tensor in found["weights"]["changed"]] == ["lm_head.weight"]
    assert found["weights"]["changed"][0]["max"] == pytest.approx(1, abs=1e-6) and not found["same"]


def test_other_configs_shapes_and_tokenizers(saved: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(plain(), sequence_len=32, vocab_size=other_tokenizer().get_vocab_size())
    save_checkpoint(
        run_dir(tmp_path, "base", "tiny"),
        40,
        model_state=random_state(other),
        meta={"model_config": other.to_dict()},
        tokenizer=other_tokenizer(),
    )
    found = compare(read_contents(step_of(saved)), read_contents(step_of(tmp_path)))
    assert found["config"]["sequence_len"] == [16, 32] and found["config"]["smear"] == [True, False]
    assert "smear_lambda" in found["weights"]["only_a"] and not found["weights"]["only_b"]
    tokens = found["tokenizer"]
    ids = [t.decode_bytes([tokens["first"]["id"]]) for t in (tokenizer(), other_tokenizer())]
    assert not tokens["same"] and ids[0] != ids[1] and tokens["only_a"] > 0
    before = tokens["first"]["id"] - 1
    assert tokenizer().decode_bytes([before]) == other_tokenizer().decode_bytes([before])


def test_a_tokenizer_in_another_programs_file(saved: Path, tmp_path: Path) -> None:
    ours, path = read_contents(step_of(saved) / "tokenizer.json"), tmp_path / "tokenizer.json"
    write_hf(portable(plain()), tmp_path / "out", "float32")
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    path.write_text(json.dumps(content))
    assert compare(ours, read_contents(path))["tokenizer"]["same"]

    def differences(change: dict[str, Any]) -> Any:
        path.write_text(json.dumps(content | change))
        found = compare(ours, read_contents(path))["tokenizer"]
        return found["same"], found["only_a"], found["only_b"], found["first"]

    assert differences({"pre_tokenizer": None}) == (False, 0, 0, None)
    model = {key: value for key, value in content["model"].items() if key != "type"}  # as of 2020
    model["vocab"] = {f"{name}é" if id == 258 else name: id for name, id in model["vocab"].items()}
    same, only_a, only_b, first = differences({"model": model})
    assert (same, only_a, only_b, first["id"]) == (False, 1, 1, 258)


def test_numbers_that_are_not_finite_and_rare_dtypes(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    base = {"nan": torch.tensor([nan, 1.0]), "inf": torch.tensor([inf, 1.0]), "empty": torch.zeros(0, 3)}
    other = {"nan": torch.tensor([nan, 1.0]), "inf": torch.tensor([1.0, 1.0]), "empty": torch.zeros(0, 3)}
    values = torch.tensor([0.0, 1.0, 2.0])
    for name, dtype in DTYPES.items():
        base[name] = other[name] = values.to(dtype)
    for name, tensors in (("a", base), ("b", other)):
        write_file(tmp_path / f"{name}.safetensors", tensor_chunks(tensors))
    assert read_tensor(tmp_path / "b.safetensors", "inf").tolist() == [1.0, 1.0]
    found = compare(*(read_contents(tmp_path / f"{name}.safetensors") for name in "ab"))
    assert [(t["name"], t["max"]) for t in found["weights"]["changed"]] == [("inf", None)]
    assert found["weights"]["identical"] == len(base) - 1


def test_a_header_is_read_once_for_all_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": torch.tensor([float(i)]) for i in range(50)}
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        write_file(path, tensor_chunks(tensors))
        tensors["t7"] = torch.tensor([0.0])
    calls, read = [], tensor_file._read_header
    monkeypatch.setattr(tensor_file, "_read_header", lambda *args: calls.append(1) or read(*args))
    for path in paths:
        assert [read_tensor(path, f"t{i}").item() for i in (0, 7, 49)] == [0, 7 if path == paths[0] else 0, 49]
    assert len(calls) == 2


def test_without_values_nothing_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.inspection.tensor_diff.compare_values", None)
    found = compare(read_contents(step_of(saved, step=20)), read_contents(step_of(saved)), values=False)
    assert found["weights"]["compared"] == "shapes" and found["same"]


def test_nothing_in_common(saved: Path, tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", tensor_chunks({"a": torch.zeros(1)}))
    one, two = read_contents(tmp_path / "x.safetensors"), read_contents(step_of(saved) / "tokenizer.json")
    assert "nothing in common" in refusal(lambda: compare(one, two))


# ---------------------------------------------------------------------------------------------------
# The commands


def test_info_prints(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(saved))
    assert info.main([]) == 0
    assert capsys.readouterr().out.count("tiny") == 2
    assert info.main(["tiny"]) == 0  # of two stages: which?
    assert "-i" in capsys.readouterr().out
    assert info.main(["tiny", "-i", "sft"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("bits per byte") and "1.25" in line for line in lines)
    assert info.main(["-i", "base", "--json", "-s", "20"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 20
    assert info.main(["--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["stage"], run["steps"]) for run in runs] == [("base", [20, 40]), ("sft", [6])]
    assert [run["newest"] for run in runs] == [False, True]
    for flags in (["--verify"], ["-s", "20"], [str(saved), "--verify"], ["tiny", "--verify"], ["tiny", "-s", "20"]):
        assert "-i" in refusal(lambda: info.main(flags))  # noqa: B023
    assert "nonesuch" in refusal(lambda: info.main(["nonesuch"]))
    assert "/none/such" in refusal(lambda: info.main(["/none/such"]))


def test_diff_of_tags(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(saved))
    assert diff.main(["tiny", "tiny", "-i", "base"]) == 0
    with pytest.raises(UserError, match="-i"):  # base and sft have one
        diff.main(["tiny", "tiny"])


def test_diff_prints_and_exits(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = str(step_of(saved, step=20)), str(step_of(saved))
    assert diff.main([one, two]) == 1
    assert "different" in capsys.readouterr().out
    assert diff.main([two, two]) == 0
    assert "same model" in capsys.readouterr().out
    assert diff.main([one, two, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["same"] is False
    assert diff.main([one, two, "--tensors"]) == 1
    assert "h.1.mlp.c_fc" in capsys.readouterr().out


def test_no_control_characters_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\u202e[bold]x[/bold]"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": evil, evil: 1, "auto_map": {"AutoModel": evil}}))
    write_file(tmp_path / "model.safetensors", tensor_chunks({"a\u202e[/]b": torch.zeros(3)}))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_text(json.dumps({"model_type": "x" + evil}))
    write_file(tmp_path / "copy" / "model.safetensors", tensor_chunks({"a\u202e[/]b": torch.ones(3)}))
    assert info.main([str(tmp_path)]) == 0
    assert diff.main([str(tmp_path), str(tmp_path / "copy")]) == 1
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and "\u202e" not in printed and "x1b" in printed


# ---------------------------------------------------------------------------------------------------
# Hostile files


@pytest.fixture
def places(saved: Path, tmp_path: Path) -> dict[str, Path]:
    """A checkpoint, an export and a published checkpoint, in copies."""
    shutil.copytree(saved, tmp_path / "saved")
    write_hf(portable(config()), tmp_path / "export", "float32")
    folder = tmp_path / "base_checkpoints" / "d2"
    folder.mkdir(parents=True)
    torch.save(random_state(config()), folder / "model_000100.pt")
    sizes = {key: config().to_dict()[key] for key in (*SIZES, "vocab_size", "window_pattern")}
    (folder / "meta_000100.json").write_text(json.dumps({"step": 100, "model_config": sizes}))
    return {"step": step_of(tmp_path / "saved"), "export": tmp_path / "export", "published": folder}


FILES = [
    *(("step", name) for name in ("model.safetensors", "meta.json", "tokenizer.json", "manifest.json")),
    *(("export", name) for name in ("model.safetensors", "config.json", "nanochat.json", "tokenizer.json")),
    *(("published", name) for name in ("model_000100.pt", "meta_000100.json")),
]


def described_or_refused(path: Path) -> None:
    """It is either described, as JSON and as rows, or refused in one line."""
    from nanochat.inspection.describe_rows import rows_of

    try:
        facts = describe(read_contents(path))
        json.dumps(facts, allow_nan=False)
        assert rows_of(facts)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_other_kinds_of_files(kind: str, name: str, places: dict[str, Path]) -> None:
    for make in ODD_FILES:
        path = places[kind] / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        make(path)
        described_or_refused(places[kind])


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_mutated_files(kind: str, name: str, places: dict[str, Path], tmp_path: Path) -> None:
    good = (places[kind] / name).read_bytes()
    for seed in range(25):
        path = places[kind] / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(good)
        rng = random.Random(seed)
        if path.suffix == ".pt":
            data = bytearray(good)
            for _ in range(rng.choice([1, 3, 30])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data[: rng.choice([len(data), len(data) // 2])])
        else:
            mutate_file(path, rng)
        described_or_refused(places[kind])


def test_a_header_that_claims_more_than_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for end in (2**62, 4):
        text = json.dumps({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, end]}}).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        assert "model.safetensors" in refusal(lambda: read_contents(tmp_path))


def test_long_texts_are_cut_and_cost_nothing(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = places["export"] / "nanochat.json"
    content = json.loads(path.read_text())
    content["meta"] |= {"recipe": "x" * 10**6, "user_config": {"data": "a," * 10**6}}
    path.write_text(json.dumps(content))
    began = time.perf_counter()
    assert info.main([str(places["export"])]) == 0
    assert len(capsys.readouterr().out) < 10_000 and time.perf_counter() - began < 10


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "no model" in refusal(lambda: read_contents(tmp_path))
    fifo(tmp_path / "x.safetensors")
    assert "x.safetensors" in refusal(lambda: read_contents(tmp_path / "x.safetensors"))
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt" in refusal(lambda: read_contents(tmp_path / "notes.txt"))
    (tmp_path / "config.json").symlink_to("/etc/passwd")
    assert "root:" not in refusal(lambda: read_contents(tmp_path))
