"""The model: initialisation and forward pass of the GPT, nothing else. Its sizes and features are in gpt_config.py.

Shapes: B batch, T time, C channels (n_embd), H query heads, G key/value heads, D head size, V vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.cpu.fused import mix, norm, normed_rotary, relu_squared
from nanochat.flash_attention import flash_attn
from nanochat.gpt_config import GPTConfig
from nanochat.loss_head import head_logits, head_loss

__all__ = ["GPT", "GPTConfig"]


class AttentionCache(Protocol):
    """What the model asks of a key/value cache (kv_cache.KVCache)."""

    previous_embedding: Any  # (B, 1, C) tensor for smear, or None before the first token

    @property
    def lengths(self) -> torch.Tensor: ...  # (B,) tokens already cached per row

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor: ...

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None: ...

    def advance(self, num_tokens: int) -> None: ...


class Linear(nn.Linear):
    """A matrix without bias: kept in fp32, multiplied in the dtype of its input."""

    cast: torch.Tensor | None = None  # the weight in that dtype, while GPT.hold_casts is open

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cast is not None:
            return _CastLinear.apply(x, self.weight, self.cast)
        return F.linear(x, self.weight.to(x.dtype))


class _CastLinear(torch.autograd.Function):
    """x (..., K) times a weight (M, K) that is at hand in x's dtype too; gradients go to the weight itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, cast: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, cast)
        ctx.weight_dtype = weight.dtype
        return F.linear(x, cast)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, cast = ctx.saved_tensors
        g = grads[0]
        of_weight = g.flatten(0, -2).T @ x.flatten(0, -2)  # (M, K)
        return g @ cast if ctx.needs_input_grad[0] else None, of_weight.to(ctx.weight_dtype), None


