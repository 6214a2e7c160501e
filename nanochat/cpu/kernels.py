"""Compile kernels.c, attention.c, decode.c and sampling.c with the machine's C compiler, once, and call them.

Without a compiler everything still works, slower, in PyTorch.
"""

import contextlib
import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from nanochat.common import atomic_path, get_kernels_dir, is_writable, kernels_enabled, warn
from nanochat.device.cpu import cpu_flags

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.c", "attention.c", "decode.c", "sampling.c"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("kernels.h", "vectors.h"))
# With contraction the compiler may round a * b + c once in one loop and twice in another (see vectors.h).
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC")
DTYPES = (torch.float32, torch.bfloat16)


def usable(*tensors: torch.Tensor) -> bool:
    """Whether C can take these tensors: plain CPU tensors of DTYPES, not while torch.compile traces."""
    if torch.compiler.is_compiling() or any(x.device.type != "cpu" or x.dtype not in DTYPES for x in tensors):
        return False
    return all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors) and library() is not None


def in_use(device: torch.device) -> bool:
    """Whether a model on that device uses the kernels."""
    return device.type == "cpu" and library() is not None


def call(name: str, *arguments: Any) -> None:
    """Call the C function `name`. Contiguous tensors are passed as addresses, floats as float, ints as long."""
    kernel = getattr(library(), name)
    kernel.restype = None
    kernel(*(_as_c(argument) for argument in arguments))


def _as_c(value: Any) -> Any:
    kind = type(value)  # isinstance of a tensor is slow, and a step calls this hundreds of times
    if kind is int or kind is bool:
        return ctypes.c_long(value)
    if kind is float:
        return ctypes.c_float(value)
    assert value.is_contiguous()
    return ctypes.c_void_p(value.data_ptr())


@functools.cache
def wide_product() -> Any:
    """MKL's cblas_gemm_bf16bf16f32: factors in bfloat16, sums in float32, which PyTorch links and has no operation for.

    None on CPUs without AMX, where it was not measured, where PyTorch comes without MKL, and without the C kernels, as
    only their forms call it.
    """
    with contextlib.suppress(OSError, AttributeError):
        if kernels_enabled() and "amx_bf16" in cpu_flags():
            return ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")).cblas_gemm_bf16bf16f32
    return None


def add_transposed_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, keep: float = 1.0) -> None:
    """total (M, K) = keep * total + a.T @ b in float32, of contiguous a (N, M) and b (N, K) in bfloat16; by MKL."""
    (N, M), K = a.shape, b.size(1)
    row_major, plain, transposed = 101, 111, 112  # from mkl_cblas.h
    sizes = (M, K, N, ctypes.c_float(1.0), _as_c(a), M, _as_c(b), K, ctypes.c_float(keep), _as_c(total), K)
    wide_product()(row_major, transposed, plain, *sizes)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, built first if they are not on disk; None if that fails."""
    if not kernels_enabled():
        return None
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    try:
        path = get_kernels_dir() / f"{build_key()}.so"
        if not path.exists():
            if compiler is None:
                warn("no C compiler found: training on this CPU will be slower (install gcc or clang)")
                return None
            build(compiler, path)
        library = ctypes.CDLL(str(path))
        library.decode_step.restype = library.draw_rows.restype = None
        library.tiles_usable.restype = ctypes.c_long
        return library
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or b""
        why = next((line for line in said.decode(errors="replace").splitlines() if "error" in line), str(error))
        fix = "" if is_writable(get_kernels_dir().parent) else "; set NANOCHAT_KERNELS_DIR to a folder that is writable"
        warn(f"the CPU kernels cannot be built or loaded ({why}): training and decoding will be slower{fix}")
        return None


def build_key() -> str:
    """Hash of the sources, flags and this CPU's features: a base folder may move to a machine with another CPU."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*HEADERS, *SOURCES)))
    digest.update(" ".join([*FLAGS, platform.platform(), platform.machine(), *sorted(cpu_flags())]).encode())
    return digest.hexdigest()[:16]


def build(compiler: str, path: Path) -> None:
    """Compile to `path`, atomically, with OpenMP if the compiler has it; it then uses PyTorch's threads."""
    with atomic_path(path) as temporary:
        command = [compiler, *FLAGS, "-o", str(temporary), *map(str, SOURCES), "-lm"]
        if subprocess.run([*command, "-fopenmp"], capture_output=True).returncode:
            subprocess.run(command, capture_output=True, check=True)
