"""The flags of a model's shape and horizon, for the scripts that build or plan one."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated

from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.ranges import Range
from nanochat.recipe import get_recipe
from nanochat.scaling import derive_sizes

USUAL_CONTEXT = 2048


@dataclass
class ModelFlags:
    depth: int = 12
    """The one dial: layers. Width, heads, horizon, batch and rates follow."""
    aspect_ratio: int = 64
    """Width per layer."""
    head_dim: int = 128
    """Size of an attention head."""
    n_embd: int = -1
    """Width, overriding depth * aspect ratio."""
    n_head: int = -1
    """Query heads."""
    n_kv_head: int = -1
    """Key/value heads, a divisor of the query heads."""
    max_seq_len: Annotated[int, Range(2, unset=-1)] = -1
    """Context length in tokens; -1 is 2048."""
    window_pattern: str = "SSSL"
    """Per layer, tiled: S short window, L full context; the last layer is always L."""
    recipe: str = "default"
    """Model features and rates: default, published, later (smear, backout, quarter windows, …) or plain (no extras);
    changes may follow, as in default,smear=False,matrix_lr=0.03."""
    target_flops: float = -1.0
    """Horizon in training FLOPs."""
    target_param_data_ratio: float = 10.5
    """Horizon in tokens per scaling parameter."""

    def network(self, vocab_size: int) -> Callable[[int], GPTConfig]:
        """The model's config as a function of its depth."""
        context = USUAL_CONTEXT if self.max_seq_len == -1 else self.max_seq_len
        make_config = partial(
            get_recipe(self.recipe).model,
            sequence_len=context,
            vocab_size=vocab_size,
            window_pattern=self.window_pattern,
        )

        def config_of_depth(depth: int) -> GPTConfig:
            sizes = derive_sizes(depth, self.aspect_ratio, self.head_dim, self.n_embd, self.n_head, self.n_kv_head)
            config = make_config(**asdict(sizes))
            if config.window_pattern != self.window_pattern and self.window_pattern != ModelFlags.window_pattern:
                raise UserError(
                    f"--recipe={self.recipe} fixes the windows as {config.window_pattern}: give yours as "
                    f"--recipe={self.recipe},window_pattern={self.window_pattern}"
                )
            return config

        return config_of_depth
