"""Tensors that claim to be on a GPU, and NCCL's rules, on a CPU: for processes that end with their test.

A tensor made for "cuda:1" is a ClaimedGPU: it is in host memory, and reports that device. What is computed from it is
one too. An operation on tensors of different devices fails, and so does a collective on tensors that NCCL refuses.
"""

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from nanochat import runtime
from nanochat.distributed import collectives

ACROSS_DEVICES = {"copy_", "_foreach_copy_", "__get__", "__set__", "__getitem__", "__setitem__"}
TO_HOST = {"cpu", "tolist", "numpy"}
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_single", "all_gather_into_tensor", "reduce_scatter_single")
COLLECTIVES += ("reduce_scatter_tensor", "all_to_all_single")
UNUSED = ("broadcast", "reduce", "gather", "scatter", "all_gather_object", "broadcast_object_list", "send", "recv")


class ClaimedGPU(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def claim(x: Any) -> Any:
    return x.as_subclass(ClaimedGPU) if type(x) is torch.Tensor else x


def unclaim(x: Any) -> Any:
    return x.as_subclass(torch.Tensor) if isinstance(x, ClaimedGPU) else x


def is_device(x: Any, kind: str) -> bool:
    return isinstance(x, str | torch.device) and str(x).split(":")[0] == kind


class ClaimGPU(TorchFunctionMode):
    """While active, in its thread: tensors made for or moved to "cuda" are ClaimedGPUs on `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        places = [*args, *kwargs.values()]
        tensors = [x for x in tree_leaves(places) if isinstance(x, torch.Tensor)]
        claimed = any(isinstance(x, ClaimedGPU) for x in tensors)
        attribute = getattr(func, "__self__", None)
        if claimed and attribute is torch.Tensor.device:
            return self.device
        if claimed and attribute is torch.Tensor.is_cuda:
            return True
        if name == "pin_memory":
            return args[0]
        if func is not torch.device and any(is_device(x, "cuda") for x in places):
            args, kwargs = tree_map(lambda x: "cpu" if is_device(x, "cuda") else x, (args, kwargs))
            return tree_map(claim, func(*args, **kwargs))
        if claimed and (name in TO_HOST or (name == "to" and any(is_device(x, "cpu") for x in places))):
            return tree_map(unclaim, func(*args, **kwargs))
        if claimed and name not in ACROSS_DEVICES and torch._C._current_graph_task_id() == -1:
            apart = [x for x in tensors if not isinstance(x, ClaimedGPU) and x.dim() and not x.is_meta]
            assert not apart, f"{name} of tensors on {self.device} and on the CPU"
        out = func(*args, **kwargs)
        return tree_map(claim, out) if claimed else out


def checked(run: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    """`run`, a collective of torch.distributed, on tensors that the group's backend takes. Notes NCCL's in `calls`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        on_gpu = kwargs.get("group") is None  # other groups are gloo
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):
                assert isinstance(x, ClaimedGPU) == on_gpu, f"{run.__name__} on {'NCCL' if on_gpu else 'gloo'}"
                assert x.is_contiguous(), run.__name__
        if on_gpu:
            calls.append(run.__name__)
        with torch._C.DisableTorchFunction():
            return run(*tree_map(unclaim, args), **tree_map(unclaim, kwargs))

    return call


def pretend(device: torch.device, store: dist.Store) -> list[str]:
    """Give this process the GPU `device`, and NCCL. Returns the list of collectives called on it, as they come.

    No two GPUs are of one model: each draws other numbers from a seed.
    """
    calls: list[str] = []
    generator, init = torch.Generator, dist.init_process_group

    def init_process_group(backend: str, *, device_id: Any, timeout: timedelta, **kwargs: Any) -> None:
        assert (backend, device_id) == ("nccl", device), "each rank connects with its own GPU"
        init("gloo", timeout=timeout, **kwargs)

    for name in COLLECTIVES:
        if run := getattr(dist, name, None):
            setattr(dist, name, checked(run, calls))
    for name in UNUSED:
        setattr(dist, name, None)
    dist.init_process_group = init_process_group
    dist.get_backend = lambda group=None: "nccl"
    collectives.rendezvous = lambda url, rank, world_size, **kwargs: iter([(store, rank, world_size)])  # type: ignore

    def draws(device_or_name: Any = "cpu") -> Any:
        shift = device.index if is_device(device_or_name, "cuda") else 0
        return SimpleNamespace(manual_seed=lambda seed: generator().manual_seed(seed + shift))

    torch.Generator = lambda device="cpu": draws(device)  # type: ignore
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    cuda: Any = torch.cuda
    cuda.is_available, cuda.device_count = lambda: True, lambda: device.index + 1
    cuda.get_device_capability, cuda.get_device_name = lambda *args: (8, 0), lambda *args: "claimed"
    cuda.get_device_properties = lambda *args: SimpleNamespace(total_memory=80 * 2**30)
    cuda.get_arch_list = lambda: ["sm_80"]
    cuda.mem_get_info = lambda *args: (80 * 2**30, 80 * 2**30)
    cuda.memory_allocated = cuda.memory_reserved = cuda.max_memory_reserved = lambda *args: 0
    cuda.get_per_process_memory_fraction = lambda *args: 1.0
    cuda.set_per_process_memory_fraction = cuda.reset_peak_memory_stats = lambda *args: None
    cuda.synchronize = cuda.empty_cache = lambda *args: None
    runtime.open_card = lambda device: None
    cuda.get_rng_state, cuda.set_rng_state = lambda *args: torch.zeros(16, dtype=torch.uint8), lambda *args: None
    return calls
