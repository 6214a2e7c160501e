"""Hugging Face models behind the evaluations: stand-ins with the library's interface, nanochat's own model inside."""

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import export_helpers
import pytest
import safetensors.torch
import torch
from core_helpers import Letters, random_task, small_model
from export_helpers import CONFIGS

from nanochat.common import UserError
from nanochat.evals.core_prompts import make_examples
from nanochat.evals.hf_model import HFModel, HFTokenizer, byte_letters, load_hf_model
from nanochat.evals.scoring import GPTScorer
from nanochat.gpt import GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.runtime import Runtime

CONFIG = GPTConfig(sequence_len=96, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


class FakeModel(torch.nn.Module):
    """nanochat's model with the library's output."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = small_model(CONFIG)
        self.config = SimpleNamespace(max_position_embeddings=None, n_positions=96)

    def forward(self, idx: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.gpt(idx))


class FakeTokenizer:
    """A byte-level tokenizer of the library's kind."""

    bos_token_id, eos_token_id = None, 256
    all_special_ids = (256,)

    def __call__(self, text: Any, add_special_tokens: bool, split_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens and split_special_tokens
        return {"input_ids": list(text.encode()) if isinstance(text, str) else [list(t.encode()) for t in text]}

    def __len__(self) -> int:
        return 300

    def get_added_vocab(self) -> dict[str, int]:
        return {"<|end|>": 256, "  é": 299}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        letters = sorted(byte_letters())
        return ["<|end|>" if i == 256 else "  é" if i == 299 else "ab" if i > 256 else letters[i] for i in ids]


@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
def test_the_same_model_scores_the_same(kind: str) -> None:
    model = FakeModel()
    examples = list(make_examples(random_task(kind, 20, 2), Letters(), 96))
    ours = GPTScorer(model.gpt).score(examples)
    theirs = HFModel(model, 96, torch.device("cpu")).score(examples)
    for a, b in zip(ours, theirs):
        assert [s.mean_loss for s in a] == pytest.approx([s.mean_loss for s in b], abs=1e-4)
        assert [s.greedy for s in a] == [s.greedy for s in b]


def test_bits_per_byte_of_a_hf_model() -> None:
    model, tokenizer = HFModel(FakeModel(), 96, torch.device("cpu")), HFTokenizer(FakeTokenizer())
    assert tokenizer.get_bos_token_id() == 256 and tokenizer.encode(["ab"]) == [[97, 98]] and tokenizer.encode([]) == []
    sizes = torch.tensor(tokenizer.token_bytes)
    assert sizes[97] == 1 and sizes[256] == 0 and sizes[257] == 2 and sizes[299] == 4
    llama = FakeTokenizer()
    llama.convert_ids_to_tokens = lambda ids: ["▁the" if i == 5 else "a" for i in ids]  # type: ignore[method-assign]
    with pytest.raises(UserError, match="token 5 is '▁the'"):
        HFTokenizer(llama).token_bytes  # noqa: B018
    idx = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(0))
    inputs, targets = idx[:, :-1], idx[:, 1:].clone()
    targets[0, :4] = -1
    nats = model.model.gpt(inputs, targets, loss_reduction="sum").item()
    bpb = evaluate_bpb(model, [(inputs, targets)], 1, sizes)  # type: ignore[arg-type]
    assert bpb == pytest.approx(nats / math.log(2) / 20, rel=1e-5)


def test_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.create("cpu", "float32")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"nanochat\[transformers\]"):
        load_hf_model("gpt2", runtime)
    asked: dict[str, Any] = {}

    def model(path: str, **settings: Any) -> FakeModel:
        asked.update(settings, path=path)
        if path == "nobody/nothing":
            raise OSError("nobody/nothing is not a model\nand more lines")
        return FakeModel(), {"missing_keys": set()}

    fake = ModuleType("transformers")
    fake.AutoModelForCausalLM = SimpleNamespace(from_pretrained=model)  # type: ignore[attr-defined]
    fake.AutoTokenizer = SimpleNamespace(from_pretrained=lambda path, **settings: FakeTokenizer())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", fake)
    loaded, _ = load_hf_model("gpt2", runtime)
    assert loaded.max_tokens == 96 and asked["use_safetensors"] is True and asked["dtype"] == torch.float32
    assert asked["trust_remote_code"] is False  # None would ask on the terminal
    with pytest.raises(UserError, match="folder"):
        load_hf_model("somebody/code", runtime, trust_remote_code=True)
    with pytest.raises(UserError, match=r"^--hf-path=nobody/nothing: [^\n]*$"):
        load_hf_model("nobody/nothing", runtime)
    fake.AutoTokenizer.from_pretrained = lambda path, **_: SimpleNamespace(bos_token_id=None, eos_token_id=None)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="bos"):
        load_hf_model("gpt2", runtime)


def test_damaged_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    runtime = Runtime.create("cpu", "float32")
    folder = export_helpers.export(export_helpers.make_model("class"), tmp_path / "export")
    whole = {name: (folder / name).read_bytes() for name in ("config.json", "tokenizer.json", "model.safetensors")}
    tensors = safetensors.torch.load(whole["model.safetensors"])
    del tensors["lm_head.weight"]
    damages = {
        "config.json": b'{"model_type": "nanochat", "hidden_size": -5}',
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": whole["model.safetensors"][:100],
    }
    # transformers would fill a missing tensor with random numbers.
    for name, data in [*damages.items(), ("model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))]:
        (folder / name).write_bytes(data)
        with pytest.raises(UserError, match=r"^--hf-path=[^\n]*$"):
            load_hf_model(str(folder), runtime)
        (folder / name).write_bytes(whole[name])
    load_hf_model(str(folder), runtime)


@pytest.mark.parametrize("route", CONFIGS)
@pytest.mark.filterwarnings("default")
def test_an_export_evaluates_as_the_checkpoint_does(route: str, tmp_path: Path) -> None:
    """Its own code is run with consent only."""
    pytest.importorskip("transformers")
    model, runtime = export_helpers.make_model(route), Runtime.create("cpu", "float32")
    folder = str(export_helpers.export(model, tmp_path / "export"))
    if route == "code":
        with pytest.raises(UserError, match="--trust-remote-code"):
            load_hf_model(folder, runtime)
    loaded, tokenizer = load_hf_model(folder, runtime, trust_remote_code=route == "code")
    ours = export_helpers.TOKENIZER
    text = "the cats <|bos|> and 你好"
    assert tokenizer.encode(text) == ours.encode(text) and tokenizer.bos == ours.get_bos_token_id()
    assert tokenizer.token_bytes[:200] == list(ours.token_bytes)[:200]
    examples = list(make_examples(random_task("schema", 10, 1), ours, 128))
    for a, b in zip(GPTScorer(model).score(examples), loaded.score(examples)):
        assert [s.mean_loss for s in a] == pytest.approx([s.mean_loss for s in b], abs=1e-4)
