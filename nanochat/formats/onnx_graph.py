"""The network as an ONNX graph with a key/value cache: gpt.py once more, in ONNX operators.

Inputs and outputs have the names that programs for Hugging Face's decoder models expect:

    input_ids (B, T), attention_mask (B, P+T), past_key_values.N.key and .value (B, G, P, D)
    -> logits (B, T, V), present.N.key and .value (B, G, P+T, D)

Smear and n-grams need the ids of the tokens before the first of `input_ids`. Those programs keep nothing but keys and
values, so ids are cached as if they were those of one more layer: see `id_layers`.

Shapes: B batch, T new tokens, P past tokens, S = P + T, C channels, H query heads, G key/value heads, R = H / G,
D head size, V vocabulary.
"""

import math
from typing import Any

import torch

from nanochat.formats.onnx_builder import ENDLESS, OnnxBuilder
from nanochat.gpt_config import GPTConfig

HIDDEN = -1e30  # added to the score of a key that is not seen; finite, as rows of padding see none


def id_layers(config: GPTConfig) -> int:
    """How many layers the cache has for ids: 1 or 0. All its numbers of a token are the id, exact as float32."""
    return int(config.smear or config.ngram_rows > 0)


def build_graph(config: GPTConfig, state: dict[str, torch.Tensor], int8: bool = False) -> OnnxBuilder:
    """The graph of a model with these parameters, named and shaped as GPT has them. Raises UserError without onnx."""
    return _Network(config, state, int8).build()


