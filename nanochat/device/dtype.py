"""Which dtype a device computes fast in."""

import torch

from nanochat.common import UserError
from nanochat.device.cpu import cpu_flags

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_dtype(device_type: str, requested: str = "") -> tuple[torch.dtype, str]:
    """The dtype of activations and the reason for it: bfloat16 where the hardware multiplies it fast, float16 on GPUs
    that are fast in float16 only, else float32."""
    if requested:
        if requested not in DTYPES:
            raise UserError(f"NANOCHAT_DTYPE must be one of {', '.join(DTYPES)}, got {requested!r}")
        plain = requested == "float32" and device_type == "cuda"
        return DTYPES[requested], "as requested, without TF32" if plain else "as requested"
    if device_type == "cuda":
        if torch.version.hip:  # its capability counts AMD's generations
            return torch.bfloat16, "AMD GPU, untested"
        capability = torch.cuda.get_device_capability()
        if capability >= (8, 0):
            return torch.bfloat16, "CUDA SM80 or newer"
        if capability >= (7, 0):  # Volta and Turing, the first with tensor cores
            return torch.float16, "this GPU has no bfloat16; the loss is scaled"
        return torch.float32, "this GPU has no tensor cores"
    if device_type == "cpu":
        for flag, feature in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
            if flag in cpu_flags():
                return torch.bfloat16, f"CPU has {feature}"
        return torch.float32, "CPU has no AMX or AVX512-BF16"
    # On Apple GPUs bfloat16 needs macOS 14; NANOCHAT_DTYPE=bfloat16 requests it.
    return torch.float32, "works on every Apple GPU"
