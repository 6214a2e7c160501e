"""One decode step on a CPU as a single call of C (decode.c): a model, its key/value cache, one new token per row, or
the few tokens of a short prompt for one row.

It computes what GPT.forward does with a cache. That form runs on GPUs, on machines without a C compiler, and for longer
prompts.

Shapes: B rows, C channels, H query heads, G key/value heads, D head size, V vocabulary.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from nanochat.cpu import kernels
from nanochat.cpu.fused import EPSILON
from nanochat.gpt import GPT
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.packed_weights import PackedWeights

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
        *(
            (name, LONG)
            for name in (
                "C",
                "H",
                "G",
                "D",
                "V",
                "num_layers",
                "middle",
                "gate_channels",
                "smear_channels",
                "kind",
                "bf16",
                "room",
            )
        ),
        *((name, FLOAT) for name in ("softcap", "qk_scale", "gate_scale", "eps")),
        *(
            (name, POINTER)
            for name in ("wte", "smear_gate", "resid", "x0", "smear_lambda", "backout", "cosine", "sine")
        ),
        ("head", Matrix),
        ("layers", ctypes.POINTER(Layer)),
    )


class Scratch(ctypes.Structure):
    _fields_ = tuple(
        (name, POINTER) for name in ("x", "first", "middle", "q", "k", "v", "input", "wide", "scores", "previous")
    )


class Tokens(ctypes.Structure):
    _fields_ = (*((name, ctypes.POINTER(LONG)) for name in ("ids", "rows", "positions")), ("B", LONG))


SHORT_PROMPT = 128  # tokens: with more of them PyTorch's products are as fast; with int8 weights, from half of it on


def supported(model: GPT) -> bool:
    """Whether decode.c can run this model: on a CPU with a compiler, in a dtype and of sizes that it is written for."""
    config = model.config
    sizes = (config.n_embd, config.head_dim)
    known = model.compute_dtype in (torch.float32, torch.bfloat16) and all(size % 16 == 0 for size in sizes)
    return known and kernels.in_use(model.device)


class CpuDecoder:
    """Decodes with the weights of `model`: matrices as `packed`, the rest read where it lies."""

    def __init__(self, model: GPT, cache: KVCache, packed: PackedWeights) -> None:
        """`model` has its matrices in its compute dtype (decoding.DecodingWeights)."""
        assert supported(model) and cache.max_tokens <= model.cos.size(0)
        self.cache, self.vocab_size = cache, model.config.vocab_size
        self._most_tokens = SHORT_PROMPT // 2 if packed.int8 else SHORT_PROMPT
        self._kept: list[Any] = [model, packed, *model.parameters(), *cache.k, *cache.v]  # alive while C knows them
        self._model = self._describe(model, packed)
        self._scratch = self._reserve(model)

    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        """The next token of each row in use -> softcapped fp32 logits (B, V); the cache holds them afterwards."""
        B = len(tokens)
        assert self.cache.num_rows == B
        logits = self._run(tokens, range(B), [self.cache.length(row) for row in range(B)], 0)
        self.cache.advance(1)
        return logits

    def takes(self, start: int, num_tokens: int) -> bool:
        """Whether `prompt` is for so many tokens after `start` others: no window may close before the last of them."""
        most = min(self._most_tokens, min(ring.size(1) for ring in self.cache.k) - start)
        return num_tokens <= most

    def prompt(self, tokens: Sequence[int]) -> torch.Tensor:
        """The next tokens of the only row -> softcapped fp32 logits (1, V) after the last, as if given one by one."""
        T, start = len(tokens), self.cache.length(0)
        assert self.cache.num_rows == 1 and self.takes(start, T)
        logits = self._run(tokens, [0] * T, range(start, start + T), T - 1)
        self.cache.advance(T)
        return logits

    def _run(self, tokens: Sequence[int], rows: Sequence[int], positions: Sequence[int], first: int) -> torch.Tensor:
        """`tokens` at `positions` of `rows` -> logits (B - first, V) from number `first` on."""
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
            bf16=bf16,
            kind=KINDS[torch.int8 if packed.int8 else model.compute_dtype],
            room=-(-max(ring.size(1) for ring in self.cache.k) // 16) * 16,
            softcap=config.softcap,
            qk_scale=config.qk_scale,
            gate_scale=config.value_gate_scale,
            eps=EPSILON,
            wte=address(model.wte.weight),
            smear_gate=address(model.smear_gate.weight) if config.smear else None,
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
        """Memory for what a step works out, enough for every row of the cache and for a short prompt."""
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
            "scores": config.n_head * self._model.room,
        }
        tensors = {name: torch.zeros(B, size) for name, size in sizes.items()}
        if self.cache.embeddings is not None:
            tensors["previous"] = self.cache.embeddings
        self._kept += tensors.values()
        return Scratch(**{name: self._address(tensor) for name, tensor in tensors.items()})

    @staticmethod
    def _address(tensor: torch.Tensor) -> int:
        assert tensor.is_contiguous() and tensor.device.type == "cpu"
        return tensor.data_ptr()
