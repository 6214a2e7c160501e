"""Decoding: requests, the running batch over a KV cache, sampling, tools, prefix cache, and a CPU decode step in C.

`nanochat.engine` runs requests from one caller, `nanochat.serve` those of many clients. Start with `request.py`, then
`decoding.py`.
"""
