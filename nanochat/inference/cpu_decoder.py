"""The C decoder: a decode step on a CPU as a single call of C (decode.c), for one token per row or one short prompt.

It computes what GPT.forward computes with a KVCache, which runs on GPUs, without a C compiler, for longer prompts, and
for models that `supported` does not recognise.

Shapes: B rows, C channels, H query heads, G key/value heads, D head size, V vocabulary.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nanochat import gpt
from nanochat.common import fast_path
from nanochat.common.fast_path import in_words, warn_once
from nanochat.cpu import kernels
from nanochat.cpu.functions import EPSILON
from nanochat.gpt import GPT, MLP, Block, CausalSelfAttention, Embedding, GPTConfig, Linear
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.packed_weights import PackedWeights, adjacent_inputs

POINTER, LONG, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class Matrix(ctypes.Structure):
    _fields_ = (("weight", POINTER), ("scale", POINTER))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "proj", "fc", "out")),
        *((name, POINTER) for name in ("gate", "value_embed", "keys", "values")),
        ("slots", LONG),
    )


class Model(ctypes.Structure):
    _fields_ = (
        *((name, LONG) for name in ("C", "H", "G", "D", "V", "num_layers", "middle")),
        *(
            (name, LONG)
            for name in ("gate_channels", "smear_channels", "ngram_rows", "ngram_dim", "kind", "bf16", "room")
        ),
        *((name, FLOAT) for name in ("softcap", "qk_scale", "gate_scale", "eps")),
        *((name, POINTER) for name in ("wte", "smear_gate", "ngram_embed", "ngram_proj", "resid", "x0")),
        *((name, POINTER) for name in ("smear_lambda", "backout", "cosine", "sine")),
        ("head", Matrix),
        ("layers", ctypes.POINTER(Layer)),
    )


class Scratch(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("x", "first", "middle", "q", "k", "v")),
        *((name, POINTER) for name in ("input", "wide", "integers", "scale", "scores", "recent")),
    )


class Tokens(ctypes.Structure):
    _fields_ = (*((name, ctypes.POINTER(LONG)) for name in ("ids", "rows", "positions")), ("B", LONG))


SHORT_PROMPT = 255  # tokens: less than a chunk of prefill

# What decode.c computes. A model that differs in anything named here is decoded in PyTorch.
FUNCTIONS = {
    "GPT.hidden": "95038a48",
    "GPT._smear": "b2fa7b6a",
    "GPT._ngrams": "b3aa4b49",
    "GPT._embed": "74ff5184",
    "GPT._rotary": "c31f33fb",
    "GPT.forward": "1ac1ec2c",
    "GPT.last_logits": "c8cd79a2",
    "Block.forward": "33982092",
    "CausalSelfAttention.forward": "47e81de0",
    "MLP.forward": "ee964089",
    "Linear.forward": "8f413056",
    "linear": "0ad23a94",
    "norm": "95f9edc2",
    "mix": "60102a94",
    "normed_rotary": "f381e780",
    "relu_squared": "cf51e9e4",
    "head_logits": "e5f0966d",
}
MODULES = (GPT, Block, CausalSelfAttention, MLP, Linear, Embedding, nn.ModuleDict, nn.ModuleList)
FIELDS = (
    *("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern", "init"),
    *("short_window_divisor", "rope_base", "qk_scale", "softcap", "residual_scalars", "smear", "smear_channels"),
    *("value_embeds", "value_gate_channels", "value_gate_scale", "backout", "ngram_rows", "ngram_dim"),
)


def supported(model: GPT, int8: bool = False) -> bool:
    """Whether decode.c can decode this model: on a CPU with a compiler, of a dtype and sizes that it handles, and
    computing what it computes. Warns once of what it does not know."""
    if not handles(model):
        return False
    if unknown := differences(model, int8):
        warn_once(f"the C decoder does not implement this model ({in_words(unknown)}): decoding in PyTorch, slower")
    return not unknown


def handles(model: GPT) -> bool:
    """Whether decode.c is there for the model's device, dtype and sizes."""
    config, dtype = model.config, model.compute_dtype
    sizes_fit = config.n_embd % 16 == 0 and config.head_dim % 16 == 0
    return dtype in (torch.float32, torch.bfloat16) and sizes_fit and kernels.in_use(model.device)


def differences(model: GPT, int8: bool = False) -> list[str]:
    """How the model differs from what decode.c computes, in words; where decode.c handles it also by example."""
    unknown = unknown_parts(model)
    if not unknown and handles(model) and not agrees(probe_config(model.config), model.compute_dtype, int8):
        return ["its result for a small example, which differs from PyTorch's"]
    return unknown


def unknown_parts(model: GPT) -> list[str]:
    """The model's functions, modules, config fields and parameters that decode.c is not written for."""
    if type(model.config) is not GPTConfig:
        return [type(model.config).__qualname__]
    return fast_path.unknown_parts(model, [(gpt, FUNCTIONS)], MODULES, FIELDS, expected_shapes(model.config))


