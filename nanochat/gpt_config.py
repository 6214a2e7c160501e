"""GPTConfig: everything that defines the network, checked when made."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from nanochat.common import UserError


@dataclass
class GPTConfig:
    """Everything that defines the network. Saved with every checkpoint and read back from it.

    The defaults are the published form; `later()` and `plain()` are the two others people compare with.
    """

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"  # tiled over the layers: S short window, L full context; the last layer is always L
    short_window_divisor: int = 2  # S = sequence_len / divisor; above 2 rounded up to a multiple of 128
    rope_base: float = 10_000.0
    qk_scale: float = 1.0  # on q and on k, after their norm
    softcap: float = 15.0
    value_embeds: bool = True  # on every other layer, the last one included
    value_gate_channels: int = 32
    value_gate_scale: float = 2.0
    residual_scalars: bool = True  # per layer: x = resid_lambda * x + x0_lambda * x0
    smear: bool = False  # each token takes a gated bit of its predecessor's embedding
    smear_channels: int = 24
    backout: bool = False  # the middle layer's residual is subtracted before the head
    init: str = "published"  # or "later": smaller embeddings and c_fc, scalars graded over depth, gates not zero

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence_len < 2:
            raise UserError(f"sequence_len must be at least 2, got {self.sequence_len}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; change one of them")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}; change one of them")
        if self.head_dim % 2:
            raise UserError(f"the head size n_embd/n_head must be even for rotary embeddings, got {self.head_dim}")
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise UserError(f"window_pattern takes the letters S and L, got {self.window_pattern!r}")
        if self.short_window_divisor < 1:
            raise UserError(f"short_window_divisor must be at least 1, got {self.short_window_divisor}")
        if self.init not in ("published", "later"):
            raise UserError(f"init must be 'published' or 'later', got {self.init!r}")
        for name in ("softcap", "rope_base", "qk_scale", "value_gate_channels", "smear_channels"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        self.value_gate_channels = min(self.value_gate_channels, self.n_embd)
        self.smear_channels = min(self.smear_channels, self.n_embd)

    @classmethod
    def later(cls, **sizes: Any) -> "GPTConfig":
        """The later form of the published system: smear, backout, sharper attention, quarter windows."""
        features: dict[str, Any] = {
            "short_window_divisor": 4,
            "rope_base": 100_000.0,
            "qk_scale": 1.2,
            "value_gate_channels": 12,
            "value_gate_scale": 3.0,
            "smear": True,
            "backout": True,
            "init": "later",
        }
        return cls(**{**features, **sizes})

    @classmethod
    def plain(cls, **sizes: Any) -> "GPTConfig":
        """Full attention and none of the extras: the baseline to measure features against."""
        features: dict[str, Any] = {"window_pattern": "L", "value_embeds": False, "residual_scalars": False}
        return cls(**{**features, **sizes})

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary rounded up to a multiple of 64, for even tiles; the padding is cropped from the logits."""
        return -(-self.vocab_size // 64) * 64

    @property
    def short_window(self) -> int:
        window = self.sequence_len // self.short_window_divisor
        return min(self.sequence_len, -(-window // 128) * 128) if self.short_window_divisor > 2 else window

    def window_sizes(self) -> list[tuple[int, int]]:
        """(left, right) window per layer: how many earlier tokens each position sees."""
        lengths = {"S": self.short_window, "L": self.sequence_len}
        pattern = self.window_pattern.upper()
        left = [lengths[pattern[i % len(pattern)]] for i in range(self.n_layer)]
        left[-1] = self.sequence_len
        return [(n, 0) for n in left]

    def has_value_embed(self, layer: int) -> bool:
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPTConfig":
        """Read a saved config; a field this version does not know is an error, not a guess."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise UserError(f"the checkpoint's model config has unknown fields: {', '.join(sorted(unknown))}")
        return cls(**values)
