"""Models brought here: the same weights, the same logits, and a checkpoint that every stage goes on from."""

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import assert_one_line_error, assert_same_bits
from export_helpers import CONFIGS, TOKENIZER, export, make_model, model_of, portable
from import_helpers import FORMS, encoding, make_model as make_published, write_published

from nanochat.checkpoint.tensor_file import read_tensors, tensor_chunks, write_file
from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError
from nanochat.formats.card_front import HUB_ORIGIN
from nanochat.formats.mlx_folder import write_mlx
from nanochat.formats.published import parse_assumed
from nanochat.formats.read_model import Options, read_model
from nanochat.gpt import GPT
from nanochat.tokenizer import RustBPETokenizer
from scripts.import_model import main


def parameters(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def cropped(model: GPT) -> dict[str, torch.Tensor]:
    """The parameters, with zeros where the vocabulary is padded."""
    state, size = {name: p.clone() for name, p in parameters(model).items()}, model.config.vocab_size
    for tensor in state.values():
        if tensor.size(0) == model.config.padded_vocab_size != size:
            tensor[size:] = 0
    return state


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.mark.parametrize("route", CONFIGS)
def test_an_export_comes_back_bit_for_bit(route: str, base: Path, tmp_path: Path) -> None:
    model = make_model(route)
    export(model, tmp_path / "out")
    assert main([str(tmp_path / "out"), "-g", "back", "--source=auto"]) == 0
    loaded, tokenizer, meta = load_model("sft", "cpu", base_dir=base, model_tag="back")
    assert loaded.config == model.config and tokenizer.hash == TOKENIZER.hash and meta["step"] == 1
    assert_same_bits(parameters(loaded), cropped(model))
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
    assert meta["plan"]["total_batch_tokens"] > 0 and meta["recipe"] == {"class": "plain", "code": "later"}[route]
    with pytest.raises(UserError, match="-g"):
        main([str(tmp_path / "out"), "-g", "back"])


def test_a_failed_import_can_be_repeated(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [str(export(make_model("class"), tmp_path / "out")), "-g", "back"]
    with monkeypatch.context() as full:

        def no_space(self: RustBPETokenizer, folder: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(RustBPETokenizer, "save", no_space)
        with pytest.raises(OSError, match="No space"):
            main(command)
    assert [path.name for path in (base / "chatsft_checkpoints" / "back").iterdir()] == [".lock"]
    assert main(command) == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_published_checkpoint(form: str, base: Path, tmp_path: Path, capsys: Any) -> None:
    model = make_published(form)
    folder = write_published(tmp_path / "theirs", model)
    (folder / "optim_000100_rank0.pt").touch()
    assert main([str(folder)]) == 0
    assert "optim_000100_rank0.pt" in (printed := capsys.readouterr().out) and "RoPE" in printed
    loaded, tokenizer, meta = load_model("base", "cpu", base_dir=base, model_tag="d3")
    assert loaded.config == model.config and tokenizer.hash == TOKENIZER.hash
    assert_same_bits(parameters(loaded), parameters(model))
    assert (meta["step"], meta["progress"]["val_bpb"], meta["plan"]["total_batch_tokens"]) == (100, 1.25, 2048)
    assert meta["recipe"] == form and (base / "tokenizer" / "tokenizer.json").exists()


def test_which_step_which_stage_and_which_tokenizer(tmp_path: Path) -> None:
    model = make_published("published")
    folder = write_published(tmp_path, model, 7, "chatsft_checkpoints/d3")
    torch.save(model.state_dict(), folder / "model_000009.pt")
    shutil.copy(folder / "meta_000007.json", folder / "meta_000009.json")
    assert read_model(folder).meta["step"] == 9 and read_model(folder).source == "sft"
    assert read_model(folder, Options(step=7)).meta["step"] == read_model(folder / "model_000007.pt").meta["step"] == 7
    assert read_model(folder, Options(source="rl")).source == "rl"
    assert_one_line_error(lambda: read_model(folder, Options(step=8)), "7, 9")
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    assert_one_line_error(lambda: read_model(folder), "--tokenizer")
    assert read_model(folder, Options(tokenizer=tmp_path / "elsewhere")).tokenizer.hash == TOKENIZER.hash


def test_the_first_version(tmp_path: Path) -> None:
    """No windows, value embeddings or residual scalars, embedding in bfloat16, rotations saved, vocabulary not
    padded."""
    model = make_model("class")
    folder = write_published(tmp_path, model)
    state = {name: t[:300] if t.size(0) == 320 else t for name, t in model.state_dict().items()}
    state["transformer.wte.weight"] = state["transformer.wte.weight"].bfloat16()
    state |= {"cos": model.cos[None, :, None].bfloat16(), "sin": model.sin[None, :, None].bfloat16()}
    torch.save(state, folder / "model_000100.pt")
    meta = json.loads((folder / "meta_000100.json").read_text())
    del meta["model_config"]["window_pattern"]
    (folder / "meta_000100.json").write_text(json.dumps(meta))
    found = read_model(folder)
    assert found.config == model.config
    with torch.no_grad():
        model.wte.weight.copy_(model.wte.weight.bfloat16())
        model.wte.weight[300:] = 0
    assert_same_bits(found.state, cropped(model))
    assert_one_line_error(lambda: read_model(folder, Options(assumed={"rope_base": 5e4})), "cos", "rope_base")


def test_what_cannot_be_known_is_said_and_can_be_given(tmp_path: Path) -> None:
    folder = write_published(tmp_path, make_published("published"))
    assert any("10,000" in note for note in read_model(folder).meta["notes"])
    assumed = parse_assumed("rope_base=50000,qk_scale=1.1,short_window_divisor=4")
    config = read_model(folder, Options(assumed=assumed)).config
    assert (config.rope_base, config.qk_scale, config.short_window_divisor) == (50_000, 1.1, 4)
    notes = read_model(folder, Options(assumed=parse_assumed("rope_base=50000,qk_scale=1.1"))).meta["notes"]
    assert not any("50,000" in note or "1.1" in note for note in notes) and any("short window" in n for n in notes)
    everything = parse_assumed("rope_base=50000,qk_scale=1,short_window_divisor=4,value_gate_scale=2")
    assert read_model(folder, Options(assumed=everything)).meta["notes"] == []
    for bad in ("n_layer=3", "rope_base=big", "rope_base"):
        assert_one_line_error(lambda bad=bad: parse_assumed(bad), "--assume")
    state = make_published("published").state_dict()
    del state["resid_lambdas"]
    torch.save(state, folder / "model_000100.pt")
    found = read_model(folder)
    assert found.state["resid_lambdas"].tolist() == [1.0] * 3 and any("resid" in n for n in found.meta["notes"])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"special_tokens": {"<|endoftext|>": 291}}, "endoftext"),
        ({"special_tokens": {n: 299 - i for i, n in enumerate(TOKENIZER.special_ids)}}, "special"),
        ({"special_tokens": {n: 1000 + i for i, n in enumerate(TOKENIZER.special_ids)}}, "ids"),
        ({"pat_str": r"[a-z]+"}, "pattern"),
    ],
)
def test_other_tokenizers_are_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    folder = write_published(tmp_path, make_published("published"))
    (tmp_path / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding(**changes)))
    assert_one_line_error(lambda: read_model(folder), "tokenizer.pkl", word)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = read_tensors(path)[0]
    change(tensors)
    path.unlink()
    write_file(path, tensor_chunks(tensors))


