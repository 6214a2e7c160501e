"""Speed on a CPU: C kernels compiled on first use, and the fused operations built on them.

Called by the model, the loss, the optimizer and the decoder where the kernels apply; not without a compiler.
Optional: the plain PyTorch form of every operation stands beside its caller. Start with `fused.py`.
"""
