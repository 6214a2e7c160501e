"""How documents become rows of tokens.

Called by `nanochat.dataset` (opens a corpus) and `nanochat.dataloader` (makes batches of it). Start with `corpus.py`;
nanochat/dataset.py lists the modules in the order of the data.
"""
