"""The machine and the code version a stage ran on, for the record."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nanochat.runtime import device_name


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, GPUs, versions and the code's commit; None for what is unknown."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": device_name(torch.device("cpu")),
        "cores": cores,
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
        "gpus": ", ".join(f"{gpus.count(name)} x {name}" for name in sorted(set(gpus))) or None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "nanochat": package_version(),
        "commit": git_commit(),
    }


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or the limit of its control group if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def package_version() -> str | None:
    """Version of the installed package; None if it is not installed."""
    try:
        return metadata.version("nanochat")
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Short hash of the checkout this code is in, with "+changes" if it was edited; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+changes"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