def expected_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that decode.c reads."""
    C, L, V = config.n_embd, config.n_layer, config.padded_vocab_size
    HD, GD = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    in_block = {"attn.c_q": (HD, C), "attn.c_k": (GD, C), "attn.c_v": (GD, C), "attn.c_proj": (C, HD)}
    in_block |= {"mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    shapes = {f"transformer.h.{i}.{name}.weight": shape for i in range(L) for name, shape in in_block.items()}
    for i in filter(config.has_value_embed, range(L)):
        shapes[f"value_embeds.{i}.weight"] = (V, GD)
        shapes[f"transformer.h.{i}.attn.ve_gate.weight"] = (config.n_kv_head, config.value_gate_channels)
    shapes |= {"transformer.wte.weight": (V, C), "lm_head.weight": (V, C)}
    others: dict[str, tuple[int, ...]] = {}
    if config.residual_scalars:
        others |= {"resid_lambdas": (L,), "x0_lambdas": (L,)}
    if config.smear:
        others |= {"smear_gate.weight": (1, config.smear_channels), "smear_lambda": (1,)}
    if config.ngram_rows:
        others |= {"ngram_embed.weight": (config.ngram_rows, config.ngram_dim)}
        others |= {"ngram_proj.weight": (config.n_embd, config.ngram_dim)}
    return shapes | others | ({"backout_lambda": (1,)} if config.backout else {})


def probe_config(config: GPTConfig) -> GPTConfig:
    """The same features and head size in a model of a few thousand weights."""
    group = config.n_head // config.n_kv_head
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": group, "n_kv_head": 1, "n_embd": group * config.head_dim}
    sizes["ngram_rows"] = min(config.ngram_rows, 97)
    return replace(config, sequence_len=16, vocab_size=64, **sizes)


_agrees: dict[tuple[str, torch.dtype, bool], bool] = {}


def agrees(config: GPTConfig, dtype: torch.dtype, int8: bool = False) -> bool:
    """Whether decode.c gives the same logits as PyTorch for a model of this config with random weights: of a prompt of
    5 tokens, and of one more. With int8, PyTorch has what the rounded weights stand for. Computed once per config and
    dtype; takes a few milliseconds."""
    key = str(config), dtype, int8
    if key not in _agrees:
        with torch.inference_mode():
            model, draw = GPT.create(config, compute_dtype=dtype), torch.Generator().manual_seed(1)
            for p in model.parameters():  # in a fresh model projections are zero, which would hide what they project
                p.data = torch.randn(p.shape, generator=draw) * (0.15 if p.dim() > 1 else 0.5)
                p.data = p.data.to(dtype if p.dim() > 1 else p.dtype)
            tokens = [3, 1, 4, 1, 5, 9]
            decoder = CpuDecoder(model, KVCache(config, 1, 16, dtype=dtype), PackedWeights(model, int8))
            logits = torch.cat([decoder.prompt(tokens[:5]), decoder(tokens[5:])])  # (2, V)
            plain = model(torch.tensor([tokens], device="cpu"))[0, 4:]
        error = (logits - plain).norm() / plain.norm()
        _agrees[key] = bool(error < (1e-3 if dtype == torch.float32 else 0.1))
    return _agrees[key]


def short_prompt(dtype: torch.dtype, int8: bool) -> int:
    """Tokens up to which decode.c is at least as fast as PyTorch, whose products are faster the larger they are."""
    if int8:
        return SHORT_PROMPT if adjacent_inputs(torch.int8) > 1 else 64  # multiplied as integers, or as float32
    return SHORT_PROMPT if dtype == torch.bfloat16 else 128


class CpuDecoder:
    """Decodes with the weights of `model`: matrices from `packed`, other parameters in place."""

    def __init__(self, model: GPT, cache: KVCache, packed: PackedWeights) -> None:
        """`model` has its matrices in its compute dtype (decoding_weights.DecodingWeights)."""
        assert cache.max_tokens <= model.cos.size(0)
        self.cache, self.vocab_size = cache, model.config.vocab_size
        self._max_tokens = short_prompt(model.compute_dtype, packed.int8)
        self._kept: list[Any] = [model, packed, *model.parameters(), *cache.k, *cache.v]  # C holds their addresses
        self._model = self._describe(model, packed)
        self._scratch = self._reserve(model)

    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token per row in use to the cache -> softcapped fp32 logits (B, V) of the next."""
        B = len(tokens)
        assert self.cache.num_rows == B
        logits = self._run(tokens, range(B), [self.cache.length(row) for row in range(B)], 0)
        self.cache.lengthen(1)
        return logits

    def takes(self, start: int, num_tokens: int) -> bool:
        """Whether `prompt` can run so many tokens after `start` others: none may leave a window before the last."""
        return num_tokens <= min(self._max_tokens, min(ring.size(1) for ring in self.cache.k) - start)

    def prompt(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append tokens to the only row -> softcapped fp32 logits (1, V) after the last, as if one by one."""
        T, start = len(tokens), self.cache.length(0)
        assert self.cache.num_rows == 1 and self.takes(start, T)
        logits = self._run(tokens, [0] * T, range(start, start + T), T - 1)
        self.cache.lengthen(T)
        return logits

    def _run(self, tokens: Sequence[int], rows: Sequence[int], positions: Sequence[int], first: int) -> torch.Tensor:
        """`tokens` at `positions` of `rows` -> logits (B - first, V) of token `first` and those after it."""
        B = len(tokens)
        assert max(positions) < self.cache.max_tokens and min(tokens) >= 0 and max(tokens) < self.vocab_size
        logits = torch.empty(B - first, self.vocab_size)
        longs = LONG * B
        given = Tokens(longs(*tokens), longs(*rows), longs(*positions), B)
        kernels.library().decode_step(  # type: ignore[union-attr]
            ctypes.byref(self._model),
            ctypes.byref(self._scratch),
            ctypes.byref(given),
            POINTER(logits.data_ptr()),
            LONG(first),
        )
        return logits

    def _describe(self, model: GPT, packed: PackedWeights) -> Model:
        config = model.config
        matrix = functools.partial(self._matrix, packed)
        layers = (Layer * config.n_layer)()
        for i, block in enumerate(model.blocks):
            attn, mlp = block.attn, block.mlp
            gate = attn.ve_gate and self._address(attn.ve_gate.weight)
            embed = self._address(model.get_parameter(f"value_embeds.{i}.weight")) if gate else None
            layers[i] = Layer(
                matrix(attn.c_q),
                matrix(attn.c_k),
                matrix(attn.c_v),
                matrix(attn.c_proj),
                matrix(mlp.c_fc),
                matrix(mlp.c_proj),
                gate,
                embed,
                self._address(self.cache.k[i]),
                self._address(self.cache.v[i]),
                self.cache.k[i].size(1),
            )
        self._kept += [layers, model.cos, model.sin]
        bf16 = model.compute_dtype == torch.bfloat16
        scalars, address = config.residual_scalars, self._address
        return Model(
            C=config.n_embd,
            H=config.n_head,
            G=config.n_kv_head,
            D=config.head_dim,
            V=config.vocab_size,
            num_layers=config.n_layer,
            middle=config.n_layer // 2,
            gate_channels=config.value_gate_channels,
            smear_channels=config.smear_channels,
            ngram_rows=config.ngram_rows,
            ngram_dim=config.ngram_dim,
            bf16=bf16,
            kind=KINDS[torch.int8 if packed.int8 else model.compute_dtype],
            room=-(-max(ring.size(1) for ring in self.cache.k) // 16) * 16,
            softcap=config.softcap,
            qk_scale=config.qk_scale,
            gate_scale=config.value_gate_scale,
            eps=EPSILON,
            wte=address(model.wte.weight),
            smear_gate=address(model.smear_gate.weight) if config.smear else None,
            ngram_embed=address(model.ngram_embed.weight) if config.ngram_rows else None,
            ngram_proj=address(model.ngram_proj.weight) if config.ngram_rows else None,
            resid=address(model.resid_lambdas) if scalars else None,
            x0=address(model.x0_lambdas) if scalars else None,
            smear_lambda=address(model.smear_lambda) if config.smear else None,
            backout=address(model.backout_lambda) if config.backout else None,
            cosine=address(model.cos),
            sine=address(model.sin),
            head=matrix(model.lm_head),
            layers=layers,
        )

    def _matrix(self, packed: PackedWeights, linear: torch.nn.Linear) -> Matrix:
        weight, scale = packed.of(linear)
        return Matrix(self._address(weight), None if scale is None else self._address(scale))

    def _reserve(self, model: GPT) -> Scratch:
        """Buffers for a step's activations, for every row of the cache or a short prompt."""
        config, B = model.config, max(self.cache.batch_size, SHORT_PROMPT)
        C, HD, GD = config.n_embd, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        sizes = {
            "x": C,
            "first": C,
            "middle": C,
            "q": HD,
            "k": GD,
            "v": GD,
            "input": C,
            "wide": max(4 * C, HD),
            "integers": max(4 * C, HD),
            "scale": 1,
            "scores": config.n_head * self._model.room,
        }
        tensors = {name: torch.empty(B, size) for name, size in sizes.items()}  # touched as far as it is used
        tensors["recent"] = self.cache.recent_of_all
        self._kept += tensors.values()
        return Scratch(**{name: self._address(tensor) for name, tensor in tensors.items()})

    @staticmethod
    def _address(tensor: torch.Tensor) -> int:
        assert tensor.is_contiguous() and tensor.device.type == "cpu"
        return tensor.data_ptr()
