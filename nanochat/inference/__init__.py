"""Decoding: batched steps over a KV cache, sampling, tools, prefix cache, and the CPU's decode step in C.

Called by `nanochat.engine` (one call, one list of token ids) and `nanochat.serve` (many requests at once).
Start with `decoding.py`.
"""
