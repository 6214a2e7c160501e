"""ONNX graphs against the model itself: the same logits in onnxruntime, whole, cached and padded; int8 comes near."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import export_helpers
import numpy as np
import pytest
import torch
from export_helpers import stirred

from nanochat.common import UserError
from nanochat.formats import onnx_builder
from nanochat.formats.onnx_builder import quantize_rows
from nanochat.formats.onnx_folder import write_onnx
from nanochat.formats.onnx_graph import build_graph, id_layers
from nanochat.formats.portable import PortableModel
from nanochat.formats.read_model import read_model
from nanochat.gpt import GPT, GPTConfig
from nanochat.inspection.read_contents import read_contents
from nanochat.tokenizer import RustBPETokenizer
from scripts import export

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

DOCS = Path(__file__).parents[1] / "docs" / "portable.md"
SIZES: dict[str, Any] = {"sequence_len": 64, "vocab_size": 300, "n_layer": 4, "n_head": 4, "n_embd": 32}
SHORT = {**SIZES, "short_window_divisor": 2}  # of the later form: a quarter of 64 would be rounded up to all of it
CONFIGS = {
    "published": GPTConfig(n_kv_head=4, **SIZES),
    "grouped": GPTConfig(n_kv_head=2, window_pattern="SL", **SIZES),
    "later": GPTConfig.later(n_kv_head=4, **SHORT),
    "later_one_kv_head": GPTConfig.later(n_kv_head=1, **SHORT),
    "plain": GPTConfig.plain(n_kv_head=2, **SIZES),
    "ngrams": GPTConfig.later(n_kv_head=2, ngram_rows=97, ngram_dim=16, **SHORT),
    "ngrams_alone": GPTConfig.plain(n_kv_head=1, ngram_rows=2**20 + 7, ngram_dim=1, **SIZES),
}
TOKENIZER = RustBPETokenizer.train_from_iterator(
    [f"the cat has {n} hats, the dog {n * n} mats" for n in range(99)], 300
)


def make_model(config: GPTConfig) -> GPT:
    return stirred(config, noise=0.2).requires_grad_(False)


def portable(config: GPTConfig, source: str = "sft") -> PortableModel:
    return export_helpers.portable(make_model(config), source, TOKENIZER)


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(seed))


class Session:
    """A graph in onnxruntime: ids (B, T), past values and mask (B, P+T) -> logits and present values."""

    def __init__(self, path: Path) -> None:
        onnx.checker.check_model(str(path), full_check=True)
        self.session = onnxruntime.InferenceSession(path)
        self.cache = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]

    def __call__(
        self, ids: torch.Tensor, past: list[np.ndarray] | None = None, mask: np.ndarray | None = None
    ) -> tuple[torch.Tensor, list[np.ndarray]]:
        if past is None:
            past = [np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32) for i in self.cache]
        mask = np.ones((len(ids), past[0].shape[2] + ids.size(1)), np.int64) if mask is None else mask
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask}
        logits, *present = self.session.run(None, feeds | {i.name: x for i, x in zip(self.cache, past, strict=True)})
        return torch.from_numpy(logits), present


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Session]:
    model = make_model(CONFIGS[request.param])
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    assert not build_graph(model.config, model.state_dict()).save(path, "")
    return model, Session(path)


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---------------------------------------------------------------------------------------------------
# Logits


@pytest.mark.parametrize("length", [1, 2, 40, 64, 150])
def test_logits(pair: tuple[GPT, Session], length: int) -> None:
    """As the model's, past its context too."""
    model, session = pair
    ids = random_ids(2, length)
    logits, present = session(ids)
    close(logits, model(ids))
    assert {x.shape for x in present} == {(2, model.config.n_kv_head, length, model.config.head_dim)}


@pytest.mark.parametrize("pieces", [[1] * 12, [20, 1, 1, 30], [1, 49, 2], [70]], ids=str)
def test_cached_logits(pair: tuple[GPT, Session], pieces: list[int]) -> None:
    model, session = pair
    ids, past, found = random_ids(3, sum(pieces)), None, []
    for piece in ids.split(pieces, dim=1):
        logits, past = session(piece, past)
        found.append(logits)
    close(torch.cat(found, dim=1), model(ids))


