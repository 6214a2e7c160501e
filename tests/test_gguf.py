"""GGUF files: read back with llama.cpp's own package, the network computed in numpy, text encoded by its merges."""

import dataclasses
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import regex
import torch
from cli_helpers import refused
from export_helpers import portable, stirred

from nanochat.common import SPECIAL_TOKENS, UserError
from nanochat.formats.gguf_file import write_gguf
from nanochat.formats.portable import PortableModel
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPLIT_PATTERN, RustBPETokenizer
from scripts import export

gguf = pytest.importorskip("gguf")

WORDS = [
    "the",
    "there",
    "other",
    "1234",
    "12",
    "don't",
    "I'LL",
    "été",
    "漢字",
    "😀",
    "\n\n",
    "  ",
    "<|bos|>",
    "<|",
    "aaaa",
]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice(["", " "]).join(rng.choices(WORDS, k=30)) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> PortableModel:
    tokenizer = RustBPETokenizer.train_from_iterator(texts(40), 320)
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "sequence_len": 32}
    config = GPTConfig.plain(vocab_size=tokenizer.get_vocab_size(), qk_scale=1.2, rope_base=50_000.0, **sizes)
    return portable(stirred(config), "base", tokenizer, model_tag="tag")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and tensors, these as float32."""
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


# ---------------------------------------------------------------------------------------------------
# The network


def logits(values: dict[str, Any], w: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """What the fork's graph computes, in float64: (T,) -> (T, V)."""

    def of(key: str) -> Any:
        return values[f"nanochat.{key}"]

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + of("attention.layer_norm_rms_epsilon")) * weight

    H, G, D = of("attention.head_count"), of("attention.head_count_kv"), of("attention.key_length")
    angles = np.arange(len(ids))[:, None] * of("rope.freq_base") ** (-np.arange(0, D, 2) / D)

    def rotate(x: np.ndarray) -> np.ndarray:  # by minus the angle, halves of a head as pairs
        a, b = x[..., : D // 2], x[..., D // 2 :]
        cos, sin = np.cos(-angles)[:, None], np.sin(-angles)[:, None]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    w = {name: value.astype(np.float64) for name, value in w.items()}
    x = norm(w["token_embd.weight"][ids], w["token_embd_norm.weight"])
    for i in range(of("block_count")):
        block = {name.split(".")[2]: value for name, value in w.items() if name.startswith(f"blk.{i}.")}
        h = norm(x, block["attn_norm"])
        q, k, v = ((h @ block[f"attn_{c}"].T).reshape(len(ids), -1, D) for c in "qkv")
        q, k = norm(rotate(q), block["attn_q_norm"]), norm(rotate(k), block["attn_k_norm"])
        k, v = k.repeat(H // G, 1), v.repeat(H // G, 1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(D) + np.triu(np.full((len(ids),) * 2, -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)
        x = x + y.reshape(len(ids), -1) @ block["attn_output"].T
        x = x + np.maximum(norm(x, block["ffn_norm"]) @ block["ffn_up"].T, 0) ** 2 @ block["ffn_down"].T
    cap = of("final_logit_softcapping")
    return cap * np.tanh(norm(x, w["output_norm.weight"]) @ w["output.weight"].T / cap)


def test_same_logits(model: PortableModel, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "m.gguf", "float32")
    ours = GPT.create(model.config, seed=0)
    ours.load_state_dict(model.state)
    ids = torch.randint(model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(ids)[0].numpy()
    assert expected.std() > 0.5
    assert np.abs(logits(*read(tmp_path / "m.gguf"), ids[0].tolist()) - expected).max() < 1e-4


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("q8_0", "Q8_0")])
def test_smaller_types_round_as_the_package_does(model: PortableModel, tmp_path: Path, dtype: str, kind: str) -> None:
    model.state["lm_head.weight"][:2] = 0
    write_gguf(model, tmp_path / "m.gguf", dtype)
    write_gguf(model, tmp_path / "exact.gguf", "float32")
    exact = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "exact.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        matrix = exact[tensor.name].ndim == 2
        assert tensor.tensor_type.name == (kind if matrix else "F32")
        rounded = gguf.quants.quantize(exact[tensor.name], tensor.tensor_type)
        assert np.array_equal(tensor.data.view(np.uint8), rounded.view(np.uint8)), tensor.name


# ---------------------------------------------------------------------------------------------------
# The tokenizer


def encode(values: dict[str, Any], text: str) -> list[int]:
    """Split, then apply the merge that comes first in the list until there is none, on GPT-2's characters."""
    order = {tuple(pair.split(" ")): i for i, pair in enumerate(values["tokenizer.ggml.merges"])}
    ids = {token: i for i, token in enumerate(values["tokenizer.ggml.tokens"])}
    characters = values["tokenizer.ggml.tokens"][:256]
    found = []
    for word in regex.findall(SPLIT_PATTERN, text):
        parts = [characters[byte] for byte in word.encode()]
        while ranks := [(order[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in order]:
            i = min(ranks)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [ids[part] for part in parts]
    return found


def test_same_ids(model: PortableModel, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "m.gguf", "float32")
    values, tokenizer = read(tmp_path / "m.gguf")[0], model.tokenizer
    for text in texts(100, seed=1):
        assert encode(values, text) == tokenizer.encode(text)
    kinds = values["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(values["tokenizer.ggml.tokens"], kinds) if kind == gguf.TokenType.CONTROL]
    assert tuple(special) == SPECIAL_TOKENS and len(kinds) == tokenizer.get_vocab_size()


def test_what_ends_an_answer(model: PortableModel, tmp_path: Path) -> None:
    for source, end in (("base", "<|bos|>"), ("sft", "<|assistant_end|>")):
        write_gguf(dataclasses.replace(model, source=source), tmp_path / source, "float32")
        values = read(tmp_path / source)[0]
        assert values["tokenizer.ggml.tokens"][values["tokenizer.ggml.eos_token_id"]] == end
        assert ("tokenizer.chat_template" in values) == (source == "sft")


def test_chat_template(model: PortableModel, tmp_path: Path) -> None:
    write_gguf(dataclasses.replace(model, source="sft"), tmp_path / "m.gguf", "float32")
    template = jinja2.Template(read(tmp_path / "m.gguf")[0]["tokenizer.chat_template"])
    rng, roles = random.Random(0), ("user", "assistant")
    for turns in range(1, 8):
        messages = [{"role": roles[i % 2], "content": rng.choice(WORDS[:10])} for i in range(turns)]
        if turns > 3:
            messages.insert(0, {"role": "system", "content": "Be brief."})
        ask = messages[-1]["role"] == "user"
        text = template.render(messages=messages, add_generation_prompt=ask)
        if ask:
            expected = model.tokenizer.render_for_completion(
                {"messages": [*messages, {"role": "assistant", "content": ""}]}
            )
        else:
            expected = model.tokenizer.render_conversation({"messages": messages})[0]
        assert text == model.tokenizer.decode(expected)


# ---------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"window_pattern": "SL"}, "windows"),
        ({"value_embeds": True}, "value embeddings"),
        ({"residual_scalars": True}, "residual scalars"),
        ({"smear": True}, "smear"),
        ({"ngram_rows": 97}, "n-grams"),
        ({"backout": True}, "backout"),
    ],
)
def test_a_lossy_export_is_refused(model: PortableModel, tmp_path: Path, change: dict[str, Any], feature: str) -> None:
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, **change))
    with pytest.raises(UserError, match=feature):
        write_gguf(other, tmp_path / "m.gguf", "float32")
    assert not any(tmp_path.iterdir())


