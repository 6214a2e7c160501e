"""GPTConfig: everything that defines the network, checked when made."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from nanochat.common import UserError
from nanochat.common.files import check_value
from nanochat.common.ranges import Range, check_ranges


@dataclass
class GPTConfig:
    """Everything that defines the network. Saved with every checkpoint and read back from it.

    The defaults are the published form; `later()`, `small()` and `plain()` are the others people compare with.
    """

    sequence_len: Annotated[int, Range(2, 2**20)] = 2048
    vocab_size: Annotated[int, Range(1, 2**22)] = 32768
    n_layer: Annotated[int, Range(1, 1024)] = 12
    n_head: Annotated[int, Range(1, 1024)] = 6
    n_kv_head: Annotated[int, Range(1, 1024)] = 6
    n_embd: Annotated[int, Range(1, 2**17)] = 768
    window_pattern: str = "SSSL"  # tiled over the layers: S short window, L full context; the last layer is always L
    short_window_divisor: Annotated[int, Range(1)] = 2  # S = sequence_len / divisor, rounded up to 128s above 2
    rope_base: Annotated[float, Range(above=0, max=1e12)] = 10_000.0
    qk_scale: Annotated[float, Range(above=0, max=1e6)] = 1.0  # on q and on k, after their norm
    softcap: Annotated[float, Range(above=0, max=1e6)] = 15.0
    value_embeds: bool = True  # on every other layer, the last one included
    value_gate_channels: Annotated[int, Range(1)] = 32
    value_gate_scale: Annotated[float, Range(-1e6, 1e6)] = 2.0
    residual_scalars: bool = True  # per layer: x = resid_lambda * x + x0_lambda * x0
    ngram_rows: Annotated[int, Range(0, 2**26)] = 0  # of the table of hashed pairs and triples of tokens; 0: none
    ngram_dim: Annotated[int, Range(1, 2**17)] = 32  # of a row, which a matrix brings to n_embd
    smear: bool = False  # each token takes a gated bit of its predecessor's embedding
    smear_channels: Annotated[int, Range(1)] = 24
    backout: bool = False  # the middle layer's residual is subtracted before the head
    init: str = "published"  # or "later": smaller embeddings and c_fc, scalars graded over depth, gates not zero

    def __post_init__(self) -> None:
        check_ranges(self, flags=False)
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; change one of them")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}; change one of them")
        if self.head_dim % 2:
            raise UserError(f"the head size n_embd/n_head must be even for rotary embeddings, got {self.head_dim}")
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise UserError(f"window_pattern takes the letters S and L, got {self.window_pattern!r}")
        if self.init not in ("published", "later"):
            raise UserError(f"init must be 'published' or 'later', got {self.init!r}")
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
    def small(cls, **sizes: Any) -> "GPTConfig":
        """The later form with the published initialisation, and with n-grams in place of smear: look-ups are cheap."""
        rows = min(64 * sizes.get("vocab_size", cls.vocab_size), 2**20)
        return cls.later(**{"init": "published", "ngram_rows": rows, "smear": False, **sizes})

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

    @property
    def has_short_windows(self) -> bool:
        return any(left < self.sequence_len for left, _ in self.window_sizes())

    def has_value_embed(self, layer: int) -> bool:
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: object = "the checkpoint's model config") -> "GPTConfig":
        """Read a saved config. Raises UserError for a wrong value, and for a field this version does not know."""
        return check_value(values, where, cls, extra="forbid")