@pytest.mark.parametrize("pieces", [[25, *[1] * 6], [20, 3, 1, 1, 1, 5]], ids=str)
def test_rows_of_different_length(pair: tuple[GPT, Session], pieces: list[int]) -> None:
    """Padded on the left, prefilled together, whole or in pieces, and continued: each as if it were alone."""
    model, session = pair
    lengths, width, more = [3, 25, 11, 1], 25, 6
    rows = [random_ids(1, n + more, seed=n) for n in lengths]
    padded = torch.cat([torch.cat([torch.full((1, width - r.size(1) + more), 7), r], dim=1) for r in rows])
    mask = np.array([[0] * (width - n) + [1] * (n + more) for n in lengths])
    found, past, seen = [], None, 0
    for piece in padded.split(pieces, dim=1):
        seen += piece.size(1)
        logits, past = session(piece, past, mask[:, :seen])
        found.append(logits)
    for row, logits in zip(rows, torch.cat(found, dim=1)):
        close(logits[-row.size(1) :], model(row)[0])


def test_long_prompts_at_real_windows(tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "n_layer": 4, "n_head": 2, "n_kv_head": 1, "n_embd": 16}
    model = make_model(GPTConfig.later(**sizes))
    assert model.config.short_window == 512
    build_graph(model.config, model.state_dict()).save(tmp_path / "m", "")
    ids = random_ids(1, 1500)
    close(Session(tmp_path / "m")(ids)[0], model(ids), 2e-4)


def test_another_runtime(tmp_path: Path) -> None:
    """The standard's own evaluator has the same logits: the graph holds nothing that only onnxruntime knows."""
    from onnx.reference import ReferenceEvaluator

    model = make_model(CONFIGS["ngrams"])
    for int8 in (False, True):
        build_graph(model.config, model.state_dict(), int8).save(tmp_path / "m", "")
        session, ids = Session(tmp_path / "m"), random_ids(1, 30)
        past = {i.name: np.zeros((1, 2, 0, 8), np.float32) for i in session.cache}
        feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 30), np.int64), **past}
        logits, *_ = ReferenceEvaluator(str(tmp_path / "m")).run(None, feeds)
        close(torch.from_numpy(logits), session(ids)[0], 0.05 if int8 else 5e-5)  # int8: a rounding may flip
    assert {node.domain for node in onnx.load(tmp_path / "m").graph.node} == {""}


# ---------------------------------------------------------------------------------------------------
# int8


def test_codes_are_within_half_a_step() -> None:
    weight = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 50)[:, None]
    weight[7] = 0
    codes, scales = quantize_rows(weight)
    assert codes.dtype == np.int8 and scales.shape == (50, 1)
    assert (np.abs(codes * scales - weight.numpy()) <= scales * 0.501).all()
    assert not codes[7].any() and (np.abs(codes).max(axis=1) == 127).sum() == 49


@pytest.mark.parametrize("name", ["later", "grouped", "ngrams"])
def test_int8(name: str, tmp_path: Path) -> None:
    """Near the model's logits, a quarter of its weights, and a token's logits depend on no later token or neighbour."""
    config = GPTConfig(**{**CONFIGS[name].to_dict(), "sequence_len": 16, "n_embd": 64})
    model = make_model(config)
    for int8 in (False, True):
        build_graph(config, model.state_dict(), int8).save(tmp_path / f"{int8}", "")
    sizes = [sum(x.nbytes for x in build_graph(config, model.state_dict(), q).constants.values()) for q in (0, 1)]
    assert sizes[1] < 0.35 * sizes[0]
    ids, session = random_ids(3, 14), Session(tmp_path / "True")
    wanted, found = model(ids), session(ids)[0]
    assert 1e-4 < ((found - wanted).norm() / wanted.norm()) < 0.05
    past, cached = None, []
    for piece in ids[1:2].split(1, dim=1):
        logits, past = session(piece, past)
        cached.append(logits)
    assert (torch.cat(cached, dim=1) - found[1:2]).norm() / wanted.norm() < 2e-3


# ---------------------------------------------------------------------------------------------------
# The folder


