"""NVIDIA GPUs: whether the installed PyTorch runs on the one it is given, and why it finds none."""

import shutil
import warnings
from pathlib import Path

import torch

from nanochat.common import UserError, first_line

Capability = tuple[int, int]
INDEX = "https://download.pytorch.org/whl"
DRIVER = Path("/proc/driver/nvidia/version")  # of the Linux kernel, also inside containers


def open_card(device: torch.device) -> None:
    """Make `device` this process's current GPU and compute something on it.

    Raises UserError, with the fix, if there is no such GPU, or the PyTorch build or the GPU's state prevents it.
    """
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UserError(
            f"local rank {device.index} has no GPU: PyTorch sees {count} here (CUDA_VISIBLE_DEVICES chooses which); "
            f"start {count} ranks on this machine, --nproc_per_node={count}"
        )
    name, capability, archs = f"GPU {device.index}", None, torch.cuda.get_arch_list()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, several lines on every card of the machine
            capability = torch.cuda.get_device_capability(device)
            name = f"{name} ({torch.cuda.get_device_name(device)})"
            torch.cuda.set_device(device)
            compute_something(device)
    except Exception as error:  # RuntimeError, or DeferredCudaCallError if CUDA cannot be initialised
        build = f"PyTorch {torch.__version__} (CUDA {torch.version.cuda})"
        if capability and archs and torch.version.cuda and not has_code(archs, capability):
            raise UserError(
                f"{build} has no code for {name}, compute capability {capability[0]}.{capability[1]}, only for "
                f"{' '.join(archs)}: {other_build(capability)}; or --device-type=cpu"
            ) from error
        raise UserError(
            f"{name} cannot be used by {build}: {first_line(error)}; nvidia-smi shows its driver, its mode and the "
            "processes that hold it"
        ) from error


def compute_something(device: torch.device) -> None:
    """Allocate memory and run a kernel. Without expandable segments from here on if the driver cannot map memory in
    pages, as under some hypervisors (vGPU) and on Jetson boards (https://github.com/unslothai/unsloth/issues/1446)."""
    try:
        float(torch.ones(2, device=device).sum())
    except RuntimeError as error:
        if "CUDA driver error" not in str(error):
            raise
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
        float(torch.ones(2, device=device).sum())


def has_code(archs: list[str], capability: Capability) -> bool:
    """Whether a build with code for `archs`, as torch.cuda.get_arch_list() names them, runs on such a card.

    sm_86 is machine code: it runs on cards of its major version from that minor version on (sm_90a on that one alone,
    sm_100f as sm_100). compute_86 is PTX, which the driver compiles for every later card.
    """

    def runs(arch: str) -> bool:
        kind, _, number = arch.partition("_")
        digits = int(number.rstrip("af"))
        code = (digits // 10, digits % 10)
        if number.endswith("a"):
            return capability == code
        return capability >= code and (capability[0] == code[0] or (kind == "compute" and not number.endswith("f")))

    return any(map(runs, archs))


def other_build(capability: Capability) -> str:
    """How to get a PyTorch that runs on cards of that capability.

    Builds for CUDA 13 begin at 7.5 (Turing). Those for 12.6 have code for 5.0 to 9.0, up to PyTorch 2.14 at least
    (https://github.com/pytorch/pytorch/issues/190385).
    """
    version = torch.__version__.partition("+")[0]
    if capability < (5, 0):
        return "no present PyTorch has"
    if capability < (7, 5):
        return f"pip install torch=={version} --index-url {INDEX}/cu126"
    if int((torch.version.cuda or "0").split(".")[0]) < 13:
        return f"pip install torch=={version} --index-url {INDEX}/cu130"
    return "pip install --upgrade torch"


def why_none(visible: str | None) -> str:
    """Why PyTorch finds no GPU on a machine with an NVIDIA driver, and the fix; "" without a driver.

    `visible` is CUDA_VISIBLE_DEVICES, None if it is not set.
    """
    if not DRIVER.exists() and not shutil.which("nvidia-smi"):
        return ""
    version = torch.__version__
    if torch.version.cuda is None:
        fix = f"pip install torch=={version.partition('+')[0]} --index-url {INDEX}/cu130"
        return f"this machine has an NVIDIA driver, but PyTorch {version} is built without CUDA: {fix}"
    try:
        torch.cuda.init()
        reason = "No CUDA GPUs are available"
    except Exception as error:
        reason = first_line(error).split(". ")[0]
    if visible is not None and "No CUDA GPUs" in reason:
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides this machine's NVIDIA GPUs, or names none of them"
    fix = f"update the driver, or take the build for an older CUDA: {other_build((7, 0))}"
    if "too old" not in reason:
        fix = "see nvidia-smi; in a container, start it with its GPUs (docker run --gpus all)"
    return f"this machine has an NVIDIA driver, but PyTorch {version} cannot use it: {reason}; {fix}"
