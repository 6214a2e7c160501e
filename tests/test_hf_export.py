"""Exports to Hugging Face: transformers computes what GPT computes, on both routes, in every way that it decodes."""

import errno
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_helpers import SIZES, TOKENIZER, portable, stirred

from nanochat.checkpoint.tensor_file import read_tensors
from nanochat.common import UserError
from nanochat.formats import hf_class, hf_code, hf_folder
from nanochat.formats.hf_folder import write_hf
from nanochat.gpt import GPT, GPTConfig
from nanochat.recipe import get_recipe
from scripts import chat_cli

transformers = pytest.importorskip("transformers")

LATER = GPTConfig.later(**{**SIZES, "n_layer": 4})
# Windows of 32 tokens in a context of 64, so that prompts are longer than both.
WINDOWS = replace(LATER, sequence_len=64, window_pattern="SSL", short_window_divisor=2)
MODELS = {
    "plain, class": (GPTConfig.plain(**SIZES), "class"),
    "plain, code": (GPTConfig.plain(**SIZES), "code"),
    "published": (GPTConfig(**SIZES), "code"),
    "later": (LATER, "code"),
    "windows": (WINDOWS, "code"),
    "n-grams": (replace(WINDOWS, ngram_rows=97, ngram_dim=24), "code"),
    "n-grams alone": (GPTConfig.plain(**SIZES, ngram_rows=97), "code"),
    "smear alone": (GPTConfig.plain(**SIZES, smear=True, qk_scale=1.3), "code"),
}
BOS = TOKENIZER.get_bos_token_id()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def load(folder: Path, **options: object):
    code = (folder / hf_code.CODE_FILES[0]).exists()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=code, **options).eval()


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A model, and what transformers loads of its export."""
    config, route = MODELS[request.param]
    model, out = stirred(config), tmp_path_factory.mktemp("export") / "model"
    write_hf(portable(model), out, "float32", route)  # type: ignore[arg-type]
    return model, load(out)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory):
    model, out = stirred(WINDOWS), tmp_path_factory.mktemp("export") / "model"
    write_hf(portable(model), out, "float32")
    return model, load(out), out


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300, (1, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: GPT, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """ids (1, T) -> (1, T + tokens), without any cache."""
    with torch.inference_mode():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def generate(theirs, ids: torch.Tensor, tokens: int, **options: object) -> torch.Tensor:
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, **options}
    return theirs.generate(ids, max_new_tokens=tokens, **given)


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch (B, T) and its mask."""
    length = max(p.size(1) for p in prompts)
    padding = [torch.full((1, length - p.size(1)), BOS) for p in prompts]
    ids = torch.cat([torch.cat([pad, p], dim=1) for pad, p in zip(padding, prompts)])
    mask = torch.cat(
        [torch.cat([torch.zeros_like(pad), torch.ones_like(p)], dim=1) for pad, p in zip(padding, prompts)]
    )
    return ids, mask


def test_logits_are_equal(pair) -> None:
    model, theirs = pair
    beyond = () if "NanoChat" in type(theirs).__name__ else (129, 200)  # the class sees further back than GPT there
    with torch.inference_mode():
        for length in (1, 2, 31, 64, 100, 128, *beyond):
            ids = torch.cat([prompt(length, seed) for seed in (1, 2)])
            torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=2e-5)
        assert torch.equal(theirs(ids.int()).logits, theirs(ids).logits)


def test_greedy_text_is_equal(pair) -> None:
    model, theirs = pair
    ids = prompt(56)
    expected = greedy(model, ids, 16)  # of `windows` beyond the context, too
    for use_cache in (True, False):
        assert torch.equal(generate(theirs, ids, 16, use_cache=use_cache), expected)


def test_padded_prompts_in_a_batch(pair) -> None:
    """The first token has no predecessor, whatever padding is before it."""
    model, theirs = pair
    prompts = [prompt(length, length) for length in (3, 40, 1)]
    ids, mask = left_padded(prompts)
    answers = generate(theirs, ids, 6, attention_mask=mask)
    for row, each in zip(answers, prompts):
        assert torch.equal(row[ids.size(1) :], greedy(model, each, 6)[0, each.size(1) :])


def test_cache_through_beams_and_samples(windows) -> None:
    """Beam search reorders the cache, and samples draw from it: the same as without one."""
    _, theirs, _ = windows
    ids, mask = left_padded([prompt(9, 1), prompt(30, 2)])
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            texts.append(generate(theirs, ids, 15, attention_mask=mask, use_cache=use_cache, **options))
        assert torch.equal(*texts)


