"""How documents become rows of tokens. nanochat/dataset.py lists the modules in the order of the data.

Called by `nanochat.dataset` (opens a corpus) and `nanochat.dataloader` (makes batches of it).
"""
