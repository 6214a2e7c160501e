"""How a save becomes complete or does not exist: folders with manifests, safetensors files, optimizer shards.

Called by `nanochat.checkpoint_manager`, which defines what a checkpoint holds.
Start with `folder.py`.
"""
