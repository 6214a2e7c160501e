"""MuonAdamW: Muon for the matrices inside the blocks, AdamW for everything else, one optimizer for both.

The arithmetic is in update_rules.py, which parameter gets what in param_groups.py. Matrices of one shape are
stacked, so each group is a handful of batched products. DistMuonAdamW does the same on several processes.

Shapes: K matrices in a group, R rows, C columns.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from nanochat.checkpoint.optimizer_shards import StateSlot, parse_name, state_shapes
from nanochat.common import UserError
from nanochat.distributed.collectives import Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from nanochat.optimizer.param_groups import OptimizerConfig, build_param_groups
from nanochat.optimizer.update_rules import adamw_step, even_out, muon_step, orthogonalize

__all__ = [
    "DistMuonAdamW",
    "MuonAdamW",
    "OptimizerConfig",
    "build_param_groups",
    "even_out",
    "muon_step",
    "orthogonalize",
]


class MuonAdamW:
    """Groups are dicts with `kind` "adamw" or "muon"; a muon group's matrices all have one shape.

    `param_groups`, `state` and `step` are as in torch.optim.Optimizer, which this is not: to make one imports torch's
    compiler, which takes seconds.

    State per parameter, full-shape and fp32: adamw `exp_avg`, `exp_avg_sq`; muon `momentum_buffer` (R, C) and
    `second_moment` (R, 1) or (1, C): a matrix's state is a view into its group's stack, so that saving and
    loading know nothing of stacking.
    """

    ADAMW: ClassVar[dict[str, Any]] = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    MUON: ClassVar[dict[str, Any]] = {
        "momentum": 0.95,
        "beta2": 0.95,
        "weight_decay": 0.0,
        "ns_steps": 5,
        "ns_dtype": torch.bfloat16,
        "ns_safety": 1.02,
        "row_equilibrate": False,
        "frobenius_snap": False,
    }

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        groups = []
        for group in param_groups:
            kind = group.get("kind")
            assert kind in ("adamw", "muon"), f"a parameter group's kind is adamw or muon, not {kind!r}"
            groups.append({**(self.ADAMW if kind == "adamw" else self.MUON), **group})
        self.param_groups: list[dict[str, Any]] = groups
        self.state: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        params = [p for group in groups for p in group["params"]]
        assert len(set(params)) == len(params), "a parameter is in two groups"
        for group in groups:
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("initial_weight_decay", group["weight_decay"])
            if group["kind"] == "muon":
                shapes = {tuple(p.shape) for p in group["params"]}
                assert len(shapes) == 1, f"a muon group holds one shape, got {shapes}"

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient; a muon group needs all of its gradients."""
        for group in self.param_groups:
            if group["kind"] == "adamw":
                for p in group["params"]:
                    if p.grad is not None:
                        self._step_adamw(p, group)
            elif all(p.grad is not None for p in group["params"]):
                self._step_muon(group)

    def _step_adamw(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        self._update_adamw(p, p.detach(), p.grad, group)  # type: ignore[arg-type]

    def _update_adamw(self, p: torch.Tensor, own: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """Step `own`, which is p's data or a part of it."""
        state = self.state[p]
        if not state:
            state.update(
                step=0,
                exp_avg=torch.zeros_like(own, dtype=torch.float32),
                exp_avg_sq=torch.zeros_like(own, dtype=torch.float32),
            )
        state["step"] += 1
        adamw_step(own, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group)

    def _step_muon(self, group: dict[str, Any]) -> None:
        params = group["params"]
        grads = torch.stack([p.grad.to(torch.float32) for p in params])
        stacked = self._update_muon(params, grads, group)
        torch._foreach_copy_(params, list(stacked.unbind(0)))

    def _update_muon(self, params: list[torch.Tensor], grads: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """What `params`, some of a group's matrices, become by their gradients (K, R, C): (K, R, C)."""
        momentum, second = self._muon_stacks(params)
        stacked = torch.stack([p.detach() for p in params])
        muon_step(stacked, grads, momentum, second, group)
        for p in params:
            self.state[p]["step"] += 1
        return stacked

    def _muon_stacks(self, params: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Their stacked state, made on first use and rebuilt after load_named_state."""
        R, C = params[0].shape
        if "_stacks" not in self.state[params[0]]:
            old = [self.state[p] for p in params]
            like: dict[str, Any] = {"dtype": torch.float32, "device": params[0].device}
            small = (len(params), R, 1) if R >= C else (len(params), 1, C)
            stacks = torch.zeros(len(params), R, C, **like), torch.zeros(small, **like)
            for i, p in enumerate(params):
                if "momentum_buffer" in old[i]:
                    stacks[0][i].copy_(old[i]["momentum_buffer"])
                    stacks[1][i].copy_(old[i]["second_moment"])
                self.state[p] = {
                    "step": old[i].get("step", 0),
                    "momentum_buffer": stacks[0][i],
                    "second_moment": stacks[1][i],
                }
            self.state[params[0]]["_stacks"] = stacks
        return self.state[params[0]]["_stacks"]

    # What a process keeps of a parameter's state, as a range of its flat numbers; here all of it.

    def _own_range(self, p: torch.Tensor) -> tuple[int, int]:
        return 0, p.numel()

    def _saves(self, p: torch.Tensor) -> bool:
        """Whether this process is the one to save what it keeps of p's state."""
        return True

    def named_state(self, names: Mapping[Any, str]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Every state tensor as "<state>.<parameter name>", full-shape, and the step count per parameter name.

        Of several processes each names its own part; of a tensor that was split, numbers start to stop of the flat
        form as "<state>.<parameter name>[start:stop]". Together they name everything once.
        """
        tensors, steps = {}, {}
        for p, name in names.items():
            if not self.state.get(p) or not self._saves(p):
                continue
            start, stop = self._own_range(p)
            part = "" if (start, stop) == (0, p.numel()) else f"[{start}:{stop}]"
            for key, value in self.state[p].items():
                if key == "step":
                    steps[name] = value
                elif key != "_stacks":
                    tensors[f"{key}.{name}{part}"] = value
        return tensors, steps

    def load_named_state(
        self,
        names: Mapping[Any, str],
        tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        steps: dict[str, int],
    ) -> None:
        """Restore what named_state returned, on however many processes; each takes what is its own.

        `tensors` may come piece by piece. Raises UserError when something is missing or has another shape.
        """
        slots: dict[str, StateSlot] = {}
        for group in self.param_groups:
            for p in group["params"]:
                start, stop = self._own_range(p)
                if names[p] in steps and start < stop:
                    self.state[p] = {"step": steps[names[p]]}
                    for key, shape in state_shapes(group["kind"], p).items():
                        whole = (start, stop) == (0, p.numel())
                        value = torch.empty(shape if whole else stop - start, dtype=torch.float32, device=p.device)
                        self.state[p][key] = value
                        slots[f"{key}.{names[p]}"] = StateSlot(value.view(-1), shape, start)
        missing = {name: slot.target.numel() for name, slot in slots.items()}
        for saved_name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            name, first = parse_name(saved_name)
            if name in slots:
                missing[name] -= slots[name].copy_from(tensor, first)
        for name, count in missing.items():
            if count:
                key, _, parameter = name.partition(".")
                shape = slots[name].shape
                raise UserError(f"the checkpoint's optimizer has no {key} of shape {shape} for {parameter}")


class DistMuonAdamW(MuonAdamW):
    """MuonAdamW over N processes: gradients are summed over all, the update and its state are shared out (ZeRO-2,
    arXiv 1910.02054), and every process ends up with all of the weights.

    The trainer divides by the global number of target tokens, so sums are all that is missing. A large AdamW tensor
    is split into N equal ranges of its flat form, the last ones padded; the small ones' gradients are summed in one
    piece and every process updates them. A muon group's matrices are dealt out whole, one by one, going on where the
    last group ended: no process holds more than one more of a shape than another.

    Three phases overlap: all sums are started; as each one ends its share is updated and its way back started; then
    those are waited for. A parameter without a gradient on every process is left alone, on some only counts as zero.
    """

    SPLIT_FROM = 4096  # numbers in an AdamW tensor; below that, splitting saves less memory than it costs messages

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(param_groups)
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.small: list[torch.Tensor] = []
        self.owner: dict[torch.Tensor, int] = {}  # of each matrix
        for group in self.param_groups:
            for p in group["params"]:
                if group["kind"] == "muon":
                    self.owner[p] = len(self.owner) % self.world_size
                elif p.numel() < self.SPLIT_FROM:
                    self.small.append(p)
        self._is_small = set(self.small)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient on any process. All processes call it."""
        params = [p for group in self.param_groups for p in group["params"]]
        small = self._start_small(params)
        sums = [self._start_group(group) for group in self.param_groups]
        summed = small.wait()
        present = dict(zip(params, (summed[: len(params)] > 0).tolist()))
        self._step_small(summed[len(params) :], present)
        back = [
            gather
            for group, pending in zip(self.param_groups, sums)
            for gather in self._step_group(group, pending, present)
        ]
        for gather in back:
            gather.finish()

    # Small tensors

    def _start_small(self, params: list[torch.Tensor]) -> Pending:
        """Sum, as one flat tensor, which parameters have a gradient, and the small ones' gradients."""
        has = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
        grads = [_flat_grad(p) for p in self.small]
        return start_all_reduce(torch.cat([has, *grads]), "summing the small gradients")

    def _step_small(self, summed: torch.Tensor, present: dict[torch.Tensor, bool]) -> None:
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p, grad in zip(self.small, summed.split([p.numel() for p in self.small])):
            if present[p]:
                self._update_adamw(p, p.detach(), grad.view_as(p), groups[p])

    # Large tensors and matrices

    def _start_group(self, group: dict[str, Any]) -> list[Pending]:
        """Start to sum a group's gradients, to each process its share's."""
        if group["kind"] == "muon":
            return [start_reduce_scatter(self._lay_out(group["params"]), "summing the matrices' gradients")]
        large = [p for p in group["params"] if p not in self._is_small]
        return [
            start_reduce_scatter(_padded(_flat_grad(p), self._share(p) * self.world_size), "summing large gradients")
            for p in large
        ]

    def _step_group(
        self, group: dict[str, Any], sums: list[Pending], present: dict[torch.Tensor, bool]
    ) -> "Iterable[_Gather]":
        """Wait for this process's share of the group's gradients, update it, start to send it to the others."""
        params = [p for p in group["params"] if p not in self._is_small]
        if group["kind"] == "muon":
            grads = sums[0].wait()
            if all(present[p] for p in params):
                yield self._step_matrices(group, grads)
            return
        for p, pending in zip(params, sums):
            grad = pending.wait()
            if present[p]:
                yield self._step_range(p, grad, group)

    def _step_range(self, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> "_Gather":
        """Update this process's range of a large AdamW tensor."""
        start, stop = self._own_range(p)
        flat, share = p.detach().view(-1), self._share(p)
        own = flat[start:stop]
        if start < stop:
            self._update_adamw(p, own, grad[: stop - start], group)
        exact = share * self.world_size == p.numel()
        whole = flat if exact else flat.new_empty(share * self.world_size)
        pending = start_all_gather(_padded(own, share), whole, "gathering large weights")
        return _Gather(pending, [] if exact else [flat], [] if exact else [whole[: p.numel()]])

    def _step_matrices(self, group: dict[str, Any], grads: torch.Tensor) -> "_Gather":
        """Update this process's matrices of a muon group."""
        params = group["params"]
        R, C = params[0].shape
        own = [p for p in params if self.owner[p] == self.rank]
        share = torch.zeros(len(grads) // (R * C), R, C, dtype=params[0].dtype, device=params[0].device)
        if own:
            share[: len(own)] = self._update_muon(own, grads.view(-1, R, C)[: len(own)], group)
        whole = share.new_empty(self.world_size * share.numel())
        pending = start_all_gather(share.view(-1), whole, "gathering the matrices")
        return _Gather(pending, params, self._slots(params, whole))

    def _lay_out(self, params: list[torch.Tensor]) -> torch.Tensor:
        """The group's gradients side by side in fp32, each in a slot of its owner's share; empty slots are zero."""
        rounds = math.ceil(len(params) / self.world_size)
        whole = torch.zeros(self.world_size * rounds * params[0].numel(), device=params[0].device)
        have = [(slot, p.grad) for slot, p in zip(self._slots(params, whole), params) if p.grad is not None]
        if have:
            torch._foreach_copy_([slot for slot, _ in have], [grad for _, grad in have])
        return whole

    def _slots(self, params: list[torch.Tensor], whole: torch.Tensor) -> list[torch.Tensor]:
        """Where in the flat tensor of all shares each matrix lies."""
        R, C = params[0].shape
        slots = whole.view(self.world_size, -1, R, C)
        return [slots[self.owner[p], i // self.world_size] for i, p in enumerate(params)]

    def _share(self, p: torch.Tensor) -> int:
        """Numbers of a split tensor on each process, padding included."""
        return math.ceil(p.numel() / self.world_size)

    def _own_range(self, p: torch.Tensor) -> tuple[int, int]:
        if p in self.owner:
            return 0, p.numel() if self.owner[p] == self.rank else 0
        if p in self._is_small:
            return 0, p.numel()
        share = self._share(p)
        return min(self.rank * share, p.numel()), min((self.rank + 1) * share, p.numel())

    def _saves(self, p: torch.Tensor) -> bool:
        return p not in self._is_small or self.rank == 0


class _Gather(NamedTuple):
    """Weights on their way back, and where to copy what does not arrive in place."""

    pending: Pending
    targets: list[torch.Tensor]
    sources: list[torch.Tensor]

    def finish(self) -> None:
        self.pending.wait()
        if self.targets:
            torch._foreach_copy_(self.targets, self.sources)


def _flat_grad(p: torch.Tensor) -> torch.Tensor:
    """A gradient as a flat fp32 tensor; zeros where there is none."""
    if p.grad is None:
        return torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
    return p.grad.reshape(-1).to(torch.float32)


def _padded(flat: torch.Tensor, size: int) -> torch.Tensor:
    """`flat` itself, or followed by zeros to `size`."""
    return flat if len(flat) == size else torch.cat([flat, flat.new_zeros(size - len(flat))])
