"""The network: a GPT, how it is initialised and how large it is. Sizes and features are in gpt_config.py.

    tokens -> norm(embedding + n-grams) -> smear -> n_layer x (mix with x0, Block) -> backout -> norm -> head -> cap

x0 is the stream before the first layer. A Block is attention, whose values on every other layer have an embedding of
the tokens added (value embeddings), and an MLP.

Weights are float32; each is cast to the activations' dtype, compute_dtype, where it is multiplied. A function marked
`in_c` also has a C form for CPUs (cpu/fused.py), used while this plain form is the one it was written for.

Shapes: B batch, T time, C channels (n_embd), H query heads, G key/value heads, D head size, V vocabulary.
"""

import math
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.cpu.fused import in_c
from nanochat.flash_attention import flash_attn
from nanochat.gpt_config import GPTConfig
from nanochat.loss_head import head_logits, head_loss

__all__ = ["GPT", "GPTConfig"]

RECENT = 3  # ids of a row's last tokens that a cache keeps: smear looks one token back, the n-grams of that two more


@in_c("norm")
def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension, without parameters (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


@in_c("normed_rotary")
def normed_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * norm(rotate(x)): x (B, T, H, D) -> the same shape; cos, sin (B or 1, T, 1, D/2) float32.

    Rotary position embedding rotates pairs of channels, one from each half of a head (RoPE, arXiv 2104.09864).
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    y = norm(torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1))
    return y * scale if scale != 1 else y


@in_c("relu_squared")
def relu_squared(h: torch.Tensor) -> torch.Tensor:
    """max(h, 0)^2 (arXiv 2109.08668). May overwrite `h`: pass a temporary."""
    return F.relu(h).square()


