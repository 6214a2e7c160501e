"""MuonAdamW: Muon for the matrices inside the blocks, AdamW for everything else, one optimizer for both.

Muon keeps a momentum, replaces it by the nearest semi-orthogonal matrix (Polar Express), evens out its rows
or columns by their running second moment (NorMuon) and decays only weights that the update also shrinks
(cautious decay). Matrices of one shape are stacked, so each group is a handful of batched products.

Shapes: K matrices in a group, R rows, C columns.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from nanochat.common import UserError
from nanochat.gpt import GPT

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

    Singular values end within about 0.85 .. 1.15. `safety` keeps the largest below 1 at the start, in spite of
    rounding. The Gram matrix is the smaller side's.
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


class MuonAdamW(torch.optim.Optimizer):
    """Groups are dicts with `kind` "adamw" or "muon"; a muon group's matrices all have one shape.

    State per parameter, full-shape and fp32: adamw `exp_avg`, `exp_avg_sq`; muon `momentum_buffer` (R, C) and
    `second_moment` (R, 1) or (1, C): a matrix's state is a view into its group's stack, so that saving and
    loading know nothing of stacking.
    """

    ADAMW: ClassVar[dict[str, Any]] = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    MUON: ClassVar[dict[str, Any]] = {
        "momentum": 0.95, "beta2": 0.95, "weight_decay": 0.0,
        "ns_steps": 5, "ns_dtype": torch.bfloat16, "ns_safety": 1.02,
        "row_equilibrate": False, "frobenius_snap": False,
    }  # fmt: skip

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        groups = []
        for group in param_groups:
            kind = group.get("kind")
            assert kind in ("adamw", "muon"), f"a parameter group's kind is adamw or muon, not {kind!r}"
            groups.append({**(self.ADAMW if kind == "adamw" else self.MUON), **group})
        super().__init__(groups, {})
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("initial_weight_decay", group["weight_decay"])
            if group["kind"] == "muon":
                shapes = {tuple(p.shape) for p in group["params"]}
                assert len(shapes) == 1, f"a muon group holds one shape, got {shapes}"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; a muon group needs all of its gradients."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            if group["kind"] == "adamw":
                for p in group["params"]:
                    if p.grad is not None:
                        self._step_adamw(p, group)
            elif all(p.grad is not None for p in group["params"]):
                self._step_muon(group)

    def _step_adamw(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p, dtype=torch.float32),
                         exp_avg_sq=torch.zeros_like(p, dtype=torch.float32))  # fmt: skip
        state["step"] += 1
        adamw_step(p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group)  # type: ignore[arg-type]

    def _step_muon(self, group: dict[str, Any]) -> None:
        params = group["params"]
        momentum, second = self._muon_stacks(group)
        stacked = torch.stack([p.data for p in params])
        grads = torch.stack([p.grad.to(torch.float32) for p in params])
        muon_step(stacked, grads, momentum, second, group)
        torch._foreach_copy_(params, list(stacked.unbind(0)))
        for p in params:
            self.state[p]["step"] += 1

    def _muon_stacks(self, group: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The group's stacked state, made on first use and rebuilt after load_state_dict."""
        params = group["params"]
        R, C = params[0].shape
        if "_stacks" not in self.state[params[0]]:
            old = [self.state[p] for p in params]
            like = {"dtype": torch.float32, "device": params[0].device}
            small = (len(params), R, 1) if R >= C else (len(params), 1, C)
            stacks = torch.zeros(len(params), R, C, **like), torch.zeros(small, **like)
            for i, p in enumerate(params):
                if "momentum_buffer" in old[i]:
                    stacks[0][i].copy_(old[i]["momentum_buffer"])
                    stacks[1][i].copy_(old[i]["second_moment"])
                self.state[p] = {"step": old[i].get("step", 0),
                                 "momentum_buffer": stacks[0][i], "second_moment": stacks[1][i]}  # fmt: skip
            self.state[params[0]]["_stacks"] = stacks
        return self.state[params[0]]["_stacks"]

    def named_state(self, names: Mapping[Any, str]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Every state tensor as "<state>.<parameter name>", full-shape, and the step count per parameter name."""
        tensors, steps = {}, {}
        for p, name in names.items():
            for key, value in self.state.get(p, {}).items():
                if key == "step":
                    steps[name] = value
                elif key != "_stacks":
                    tensors[f"{key}.{name}"] = value
        return tensors, steps

    def load_named_state(
        self, names: Mapping[Any, str], tensors: dict[str, torch.Tensor], steps: dict[str, int]
    ) -> None:
        """Restore what named_state returned; raises UserError when a tensor is missing or has another shape."""
        kinds = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer", "second_moment")}
        for group in self.param_groups:
            for p in group["params"]:
                name = names[p]
                if name not in steps:
                    continue
                state: dict[str, Any] = {"step": steps[name]}
                for key in kinds[group["kind"]]:
                    saved = tensors.get(f"{key}.{name}")
                    shape = p.shape
                    if key == "second_moment":
                        shape = (p.size(0), 1) if p.size(0) >= p.size(1) else (1, p.size(1))
                    if saved is None or tuple(saved.shape) != tuple(shape):
                        raise UserError(f"the checkpoint's optimizer has no {key} of shape {tuple(shape)} for {name}")
                    state[key] = saved.to(device=p.device, dtype=torch.float32).clone()
                self.state[p] = state


# ---------------------------------------------------------------------------------------------------
# Which parameter goes where, at which rate


@dataclass
class OptimizerConfig:
    """Rates at the reference: width 768 and 2^19 tokens a step. scaling.py says what they become elsewhere.

    The defaults are the published recipe; `later()` is the other one people compare with.
    """

    embedding_lr: float = 0.3
    unembedding_lr: float = 0.004
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    value_embed_lr_ratio: float = 1.0  # of the embedding rate
    smear_backout_lr: float = 0.2
    weight_decay: float = 0.2  # of the matrices, at depth 12
    adam_beta1: float = 0.8
    adam_beta2: float = 0.95
    head_beta2: float = 0.95
    embed_beta2: float = 0.95
    head_decay: float = 0.0
    wte_decay: float = 0.0
    value_embed_decay: float = 0.0
    resid_decay: float = 0.0
    muon_beta2: float = 0.95
    row_equilibrate: bool = False
    frobenius_snap: bool = False
    ns_safety: float = 1.02

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if "beta" in name and not 0 <= value < 1:
                raise UserError(f"{name} must be from 0 to below 1, got {value:g}")
            if ("lr" in name or "decay" in name) and value < 0:
                raise UserError(f"{name} cannot be negative, got {value:g}")

    @classmethod
    def later(cls, **changes: Any) -> "OptimizerConfig":
        """The later published recipe: a hotter head, slower second moments, light decay, row equilibration."""
        values: dict[str, Any] = {
            "unembedding_lr": 0.008, "value_embed_lr_ratio": 0.5, "weight_decay": 0.28, "head_beta2": 0.96,
            "embed_beta2": 0.995, "head_decay": 0.01, "wte_decay": 0.001, "value_embed_decay": 0.01,
            "resid_decay": 0.05, "muon_beta2": 0.9, "row_equilibrate": True, "frobenius_snap": True,
            "ns_safety": 1.01,
        }  # fmt: skip
        return cls(**{**values, **changes})


def build_param_groups(
    model: GPT, config: OptimizerConfig, *, lr_scale: float = 1.0, weight_decay: float = 0.0, ns_dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The optimizer's groups for `model`, every parameter in exactly one.

    AdamW rates shrink with width as (n_embd/768)^-0.5, the scalars' do not; all rates are multiplied by
    `lr_scale` (batch size, finetuning). `weight_decay` is the matrices', already scaled for depth.
    """
    width = (model.config.n_embd / 768) ** -0.5 * lr_scale
    betas = (config.adam_beta1, config.adam_beta2)
    embed_betas = (config.adam_beta1, config.embed_beta2)
    head_betas = (config.adam_beta1, config.head_beta2)
    value_lr = config.embedding_lr * config.value_embed_lr_ratio * width

    def adamw(params: list[Any], lr: float, betas: tuple[float, float], decay: float = 0.0) -> dict[str, Any]:
        return {"kind": "adamw", "params": params, "lr": lr, "betas": betas, "weight_decay": decay}

    groups = [
        adamw([model.lm_head.weight], config.unembedding_lr * width, head_betas, config.head_decay),
        adamw([model.wte.weight], config.embedding_lr * width, embed_betas, config.wte_decay),
        adamw(list(model.value_embeds.parameters()), value_lr, embed_betas, config.value_embed_decay),
    ]  # fmt: skip
    if model.config.residual_scalars:
        scalar_lr = config.scalar_lr * lr_scale
        groups.append(adamw([model.resid_lambdas], scalar_lr * 0.01, betas, config.resid_decay))
        groups.append(adamw([model.x0_lambdas], scalar_lr, (0.96, config.adam_beta2)))
    extras = [p for name, p in model.named_parameters() if name.startswith(("smear", "backout"))]
    groups.append(adamw(extras, config.smear_backout_lr * lr_scale, betas))
    by_shape: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for p in model.transformer["h"].parameters():
        by_shape.setdefault(tuple(p.shape), []).append(p)
    for shape in sorted(by_shape):
        groups.append({"kind": "muon", "params": by_shape[shape], "lr": config.matrix_lr * lr_scale,
                       "weight_decay": weight_decay, "beta2": config.muon_beta2,
                       "ns_dtype": ns_dtype, "ns_safety": config.ns_safety,
                       "row_equilibrate": config.row_equilibrate, "frobenius_snap": config.frobenius_snap})  # fmt: skip
    groups = [group for group in groups if group["params"]]
    placed = sum(len(group["params"]) for group in groups)
    assert placed == len(list(model.parameters())), "a parameter is in no group or in two"
    return groups


class DistMuonAdamW(MuonAdamW):
    """MuonAdamW over several processes: gradients are summed over all of them, then each takes the same step.

    The trainer divides by the global number of target tokens, so a sum is all that is missing.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:  # every process must take part in every sum
                    p.grad = torch.zeros_like(p)
                torch.distributed.all_reduce(p.grad)
        super().step(closure)
