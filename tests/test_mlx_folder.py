"""Folders for mlx-lm: names, what is refused, and the same text in mlx-lm itself where it is installed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import CONFIGS, TOKENIZER, make_model, portable
from safetensors.torch import load_file

from nanochat.common import UserError
from nanochat.formats.hf_import import read_hf
from nanochat.formats.mlx_folder import write_mlx
from nanochat.gpt_config import GPTConfig


def test_the_folder(tmp_path: Path) -> None:
    model = make_model("class")
    write_mlx(portable(model), tmp_path / "out", "float32")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == dict(model.named_parameters()).keys()
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight[:300]) and model.lm_head.weight.size(0) == 320
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == CONFIGS["class"].rope_base and config["model_type"] == "nanochat"
    with pytest.raises(UserError, match="smear"):
        write_mlx(portable(make_model("code")), tmp_path / "other", "float32")


def test_without_its_tokenizer(tmp_path: Path) -> None:
    write_mlx(portable(make_model("class")), tmp_path / "out", "float32")
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="is missing: copy the tokenizer"):
        read_hf(tmp_path / "out")


def test_what_is_lacking() -> None:
    from nanochat.formats.mlx_folder import lacking

    assert not lacking(GPTConfig.plain()) and len(lacking(GPTConfig.plain(softcap=20.0))) == 1
    assert lacking(GPTConfig.plain(ngram_rows=97)) == ["n-grams"]


@torch.no_grad()
def test_the_same_text_in_mlx_lm(tmp_path: Path) -> None:
    """Greedy text of 50 tokens, and their log probabilities within what the other epsilon makes of them."""
    mx: Any = pytest.importorskip("mlx.core")
    utils, generate = pytest.importorskip("mlx_lm.utils"), pytest.importorskip("mlx_lm.generate")
    model = make_model("class")
    write_mlx(portable(model), tmp_path / "out", "float32")
    theirs, _ = utils.load_model(tmp_path / "out")
    prompt = TOKENIZER.encode("the cats and the hats", prepend="<|bos|>")
    ids = list(prompt)
    for token, logprobs in generate.generate_step(mx.array(prompt), theirs, max_tokens=50):
        ours = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        assert int(token) == int(ours.argmax())
        assert math.isclose(float(logprobs[int(token)]), float(ours.max()), abs_tol=1e-3)
        ids.append(int(token))
    assert len(ids) == len(prompt) + 50
