"""Programs of the GPU check that are no scripts of their own: `python -m dev.gpu_check_parts PART ...`.

    environment                  versions, devices, what is missing
    imports                      import every module
    resume MODULE FLAGS          train the run "resume", then again from its middle, and compare the files
    web FLAGS                    serve, answer one request, stop
    graphs MODULE FLAGS          run a training script; count torch.compile's graphs, breaks and recompiles
    memory GIB MODULE FLAGS      run a script in as much memory as a GPU of this size has

The last line of each is a JSON object of its figures. Exit code 0 if all is as it should be.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import traceback
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONTEXT_GIB = 0.6  # of CUDA and its libraries, outside PyTorch's allocator


def finish(problems: Sequence[str], **figures: Any) -> int:
    """Print the problems and the figures; returns the exit code."""
    for problem in problems:
        print(f"error: {problem}")
    print(json.dumps(figures), flush=True)
    return 1 if problems else 0


# ---------------------------------------------------------------------------------------------------
# Environment


def environment() -> int:
    import torch

    problems = [f"{name} is not installed: {fix}" for name, fix in missing_packages()]
    found: dict[str, Any] = {
        "device_type": "cpu",
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    driver = nvidia_smi()
    if torch.cuda.is_available():
        found |= cuda(driver)
        arch = "sm_{}{}".format(*found["capability"])
        print(f"this GPU is {arch}; PyTorch has kernels for {' '.join(torch.cuda.get_arch_list())}")
    elif driver and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):  # hidden on purpose
        problems.append(f"nvidia-smi lists a GPU, which PyTorch {torch.__version__} cannot use: {why_no_cuda()}")
    elif torch.backends.mps.is_available():
        found |= {"device_type": "mps"}
    try:
        from nanochat.runtime import Runtime
        from nanochat.train.timing import measure_peak_flops

        runtime = Runtime.create()
        print(runtime.describe())
        found |= {"flops_per_second": measure_peak_flops(runtime), "dtype": str(runtime.dtype).removeprefix("torch.")}
    except Exception as error:
        problems.append(f"{type(error).__name__}: {error}")
    print(f"C compiler: {shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')}")
    print(f"Python.h: {(Path(sysconfig.get_path('include')) / 'Python.h').exists()}")
    for name in ("triton", "torchao", "kernels", "flash_attn_interface"):
        print(f"{name}: {version_of(name)}")
    return finish(problems, **found)


def missing_packages() -> list[tuple[str, str]]:
    """(package, how to install it) of what pyproject.toml requires and is not there; pytest too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line.split(";")[0].strip() for line in project["dependencies"]]
    names = [line[: min(line.find(mark) for mark in "=<>~! " if mark in line) or None] for line in lines] + ["pytest"]
    return [(name, f"pip install '{name}', or put it on PYTHONPATH") for name in names if not version_of(name)]


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version" if importlib.util.find_spec(package.replace("-", "_")) else None


