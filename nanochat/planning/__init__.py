"""Planning a pretraining run: memory, time, cost, and the scaling law that forecasts its loss.

Called by `scripts/plan.py`, `scripts/fit_law.py` and the training scripts. Start with `planner.py`, which combines
`hardware.py`, `memory.py` and `law.py`. A scaling study fits `law.json` with `fit.py`, finds the
best sizes with `isoflop.py` and draws them with `study_plots.py`.
"""