def test_folders_of_other_programs(tmp_path: Path) -> None:
    model = make_model("class")
    out = export(model, tmp_path / "out")
    (out / "nanochat.json").unlink()
    found = read_model(out)
    assert found.source == "base" and any("-i sft" in note for note in found.meta["notes"])
    tensors = read_tensors(out / "model.safetensors")[0]
    (out / "model.safetensors").unlink()
    assert_one_line_error(lambda: read_model(out), "model.safetensors")
    (out / "pytorch_model.bin").touch()
    assert_one_line_error(lambda: read_model(out), "pytorch_model.bin", "safe_serialization")
    halves = {f"part-{i}.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for name, half in halves.items():
        write_file(out / name, tensor_chunks(half))
    index = {"weight_map": {key: name for name, half in halves.items() for key in half}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_bits(read_model(out).state, cropped(model))
    edit(out / "model.safetensors.index.json", lambda c: c["weight_map"].update(x="part-0.safetensors"))
    assert_one_line_error(lambda: read_model(out), "part-0")
    edit(out / "model.safetensors.index.json", lambda c: c["weight_map"].update(x="../part-0.safetensors"))
    assert_one_line_error(lambda: read_model(out), "index.json")


def test_tied_embeddings_are_copied(tmp_path: Path) -> None:
    out = export(make_model("class"), tmp_path / "out")
    edit(out / "config.json", lambda c: c.update(tie_word_embeddings=True))
    rewrite(out / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    state = read_model(out).state
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop("model.embed_tokens.weight"), "missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(300, 16)}), "shape"),
        (lambda t: t["lm_head.weight"].fill_(float("nan")), "finite"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(300, 32, dtype=torch.int32)}), "quantized"),
    ],
)
def test_weights_that_do_not_fit(change: Callable[[Any], Any], word: str, tmp_path: Path) -> None:
    out = export(make_model("class"), tmp_path / "out")
    rewrite(out / "model.safetensors", change)
    assert_one_line_error(lambda: read_model(out), word)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    out, adapter = export(make_model("code"), tmp_path / "out"), tmp_path / "adapter"
    adapter.mkdir()
    a, b = torch.randn(4, 32), torch.randn(128, 4)
    module = "base_model.model.model.layers.1.mlp.fc1"
    chunks = tensor_chunks({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})
    write_file(adapter / "adapter_model.safetensors", chunks)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": "/etc"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert_one_line_error(lambda: read_model(adapter), "--base", "merge_and_unload")
    merged, before = read_model(adapter, Options(base=out)), read_model(out)
    name = "transformer.h.1.mlp.c_fc.weight"
    torch.testing.assert_close(merged.state.pop(name), before.state.pop(name) + 2 * b @ a)
    assert_same_bits(merged.state, before.state)
    for start in (True, False, None, "gaussian", "eva", "orthogonal"):
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": start}))
        assert not torch.equal(read_model(adapter, Options(base=out)).state[name], read_model(out).state[name])
    starts = [
        {"init_lora_weights": start} for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    ]
    others = [{"layer_replication": [[0, 2]]}, {"use_qalora": True}, {"alora_invocation_tokens": [5]}]
    for change in (*starts, *others, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}):
        (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
        assert_one_line_error(lambda: read_model(adapter, Options(base=out)), next(iter(change)), "merge_and_unload")
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"r": 8}))
    assert_one_line_error(lambda: read_model(adapter, Options(base=out)), "adapter")


