"""Runs untrusted Python in a restricted process. A trust boundary: standard library only.

Called by `nanochat.execution`, the only public interface. Start with `levels.py` (which levels this machine has), then
`child.py` (the supervisor inside). See dev/SANDBOX.md.
"""
