"""Collectives with time-outs, checks across ranks, and stop signals.

What happens when a rank dies or hangs:

1. The others wait in their next collective. On CPUs it ends after the process group's time-out (`--timeout`, 30
   minutes by default; at once where the system reports a closed connection) with `CollectiveFailed`, which names the
   waiting rank and the operation. Exit code 1. (`collectives.py`) On GPUs a rank waits inside a CUDA call, not in
   Python: after the time-out NCCL's watchdog thread aborts the process (SIGABRT). If the launcher notices a dead rank
   before, it kills the others.
2. `scripts/launch.py`, or torchrun, then starts all ranks again; they go on from the last complete checkpoint
   (`nanochat/checkpoint/`), which a save cut short by the failure cannot damage.

What one rank alone notices (unreadable data, a non-finite loss, weights that differ) it shares with all, so that all
stop after the same step with the same error (`rank_checks.py`). So with a stop signal: all finish the step, save, and
exit (`signals.py`).

Every function marked "Collective" must be called by every rank, in the same order. Start with `collectives.py`.
"""
