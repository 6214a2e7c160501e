"""The loss as torch.compile makes it, or plain where that does not work."""

import warnings

import torch

from nanochat.common import UserError, is_out_of_memory, warn
from nanochat.device.compiler import cause, why_not_compiling
from nanochat.flash_attention import prepare
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.train.step import LossFunction


def compiled_loss(model: GPT, mode: str, runtime: Runtime) -> LossFunction:
    """model.loss, compiled if `mode` is "on", or "auto" on a GPU where torch.compile works.

    Collective: all ranks compile or none. Raises UserError with "on" where it does not work.
    """
    if mode == "off" or (mode == "auto" and runtime.device.type != "cuda"):
        return model.loss
    reasons = runtime.all_gather(why_not_compiling(runtime.device), "trying torch.compile")
    if reason := next(filter(None, reasons), ""):
        if mode == "on":
            raise UserError(f"--compile=on: {reason}")
        runtime.warn0(f"training without torch.compile, slower: {reason}")
        return model.loss
    # float32 means float32 (runtime.py); in bfloat16, TF32 would change nothing.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    prepare(model.config, runtime.device, model.compute_dtype)
    return CompiledLoss(model, required=mode == "on")


class CompiledLoss:
    """model.loss compiled, for each shape at its first call.

    If a compilation fails, one warning is printed and the plain loss is used from then on, by this rank alone: it
    computes the same, but for rounding, and calls no collective. With `required` it is a UserError.
    """

    def __init__(self, model: GPT, required: bool) -> None:
        self.plain, self.required = model.loss, required
        # Each shape counts: micro-batches, a step's last one, those that the search for a device batch tries. Past the
        # limit, 8 by default, further shapes would run uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.compiled = torch.compile(model.loss, dynamic=False)
        self.failed = False

    def __call__(
        self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.failed:
            return self.plain(inputs, targets, weights)
        try:
            # The backward pass is compiled here too, not when it first runs.
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                return self.compiled(inputs, targets, weights)
        except torch._dynamo.exc.TorchDynamoException as error:
            if is_out_of_memory(error):  # a smaller batch may fit
                raise
            reason = f"torch.compile failed ({cause(error)})"
            if self.required:
                raise UserError(f"--compile=on: {reason}; leave the flag out, or report it to PyTorch") from error
            warn(f"{reason}: training without it, slower")
            self.failed = True
            return self.plain(inputs, targets, weights)
