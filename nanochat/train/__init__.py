"""A training run: everything around the loop in `nanochat.trainer`.

run.py             folder, lock, resuming, exit codes: the way from a trainer to a finished run. Start here.
commands.py        the commands shown to continue a run, or to train a finished one on
config.py          the flags of every training stage, which of them a resumed run may change, and the flags of data
build.py           from a model to its step: optimizer, rows per micro-batch
compiling.py       the loss compiled, where torch.compile works
step.py            one optimizer step: micro-batches, gradients, update
schedules.py       learning rate, momentum and weight decay over the run
progress.py        counters and averages that checkpoints keep
snapshot.py        copying the state for a save, restoring it
hooks.py           evaluations and samples during training
metrics.py         metrics.jsonl, the console line, wandb, tensorboard
timing.py, deadline.py, pace.py    how long steps take, and ending on time
busy_cores.py      whether other programs take cores from the run
device_batch.py    how many rows fit on a GPU
pretraining.py, finetuning.py, reinforcement.py    flags, plan and step of each stage
starting_model.py  the earlier model that a stage starts from
"""