class Embedding(nn.Embedding):
    """A look-up table that GPT.init_weights fills."""

    def reset_parameters(self) -> None:
        """Nothing: the default would draw numbers to be thrown away, and import the compiler to do so."""


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, normed q and k, and gated value embeddings."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        C, D, H, G = config.n_embd, config.head_dim, config.n_head, config.n_kv_head
        self.c_q = Linear(C, H * D)
        self.c_k = Linear(C, G * D)
        self.c_v = Linear(C, G * D)
        self.c_proj = Linear(H * D, C)
        self.ve_gate = Linear(config.value_gate_channels, G) if config.has_value_embed(layer) else None

    def forward(
        self,
        x: torch.Tensor,
        ve: torch.Tensor | None,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        window_size: tuple[int, int],
        kv_cache: AttentionCache | None = None,
    ) -> torch.Tensor:
        """x (B, T, C); ve (B, T, G*D) value embeddings or None -> (B, T, C)."""
        B, T, _ = x.shape
        q = normed_rotary(self.c_q(x).view(B, T, -1, self.config.head_dim), *cos_sin, self.config.qk_scale)
        k, v = self.keys_and_values(x, ve, cos_sin)
        if kv_cache is None:
            y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window_size)
        else:
            y = kv_cache.attend(self.layer, q, k, v, window_size[0])
        return self.c_proj(y.reshape(B, T, -1))

    def keys_and_values(
        self, x: torch.Tensor, ve: torch.Tensor | None, cos_sin: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v (B, T, G, D) of x (B, T, C)."""
        B, T, _ = x.shape
        D = self.config.head_dim
        k = self.c_k(x).view(B, T, -1, D)
        v = self.c_v(x).view(B, T, -1, D)
        if ve is not None:
            assert self.ve_gate is not None
            gate = torch.sigmoid(self.ve_gate(x[..., : self.config.value_gate_channels]))  # (B, T, G)
            v = v + self.config.value_gate_scale * gate.unsqueeze(-1) * ve.view(B, T, -1, D)
        return normed_rotary(k, *cos_sin, self.config.qk_scale), v


class MLP(nn.Module):
    """Two matrices with ReLU squared between them (arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(relu_squared(self.c_fc(x)))


class Block(nn.Module):
    """Attention, then MLP, each on a normed copy and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        ve: torch.Tensor | None,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        window_size: tuple[int, int],
        kv_cache: AttentionCache | None = None,
    ) -> torch.Tensor:
        x = x + self.attn(norm(x), ve, cos_sin, window_size, kv_cache)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The whole network. Build with `GPT.create`, which allocates and initialises every tensor."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.window_sizes = config.window_sizes()
        C, V = config.n_embd, config.padded_vocab_size
        self.transformer = nn.ModuleDict(
            {
                "wte": Embedding(V, C),
                "h": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            }
        )
        self.lm_head = Linear(C, V)
        with_values = [i for i in range(config.n_layer) if config.has_value_embed(i)]
        kv_dim = config.n_kv_head * config.head_dim
        self.value_embeds = nn.ModuleDict({str(i): Embedding(V, kv_dim) for i in with_values})
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        if config.smear:
            self.smear_gate = Linear(config.smear_channels, 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))
        # Ten contexts' worth of rotations: evaluation prompts may be longer than the training rows.
        positions = (10 * config.sequence_len, config.head_dim // 2)
        self.register_buffer("cos", torch.empty(positions), persistent=False)
        self.register_buffer("sin", torch.empty(positions), persistent=False)

    @classmethod
    def allocate(cls, config: GPTConfig, device: torch.device | str, compute_dtype: torch.dtype) -> "GPT":
        """The model on `device`; weights and tables are still to come (init_weights, or load_model)."""
        with torch.device("meta"):
            model = cls(config, compute_dtype)
        # As model.to_empty(device) does, which imports sympy for it: half a second at every start.
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        return model

    @classmethod
    def create(
        cls,
        config: GPTConfig,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        seed: int = 42,
    ) -> "GPT":
        """Lay the model out without memory, allocate it on `device`, then initialise every tensor from `seed`."""
        model = cls.allocate(config, device, compute_dtype)
        model.init_weights(seed)
        return model

    @torch.no_grad()
    def init_weights(self, seed: int = 42) -> None:
        """Initialise every parameter and buffer; the two published recipes differ in `config.init`."""
        cfg, later = self.config, self.config.init == "later"
        generator = torch.Generator(device=self.device).manual_seed(seed)
        bound = math.sqrt(3 / cfg.n_embd)  # a uniform distribution with standard deviation 1/sqrt(n_embd)
        nn.init.normal_(self.wte.weight, std=0.8 if later else 1.0, generator=generator)
        nn.init.normal_(self.lm_head.weight, std=0.001, generator=generator)
        for block in self.blocks:
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(matrix.weight, -bound, bound, generator=generator)
            fc_bound = 0.4 * bound if later else bound
            nn.init.uniform_(block.mlp.c_fc.weight, -fc_bound, fc_bound, generator=generator)
            nn.init.zeros_(block.attn.c_proj.weight)  # every block starts as the identity
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.uniform_(block.attn.ve_gate.weight, 0.0, 0.02 if later else 0.0, generator=generator)
        for embed in self.value_embeds.values():
            nn.init.uniform_(embed.weight, -bound, bound, generator=generator)  # type: ignore[arg-type]
        if cfg.residual_scalars:
            depth = torch.linspace(0, 1, cfg.n_layer, device=self.device)
            self.resid_lambdas.copy_(1.15 - 0.10 * depth if later else torch.ones_like(depth))
            self.x0_lambdas.copy_(0.20 - 0.15 * depth if later else torch.full_like(depth, 0.1))
        if cfg.smear:
            nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02, generator=generator)
            nn.init.zeros_(self.smear_lambda)
        if cfg.backout:
            nn.init.constant_(self.backout_lambda, 0.2)
        self.init_rotary()

    @torch.no_grad()
    def init_rotary(self) -> None:
        """Fill the cosine and sine tables, (10 * sequence_len, D/2) each."""
        D = self.config.head_dim
        rates = self.config.rope_base ** (-torch.arange(0, D, 2, device=self.device, dtype=torch.float32) / D)
        angles = torch.outer(torch.arange(self.cos.size(0), device=self.device, dtype=torch.float32), rates)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    # -- forward --------------------------------------------------------------------------------------

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        kv_cache: AttentionCache | None = None,
        loss_reduction: str = "mean",
    ) -> torch.Tensor:
        """idx (B, T) -> softcapped fp32 logits (B, T, V); with targets (B, T), -1 = ignored, the loss instead.

        `loss_reduction`: "mean" over targets, "sum", or "none" for (B*T,) losses without gradient.
        """
        if targets is None:
            return self._logits(self.hidden(idx, kv_cache))
        total, losses = self.loss(idx, targets)
        if loss_reduction == "mean":
            return total / (targets >= 0).sum().clamp_min(1)
        assert loss_reduction in ("sum", "none"), f"unknown loss_reduction {loss_reduction!r}"
        return total if loss_reduction == "sum" else losses

    def last_logits(self, idx: torch.Tensor, kv_cache: AttentionCache) -> torch.Tensor:
        """idx (B, T) -> logits (B, V) after the last token only, as a prompt needs them."""
        return self._logits(self.hidden(idx, kv_cache)[:, -1])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.head_weight if self.head_cast is None else self.head_cast
        return head_logits(hidden, head, self.config.softcap)

    def loss(
        self, idx: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(differentiable sum of weighted losses, each token's loss (B*T,) detached); all inputs (B, T)."""
        x = self.hidden(idx).flatten(0, 1)  # (B*T, C)
        weights = None if token_weights is None else token_weights.flatten()
        return head_loss(x, self.head_weight, targets.flatten(), weights, self.config.softcap, self.head_cast)

    @contextlib.contextmanager
    def hold_casts(self) -> Iterator[None]:
        """While open, each matrix is cast to the compute dtype once, not at every use. The weights must not change
        meanwhile. On GPUs nothing happens: there the compiler sees to it, and fp8 layers have casts of their own."""
        linears = [m for m in self.modules() if type(m) is Linear] if self.device.type == "cpu" else []
        for linear in linears:
            if linear.cast is None and linear.weight.dtype != self.compute_dtype:
                linear.cast = linear.weight.detach().to(self.compute_dtype)
        try:
            yield
        finally:
            for linear in linears:
                linear.cast = None

    def fill(self, idx: torch.Tensor, kv_cache: AttentionCache) -> None:
        """Leave in the cache what `hidden` would, for tokens idx (B, T) after which nothing is to be foretold yet: of
        the last layer only its keys and values are computed."""
        self._run(idx, kv_cache, fill_only=True)

    def hidden(self, idx: torch.Tensor, kv_cache: AttentionCache | None = None) -> torch.Tensor:
        """idx (B, T) -> final normed hidden states (B, T, C) in the compute dtype."""
        x = self._run(idx, kv_cache)
        assert x is not None
        return x

    def _run(self, idx: torch.Tensor, kv_cache: AttentionCache | None, fill_only: bool = False) -> torch.Tensor | None:
        cfg = self.config
        x = norm(self.wte(idx).to(self.compute_dtype))
        if cfg.smear:
            x = self._smear(x, kv_cache)
        x0, middle = x, None
        cos_sin = self._rotary(idx.size(1), kv_cache)
        for i, block in enumerate(self.blocks):
            if cfg.residual_scalars:
                x = mix(x, x0, self.resid_lambdas[i], self.x0_lambdas[i])
            ve = self.value_embeds[str(i)](idx).to(x.dtype) if cfg.has_value_embed(i) else None
            if fill_only and i == cfg.n_layer - 1:
                assert kv_cache is not None
                kv_cache.store(i, *block.attn.keys_and_values(norm(x), ve, cos_sin))
                kv_cache.advance(idx.size(1))
                return None
            x = block(x, ve, cos_sin, self.window_sizes[i], kv_cache)
            if cfg.backout and i == cfg.n_layer // 2:
                middle = x
        if middle is not None:
            x = x - self.backout_lambda.to(x.dtype) * middle
        if kv_cache is not None:
            kv_cache.advance(idx.size(1))
        return norm(x)

    def _smear(self, x: torch.Tensor, kv_cache: AttentionCache | None) -> torch.Tensor:
        """Add a gated bit of the previous token's embedding; position 0 has none."""
        before = torch.zeros_like(x[:, :1])
        if kv_cache is not None:
            before = before if kv_cache.previous_embedding is None else kv_cache.previous_embedding
            kv_cache.previous_embedding = x[:, -1:]
        previous = torch.cat([before, x[:, :-1]], dim=1)  # (B, T, C)
        gate = torch.sigmoid(self.smear_gate(x[..., : self.config.smear_channels]))  # (B, T, 1)
        return x + self.smear_lambda.to(x.dtype) * gate * previous

    def _rotary(self, T: int, kv_cache: AttentionCache | None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for this call's positions, (1 or B, T, 1, D/2)."""
        if kv_cache is None:
            assert self.cos.size(0) >= T, f"{T} tokens are past the rotary table's {self.cos.size(0)}"
            cos, sin = self.cos[None, :T, None], self.sin[None, :T, None]
        else:
            positions = kv_cache.lengths[:, None] + torch.arange(T, device=self.device)  # (B, T)
            cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
        return cos, sin

    # -- facts about the model ------------------------------------------------------------------------

    @property
    def wte(self) -> nn.Embedding:
        return self.transformer["wte"]  # type: ignore[return-value]

    @property
    def blocks(self) -> Any:
        return self.transformer["h"]

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, C): the head without its padding rows."""
        return self.lm_head.weight[: self.config.vocab_size]

    @property
    def head_cast(self) -> torch.Tensor | None:
        """The same in the compute dtype, while hold_casts is open."""
        cast = self.lm_head.cast
        return None if cast is None else cast[: self.config.vocab_size]

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def num_scaling_params(self) -> dict[str, int]:
        """Parameters by kind; scaling laws fit best on transformer_matrices + lm_head."""
        counts = {
            "wte": self.wte.weight.numel(),
            "value_embeds": sum(p.numel() for p in self.value_embeds.parameters()),
            "lm_head": self.lm_head.weight.numel(),
            "transformer_matrices": sum(p.numel() for p in self.transformer["h"].parameters()),
        }
        total = sum(p.numel() for p in self.parameters())
        return {**counts, "scalars": total - sum(counts.values()), "total": total}

    def estimate_flops(self) -> int:
        """Training FLOPs per token: 6 per matmul weight (PaLM, arXiv 2204.02311, appendix B), and attention's
        12 * H * D per key a token can see. Embedding look-ups are free."""
        counts = self.num_scaling_params()
        matmul = counts["transformer_matrices"] + counts["lm_head"]
        matmul += self.smear_gate.weight.numel() if self.config.smear else 0
        seen = sum(min(left, self.config.sequence_len) for left, _ in self.window_sizes)
        return 6 * matmul + 12 * self.config.n_head * self.config.head_dim * seen
