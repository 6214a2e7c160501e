"""CORE's data, prompts and downloads, Hugging Face models as a peer to ours, and the contamination check.

Called by `nanochat.core_eval` and the evaluation scripts.
Start with `core_prompts.py`.
"""
