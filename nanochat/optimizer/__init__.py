"""The optimizer's parts: which parameter gets which rule, and the rules themselves.

Called by `nanochat.optim` (MuonAdamW). Start with `update_rules.py`.
"""
