"""The large matrices of a model in the memory layout of the C decoder (decode.c), in the model's dtype or in int8.

int8 halves the bytes read per token compared with bfloat16, for a little accuracy: each row of a matrix is divided by
its largest absolute value over 127 and rounded (symmetric, one scale per output). They are multiplied by activations of
16 bits, as integers (decode.c: quantize). Embeddings and gates are not packed: a token reads one row of them.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import nn

from nanochat.cpu import kernels
from nanochat.gpt import GPT


def block_outputs() -> int:
    """Outputs per block: the number of floats in a vector of this CPU."""
    return _constant("block_outputs", 16)


def adjacent_inputs(dtype: torch.dtype) -> int:
    """Inputs of an output that lie together, as this CPU multiplies them at once."""
    return {torch.bfloat16: 2, torch.int8: _constant("int8_inputs", 4)}.get(dtype, 1)


def _constant(name: str, otherwise: int) -> int:
    library = kernels.library()
    return ctypes.c_int.in_dll(library, name).value if library else otherwise


class PackedWeights:
    """Copies of the large matrices of a model."""

    def __init__(self, model: GPT, int8: bool = False) -> None:
        """`int8` also rounds the model's own matrices, see follow."""
        self.int8 = int8
        self._of: dict[nn.Module, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.follow(model)

    @torch.no_grad()
    def follow(self, model: GPT) -> None:
        """Pack the current weights into the same memory. In int8, also set the model's own weights to the dequantized
        values, so that long prompts, which run in PyTorch, agree with what is decoded."""
        for linear in matrices(model):
            weight, scale = quantize(linear.weight) if self.int8 else (linear.weight.detach(), None)
            if scale is not None:
                linear.weight.copy_(weight * scale[:, None])
                scale = F.pad(scale, (0, -len(scale) % block_outputs()))
            if linear not in self._of:
                self._of[linear] = pack(weight), scale
                continue
            packed, known_scale = self._of[linear]
            packed.copy_(pack(weight))
            if known_scale is not None and scale is not None:
                known_scale.copy_(scale)

    def of(self, linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(packed weight, scale (M,) fp32 if int8, M padded to whole blocks) of a linear layer."""
        return self._of[linear]


def matrices(model: GPT) -> list[nn.Linear]:
    """The linear layers that are read whole for every token: all but the gates and the n-grams'."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [m for name, m in layers if not name.endswith(("ve_gate", "smear_gate", "ngram_proj"))]


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (M, K) -> (int8 (M, K), scale (M,) fp32); a row of zeros stays zero."""
    scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127  # (M,)
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def pack(weight: torch.Tensor) -> torch.Tensor:
    """weight (M, K) -> (blocks, K / P, outputs, P): P inputs of each output are adjacent."""
    together, outputs = adjacent_inputs(weight.dtype), block_outputs()
    M, K = weight.shape
    weight = F.pad(weight, (0, 0, 0, -M % outputs))
    return weight.view(-1, outputs, K // together, together).permute(0, 2, 1, 3).contiguous()