def test_another_split_pattern_is_refused(model: PortableModel, tmp_path: Path) -> None:
    tokenizer = RustBPETokenizer(r"\p{N}|\P{N}+", [bytes([value]) for value in range(256)])
    with pytest.raises(UserError, match="pattern"):
        write_gguf(dataclasses.replace(model, tokenizer=tokenizer), tmp_path / "m.gguf", "float32")


def test_a_token_that_merging_does_not_reach_is_refused(model: PortableModel, tmp_path: Path) -> None:
    tokenizer = RustBPETokenizer(SPLIT_PATTERN, [*(bytes([value]) for value in range(256)), b"abc"])
    with pytest.raises(UserError, match="merging"):
        write_gguf(dataclasses.replace(model, tokenizer=tokenizer), tmp_path / "m.gguf", "float32")


def test_nothing_is_overwritten(model: PortableModel, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        write_gguf(model, tmp_path / "m.gguf", "float32")
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_rows_that_q8_0_cannot_take(model: PortableModel, tmp_path: Path) -> None:
    odd = {name: value[..., :30] if value.ndim == 2 else value for name, value in model.state.items()}
    with pytest.raises(UserError, match="q8_0"):
        write_gguf(dataclasses.replace(model, state=odd), tmp_path / "m.gguf", "q8_0")


def test_command(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, word in (([], "--recipe=portable"), (["--push=me/it"], "hf upload"), (["--int8"], "--to=onnx")):
        argv = ["--to=gguf", "-i", "base", *flags, str(tmp_path / "m.gguf")]
        assert word in refused(export.main, argv, capsys)
    assert "q8_0" in refused(export.main, ["--dtype=q8_0", str(tmp_path / "out")], capsys)
    assert "exists" in refused(export.main, ["--to=gguf", str(tmp_path)], capsys)  # OUT is a file
