"""How a save becomes complete or does not exist: step folders with manifests, safetensors files, optimizer shards.

All ranks write a step into a hidden folder, its manifest last, and the folder gets its final name in one rename
(`folder.py`). So a rank or a machine may die at any moment: readers see a step whole or not at all, and the next save
deletes the rest. Every file is checked against the manifest when it is read (`manifest.py`); where the latest step is
damaged, the one before is used.

`nanochat/checkpoint_manager.py` defines what a checkpoint holds; `async_save.py` runs saves in the background; resuming
is `restore_trainer` in `nanochat/train/snapshot.py`. Start with `folder.py`.
"""
