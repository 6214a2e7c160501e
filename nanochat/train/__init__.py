"""What surrounds the training loop: schedules, deadline, progress, and the run's folder, lock and logs.

Called by `nanochat.trainer` and the training scripts.
Start with `schedules.py` for the numbers and `session.py` for a run.
"""
