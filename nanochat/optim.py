"""MuonAdamW: Muon for the matrices of blocks and n-grams, AdamW for most of the rest, one optimizer for all.

The arithmetic and the state of each rule are in optimizer/update_rules.py, which parameter gets which rule and rate in
optimizer/param_groups.py. DistMuonAdamW does the same on several ranks.

Shapes: K matrices in a group, R rows, C columns.
"""

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from nanochat.checkpoint.optimizer_shards import StateSlot, parse_name
from nanochat.common import UserError, warn
from nanochat.distributed.collectives import Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from nanochat.optimizer.param_groups import OptimizerConfig, build_param_groups
from nanochat.optimizer.update_rules import (
    AHEAD,
    RULES,
    Total,
    UpdateRule,
    even_out,
    flat_slices,
    orthogonalize,
    slices,
)

__all__ = ["DistMuonAdamW", "MuonAdamW", "OptimizerConfig", "build_param_groups", "even_out", "orthogonalize"]


def rule_of(group: dict[str, Any]) -> UpdateRule:
    return RULES[group["kind"]]


class MuonAdamW:
    """Groups are dicts; `kind` names a rule of update_rules.RULES. Where the rule is not elementwise (Muon), a group's
    parameters all have one shape and are updated as stacks, in batched products. Large groups and tensors are updated
    slice by slice (update_rules.SLICE_NUMBERS), so that temporaries stay small.

    `param_groups`, `state` and `step` are as in torch.optim.Optimizer. This is not a subclass of it: creating one
    imports torch's compiler, which takes seconds.

    State per parameter is full-shape and fp32, named by its rule: adamw `exp_avg`, `exp_avg_sq`; sgd none; muon
    `momentum_buffer` (R, C) and `second_moment` (R, 1) or (1, C). A matrix's state is a view into its slice's stack, so
    saving and loading do not see the stacks.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        self.param_groups: list[dict[str, Any]] = []
        for group in param_groups:
            assert group.get("kind") in RULES, (
                f"a parameter group's kind is one of {list(RULES)}, not {group.get('kind')}"
            )
            group = {**rule_of(group).defaults, **group}
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("initial_weight_decay", group["weight_decay"])
            shapes = {tuple(p.shape) for p in group["params"]}
            assert rule_of(group).elementwise or len(shapes) == 1, (
                f"a {group['kind']} group holds one shape, got {shapes}"
            )
            self.param_groups.append(group)
        self.state: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        params = [p for group in self.param_groups for p in group["params"]]
        assert len(set(params)) == len(params), "a parameter is in two groups"

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient; a stacked group needs all of its gradients."""
        for group in self._groups_to_update():
            params = group["params"]
            if rule_of(group).elementwise:
                for p in params:
                    if p.grad is not None:
                        self._update_range(p, p.detach(), p.grad, self._scaled(group, p.grad))
            elif all(p.grad is not None for p in params):
                for part in slices(params):
                    stacked = self._update_stack(part, torch.stack([p.grad.to(torch.float32) for p in part]), group)
                    torch._foreach_copy_(part, list(stacked.unbind(0)))

    def _groups_to_update(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if not rule_of(group).changes_nothing(group)]

    def _scaled(self, group: dict[str, Any], grad: torch.Tensor, total: Total = lambda sums: sums) -> dict[str, Any]:
        """The group with what its rule multiplies by, for a parameter of which this rank has the gradient `grad`."""
        return {**group, "grad_scale": rule_of(group).grad_scale(grad, total)}

    def _update_range(self, p: torch.Tensor, own: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """Update `own`, which is p's data or a range of it, by an elementwise rule."""
        rule, state = rule_of(group), self.state[p]
        if not state:
            state.update(step=0, **rule.init_state(tuple(own.shape), own.device))
        state["step"] += 1
        names = list(rule.state_shapes(tuple(own.shape)))
        flat = [own.view(-1), grad.reshape(-1), *(state[name].view(-1) for name in names)]
        for own_part, grad_part, *state_parts in flat_slices(flat):
            rule.update(own_part, grad_part, dict(zip(names, state_parts)), state["step"], group)

    def _update_stack(self, params: list[torch.Tensor], grads: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """The new values (K, R, C) of `params`, some of a group's matrices, from their gradients (K, R, C)."""
        stacks = self._state_stacks(params, rule_of(group))
        stacked = torch.stack([p.detach() for p in params])
        for p in params:
            self.state[p]["step"] += 1
        rule_of(group).update(stacked, grads, stacks, self.state[params[0]]["step"], group)
        return stacked

    def _state_stacks(self, params: list[torch.Tensor], rule: UpdateRule) -> dict[str, torch.Tensor]:
        """Their stacked state, made on first use and rebuilt after load_named_state."""
        first = params[0]
        if "_stacks" not in self.state[first]:
            stacks = {
                name: state.repeat(len(params), *[1] * state.dim())
                for name, state in rule.init_state(tuple(first.shape), first.device).items()
            }
            for i, p in enumerate(params):
                old, views = self.state[p], {name: stack[i] for name, stack in stacks.items()}
                for name in views.keys() & old.keys():
                    views[name].copy_(old[name])
                self.state[p] = {"step": old.get("step", 0), **views}
            self.state[first]["_stacks"] = stacks
        return self.state[first]["_stacks"]

    # What this rank keeps of a parameter's state, as a range of its flat form; here all of it.

    def _own_range(self, p: torch.Tensor) -> tuple[int, int]:
        return 0, p.numel()

    def _saves(self, p: torch.Tensor) -> bool:
        """Whether this rank saves what it keeps of p's state."""
        return True

    def named_state(self, names: Mapping[Any, str]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Every state tensor as "<state>.<parameter name>", full-shape, and the step count per parameter name.

        Each of several ranks names its own share; a range of a split tensor's flat form is named
        "<state>.<parameter name>[start:stop]". Together the ranks name everything once.
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
        """Restore what named_state returned, on any number of ranks; each takes its own share.

        `tensors` may come piece by piece. Raises UserError if one is missing or has another shape.
        """
        slots: dict[str, StateSlot] = {}
        known: set[str] = set()  # names of all state, other ranks' too
        for group in self.param_groups:
            for p in group["params"]:
                known |= {f"{key}.{names[p]}" for key in rule_of(group).state_shapes(tuple(p.shape))}
                start, stop = self._own_range(p)
                if names[p] in steps and start < stop:
                    self.state[p] = {"step": steps[names[p]]}
                    for key, shape in rule_of(group).state_shapes(tuple(p.shape)).items():
                        whole = (start, stop) == (0, p.numel())
                        value = torch.empty(shape if whole else stop - start, dtype=torch.float32, device=p.device)
                        self.state[p][key] = value
                        slots[f"{key}.{names[p]}"] = StateSlot(value.view(-1), shape, start)
        missing = {name: slot.target.numel() for name, slot in slots.items()}
        for saved_name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            name, first = parse_name(saved_name)
            if name not in known and name.partition(".")[2] in names.values():
                warn(f"the checkpoint's optimizer has {name}, which the update rule of now does not use")
            if name in slots:
                missing[name] -= slots[name].copy_from(tensor, first)
        for name, count in missing.items():
            if count:
                key, _, parameter = name.partition(".")
                shape = slots[name].shape
                raise UserError(f"the checkpoint's optimizer has no {key} of shape {shape} for {parameter}")


class DistMuonAdamW(MuonAdamW):
    """MuonAdamW on N ranks: gradients are summed over all ranks, each updates its share of the weights and keeps the
    state of that share only (ZeRO-2, arXiv 1910.02054), and all ranks end up with all weights.

    Summing is enough, as the trainer divides by the global number of target tokens. A large tensor with an elementwise
    rule is split into N equal ranges of its flat form, the last ones padded; the gradients of small ones are summed in
    one piece and every rank updates them. The matrices of stacked groups are assigned to ranks whole, round-robin over
    all groups: no rank holds more than one more of a shape than another.

    Communication starts once the backward pass has ended, and overlaps with the updates alone: while one slice is
    updated, the sums of the next AHEAD slices and the gathers of the last ones are under way. Under NCCL waiting
    orders streams and does not block the program, which queues the whole step. (A rule with a `grad_scale` waits for a
    sum more.) Only matrices need flat buffers, of
    the slices under way; tensors of an elementwise rule are summed and gathered in place, unless they are padded.
    A parameter without a gradient on every rank is left alone; without one on some ranks, those count as zero.
    """

    SPLIT_FROM = 4096  # numbers in a tensor; splitting a smaller one saves less memory than its messages cost

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(param_groups)
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.small: list[torch.Tensor] = []
        self.owner: dict[torch.Tensor, int] = {}  # rank of each matrix
        for group in self.param_groups:
            for p in group["params"]:
                if not rule_of(group).elementwise:
                    self.owner[p] = len(self.owner) % self.world_size
                elif p.numel() < self.SPLIT_FROM:
                    self.small.append(p)
        self._is_small = set(self.small)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient on any rank. Collective."""
        params = [p for group in self.param_groups for p in group["params"]]
        small = self._start_small(params)
        parts = [(group, part) for group in self._groups_to_update() for part in self._slices_of(group)]
        sums = deque(self._start_sum(*first) for first in parts[:AHEAD])
        summed = small.wait()
        present = dict(zip(params, (summed[: len(params)] > 0).tolist()))
        self._step_small(summed[len(params) :], present)
        gathers: deque[_Gather] = deque()
        for i, (group, part) in enumerate(parts):
            sums.extend(self._start_sum(*after) for after in parts[i + AHEAD : i + AHEAD + 1])
            grads = sums.popleft().wait()
            if all(present[p] for p in (part if rule_of(group).elementwise else group["params"])):
                update = self._step_range if rule_of(group).elementwise else self._step_matrices
                gathers.append(update(part, grads, group))
            if len(gathers) > AHEAD:
                gathers.popleft().finish()
        for gather in gathers:
            gather.finish()

    def _slices_of(self, group: dict[str, Any]) -> list[list[torch.Tensor]]:
        """The group's tensors by collective: each large one alone, matrices in slices of some for every rank."""
        params = group["params"]
        if rule_of(group).elementwise:
            return [[p] for p in params if p not in self._is_small]
        return slices(params, self.world_size)

    def _start_small(self, params: list[torch.Tensor]) -> Pending:
        """Sum, as one flat tensor, which parameters have a gradient, and the small ones' gradients."""
        has = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
        grads = [_flat_grad(p) for p in self.small]
        return start_all_reduce(torch.cat([has, *grads]), "summing the small gradients")

    def _step_small(self, summed: torch.Tensor, present: dict[torch.Tensor, bool]) -> None:
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p, grad in zip(self.small, summed.split([p.numel() for p in self.small])):
            if present[p]:
                self._update_range(p, p.detach(), grad.view_as(p), self._scaled(groups[p], grad))

    def _start_sum(self, group: dict[str, Any], part: list[torch.Tensor]) -> Pending:
        """Start to sum a slice's gradients; each rank gets its share's."""
        if not rule_of(group).elementwise:
            return start_reduce_scatter(self._lay_out(part), "summing the matrices' gradients")
        flat = _padded(_flat_grad(part[0]), self._share(part[0]) * self.world_size)
        return start_reduce_scatter(flat, "summing large gradients")

    def _step_range(self, part: list[torch.Tensor], grad: torch.Tensor, group: dict[str, Any]) -> "_Gather":
        """Update this rank's range of a large tensor, and start to gather it."""
        (p,) = part
        start, stop = self._own_range(p)
        flat, share = p.detach().view(-1), self._share(p)
        own, grad = flat[start:stop], grad[: stop - start]
        group = self._scaled(group, grad, lambda sums: start_all_reduce(sums, "summing a gradient's size").wait())
        if start < stop:
            self._update_range(p, own, grad, group)
        exact = share * self.world_size == p.numel()
        whole = flat if exact else flat.new_empty(share * self.world_size)
        pending = start_all_gather(_padded(own, share), whole, "gathering large weights")
        return _Gather(pending, [] if exact else [flat], [] if exact else [whole[: p.numel()]])

    def _step_matrices(self, params: list[torch.Tensor], grads: torch.Tensor, group: dict[str, Any]) -> "_Gather":
        """Update this rank's matrices of a slice, and start to gather them."""
        R, C = params[0].shape
        own = [p for p in params if self.owner[p] == self.rank]
        share = torch.zeros(len(grads) // (R * C), R, C, dtype=params[0].dtype, device=params[0].device)
        if own:
            share[: len(own)] = self._update_stack(own, grads.view(-1, R, C)[: len(own)], group)
        whole = share.new_empty(self.world_size * share.numel())
        pending = start_all_gather(share.view(-1), whole, "gathering the matrices")
        return _Gather(pending, params, self._slots(params, whole))

    def _lay_out(self, params: list[torch.Tensor]) -> torch.Tensor:
        """A slice's gradients in one flat fp32 tensor, each in a slot of its owner's share; empty slots are zero."""
        rounds = math.ceil(len(params) / self.world_size)
        whole = torch.zeros(self.world_size * rounds * params[0].numel(), device=params[0].device)
        have = [(slot, p.grad) for slot, p in zip(self._slots(params, whole), params) if p.grad is not None]
        if have:
            torch._foreach_copy_([slot for slot, _ in have], [grad for _, grad in have])
        return whole

    def _slots(self, params: list[torch.Tensor], whole: torch.Tensor) -> list[torch.Tensor]:
        """Each matrix's slot in the flat tensor of all shares."""
        R, C = params[0].shape
        slots = whole.view(self.world_size, -1, R, C)
        return [slots[self.owner[p], i // self.world_size] for i, p in enumerate(params)]

    def _share(self, p: torch.Tensor) -> int:
        """Numbers of a split tensor on each rank, padding included."""
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
    """A gather of new weights, and where to copy those that do not arrive in place."""

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