@in_c("mix")
def mix(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a * x + b * y in the dtype of x and y, which have one shape; a and b are 0-dimensional."""
    return a * x + b * y


@in_c("linear")
def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., K), weight (M, K) -> (..., M) in the dtype of x."""
    return F.linear(x, weight.to(x.dtype))


class Linear(nn.Linear):
    """A matrix without bias: kept in float32, multiplied in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


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
        kv_cache: "AttentionCache | None" = None,
    ) -> torch.Tensor:
        """x (B, T, C); ve (B, T, G*D) value embeddings or None -> (B, T, C)."""
        B, T, _ = x.shape
        D, qk_scale = self.config.head_dim, self.config.qk_scale
        q = normed_rotary(self.c_q(x).view(B, T, -1, D), *cos_sin, qk_scale)  # (B, T, H, D)
        k = normed_rotary(self.c_k(x).view(B, T, -1, D), *cos_sin, qk_scale)  # (B, T, G, D)
        v = self.c_v(x).view(B, T, -1, D)
        if ve is not None:
            assert self.ve_gate is not None
            gate = torch.sigmoid(self.ve_gate(x[..., : self.config.value_gate_channels]))  # (B, T, G)
            v = v + self.config.value_gate_scale * gate.unsqueeze(-1) * ve.view(B, T, -1, D)
        if kv_cache is None:
            y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window_size)
        else:
            y = kv_cache.attend(self.layer, q, k, v, window_size[0])
        return self.c_proj(y.reshape(B, T, -1))

    def init_weights(self, generator: torch.Generator) -> None:
        for matrix in (self.c_q, self.c_k, self.c_v):
            init_uniform(matrix.weight, self.config, generator)
        nn.init.zeros_(self.c_proj.weight)  # every block starts as the identity

    def init_gate(self, generator: torch.Generator) -> None:
        if self.ve_gate is not None:
            high = 0.02 if self.config.init == "later" else 0.0
            nn.init.uniform_(self.ve_gate.weight, 0.0, high, generator=generator)


class MLP(nn.Module):
    """Two matrices with ReLU squared between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(relu_squared(self.c_fc(x)))

    def init_weights(self, generator: torch.Generator) -> None:
        init_uniform(self.c_fc.weight, self.config, generator, 0.4 if self.config.init == "later" else 1.0)
        nn.init.zeros_(self.c_proj.weight)


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
        kv_cache: "AttentionCache | None" = None,
    ) -> torch.Tensor:
        x = x + self.attn(norm(x), ve, cos_sin, window_size, kv_cache)
        return x + self.mlp(norm(x))

    def init_weights(self, generator: torch.Generator) -> None:
        self.attn.init_weights(generator)
        self.mlp.init_weights(generator)
        self.attn.init_gate(generator)  # after the MLP: a seed gives the weights it always gave


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
        blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": Embedding(V, C), "h": blocks})
        self.lm_head = Linear(C, V)
        with_values = [i for i in range(config.n_layer) if config.has_value_embed(i)]
        kv_dim = config.n_kv_head * config.head_dim
        self.value_embeds = nn.ModuleDict({str(i): Embedding(V, kv_dim) for i in with_values})
        if config.ngram_rows:
            self.ngram_embed = Embedding(config.ngram_rows, config.ngram_dim)
            self.ngram_proj = Linear(config.ngram_dim, C)
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

    # -- forward --------------------------------------------------------------------------------------

    def hidden(self, idx: torch.Tensor, kv_cache: "AttentionCache | None" = None) -> torch.Tensor:
        """idx (B, T) -> final normed hidden states (B, T, C) in the compute dtype."""
        cfg, T = self.config, idx.size(1)
        recent = None if kv_cache is None else kv_cache.recent
        x = self._embed(idx, recent)
        if cfg.smear:
            x = self._smear(x, recent)
        x0 = x  # mixed in again before every layer
        middle = None  # for backout
        cos_sin = self._rotary(T, kv_cache)
        for i, block in enumerate(self.blocks):
            if cfg.residual_scalars:
                x = mix(x, x0, self.resid_lambdas[i], self.x0_lambdas[i])
            ve = self.value_embeds[str(i)](idx).to(x.dtype) if cfg.has_value_embed(i) else None  # (B, T, G*D)
            x = block(x, ve, cos_sin, self.window_sizes[i], kv_cache)
            if cfg.backout and i == cfg.n_layer // 2:
                middle = x
        if middle is not None:
            x = x - self.backout_lambda.to(x.dtype) * middle
        if kv_cache is not None:
            kv_cache.advance(idx)
        return norm(x)

    def _embed(self, idx: torch.Tensor, recent: torch.Tensor | None) -> torch.Tensor:
        """idx (B, T) after the tokens `recent` (B, 2 or more; None: after nothing) -> normed embeddings (B, T, C)."""
        x = self.wte(idx)
        if self.config.ngram_rows:
            x = x + self.ngram_proj(self.ngram_embed(self._ngrams(idx, recent)).sum(0).to(self.compute_dtype))
        return norm(x.to(self.compute_dtype))

    def _ngrams(self, idx: torch.Tensor, recent: torch.Tensor | None) -> torch.Tensor:
        """(2, B, T): the table's rows for the pair and the triple of tokens that end at each of idx (B, T).

        Which share a row is left to chance, as in arXiv 1607.01759; -1 stands for what is before the first token.
        """
        ids = F.pad(idx, (2, 0), value=-1) if recent is None else torch.cat([recent[:, -2:], idx], dim=1)
        ids = ids.long()  # int32 would overflow
        one, two, three = 998_244_353, 1_000_000_007, 1_610_612_741  # primes below 2^31
        pair = one * ids[:, 2:] + two * (ids[:, 1:-1] + 1)
        return torch.stack([pair, pair + three * (ids[:, :-2] + 1)]) % self.config.ngram_rows

    def _smear(self, x: torch.Tensor, recent: torch.Tensor | None) -> torch.Tensor:
        """Add a gated share of the previous token's embedding to x (B, T, C); a row's first token has none."""
        if recent is None:
            before = torch.zeros_like(x[:, :1])
        else:
            last = recent[:, -1:]  # (B, 1); embedded again, as a cache keeps ids
            before = self._embed(last.clamp_min(0), recent[:, :-1]).masked_fill((last < 0)[..., None], 0)
        previous = torch.cat([before, x[:, :-1]], dim=1)  # (B, T, C)
        gate = torch.sigmoid(self.smear_gate(x[..., : self.config.smear_channels]))  # (B, T, 1)
        return x + self.smear_lambda.to(x.dtype) * gate * previous

    def _rotary(self, T: int, kv_cache: "AttentionCache | None") -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for this call's positions, (1 or B, T, 1, D/2)."""
        if kv_cache is None:
            assert self.cos.size(0) >= T, f"{T} tokens are past the rotary table's {self.cos.size(0)}"
            return self.cos[None, :T, None], self.sin[None, :T, None]
        positions = kv_cache.lengths[:, None] + torch.arange(T, device=self.device)  # (B, T)
        return self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        kv_cache: "AttentionCache | None" = None,
        loss_reduction: str = "mean",
    ) -> torch.Tensor:
        """idx (B, T) -> softcapped fp32 logits (B, T, V); with targets (B, T), -1 = ignored, the loss instead.

        `loss_reduction`: "mean" over targets, "sum", or "none" for (B*T,) losses without gradient.
        """
        if targets is None:
            return head_logits(self.hidden(idx, kv_cache), self.head_weight, self.config.softcap)
        total, losses = self.loss(idx, targets)
        if loss_reduction == "mean":
            return total / (targets >= 0).sum().clamp_min(1)
        assert loss_reduction in ("sum", "none"), f"unknown loss_reduction {loss_reduction!r}"
        return total if loss_reduction == "sum" else losses

    def loss(
        self, idx: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(differentiable sum of weighted losses, each token's loss (B*T,) detached); all inputs (B, T)."""
        x = self.hidden(idx).flatten(0, 1)  # (B*T, C)
        weights = None if token_weights is None else token_weights.flatten()
        return head_loss(x, self.head_weight, targets.flatten(), weights, self.config.softcap)

    def last_logits(self, idx: torch.Tensor, kv_cache: "AttentionCache") -> torch.Tensor:
        """Prefill idx (B, T) -> logits (B, V) after the last token."""
        return head_logits(self.hidden(idx, kv_cache)[:, -1], self.head_weight, self.config.softcap)

    # -- initialisation -------------------------------------------------------------------------------

    @classmethod
    def allocate(cls, config: GPTConfig, device: torch.device | str, compute_dtype: torch.dtype) -> "GPT":
        """A model on `device` whose weights and tables are uninitialised; call init_weights or load_model next."""
        with torch.device("meta"):
            model = cls(config, compute_dtype)
        if (
            tied := {n for n, _ in model.named_parameters(remove_duplicate=False)}
            - dict(model.named_parameters()).keys()
        ):
            raise ValueError(f"{', '.join(sorted(tied))}: a shared parameter would get memory of its own here")
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
        """A model on `device`, initialised from `seed`. ValueError names a parameter that init_weights leaves out:
        what __init__ sets is lost, as it runs without memory."""
        model = cls.allocate(config, device, compute_dtype)
        for p in model.parameters():
            p.detach().fill_(math.nan)
        model.init_weights(seed)
        if missed := [name for name, p in model.named_parameters() if p.isnan().any()]:
            raise ValueError(f"init_weights leaves {', '.join(missed[:5])} uninitialised: set them there")
        return model

    @torch.no_grad()
    def init_weights(self, seed: int = 42) -> None:
        """Initialise every parameter and buffer; the two published recipes differ in `config.init`."""
        cfg, later = self.config, self.config.init == "later"
        generator = torch.Generator(device=self.device).manual_seed(seed)
        nn.init.normal_(self.wte.weight, std=0.8 if later else 1.0, generator=generator)
        nn.init.normal_(self.lm_head.weight, std=0.001, generator=generator)
        for block in self.blocks:
            block.init_weights(generator)
        for weight in self.value_embeds.parameters():
            init_uniform(weight, cfg, generator)
        if cfg.ngram_rows:
            nn.init.normal_(self.ngram_embed.weight, std=0.02, generator=generator)
            init_uniform(self.ngram_proj.weight, cfg, generator)
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

    # -- parts and sizes ------------------------------------------------------------------------------

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
    def device(self) -> torch.device:
        return self.wte.weight.device

    def num_scaling_params(self) -> dict[str, int]:
        """Number of parameters by role; scaling laws fit best on transformer_matrices + lm_head.

        "scalars" are all others, the smear gate's row among them.
        """
        counts = {
            "wte": self.wte.weight.numel(),
            "value_embeds": sum(p.numel() for p in self.value_embeds.parameters()),
            "lm_head": self.lm_head.weight.numel(),
            "transformer_matrices": sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2),
        }
        if self.config.ngram_rows:
            counts |= {"ngram_embed": self.ngram_embed.weight.numel(), "ngram_proj": self.ngram_proj.weight.numel()}
        total = sum(p.numel() for p in self.parameters())
        return {**counts, "scalars": total - sum(counts.values()), "total": total}

    def estimate_flops(self) -> int:
        """Training FLOPs per token: 6 a matmul weight (arXiv 2204.02311, app. B), 12*H*D a key seen. Look-ups: 0."""
        counts = self.num_scaling_params()
        matmul = counts["transformer_matrices"] + counts["lm_head"]
        matmul += self.smear_gate.weight.numel() if self.config.smear else 0
        matmul += self.ngram_proj.weight.numel() if self.config.ngram_rows else 0
        seen = sum(min(left, self.config.sequence_len) for left, _ in self.window_sizes)
        return 6 * matmul + 12 * self.config.n_head * self.config.head_dim * seen


class Embedding(nn.Embedding):
    """A look-up table that GPT.init_weights fills."""

    def reset_parameters(self) -> None:
        """Do nothing: the default's numbers would be overwritten, and it imports the compiler."""


def init_uniform(weight: torch.Tensor, config: GPTConfig, generator: torch.Generator, scale: float = 1.0) -> None:
    """Uniform with standard deviation scale / sqrt(n_embd)."""
    bound = scale * math.sqrt(3 / config.n_embd)
    nn.init.uniform_(weight, -bound, bound, generator=generator)


class AttentionCache(Protocol):
    """A key/value cache as the model uses it (inference.kv_cache.KVCache)."""

    @property
    def lengths(self) -> torch.Tensor: ...  # (B,) tokens already cached per row

    @property
    def recent(self) -> torch.Tensor: ...  # (B, RECENT) ids of each row's last tokens, -1 before its first

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor: ...

    def advance(self, idx: torch.Tensor) -> None: ...  # idx (B, T) are in every layer
