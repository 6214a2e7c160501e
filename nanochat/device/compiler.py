"""Whether torch.compile works on a device: found by compiling something small."""

import functools
import shutil
import sysconfig
from pathlib import Path

import torch

from nanochat.common import first_line


@functools.cache
def why_not_compiling(device: torch.device) -> str:
    """Why torch.compile does not work on `device`, in one line with the fix where it is known; "" if it works.

    Compiles a small function and its gradient, so that a missing compiler or header, an old driver, a full disk or a
    cache folder that is not writable all show here. Takes a few seconds once, mostly of imports.
    """
    if device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 7:
            return f"torch.compile needs compute capability 7.0, and this GPU has {major}.{minor}"

    def small(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x).sum()

    try:
        x = torch.linspace(0, 1, 64, device=device, requires_grad=True)
        torch.compile(small, dynamic=False)(x).backward()
    except Exception as error:  # of the compiler, the linker, the driver or the file system
        return f"torch.compile does not work here ({cause(error)}){_missing()}"
    return ""


def cause(error: BaseException) -> str:
    """First line of the error behind what torch.compile raises, with its type."""
    inner = getattr(error, "inner_exception", error)
    return f"{type(inner).__name__}: {first_line(inner)}"


def _missing() -> str:
    """What the system lacks that torch.compile needs, as the end of a message."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "; install a C compiler, for instance: apt install gcc"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "; install Python's headers, for instance: apt install python3-dev"
    return ""
