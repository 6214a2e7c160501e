"""Memory of a training step on one GPU, and the largest device batch that fits.

Letters: B batch rows, T time, C channels (n_embd), H query heads, G key/value heads, D head size, V vocabulary.
"""

import math
from collections.abc import Callable

import torch

from nanochat.flash_attention import query_block
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_head import chunk_tokens
from nanochat.optimizer.param_groups import OptimizerConfig, build_param_groups
from nanochat.optimizer.update_rules import optimizer_bytes
from nanochat.planning.hardware import Gpu


def activation_bytes(config: GPTConfig, rows: int, element: int, *, fused: bool = False, blocked: bool = False) -> int:
    """Bytes that the forward pass of `rows` rows saves for the backward pass, with `element` bytes per number.

    Counted tensor by tensor, as eager PyTorch saves them. `fused`: the CPU's C kernels, which save one side of a
    norm or a squared ReLU instead of both. `blocked`: the CPU's attention, which saves its probabilities. A change to
    what gpt.py saves needs a change here; the tests compare with autograd.
    """
    T, C, sides = config.sequence_len, config.n_embd, 1 if fused else 2
    queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim  # H*D, G*D
    # Per token, in numbers. Outside the layers: the norm of the embedding, smear and backout, the last norm, and the
    # gradient that the head's loss computes in the forward pass.
    saved = C * ((sides if config.residual_scalars else 1) + 2 * config.smear + config.backout + 2.0)
    for layer, (window, _) in enumerate(config.window_sizes()):
        saved += C * config.residual_scalars  # x, for its lambda's gradient
        saved += sides * (2 * C + queries + keys)  # the norms before attention and MLP, and those of q and k
        saved += keys + queries  # v, and the output of attention
        saved += keys * config.has_value_embed(layer)  # for the gradient of its gate
        saved += sides * 4 * C  # squared ReLU
        if blocked:
            span = min(window, T)
            block = query_block(span, element)  # of queries; keys visible to only some of them add half a block
            saved += config.n_head * min(span - span**2 / (2 * T) + block / 2, T)
            saved += 2 * (queries - keys) if config.n_kv_head < config.n_head else 0  # k and v, repeated
    return int(rows * T * saved * element)


def memory_by_kind(config: GPTConfig, gpu: Gpu, num_gpus: int, rows: int) -> dict[str, int]:
    """Bytes on each GPU at the peak of the backward pass of a micro-batch of `rows` rows, by kind.

    Weights and gradients are fp32 and complete on every GPU; the optimizer state is sharded (ZeRO-2).
    """
    with torch.device("meta"):
        model = GPT(config)
    counts, element, cpu = model.num_scaling_params(), gpu.element_bytes, gpu.device_type == "cpu"
    products = counts["transformer_matrices"] + counts["lm_head"]
    groups = build_param_groups(model, OptimizerConfig(), ns_dtype=torch.float32)
    chunk = min(chunk_tokens(config.vocab_size, gpu.device_type), rows * config.sequence_len)
    return {
        "weights": 4 * counts["total"],
        "gradients": 4 * counts["total"],
        "optimizer": math.ceil(optimizer_bytes(groups) / num_gpus),
        "weight_casts": 0 if element == 4 else element * products,
        "activations": activation_bytes(config, rows, element, fused=cpu, blocked=gpu.device_type != "cuda"),
        # For a chunk of tokens: the logits, their softcapped form and its slope in fp32, and their gradient; on a CPU
        # all in one buffer. The head's gradient in fp32, and the same multiplied by the loss's.
        "logits": chunk * config.vocab_size * (element if cpu else 12) + 8 * counts["lm_head"],
    }


def choose_rows(rows_per_step: int, fits: Callable[[int], bool], max_rows: int | None = None) -> int:
    """The largest power of two that divides this GPU's rows per step, fits, and is at most `max_rows`; at least 1."""
    best, rows = 1, 2
    while rows_per_step % rows == 0 and (max_rows is None or rows <= max_rows) and fits(rows):
        best, rows = rows, 2 * rows
    return best
