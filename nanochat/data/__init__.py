"""Where documents come from and how they become rows of tokens.

Called by `nanochat.dataset` (opens a corpus) and `nanochat.dataloader` (makes batches of it).
Start with `corpus.py`, then `document_order.py` (shuffling) and `row_streams.py` (documents to rows).
"""
