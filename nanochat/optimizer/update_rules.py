"""Update rules: what a step does to a parameter, and the state it keeps. One object per rule, in RULES.

To add a rule: a subclass of UpdateRule here, an entry in RULES, and a recipe that sets matrix_rule (recipe.py). The
optimizer, its ZeRO-2 form, checkpoints, the planner and the schedules know a rule by these methods only.

Muon keeps a momentum, replaces it by the nearest semi-orthogonal matrix (Polar Express), evens out its rows or columns
by their running second moment (NorMuon), and decays only weights that the update also shrinks (cautious decay).

Shapes: K matrices in a stack, R rows, C columns.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch

from nanochat.cpu.fused import in_c

# Per step (a, b, c) of X <- aX + b(XX')X + c(XX')^2 X: the minimax-optimal composition for singular values in
# [1e-3, 1], with the paper's safety factor folded in (Polar Express, arXiv 2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


# Numbers that a rule updates at once, or one matrix if that is larger. Muon's temporaries are then 0.4 GiB, less than
# the backward pass of one row of 2048 tokens needs in models with tensors that large (in one piece they would be 5 GiB
# at depth 24), and so many numbers, even in a single matrix, keep a GPU busy.
SLICE_NUMBERS = 2**24
AHEAD = 2  # slices whose collectives are under way: NCCL runs one at a time, gloo two; more would hold more buffers


def orthogonalize(
    x: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16, safety: float = 1.02
) -> torch.Tensor:
    """Approximately the nearest semi-orthogonal matrix to each of x (K, R, C), computed and returned in `dtype`.

    Singular values above a thousandth of the norm end within about 0.85 .. 1.15, smaller ones below. `safety` keeps
    the largest below 1 at the start, in spite of rounding. The Gram matrix is the smaller side's.
    """
    x = x.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * safety + 1e-6)
    for a, b, c in POLAR_EXPRESS[:steps]:
        tall = x.size(-2) > x.size(-1)
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
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


@in_c("adamw_")
def adamw_(
    p: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> tuple[torch.Tensor, ...]:
    """One step of AdamW (arXiv 1711.05101) on p with gradient g, in place: returns p and its moments m and v."""
    beta1, beta2 = betas
    if decay:
        p.mul_(1 - lr * decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (v / (1 - beta2**step)).sqrt_().add_(eps)
    p.add_(m.div(denominator).mul_(-lr / (1 - beta1**step)).to(p.dtype))
    return p, m, v


@in_c("cautious_step_")
def cautious_step_(p: torch.Tensor, update: torch.Tensor, lr: float, decay: float) -> torch.Tensor:
    """p -= lr * update, in place; p also decays by lr * decay where the update shrinks it."""
    update = update.to(p.dtype)
    shrinks = (update * p) >= 0
    return p.sub_(lr * update + (lr * decay) * p * shrinks)


Total = Callable[[torch.Tensor], torch.Tensor]  # sums a tensor over the ranks that share a parameter; collective


class UpdateRule:
    """An update rule. State is float32, named tensors for each parameter, full-shape in checkpoints."""

    elementwise: ClassVar[bool]
    """True: but for `grad_scale`, each number is updated by itself, so ranks may split a tensor anywhere and state has
    the parameter's shape. False: equal-shaped parameters are stacked, and a rank gets whole ones."""
    defaults: ClassVar[dict[str, Any]]
    """Settings of a parameter group besides "kind", "params" and "lr". The schedule sets "momentum" if it is there;
    with decay_scheduled the weight decay follows the schedule too."""
    temporary_bytes: ClassVar[int] = 36
    """At most this many bytes of temporaries per number of `params`, for the planner."""

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the state of a parameter of that shape."""
        raise NotImplementedError

    def update(
        self, params: torch.Tensor, grads: torch.Tensor, state: dict[str, Any], step: int, group: dict[str, Any]
    ) -> None:
        """Update params and state in place; step counts from 1. Elementwise rules get any tensor, others a stack
        (K, *shape), its state stacked likewise."""
        raise NotImplementedError

    def grad_scale(self, grads: torch.Tensor, total: Total) -> torch.Tensor | float:
        """What `update` multiplies a parameter's gradient by, as group["grad_scale"]; `grads` is what this rank has of
        it. Of elementwise rules only."""
        return 1.0

    def changes_nothing(self, group: dict[str, Any]) -> bool:
        """Whether a step of the group, with what ranks exchange for it, can be left out at its rate of now."""
        return False

    def settings(self, config: Any, ns_dtype: torch.dtype) -> dict[str, Any]:
        """Group settings that OptimizerConfig has fields for; ns_dtype is the dtype of fast products on this device."""
        return {}

    def init_state(self, shape: tuple[int, ...], device: torch.device) -> dict[str, torch.Tensor]:
        """The state before the first step."""
        return {name: torch.zeros(s, device=device) for name, s in self.state_shapes(shape).items()}

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        return 4 * sum(math.prod(s) for s in self.state_shapes(shape).values())


class AdamW(UpdateRule):
    """AdamW (arXiv 1711.05101). Arithmetic is float32 whatever the parameter's dtype."""

    elementwise = True
    temporary_bytes = 12  # 8 with gradients in float32
    defaults: ClassVar[dict[str, Any]] = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"exp_avg": shape, "exp_avg_sq": shape}

    def update(
        self, params: torch.Tensor, grads: torch.Tensor, state: dict[str, Any], step: int, group: dict[str, Any]
    ) -> None:
        m, v = state["exp_avg"], state["exp_avg_sq"]
        rates = [group[key] for key in ("lr", "betas", "eps", "weight_decay")]
        adamw_(params, grads.to(m.dtype), m, v, step, *rates)


