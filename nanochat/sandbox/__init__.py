"""Runs Python that nobody has read, in a locked-in process. A trust boundary: standard library only.

Called by `nanochat.execution`, the only public entrance.
Start with `levels.py` (what is available here), then `child.py` (what runs inside). See dev/SANDBOX.md.
"""
