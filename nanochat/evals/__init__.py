"""CORE's data, prompts and downloads, Hugging Face models behind the same interface, and the contamination check.

Called by `nanochat.core_eval` and the evaluation scripts. Start with `core_prompts.py`.
"""