class NormedSGD(UpdateRule):
    """SGD without state, for tables of which a step looks up a small part: p -= lr * g * sum |g| / sum g^2.

    A row moves in proportion to its gradient: far if it is looked up often, little if it is seen once. Adam moves both
    alike, rare rows further even, and so learns text by heart (dev/LOG.md).
    """

    elementwise = True
    temporary_bytes = 0
    defaults: ClassVar[dict[str, Any]] = {"weight_decay": 0.0}

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {}

    def grad_scale(self, grads: torch.Tensor, total: Total) -> torch.Tensor:
        """sum |g| / sum g^2: about 0.7 / root mean square of the numbers that are not 0, which alone count."""
        norms = [torch.linalg.vector_norm(grads, ord, dtype=torch.float32) for ord in (1, 2)]
        absolute, squares = total(torch.stack([norms[0], norms[1].square()])).unbind()
        return absolute / squares.clamp_min(torch.finfo(torch.float32).tiny)

    def update(
        self, params: torch.Tensor, grads: torch.Tensor, state: dict[str, Any], step: int, group: dict[str, Any]
    ) -> None:
        if group["weight_decay"]:
            params.mul_(1 - group["lr"] * group["weight_decay"])
        params.addcmul_(grads, group["grad_scale"], value=-group["lr"])

    def changes_nothing(self, group: dict[str, Any]) -> bool:
        return not group["lr"]


