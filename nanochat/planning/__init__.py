"""Plans before a run: memory, time and cost, and the scaling law that forecasts losses.

Called by `scripts/plan.py`, `scripts/fit_law.py` and the training scripts.
Start with `planner.py`; `law.py` fits and reads `law.json`.
"""