class _Network:
    """Its methods follow those of gpt.py; values of the graph are their names."""

    def __init__(self, config: GPTConfig, state: dict[str, torch.Tensor], int8: bool) -> None:
        self.config, self.state, self.g = config, state, OnnxBuilder(int8)
        self.group = config.n_head // config.n_kv_head
        self.present: list[tuple[str, str]] = []  # the new keys and values of each layer, (B, G, S, D)

    def build(self) -> OnnxBuilder:
        g, num_layers = self.g, self.config.n_layer + id_layers(self.config)
        self.ids = g.input("input_ids", "INT64", ["batch_size", "sequence_length"])
        self.mask = g.input("attention_mask", "INT64", ["batch_size", "total_sequence_length"])
        names = [(f"{i}.key", f"{i}.value") for i in range(num_layers)]
        self.past = [
            tuple(
                g.input(f"past_key_values.{name}", "FLOAT", self._cache_shape("past_sequence_length")) for name in pair
            )
            for pair in names
        ]
        self._place_tokens()
        logits = self._head(self._hidden())
        g.output(logits, "logits", ["batch_size", "sequence_length", self.config.vocab_size])
        for pair, values in zip(names, self.present, strict=True):
            for name, value in zip(pair, values, strict=True):
                g.output(value, f"present.{name}", self._cache_shape("total_sequence_length"))
        return g

    def _cache_shape(self, length: str) -> list[Any]:
        return ["batch_size", self.config.n_kv_head, length, self.config.head_dim]

    def _table(self, name: str) -> torch.Tensor:
        """A matrix with a row per token, without the rows that pad it."""
        return self.state[f"{name}.weight"][: self.config.vocab_size]

    # -- positions ------------------------------------------------------------------------------------

    def _place_tokens(self) -> None:
        """Set cos and sin (B, 1, T, D/2) of the new tokens, and for each window what is added to the scores.

        A token's position is the number of tokens before it that the attention mask keeps.
        """
        g, cfg = self.g, self.config
        g.scope = "positions/"
        self.past_length = g.slice(g.op("Shape", self.past[0][0]), 2, 3, 0)  # (1,)
        places = g.op("Sub", g.op("CumSum", self.mask, 1), 1)  # (B, S)
        new_places = g.slice(g.op("Max", places, 0), self.past_length, ENDLESS, 1)  # (B, T)
        # As many rotations as GPT has. A graph that computes them would leave large angles to the cosine of a GPU.
        rates = cfg.rope_base ** (-torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim)
        angles = torch.outer(torch.arange(10 * cfg.sequence_len, dtype=torch.float32), rates)
        self.cos, self.sin = (
            g.op("Unsqueeze", g.op("Gather", g.constant(name, table), new_places), [1])
            for name, table in (("rotary.cos", angles.cos()), ("rotary.sin", angles.sin()))
        )
        distance = g.op("Sub", g.op("Unsqueeze", new_places, [2]), g.op("Unsqueeze", places, [1]))  # (B, T, S)
        kept = g.op("Unsqueeze", g.op("Cast", self.mask, to=g.onnx.TensorProto.BOOL), [1])  # (B, 1, S)
        before = g.op("And", g.op("GreaterOrEqual", distance, 0), kept)
        self.biases = {}
        for window in sorted({left for left, _ in cfg.window_sizes()}):
            seen = g.op("And", before, g.op("LessOrEqual", distance, window))
            bias = g.op("Unsqueeze", g.op("Where", seen, 0.0, HIDDEN), [1])  # (B, 1, T, S)
            self.biases[window] = g.op("Concat", *[bias] * self.group, axis=2)  # (B, 1, R*T, S)

    # -- forward --------------------------------------------------------------------------------------

    def _hidden(self) -> str:
        """The final normed hidden states (B, T, C). Fills `present`."""
        g, cfg, state = self.g, self.config, self.state
        g.scope, middle = "embedding/", None
        x = x0 = self._embed()
        for i, (window, _) in enumerate(cfg.window_sizes()):
            g.scope = f"layer_{i}/"
            if cfg.residual_scalars:
                a, b = float(state["resid_lambdas"][i]), float(state["x0_lambdas"][i])
                x = g.op("Add", g.op("Mul", x, a), g.op("Mul", x0, b))
            x = g.op("Add", x, self._attention(i, g.rms_norm(x), window))
            x = g.op("Add", x, self._mlp(i, g.rms_norm(x)))
            if cfg.backout and i == cfg.n_layer // 2:
                middle = x
        if id_layers(cfg):
            g.scope = "cached_ids/"
            self._cache_ids()
        g.scope = "head/"
        if middle is not None:
            x = g.op("Sub", x, g.op("Mul", middle, float(state["backout_lambda"])))
        return g.rms_norm(x)

    def _attention(self, layer: int, x: str, window: int) -> str:
        g, cfg, prefix = self.g, self.config, f"transformer.h.{layer}.attn"
        q = self._rotate(self._heads(self._linear(x, f"{prefix}.c_q"), cfg.n_head))  # (B, H, T, D)
        k = self._rotate(self._heads(self._linear(x, f"{prefix}.c_k"), cfg.n_kv_head))  # (B, G, T, D)
        k = g.op("Mul", k, cfg.qk_scale) if cfg.qk_scale != 1 else k
        v = self._linear(x, f"{prefix}.c_v")  # (B, T, G*D)
        if cfg.has_value_embed(layer):
            first = g.slice(x, 0, cfg.value_gate_channels, 2)
            gate = g.op("Sigmoid", self._linear(first, f"{prefix}.ve_gate", exact=True))  # (B, T, G)
            gate = g.op("Unsqueeze", g.op("Mul", gate, cfg.value_gate_scale), [3])
            ve = g.embedding(self.ids, self._table(f"value_embeds.{layer}"), f"value_embeds.{layer}")
            ve = g.op("Mul", gate, g.reshape(ve, 0, 0, cfg.n_kv_head, cfg.head_dim))
            v = g.op("Add", v, g.reshape(ve, 0, 0, cfg.n_kv_head * cfg.head_dim))
        k = g.op("Concat", self.past[layer][0], k, axis=2)  # (B, G, S, D)
        v = g.op("Concat", self.past[layer][1], self._heads(v, cfg.n_kv_head), axis=2)
        self.present.append((k, v))
        q = g.op("Mul", q, cfg.qk_scale / math.sqrt(cfg.head_dim))
        q = g.reshape(q, 0, cfg.n_kv_head, -1, cfg.head_dim)  # (B, G, R*T, D): the queries of one key head in a row
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))  # (B, G, R*T, S)
        shares = g.op("Softmax", g.op("Add", scores, self.biases[window]), axis=-1)
        y = g.reshape(g.op("MatMul", shares, v), 0, cfg.n_head, -1, cfg.head_dim)  # (B, H, T, D)
        y = g.reshape(g.op("Transpose", y, perm=[0, 2, 1, 3]), 0, 0, cfg.n_embd)
        return self._linear(y, f"{prefix}.c_proj")

    def _mlp(self, layer: int, x: str) -> str:
        h = self.g.op("Relu", self._linear(x, f"transformer.h.{layer}.mlp.c_fc"))
        return self._linear(self.g.op("Mul", h, h), f"transformer.h.{layer}.mlp.c_proj")

    def _head(self, x: str) -> str:
        """Softcapped logits (B, T, V)."""
        g, cap = self.g, self.config.softcap
        logits = g.matmul(x, self._table("lm_head"), "lm_head")
        return g.op("Mul", g.op("Tanh", g.op("Div", logits, cap)), cap)

    # -- parts ----------------------------------------------------------------------------------------

    def _linear(self, x: str, name: str, exact: bool = False) -> str:
        return self.g.matmul(x, self.state[f"{name}.weight"], name, exact)

    def _heads(self, x: str, num_heads: int) -> str:
        """(B, T, heads * D) -> (B, heads, T, D)."""
        return self.g.op("Transpose", self.g.reshape(x, 0, 0, num_heads, self.config.head_dim), perm=[0, 2, 1, 3])

    def _rotate(self, x: str) -> str:
        """Rotary positions, then the norm: x (B, heads, T, D) -> the same shape."""
        g, (a, b) = self.g, self.g.op("Split", x, outputs=2, axis=3)
        first = g.op("Add", g.op("Mul", a, self.cos), g.op("Mul", b, self.sin))
        second = g.op("Sub", g.op("Mul", b, self.cos), g.op("Mul", a, self.sin))
        return g.rms_norm(g.op("Concat", first, second, axis=3))

    # -- embeddings -----------------------------------------------------------------------------------

    def _embed(self) -> str:
        """Normed embeddings (B, T, C) of the new tokens, with n-grams and smear."""
        g, cfg, wte = self.g, self.config, self._table("transformer.wte")
        if not id_layers(cfg):
            return g.rms_norm(g.embedding(self.ids, wte, "wte"))
        ids = self._ids_with_past()  # (B, 3+T)
        x = g.embedding(g.op("Max", g.slice(ids, 2, ENDLESS, 1), 0), wte, "wte")  # (B, 1+T, C)
        x = g.rms_norm(g.op("Add", x, self._ngrams(ids)) if cfg.ngram_rows else x)
        new = g.slice(x, 1, ENDLESS, 1)  # (B, T, C)
        return self._smear(new, g.slice(x, 0, -1, 1), g.slice(ids, 2, -1, 1)) if cfg.smear else new

    def _ids_with_past(self) -> str:
        """The ids (B, 3+T) of the new tokens and of three before; -1 where there is none or the mask leaves it out."""
        g, cached = self.g, self.past[self.config.n_layer][0]
        past = g.op("Cast", g.op("Gather", g.op("Gather", cached, 0, axis=3), 0, axis=1), to=g.onnx.TensorProto.INT64)
        kept = g.op("Cast", self.mask, to=g.onnx.TensorProto.BOOL)
        ids = g.op("Where", kept, g.op("Concat", past, self.ids, axis=1), -1)  # (B, S)
        return g.slice(g.op("Pad", ids, [0, 3, 0, 0], -1), self.past_length, ENDLESS, 1)

    def _ngrams(self, ids: str) -> str:
        """What pairs and triples of ids (B, 2+N) add to the embeddings of the last N: (B, N, C)."""
        g = self.g
        one, two, three = (g.slice(ids, start, end, 1) for start, end in ((2, ENDLESS), (1, -1), (0, -2)))
        pair = g.op("Add", g.op("Mul", one, 998_244_353), g.op("Mul", g.op("Add", two, 1), 1_000_000_007))
        triple = g.op("Add", pair, g.op("Mul", g.op("Add", three, 1), 1_610_612_741))
        hashes = g.op("Concat", g.op("Unsqueeze", pair, [0]), g.op("Unsqueeze", triple, [0]), axis=0)  # (2, B, N)
        rows = g.op("Mod", hashes, self.config.ngram_rows)
        rows = g.embedding(rows, self.state["ngram_embed.weight"], "ngram_embed")
        return self._linear(g.op("ReduceSum", rows, [0], keepdims=0), "ngram_proj", exact=True)

    def _smear(self, x: str, previous: str, previous_ids: str) -> str:
        """Add to x (B, T, C) a gated share of the embedding before each, if there is one."""
        g, cfg = self.g, self.config
        there = g.op("Unsqueeze", g.op("Where", g.op("Less", previous_ids, 0), 0.0, 1.0), [2])
        gate = self._linear(g.slice(x, 0, cfg.smear_channels, 2), "smear_gate", exact=True)  # (B, T, 1)
        gate = g.op("Mul", g.op("Sigmoid", gate), float(self.state["smear_lambda"]))
        return g.op("Add", x, g.op("Mul", g.op("Mul", gate, there), previous))

    def _cache_ids(self) -> None:
        """Append the new ids to the cache's last layer, G * D times each in keys and in values."""
        g, cfg = self.g, self.config
        ids = g.op("Unsqueeze", g.op("Cast", self.ids, to=g.onnx.TensorProto.FLOAT), [1, 3])  # (B, 1, T, 1)
        ids = g.op("Expand", ids, [1, cfg.n_kv_head, 1, cfg.head_dim])
        key, value = (g.op("Concat", past, ids, axis=2) for past in self.past[cfg.n_layer])
        self.present.append((key, value))
