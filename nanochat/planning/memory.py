"""Memory of a training step on one GPU, and the largest device batch that fits.

tests/test_memory.py compares it with a step that runs on tensors without memory: within 6% at depths 4 to 20.

Letters: B batch rows, T time, C channels (n_embd), H query heads, G key/value heads, D head size, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from nanochat.cpu.functions import BLOCK, amx_attends
from nanochat.flash_attention import query_block
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_head import LOGIT_BYTES, chunk_tokens
from nanochat.optimizer.param_groups import OptimizerConfig, build_param_groups
from nanochat.optimizer.update_rules import optimizer_bytes, update_bytes
from nanochat.planning.hardware import Gpu

# What no tensor of the step holds, typical figures: CUDA's context, loaded kernels and cuBLAS's workspace; and with
# several GPUs NCCL's channels.
CONTEXT_BYTES, NCCL_BYTES = int(0.6 * 2**30), int(0.6 * 2**30)
BLOCK_WEIGHTS = {"attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "attn.ve_gate", "mlp.c_fc", "mlp.c_proj"}


def activation_bytes(config: GPTConfig, rows: int, element: int, *, fused: bool = False, blocked: bool = False) -> int:
    """Bytes that the forward pass of `rows` rows saves for the backward pass, with `element` bytes per number.

    Counted tensor by tensor, as eager PyTorch saves them; what torch.compile saves instead is 97 to 104% of it
    (dev/LOG.md). `fused`: the CPU's C kernels, which save one side of a norm or a squared ReLU instead of both.
    `blocked`: the CPU's attention, which saves its probabilities. A change to what gpt.py saves needs a change here;
    the tests compare with autograd.
    """
    T, C, sides = config.sequence_len, config.n_embd, 1 if fused else 2
    queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim  # H*D, G*D
    # Per token, in numbers. Outside the layers: the norm of the embedding, smear and backout, the last norm, and the
    # gradient that the head's loss computes in the forward pass.
    saved = C * ((sides if config.residual_scalars else 1) + 2 * config.smear + config.backout + 2.0)
    saved += config.ngram_dim if config.ngram_rows else 0  # what the matrix of the n-grams multiplies
    for layer, (window, _) in enumerate(config.window_sizes()):
        saved += C * config.residual_scalars  # x, for its lambda's gradient
        saved += sides * (2 * C + queries + keys)  # the norms before attention and MLP, and those of q and k
        saved += keys + queries  # v, and the output of attention
        saved += keys * config.has_value_embed(layer)  # for the gradient of its gate
        saved += sides * 4 * C  # squared ReLU
        if blocked:
            span = min(window, T)
            # Of queries; keys visible to only some of them add half a block.
            block = BLOCK if fused and amx_attends(element, T, config.head_dim) else query_block(span, element)
            saved += config.n_head * min(span - span**2 / (2 * T) + block / 2, T)
            saved += 2 * (queries - keys) if config.n_kv_head < config.n_head else 0  # k and v, repeated
    return int(rows * T * saved * element)


def memory_by_kind(
    config: GPTConfig,
    gpu: Gpu,
    num_gpus: int,
    rows: int,
    rates: OptimizerConfig | None = None,
    param_groups: list[dict[str, Any]] | None = None,
) -> dict[str, int]:
    """Bytes on each GPU at the peak of a step with micro-batches of `rows` rows, by kind.

    Weights and gradients are fp32 and complete on every GPU; the optimizer state is sharded (ZeRO-2). The update
    rules are those of `param_groups`, an optimizer's own, or of an optimizer with these `rates`. The peak is in the
    backward pass, unless the update needs more than that has freed: "update" is how much more. Not counted:
    uncounted_weights(config), and fp8's copies.
    """
    with torch.device("meta"):
        model = GPT(config)
    counts, element, cpu = model.num_scaling_params(), gpu.element_bytes, gpu.device_type == "cpu"
    products = counts["transformer_matrices"] + counts["lm_head"]
    groups = param_groups or build_param_groups(model, rates or OptimizerConfig(), ns_dtype=torch.float32)
    chunk = min(chunk_tokens(config.vocab_size, None if cpu else gpu.memory_bytes), rows * config.sequence_len)
    freed = {
        "weight_casts": 0 if element == 4 else element * products,
        "activations": activation_bytes(config, rows, element, fused=cpu, blocked=gpu.device_type != "cuda"),
        # A chunk's logits and what is computed of them, on a CPU all in one buffer. The head's gradient in fp32, and
        # the same multiplied by the loss's.
        "logits": chunk * config.vocab_size * (element if cpu else LOGIT_BYTES) + 8 * counts["lm_head"],
    }
    return {
        "weights": 4 * counts["total"],
        "gradients": 4 * counts["total"],
        "optimizer": math.ceil(optimizer_bytes(groups) / num_gpus),
        **freed,
        "update": max(0, update_bytes(groups, num_gpus) - sum(freed.values())),
        "context": 0 if cpu else CONTEXT_BYTES + NCCL_BYTES * (num_gpus > 1),
    }


def uncounted_weights(config: GPTConfig) -> list[str]:
    """Weights of the blocks that activation_bytes knows nothing of, as a changed gpt.py has them."""
    with torch.device("meta"):
        names = {name.split(".", 1)[1].removesuffix(".weight") for name, _ in GPT(config).blocks.named_parameters()}
    return sorted(names - BLOCK_WEIGHTS)


def choose_rows(rows_per_step: int, fits: Callable[[int], bool], max_rows: int | None = None) -> int:
    """The largest power of two that divides this GPU's rows per step, fits, and is at most `max_rows`; at least 1."""
    best, rows = 1, 2
    while rows_per_step % rows == 0 and (max_rows is None or rows <= max_rows) and fits(rows):
        best, rows = rows, 2 * rows
    return best
