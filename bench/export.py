"""Whether exports compute what GPT computes: `python -m bench.export`, or `--source=sft` for a model that was trained.

Random weights, all large enough to matter, in each recipe by each route, and with grouped heads and short windows:
the largest difference of logits in transformers and onnxruntime over random prompts, and greedy text with their cache
and without.
"""

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from nanochat.common import get_base_dir, say
from nanochat.engine import Engine
from nanochat.formats import hf_class
from nanochat.formats.hf_folder import write_hf
from nanochat.formats.onnx_folder import FLOAT, GRAPHS, write_onnx
from nanochat.formats.portable import PortableModel, read_run
from nanochat.gpt import GPT, GPTConfig
from nanochat.recipe import get_recipe
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from scripts import _cli

SEED = 1
Route = Literal["auto", "class", "code", "onnx"]


@dataclass
class ExportFlags:
    """Which model, how many prompts."""

    source: Literal["", "base", "sft", "rl"] = ""
    """A trained model of this stage instead of random ones."""
    model_tag: str = ""
    """Its tag."""
    prompts: int = 200
    """Random prompts."""
    longest: int = 1500
    """Tokens of the longest prompt."""
    tokens: int = 100
    """Of greedy text."""


def random_models(tokenizer: RustBPETokenizer) -> Iterator[tuple[str, PortableModel, Route]]:
    """Each with a name and a route."""
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "n_layer": 4, "n_head": 4, "n_embd": 64, "sequence_len": 2048}
    for recipe in ("small", "published", "later", "plain"):
        for kv_heads in (4, 1):
            config = get_recipe(recipe).model(**sizes, n_kv_head=kv_heads)
            yield from by_each_route(f"{recipe}, {kv_heads} key heads", config, tokenizer)
    config = get_recipe("later").model(**sizes, n_kv_head=2, ngram_rows=1000)
    yield from by_each_route("later with n-grams, 2 key heads", config, tokenizer)
    config = GPTConfig.later(**{**sizes, "sequence_len": 1024}, n_kv_head=2)
    config = replace(config, window_pattern="SSL", short_window_divisor=16)
    yield from by_each_route("later, windows of 128, context 1024", config, tokenizer)


def by_each_route(
    name: str, config: GPTConfig, tokenizer: RustBPETokenizer
) -> Iterator[tuple[str, PortableModel, Route]]:
    """A random model of this config, once for each route that it can take."""
    routes: tuple[Route, ...] = ("code", "onnx") if hf_class.lacking(config) else ("class", "code", "onnx")
    for route in routes:
        yield f"{name}, {route}", random_model(config, tokenizer), route


def random_model(config: GPTConfig, tokenizer: RustBPETokenizer) -> PortableModel:
    """Weights as large as in a trained model; scalars between a half and one."""
    model, generator = GPT.create(config), torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1, generator=generator)
            else:
                is_table = "wte" in name or "value_embeds" in name
                p.normal_(0, 1 if is_table else p.size(1) ** -0.5, generator=generator)
    return PortableModel(config, dict(model.state_dict()), tokenizer, "base", {"model_tag": "random", "step": 0})


class Exported(Protocol):
    """An export in the program that it is for."""

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Of ids (1, T): (1, T, V)."""
        ...

    def greedy(self, prompt: list[int], tokens: int, use_cache: bool) -> list[int]:
        """The likeliest text after the prompt."""
        ...


class InTransformers:
    def __init__(self, model: PortableModel, folder: Path, route: Literal["auto", "class", "code"]) -> None:
        from transformers import AutoModelForCausalLM

        write_hf(model, folder, "float32", route)
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(ids).logits
        return found

    def greedy(self, prompt: list[int], tokens: int, use_cache: bool) -> list[int]:
        ids = torch.tensor([prompt])
        given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": use_cache}
        text: list[int] = self.model.generate(ids, max_new_tokens=tokens, **given)[0, len(prompt) :].tolist()
        return text


class InOnnxruntime:
    def __init__(self, model: PortableModel, folder: Path) -> None:
        import onnxruntime

        write_onnx(model, folder)
        self.session = onnxruntime.InferenceSession(folder / GRAPHS / FLOAT)
        inputs = self.session.get_inputs()[2:]
        self.empty = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in inputs}

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.run(ids.tolist(), self.empty)[0]

    def greedy(self, prompt: list[int], tokens: int, use_cache: bool) -> list[int]:
        cache, new, text = self.empty, prompt, list[int]()
        for _ in range(tokens):
            logits, after = self.run([new], cache)
            text.append(int(logits[0, -1].argmax()))
            cache, new = (after, text[-1:]) if use_cache else (cache, prompt + text)
        return text

    def run(self, ids: list[list[int]], cache: dict[str, np.ndarray]) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        """Logits of ids (1, T), and the cache after them."""
        seen = len(ids[0]) + next(iter(cache.values())).shape[2]
        inputs = {"input_ids": np.array(ids, np.int64), "attention_mask": np.ones((1, seen), np.int64)}
        logits, *present = self.session.run(None, {**inputs, **cache})
        return torch.from_numpy(logits), dict(zip(cache, present, strict=True))


def compare(model: PortableModel, route: Route, flags: ExportFlags) -> str:
    """Export the model, and say how far logits and greedy text elsewhere differ from ours."""
    ours = GPT.create(model.config)
    ours.load_state_dict(model.state)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        theirs: Exported = InOnnxruntime(model, out) if route == "onnx" else InTransformers(model, out, route)
    draw, worst = random.Random(SEED), 0.0
    with torch.inference_mode():
        for _ in range(flags.prompts):
            length = draw.randint(1, flags.longest)
            ids = torch.tensor([draw.choices(range(model.config.vocab_size), k=length)])
            worst = max(worst, float((theirs.logits(ids) - ours(ids)).abs().max()))
        same = same_text(ours, theirs, model.tokenizer, flags.tokens)
    return f"largest difference of logits {worst:.1e}; greedy text {', '.join(same)}"


def same_text(ours: GPT, theirs: Exported, tokenizer: RustBPETokenizer, tokens: int) -> list[str]:
    """Whether greedy text after a prompt is that of Engine, with the program's cache and without: a phrase each."""
    prompt = tokenizer.encode("The capital of France is", prepend="<|bos|>")
    expected = [row[0] for row, _ in Engine(ours, tokenizer).generate(prompt, 1, tokens, temperature=0.0)]
    found = []
    for use_cache in (True, False):
        text = theirs.greedy(prompt, tokens, use_cache)
        verdict = "equal" if text[: len(expected)] == expected else "DIFFERENT"
        found.append(f"{verdict} ({'cached' if use_cache else 'not cached'}, {len(expected)} tokens)")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    flags = _cli.parse(ExportFlags, argv)
    base_dir = get_base_dir(to_write=False)
    if not flags.source:
        for name, model, route in random_models(get_tokenizer(base_dir / "tokenizer")):
            say(f"{name}: {compare(model, route, flags)}")
        return 0
    model = read_run(base_dir, flags.source, flags.model_tag)
    longest = min(flags.longest, model.config.sequence_len)
    routes: tuple[Route, ...] = ("auto", "onnx")
    for route in routes:
        say(f"{flags.source} model, {route}: {compare(model, route, replace(flags, longest=longest))}")
    return 0


if __name__ == "__main__":
    _cli.run(main)