@pytest.mark.parametrize("name", CONFIGS)
def test_config_describes_the_cache(name: str, tmp_path: Path) -> None:
    """Programs make an empty cache from config.json alone."""
    model = portable(CONFIGS[name])
    write_onnx(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    session = Session(tmp_path / "out/onnx/model.onnx")
    layers = range(config["num_hidden_layers"])
    wanted = [f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value")]
    assert [i.name for i in session.cache] == wanted
    outputs = [o.name for o in session.session.get_outputs()]
    assert outputs == ["logits", *(name.replace("past_key_values", "present") for name in wanted)]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    assert {tuple(i.shape[1::2]) for i in session.cache} == {(config["num_key_value_heads"], head_dim)}
    assert len(layers) == 4 + id_layers(model.config) == 4 + ("later" in name or "ngrams" in name)
    about = json.loads((tmp_path / "out/nanochat.json").read_text())
    assert about["route"] == "onnx" and about["model_config"]["n_layer"] == 4
    assert config["transformers.js_config"]["dtype"] == "fp32" and not (tmp_path / "out/onnx/model.onnx_data").exists()


def test_large_models_have_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_builder, "INLINE_BYTES", 200_000)  # less than in float32, more than in int8
    model = portable(CONFIGS["later"])
    write_onnx(model, tmp_path / "out", int8=True)
    files = {path.name: path.stat().st_size for path in (tmp_path / "out/onnx").iterdir()}
    assert set(files) == {"model.onnx", "model.onnx_data", "model_quantized.onnx"}
    assert files["model.onnx"] < 200_000 < files["model.onnx_data"]
    config = json.loads((tmp_path / "out/config.json").read_text())["transformers.js_config"]
    assert config == {"use_external_data_format": {"model.onnx": 1}}
    ids = random_ids(1, 20)
    close(Session(tmp_path / "out/onnx/model.onnx")(ids)[0], make_model(model.config)(ids))


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = portable(CONFIGS["plain"])
    with pytest.raises(UserError, match="bfloat16"):
        export.main(["--to=onnx", "--dtype=bfloat16", str(tmp_path / "out")])
    with pytest.raises(UserError, match="--int8"):
        export.main(["--to=hf", "--int8", str(tmp_path / "out")])
    with pytest.raises(UserError, match="--route"):
        export.main(["--to=onnx", "--route=code", str(tmp_path / "out")])
    write_onnx(model, tmp_path / "there")
    assert read_contents(tmp_path / "there").config == model.config  # nanochat info
    with pytest.raises(UserError, match="exists"):
        write_onnx(model, tmp_path / "there")
    for path in (tmp_path / "there", tmp_path / "there/onnx", tmp_path / "there/onnx/model.onnx"):
        with pytest.raises(UserError, match="--to=hf"):
            read_model(path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"nanochat\[onnx\]"):
        write_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------
# The example of the documentation


@pytest.mark.parametrize(("source", "ngram_rows"), [("base", 0), ("sft", 0), ("sft", 97)])
def test_the_example_writes_what_the_model_writes(
    source: str, ngram_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 greedy tokens, or up to the end."""
    pytest.importorskip("tokenizers")
    config = GPTConfig.later(**{**SHORT, "n_kv_head": 2, "sequence_len": 128, "ngram_rows": ngram_rows})
    assert config.vocab_size == TOKENIZER.get_vocab_size()
    write_onnx(portable(config, source), tmp_path / "out")
    section = DOCS.read_text(encoding="utf-8").split("\n## ONNX\n")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    names = {line.split()[1] for line in code.splitlines() if re.match("(import|from) ", line)}
    assert names == {"json", "numpy", "onnxruntime", "tokenizers"}
    monkeypatch.chdir(tmp_path)
    printed, found = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(code, found)
    bos, user, user_end, assistant, end = (
        TOKENIZER.encode_special(f"<|{name}|>")
        for name in ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
    )
    ids = [bos, user, *TOKENIZER.encode(found["question"]), user_end, assistant]
    assert found["tokenizer"].encode(found["prompt"]).ids == ids
    model, answer = make_model(config), list[int]()
    for _ in range(100):
        token = int(model(torch.tensor([[*ids, *answer]]))[0, -1].argmax())
        if token == bos or (token == end and source == "sft"):
            break
        answer.append(token)
    assert found["answer"] == answer and printed.getvalue() == found["tokenizer"].decode(answer) + "\n"
    assert len(answer) > 20  # long enough to mean something
