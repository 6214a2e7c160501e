"""A model's weights for decoding: in the dtype they are multiplied in, packed for the C decoder, optionally in int8."""

import copy
import threading
from typing import Any

import torch

from nanochat.common import UserError, warn
from nanochat.common.fast_path import warn_once
from nanochat.gpt import GPT
from nanochat.inference import cpu_decoder
from nanochat.inference.cpu_decoder import CpuDecoder
from nanochat.inference.graph_decoder import GraphDecoder
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.packed_weights import PackedWeights


class DecodingWeights:
    """Decoding copies of a model's weights, renewed when an optimizer has changed them.

    Training keeps fp32 weights and casts them for every product. A decode step has so few products per weight that the
    cast would cost more than they do, so it is done once, ahead; the numbers are the same.
    """

    def __init__(self, model: GPT, int8: bool = False) -> None:
        """`int8`: quantize to eight bits; the model of current() then has the dequantized values."""
        if int8 and model.device.type != "cpu":
            raise UserError("int8 weights are for decoding on a CPU; leave int8 out")
        self.model, self.int8 = model, int8
        needs_cast = any(p.dtype != _decoding_dtype(p, model.compute_dtype) for p in model.parameters())
        with torch.inference_mode(False):  # else they could not be renewed outside of it
            self._copy = cast_copy(model) if int8 or needs_cast else model
            self.packed = PackedWeights(self._copy, int8) if int8 or cpu_decoder.supported(model, int8) else None
        if int8 and not cpu_decoder.supported(model, int8):
            warn("int8 saves no memory here: without a C compiler, or for this model, the C decoder is not used")
        if self.packed is None and isinstance(model, GPT) and cpu_decoder.differences(model, int8):
            check_cached_decoding(self._copy)
        self._versions = self._current_versions()
        self._lock = threading.Lock()

    def current(self) -> GPT:
        """The model with its current weights: the original where nothing needs casting. Renews `packed` too."""
        with self._lock:
            if (versions := self._current_versions()) != self._versions:
                with torch.inference_mode(False), torch.no_grad():
                    if self._copy is not self.model:
                        for cast, original in zip(self._copy.parameters(), self.model.parameters()):
                            cast.copy_(original)
                    if self.packed:
                        self.packed.follow(self._copy)
                self._versions = versions
            return self._copy

    def decoder(self, cache: KVCache) -> CpuDecoder | GraphDecoder | None:
        """What decodes one token per row of `cache` faster than the model itself does, where there is such a thing."""
        return GraphDecoder(self._copy, cache) if self.model.device.type == "cuda" else self.cpu_decoder(cache)

    def cpu_decoder(self, cache: KVCache) -> CpuDecoder | None:
        """The C decoder of the weights on `cache`; None where decoding runs in PyTorch."""
        usable = cpu_decoder.supported(self.model, self.int8)
        return CpuDecoder(self._copy, cache, self.packed) if usable and self.packed else None

    def _current_versions(self) -> list[tuple[int, int]]:
        """Address and write count of each parameter. Writes to `p.data` and to inference tensors are not counted: they
        need a new DecodingWeights."""
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.model.parameters()]


@torch.inference_mode()
def check_cached_decoding(model: GPT) -> None:
    """Compare decoding with a cache with the whole sequence at once, and warn if they differ.

    For models whose code was changed: a layer that looks at other positions has to find them in the cache.
    """
    T = min(8, model.config.sequence_len)
    tokens = torch.arange(T, device=model.device)[None] % model.config.vocab_size
    cache = KVCache(model.config, 1, T, model.device, model.compute_dtype)
    pieces = [tokens[:, : T // 2], *tokens[:, T // 2 :].split(1, dim=1)]
    cached = torch.cat([model(piece, kv_cache=cache) for piece in pieces], dim=1)
    whole = model(tokens)
    error = float((cached - whole).norm() / whole.norm().clamp_min(1e-9))
    if not error < (1e-3 if model.compute_dtype == torch.float32 else 0.1):
        warn_once(
            f"decoding is wrong for this changed model: token by token its logits differ by {error:.0%} from those of "
            "the whole sequence; what looks at other positions must keep them in the cache (inference/kv_cache.py)"
        )


def cast_copy(model: GPT) -> GPT:
    """A copy with its matrices in the model's compute dtype, for inference only. Modules are copied as they are, of
    whatever class. Rotary tables, cast where they are used, are cast here for GPUs, and shared on CPUs, where C takes
    float32."""
    on_cpu = model.device.type == "cpu"
    memo: dict[int, Any] = {id(b): b if on_cpu else b.to(model.compute_dtype) for b in model.buffers()}
    for p in model.parameters():
        cast = p.detach().to(_decoding_dtype(p, model.compute_dtype), copy=True)
        memo[id(p)] = torch.nn.Parameter(cast, requires_grad=False)
    return copy.deepcopy(model, memo).eval()


def _decoding_dtype(parameter: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """Scalars keep their dtype: they multiply in fp32."""
    return dtype if parameter.dim() > 1 else parameter.dtype
