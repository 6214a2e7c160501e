"""Speed on a CPU: C kernels compiled on first use, and the fused operations built on them.

Optional: the plain PyTorch form of every operation stands beside its caller, and runs where C does not apply. Start
with `fused.py` (when a C form is used), then `functions.py` (the forms).
"""