class Muon(UpdateRule):
    """Muon for matrices (R, C); see the module's docstring for its parts."""

    elementwise = False
    temporary_bytes = 36  # the stacks of weights and gradients included; 25 where orthogonalised in 16 bits
    defaults: ClassVar[dict[str, Any]] = {
        "momentum": 0.95,
        "beta2": 0.95,
        "weight_decay": 0.0,
        "decay_scheduled": True,
        "ns_steps": 5,
        "ns_dtype": torch.bfloat16,
        "ns_safety": 1.02,
        "row_equilibrate": False,
        "frobenius_snap": False,
    }

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        R, C = shape
        return {"momentum_buffer": shape, "second_moment": (R, 1) if R >= C else (1, C)}

    def settings(self, config: Any, ns_dtype: torch.dtype) -> dict[str, Any]:
        names = ("ns_safety", "row_equilibrate", "frobenius_snap")
        return {"beta2": config.muon_beta2, "ns_dtype": ns_dtype, **{name: getattr(config, name) for name in names}}

    def update(
        self, params: torch.Tensor, grads: torch.Tensor, state: dict[str, Any], step: int, group: dict[str, Any]
    ) -> None:
        """params, grads, momentum_buffer (K, R, C); second_moment (K, R, 1) or (K, 1, C)."""
        state["momentum_buffer"].lerp_(grads, 1 - group["momentum"])
        update = grads.lerp(state["momentum_buffer"], group["momentum"])  # Nesterov
        if group["row_equilibrate"]:
            # MuonEq (arXiv 2603.28254): rows of equal length condition the iteration better.
            update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-10)
        update = orthogonalize(update, group["ns_steps"], group["ns_dtype"], group["ns_safety"])
        if group["frobenius_snap"]:
            # Muon+ (arXiv 2602.21545): give the result exactly the norm a semi-orthogonal matrix has.
            target = math.sqrt(min(update.size(-2), update.size(-1)))
            update = update * (target / update.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
        update = even_out(update, state["second_moment"], group["beta2"])
        lr = group["lr"] * math.sqrt(max(1.0, params.size(-2) / params.size(-1)))
        cautious_step_(params, update, lr, group["weight_decay"])


RULES: dict[str, UpdateRule] = {"adamw": AdamW(), "sgd": NormedSGD(), "muon": Muon()}
"""By the `kind` of a parameter group."""


def optimizer_bytes(param_groups: list[dict[str, Any]]) -> int:
    """Bytes of all state of these groups, on one rank."""
    return sum(RULES[group["kind"]].state_bytes(tuple(p.shape)) for group in param_groups for p in group["params"])


def slices(params: list[Any], ranks: int = 1) -> list[list[Any]]:
    """Equal-shaped `params` in runs of about equal length, of which each rank updates at most SLICE_NUMBERS numbers."""
    rounds = math.ceil(len(params) / ranks)
    count = math.ceil(rounds / max(1, SLICE_NUMBERS // params[0].numel()))
    length = math.ceil(rounds / count) * ranks
    return [params[i : i + length] for i in range(0, len(params), length)]


def flat_slices(tensors: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Equally long flat tensors in runs of SLICE_NUMBERS numbers."""
    return zip(*(t.split(SLICE_NUMBERS) for t in tensors))


def update_bytes(param_groups: list[dict[str, Any]], ranks: int = 1) -> int:
    """Bytes of an update at its peak, above weights, gradients and state: a slice's temporaries, and on several ranks
    the float32 buffers of the slices whose sums and gathers are under way."""
    temporaries, buffers = [], []  # by slice
    for group in param_groups:
        rule = RULES[group["kind"]]
        for part in [[p] for p in group["params"]] if rule.elementwise else slices(group["params"], ranks):
            whole = sum(p.numel() for p in part)
            own = math.ceil(whole / ranks) if rule.elementwise else math.ceil(len(part) / ranks) * part[0].numel()
            temporaries.append(rule.temporary_bytes * (min(own, SLICE_NUMBERS) if rule.elementwise else own))
            in_place = rule.elementwise and whole % ranks == 0
            buffers.append(4 * own * (1 if in_place else 1 + ranks))
    if ranks == 1:
        return max(temporaries)
    sums = [sum(buffers[i : i + AHEAD + 1]) for i in range(len(buffers))]
    gathers = [sum(buffers[max(0, i - AHEAD) : i + 1]) for i in range(len(buffers))]
    return max(map(sum, zip(temporaries, sums, gathers)))
