"""Bits per byte against a hand count."""

import math

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb

MODEL = GPT.create(GPTConfig(sequence_len=8, vocab_size=10, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))


def test_by_hand_with_masks_and_special_tokens() -> None:
    sizes = torch.tensor([1, 2, 3, 1, 1, 1, 4, 1, 1, 0])  # token 9 is special
    inputs = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    targets = torch.tensor([[2, -1, 9, 6], [0, 1, -1, 2]])
    logprobs = torch.log_softmax(MODEL(inputs).double(), -1)
    nats, count = 0.0, 0
    for row in range(2):
        for t in range(4):
            target = int(targets[row, t])
            if target >= 0 and sizes[target] > 0:
                nats -= logprobs[row, t, target].item()
                count += int(sizes[target])
    bpb = evaluate_bpb(MODEL, [(inputs, targets)], 1, sizes)
    assert bpb == pytest.approx(nats / math.log(2) / count, rel=1e-5)


def test_takes_at_most_steps_batches_and_splitting_changes_nothing() -> None:
    sizes = torch.ones(10)
    data = torch.randint(10, (6, 9), generator=torch.Generator().manual_seed(0))
    whole = evaluate_bpb(MODEL, [(data[:, :-1], data[:, 1:])], 1, sizes)
    parts = evaluate_bpb(MODEL, [(row[None, :-1], row[None, 1:]) for row in data], 99, sizes)
    assert whole == pytest.approx(parts, rel=1e-5)
    assert evaluate_bpb(MODEL, [(data[:1, :-1], data[:1, 1:])] * 5, 1, sizes) != pytest.approx(whole, rel=1e-6)


def test_no_bytes_is_infinite_and_the_mode_is_restored() -> None:
    MODEL.train()
    nothing = torch.full((1, 4), -1)
    assert evaluate_bpb(MODEL, [(torch.zeros(1, 4, dtype=torch.long), nothing)], 1, torch.ones(10)) == math.inf
    assert MODEL.training
