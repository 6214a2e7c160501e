"""The flags that say which network, shared by whoever builds one or plans one."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from nanochat.common import UserError
from nanochat.gpt import GPTConfig
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
    max_seq_len: int = -1
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


def network(flags: ModelFlags, vocab_size: int) -> Callable[[int], GPTConfig]:
    """What the flags make of a depth."""
    context = USUAL_CONTEXT if flags.max_seq_len == -1 else flags.max_seq_len
    if context < 2:
        raise UserError(f"--max-seq-len must be at least 2, got {context}")
    form = partial(
        get_recipe(flags.recipe).model, sequence_len=context, vocab_size=vocab_size, window_pattern=flags.window_pattern
    )

    def of_depth(depth: int) -> GPTConfig:
        sizes = derive_sizes(depth, flags.aspect_ratio, flags.head_dim, flags.n_embd, flags.n_head, flags.n_kv_head)
        made = form(**asdict(sizes))
        if made.window_pattern != flags.window_pattern and flags.window_pattern != ModelFlags.window_pattern:
            raise UserError(
                f"--recipe={flags.recipe} fixes the windows as {made.window_pattern}: give yours as "
                f"--recipe={flags.recipe},window_pattern={flags.window_pattern}"
            )
        return made

    return of_depth