def test_caches_that_are_cropped_or_of_fixed_size(windows) -> None:
    model, theirs, _ = windows
    ids = prompt(8).repeat(1, 3)
    expected = greedy(model, ids, 20)
    assert torch.equal(generate(theirs, ids, 20, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(generate(theirs, ids, 20, cache_implementation="static", disable_compile=True), expected)


def test_a_cache_is_continued_by_several_tokens(windows) -> None:
    model, theirs, _ = windows
    ids = prompt(120)
    cache, parts = None, []
    with torch.inference_mode():
        for part in ids.split([50, 1, 20, 1, 48], dim=1):
            output = theirs(part, **({} if cache is None else {theirs_cache(): cache}))
            cache, parts = output[theirs_cache()], [*parts, output.logits]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=0, atol=2e-5)


def theirs_cache() -> str:
    """What this version of transformers calls the cache."""
    return "cache" if hasattr(transformers.modeling_outputs.CausalLMOutputWithPast(), "cache") else "past_key_values"


def test_documents_packed_into_a_row(windows) -> None:
    """positions that begin again at 0 begin a document: no attention and no smear across."""
    model, theirs, _ = windows
    first, second = prompt(5, 1), prompt(12, 2)
    position_ids = torch.cat([torch.arange(5), torch.arange(12)])[None]
    with torch.inference_mode():
        logits = theirs(torch.cat([first, second], dim=1), position_ids=position_ids, use_cache=False).logits
        torch.testing.assert_close(logits, torch.cat([model(first), model(second)], dim=1), rtol=0, atol=2e-5)


def test_loss_and_gradients(windows) -> None:
    """Also with activation checkpointing, which computes each layer twice."""
    model, _, out = windows
    theirs, ids = load(out), prompt(50)
    model(ids[:, :-1], ids[:, 1:]).backward()
    parameters, names = dict(theirs.named_parameters()), hf_code.names(WINDOWS)
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(theirs, "activation_checkpointing_enable", None) or theirs.gradient_checkpointing_enable
            enable()
            theirs.train()
        theirs.zero_grad()
        theirs(ids, labels=ids).loss.backward()
        for name, ours in model.named_parameters():
            grad = parameters[names[name]].grad
            assert grad is not None and ours.grad is not None
            torch.testing.assert_close(grad, ours.grad[: grad.size(0)], rtol=1e-3, atol=1e-6)
    model.zero_grad()


def test_outputs_that_are_asked_for(windows) -> None:
    model, theirs, out = windows
    ids = prompt(10)
    with torch.inference_mode():
        logits = model(ids)
        eager = load(out, attn_implementation="eager")(ids, output_attentions=True, output_hidden_states=True)
        assert [w.shape for w in eager.attentions] == [(1, 2, 10, 10)] * 4 and len(eager.hidden_states) == 5
        torch.testing.assert_close(eager.logits, logits, rtol=0, atol=2e-5)
        torch.testing.assert_close(theirs(ids, logits_to_keep=3).logits, logits[:, -3:], rtol=0, atol=2e-5)
        assert isinstance(theirs(ids, return_dict=False), tuple)
        with pytest.raises(ValueError, match="input_ids"):
            theirs(inputs_embeds=torch.zeros(1, 3, 32))


def test_saved_again_by_transformers(pair, tmp_path: Path) -> None:
    """The same logits, and the config that it had here."""
    model, theirs = pair
    theirs.save_pretrained(tmp_path / "again")
    ids = prompt(30)
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "again")(ids).logits, theirs(ids).logits)
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    kind = hf_code if values["model_type"] == hf_code.MODEL_TYPE else hf_class
    assert kind.read_config(values, "config.json") == model.config


def test_a_model_from_its_config_alone(windows) -> None:
    """Weights are initialised, to be trained from nothing."""
    _, _, out = windows
    config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
    fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert all(p.isfinite().all() for p in fresh.parameters())
    assert fresh.model.resid_lambdas.tolist() == [1.0] * 4


def test_bfloat16(tmp_path: Path) -> None:
    model = stirred(LATER)
    for dtype in ("float32", "bfloat16"):
        write_hf(portable(model), tmp_path / dtype, dtype)
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size for dtype in ("float32", "bfloat16")]
    assert sizes[1] < 0.6 * sizes[0]
    theirs, ids = load(tmp_path / "bfloat16"), prompt(40)
    assert theirs.dtype == torch.bfloat16
    with torch.inference_mode():
        exact = model(ids)
        model.compute_dtype = torch.bfloat16
        allowed = 2 * (model(ids) - exact).abs().max()
        assert (theirs(ids).logits - exact).abs().max() <= allowed