def nvidia_smi() -> str:
    """The driver's version; "" where there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        subprocess.run(["nvidia-smi"], check=False)
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def why_no_cuda() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0]
    return "unknown"


def cuda(driver: str) -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_properties(0)
    capability = torch.cuda.get_device_capability(0)
    no_fp8 = "" if capability >= (8, 9) else "needs a GPU of capability 8.9"
    print(f"cuDNN {torch.backends.cudnn.version()}, NCCL {torch.cuda.nccl.version()}, {device}")
    return {
        "device_type": "cuda",
        "device": device.name,
        "gpus": torch.cuda.device_count(),
        "capability": capability,
        "memory_gib": device.total_memory / 2**30,
        "cuda": torch.version.cuda,
        "driver": driver,
        "no_fp8": no_fp8 or ("" if version_of("torchao") else "needs torchao: pip install 'nanochat[torchao]'"),
    }


def imports() -> int:
    """Import every module, whatever becomes of the others."""
    paths = [*(ROOT / "dev").glob("*.py")]  # its folders are examples and other people's clients
    for package in ("nanochat", "tasks", "scripts", "bench"):
        paths += (ROOT / package).rglob("*.py")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(paths)]
    problems = []
    for name in names:
        try:
            importlib.import_module(name.removesuffix(".__init__"))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            problems.append(f"{name}: {error!r}")
    return finish(problems, modules=len(names), failed=len(problems))


# ---------------------------------------------------------------------------------------------------
# Resuming, serving


def resume(*command: str) -> int:
    """Train, drop the last checkpoint, resume; the files of both ends should have the same bits (--deterministic)."""
    from nanochat.checkpoint.folder import list_steps
    from nanochat.checkpoint.runs import run_dir
    from nanochat.common import get_base_dir, sha256_file

    train = [sys.executable, "-m", *command]
    folder = run_dir(get_base_dir(), "base", "resume")
    if code := subprocess.run(train).returncode:
        return finish([f"the run ended with exit code {code}"])
    *_, before, last = list_steps(folder)
    ends = folder / f"{last:06d}"

    def hashes() -> dict[str, str]:
        return {path.name: sha256_file(path) for path in sorted(ends.glob("*.safetensors"))}

    straight = hashes()
    shutil.rmtree(ends)
    if code := subprocess.run([*train, "--resume"]).returncode:
        return finish([f"the resumed run ended with exit code {code}"])
    problems = [
        f"{name} differs after resuming at step {before}" for name, bits in hashes().items() if bits != straight[name]
    ]
    return finish(problems, **{"files compared": len(straight), "steps": last})


def web(*flags: str) -> int:
    """Serve, wait until it is healthy, ask once, stop it with SIGTERM."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "scripts.chat_web", f"--port={port}", *flags])
    url, started = f"http://127.0.0.1:{port}", time.perf_counter()
    try:
        while not answers(f"{url}/health"):
            if server.poll() is not None:
                return finish([f"the server ended with exit code {server.returncode}"])
            time.sleep(0.1)
        ready = time.perf_counter() - started
        question = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 16}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        started = time.perf_counter()
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = json.load(response)
        seconds = time.perf_counter() - started
        print(answer)
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    finally:
        server.kill()
    problems = [] if code == 0 else [f"after SIGTERM the server's exit code was {code}"]
    tokens = answer["usage"]["completion_tokens"]
    return finish(problems, **{"s to the start": ready, "s to answer": seconds, "tokens": tokens})


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except OSError:  # not yet listening, or not healthy
        return False


# ---------------------------------------------------------------------------------------------------
# A script, observed


def run_script(module: str, flags: Sequence[str]) -> int:
    """Run `python -m module flags` in this process; returns its exit code."""
    sys.argv = [module, *flags]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


class Recompiles(logging.Handler):
    """Counts the recompiles that PyTorch logs."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def graphs(module: str, *flags: str) -> int:
    """Every compiled function should be one graph, compiled once. The reasons where not are in the log.

    On a CPU the backend is aot_eager: the same graphs, without the minutes that a C++ compiler takes.
    """
    import torch
    from torch._dynamo.utils import counters

    if not torch.cuda.is_available():
        torch.compile = partial(torch.compile, backend="aot_eager")
    torch._logging.set_logs(recompiles=True, graph_breaks=True)
    recompiles = Recompiles()
    torch._logging.getArtifactLogger("torch._dynamo.guards", "recompiles").addHandler(recompiles)
    code = run_script(module, flags)
    compiled, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    problems = [f"{module} ended with exit code {code}"] if code else []
    problems += ["nothing was compiled"] if not compiled else []
    problems += [f"{breaks} graph breaks"] if breaks else []
    problems += [f"{recompiles.count} recompiles"] if recompiles.count else []
    return finish(problems, graphs=compiled, breaks=breaks, recompiles=recompiles.count)


def memory(gib: str, module: str, *flags: str) -> int:
    """Run the training script as on a GPU with `gib` GiB, and delete its checkpoint of gigabytes.

    Without a GPU nothing is limited.
    """
    import torch

    from nanochat.checkpoint.runs import run_dir
    from nanochat.common import get_base_dir

    on_gpu, tag = torch.cuda.is_available(), flags[-1].removeprefix("--model-tag=")
    if on_gpu:
        limit_memory(float(gib))
    code = run_script(module, flags)
    shutil.rmtree(run_dir(get_base_dir(), "base", tag), ignore_errors=True)
    problems = [f"{module} ended with exit code {code}"] if code else []
    if not on_gpu:
        return finish(problems)
    print(torch.cuda.memory_summary(abbreviated=True))
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return finish(problems, peak_memory_bytes=peak, **{"GiB reserved": reserved / 2**30})


def limit_memory(gib: float) -> None:
    """Make PyTorch's allocator refuse what a GPU with `gib` GiB could not give, beside its CUDA context."""
    import torch

    from nanochat.runtime import use_expandable_segments

    use_expandable_segments()  # as the script itself would, before CUDA is initialised
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - CONTEXT_GIB) / total))


PARTS: dict[str, Callable[..., int]] = {
    part.__name__: part for part in (environment, imports, resume, web, graphs, memory)
}

if __name__ == "__main__":
    sys.exit(PARTS[sys.argv[1]](*sys.argv[2:]))