def test_a_run_of_another_machine(base: Path, tmp_path: Path) -> None:
    folder = write_published(tmp_path / "theirs", make_published("later"))
    assert main([str(folder), "-g", "first"]) == 0
    run = base / "base_checkpoints" / "first"
    for path in (run, run / "000100"):
        found = read_model(path)
        assert (found.source, found.meta["step"]) == ("base", 100)
        assert_same_bits(found.state, read_model(folder).state)
    assert read_model(run / "000100", Options(step=100)).meta["step"] == 100
    assert_one_line_error(lambda: read_model(run / "000100", Options(step=200)), "--step")
    assert_one_line_error(lambda: read_model(base), str(base))
    assert_one_line_error(lambda: read_model(tmp_path / "nothing"), "does not exist")


def test_a_model_of_the_hub_is_known_by_its_commit(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(make_model("class"), tmp_path / ("a" * 40))
    monkeypatch.setattr("nanochat.formats.hub.pull", lambda *args: folder)
    for path, origin in (("org/model", f"hub:org/model@{folder.name}"), (str(folder), str(folder))):
        assert main([path]) == 0
        meta = load_model("sft", "cpu", base_dir=base, model_tag=Path(path).name)[2]
        assert meta["imported"]["from"] == origin
        assert bool(HUB_ORIGIN.fullmatch(origin)) == (path == "org/model")


def test_greedy_text_is_the_same(base: Path, tmp_path: Path) -> None:
    model = make_model("code")
    found = model_of(read_model(export(model, tmp_path / "out")))
    ids = [list(range(20, 30))]
    with torch.no_grad():
        for one in (model, found):
            row = ids[0][:10]
            for _ in range(12):
                row = [*row, int(one(torch.tensor([row]))[0, -1].argmax())]
            ids.append(row)
    assert ids[1] == ids[2]


def test_an_export_for_mlx_comes_back(tmp_path: Path) -> None:
    model = make_model("class")
    write_mlx(portable(model), tmp_path / "out", "float32")
    assert_same_bits(cropped(model_of(read_model(tmp_path / "out"))), cropped(model))


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    out = export(make_model("class"), tmp_path / "out")
    for options, flag in (
        (Options(tokenizer=tmp_path), "--tokenizer"),
        (Options(base=out), "--base"),
        (Options(step=1), "--step"),
        (Options(assumed={"rope_base": 1e4}), "--assume"),
    ):
        assert_one_line_error(lambda: read_model(out, options), flag)  # noqa: B023
    with pytest.raises(UserError, match="--revision"):
        main([str(out), "--revision=v1"])
