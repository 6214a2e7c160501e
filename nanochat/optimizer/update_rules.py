"""The arithmetic of one update: Muon for stacks of matrices, AdamW for any tensor. No state, no processes.

Muon keeps a momentum, replaces it by the nearest semi-orthogonal matrix (Polar Express), evens out its rows
or columns by their running second moment (NorMuon) and decays only weights that the update also shrinks
(cautious decay).

Shapes: K matrices in a stack, R rows, C columns.
"""

import math
from typing import Any

import torch

# Per step (a, b, c) of X <- aX + b(XX')X + c(XX')^2 X: the minimax-optimal composition for singular values in
# [1e-3, 1], with the paper's safety factor folded in (Polar Express, arXiv 2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(
    x: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16, safety: float = 1.02
) -> torch.Tensor:
    """Nearly the nearest semi-orthogonal matrix to each of x (K, R, C); computed and returned in `dtype`.

    Singular values above a thousandth of the norm end within about 0.85 .. 1.15, smaller ones below. `safety` keeps
    the largest below 1 at the start, in spite of rounding. The Gram matrix is the smaller side's.
    """
    x = x.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * safety + 1e-6)
    for a, b, c in POLAR_EXPRESS[:steps]:
        if x.size(-2) > x.size(-1):
            gram = x.mT @ x
            x = a * x + x @ (b * gram + c * (gram @ gram))
        else:
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def even_out(update: torch.Tensor, second_moment: torch.Tensor, beta2: float) -> torch.Tensor:
    """NorMuon (arXiv 2510.05491): divide each neuron's update by its running RMS, keep the matrix's norm.

    update (K, R, C); second_moment (K, R, 1) or (K, 1, C) along the longer side, updated in place.
    """
    axis = -1 if second_moment.size(-1) == 1 else -2
    mean_square = update.float().square().mean(dim=axis, keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    before = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return update * (scale * (before / after.clamp_min(1e-10))).to(update.dtype)


def muon_step(
    params: torch.Tensor,  # (K, R, C) fp32, updated in place
    grads: torch.Tensor,  # (K, R, C)
    momentum_buffer: torch.Tensor,  # (K, R, C), updated in place
    second_moment: torch.Tensor,  # (K, R, 1) or (K, 1, C), updated in place
    group: dict[str, Any],
) -> None:
    """One Muon update of a stack of equal-shaped matrices."""
    momentum_buffer.lerp_(grads, 1 - group["momentum"])
    update = grads.lerp(momentum_buffer, group["momentum"])  # Nesterov
    if group["row_equilibrate"]:
        # MuonEq (arXiv 2603.28254): rows of equal length condition the iteration better.
        update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-10)
    update = orthogonalize(update, group["ns_steps"], group["ns_dtype"], group["ns_safety"])
    if group["frobenius_snap"]:
        # Muon+ (arXiv 2602.21545): give the result exactly the norm a semi-orthogonal matrix has.
        target = math.sqrt(min(update.size(-2), update.size(-1)))
        update = update * (target / update.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    update = even_out(update, second_moment, group["beta2"]).to(params.dtype)
    lr = group["lr"] * math.sqrt(max(1.0, params.size(-2) / params.size(-1)))
    shrinks = (update * params) >= 0
    params.sub_(lr * update + (lr * group["weight_decay"]) * params * shrinks)


def adamw_step(
    param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: int, group: dict
) -> None:
    """One AdamW update (arXiv 1711.05101), in place. State and arithmetic are fp32 whatever the parameter's dtype."""
    beta1, beta2 = group["betas"]
    grad = grad.to(exp_avg.dtype)
    if group["weight_decay"]:
        param.mul_(1 - group["lr"] * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(group["eps"])
    param.add_(exp_avg.div(denominator).mul_(-group["lr"] / (1 - beta1**step)).to(param.dtype))
