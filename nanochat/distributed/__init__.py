"""Collectives with time-outs that name what was waited for, checks across ranks, and signals.

Called by the trainer, the checkpoint code and everything else that several ranks do together.
Every function in `collectives.py` and `rank_checks.py` must be called by all ranks. Start with `collectives.py`.
"""