@pytest.mark.parametrize("name", ["n-grams alone", "smear alone"])
def test_a_paged_cache_is_refused(name: str, tmp_path: Path) -> None:
    """vLLM's too: it keeps no ids, so that the text would be another one."""
    write_hf(portable(stirred(MODELS[name][0])), tmp_path / "out", "float32")
    with pytest.raises(ValueError, match=r"smear, n-grams.*vLLM.*chat_web"):
        load(tmp_path / "out", attn_implementation="paged|eager")


@pytest.mark.parametrize("name", ["small", "published", "later", "plain"])
def test_the_route_of_a_recipe(name: str, tmp_path: Path) -> None:
    """Only plain has nothing that transformers' class lacks; asking for that class is refused with the features."""
    config = get_recipe(name).model(**SIZES)
    assert hf_folder.choose_route(config, "auto") == ("class" if name == "plain" else "code")
    assert hf_code.lacking(config) == []
    if name != "plain":
        with pytest.raises(UserError, match=r"value embeddings.*--route=class"):
            write_hf(portable(stirred(config)), tmp_path / "out", "float32", "class")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [hf_class, hf_code])
def test_read_config_refuses_what_gpt_does_not_compute(kind) -> None:
    config = GPTConfig.plain(**SIZES) if kind is hf_class else LATER
    values = kind.config_json(config, TOKENIZER)
    assert kind.read_config(values, "it") == config
    wrong = {
        hf_class: {
            "hidden_act": "silu",
            "attention_bias": True,
            "rms_norm_eps": 1e-6,
            "intermediate_size": 100,
            "head_dim": 8,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"},
            "rope_scaling": {"type": "linear"},
            "final_logit_softcapping": None,
            "nanochat_config": LATER.to_dict(),
            "vocab_size": 2**40,
            "num_hidden_layers": 0,
        },
        hf_code: {
            "layer_types": ["full_attention"] * 3,
            "sliding_window": 5,
            "value_embeds": [0],
            "smear": 1,
            "model_type": "nanochat",
            "hidden_size": -4,
        },
    }
    for name, value in wrong[kind].items():
        with pytest.raises(UserError, match=r"^it"):
            kind.read_config({**values, name: value}, "it")


def test_files_of_an_export(windows) -> None:
    _, _, out = windows
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "nanochat.json", "tokenizer.json", *hf_code.CODE_FILES} <= names
    assert "__pycache__" not in names
    tensors, _ = read_tensors(out / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (300, 32)  # without GPT's padding
    for path in out.iterdir():
        if path.suffix in (".json", ".py", ".jinja"):
            assert str(out) not in path.read_text() and str(Path.home()) not in path.read_text()
    ends = json.loads((out / "generation_config.json").read_text())
    assert ends["eos_token_id"] == [ends["pad_token_id"], BOS]
    assert ends["pad_token_id"] == TOKENIZER.encode_special("<|assistant_end|>")
    chat = chat_cli.Config()
    assert {name: ends[name] for name in ("temperature", "top_k", "min_p")} == {
        "temperature": chat.temperature,
        "top_k": chat.top_k,
        "min_p": chat.min_p,
    }
    about = json.loads((out / "nanochat.json").read_text())
    assert about["model_config"] == WINDOWS.to_dict() and about["meta"]["step"] == 1


def test_a_prompt_of_bos_needs_no_mask(windows) -> None:
    """generate would mask the padding token in prompts, were it not one that ends texts."""
    model, theirs, _ = windows
    ids = torch.cat([torch.tensor([[BOS]]), prompt(6)], dim=1)
    answer = theirs.generate(ids, do_sample=False, min_new_tokens=8, max_new_tokens=8)
    expected = greedy(model, ids, 8)
    assert torch.equal(answer[:, :8], expected[:, :8])


def test_nothing_is_left_of_a_failed_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = portable(stirred(LATER))
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(hf_folder, "write_tokenizer", fail)
        with pytest.raises(type(error)):
            write_hf(model, tmp_path / "out", "float32")
        assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UserError, match="exists"):
        write_hf(model, tmp_path / "out", "float32")
    assert (tmp_path / "out" / "mine").read_text() == "kept"
