"""The chunked head loss against torch's cross-entropy over full float64 logits."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import loss_head
from nanochat.loss_head import chunk_tokens, gpu_memory, head_logits, head_loss

N, C, V, CAP = 37, 8, 51, 15.0


def inputs(seed: int = 0, scale: float = 6.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (N, C) and weight (V, C) whose logits reach into the softcap's bend, targets with some ignored, weights."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(N, C, generator=g) * scale, torch.randn(V, C, generator=g)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[torch.rand(N, generator=g) < 0.3] = -1
    return x, weight, targets, torch.randn(N, generator=g)  # an advantage may be negative


def reference(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Each token's loss (N,), 0 where ignored, differentiable in float64."""
    logits = CAP * torch.tanh(x.double() @ weight.double().T / CAP)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


@pytest.mark.parametrize("chunk", [1, 7, N - 1, N, N + 5])
@pytest.mark.parametrize("ignored", [True, False])
def test_loss_and_gradients_match_full_logits(monkeypatch: pytest.MonkeyPatch, chunk: int, ignored: bool) -> None:
    monkeypatch.setattr(loss_head, "chunk_tokens", lambda *args: chunk)
    x, weight, targets, token_weights = inputs()
    targets = targets if ignored else targets.clamp_min(0)
    mine, theirs = ([t.clone().requires_grad_() for t in (x, weight)] for _ in range(2))
    total, losses = head_loss(*mine, targets, token_weights, CAP)
    wanted = reference(*theirs, targets)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not losses.requires_grad and losses.shape == (N,) and (losses[targets < 0] == 0).all()
    wanted_total = (wanted * token_weights).sum()
    torch.testing.assert_close(total.double(), wanted_total, rtol=1e-5, atol=1e-4)
    grads = torch.autograd.grad(total * 3, mine)  # a factor from outside, as a mean's, must arrive
    wanted_grads = torch.autograd.grad(wanted_total * 3, theirs)
    for grad, wanted_grad in zip(grads, wanted_grads):
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-4)


def test_without_weights_every_target_counts_once() -> None:
    x, weight, targets, _ = inputs(1)
    total, losses = head_loss(x, weight, targets, None, CAP)
    torch.testing.assert_close(total, losses.sum())
    torch.testing.assert_close(total.double(), reference(x, weight, targets).sum(), rtol=1e-5, atol=1e-4)


def test_weight_of_an_ignored_token_does_nothing() -> None:
    x, weight, targets, token_weights = inputs(2)
    loud = token_weights.clone()
    loud[targets < 0] = 1e9
    both = [head_loss(x, weight, targets, w, CAP) for w in (loud, token_weights)]
    torch.testing.assert_close(*both)


def test_multiplying_ignored_rows_by_zero_gives_the_same() -> None:
    """What other devices do instead of leaving the rows out."""
    x, weight, targets, token_weights = inputs(3)
    kept = (targets >= 0).float()
    x.requires_grad_(), weight.requires_grad_()
    total, _ = head_loss(x, weight, targets, token_weights, CAP)
    other, _ = loss_head._ChunkedHeadLoss.apply(x, weight, targets.clamp_min(0), token_weights * kept, CAP, 8)
    torch.testing.assert_close(total, other)
    torch.testing.assert_close(torch.autograd.grad(total, (x, weight)), torch.autograd.grad(other, (x, weight)))


def test_no_target_at_all_is_a_zero_with_zero_gradients() -> None:
    x, weight, _, _ = inputs()
    x.requires_grad_(), weight.requires_grad_()
    total, losses = head_loss(x, weight, torch.full((N,), -1), None, CAP)
    assert total.item() == 0 and (losses == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(total, (x, weight)))


def test_only_one_side_may_need_gradients() -> None:
    x, weight, targets, _ = inputs()
    both = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    wanted = torch.autograd.grad(head_loss(*both, targets, None, CAP)[0], both)
    alone = weight.clone().requires_grad_()
    (grad,) = torch.autograd.grad(head_loss(x, alone, targets, None, CAP)[0], alone)
    torch.testing.assert_close(grad, wanted[1])
    with torch.no_grad():
        total, _ = head_loss(*both, targets, None, CAP)
    assert not total.requires_grad
    torch.testing.assert_close(total.double(), reference(x, weight, targets).sum(), rtol=1e-5, atol=1e-4)


def test_bf16_activations_keep_fp32_losses_and_weight_gradients() -> None:
    x, weight, targets, _ = inputs(4, scale=1.0)
    half, full = x.bfloat16().requires_grad_(), weight.clone().requires_grad_()
    total, losses = head_loss(half, full, targets, None, CAP)
    assert losses.dtype == total.dtype == torch.float32
    exact_x, exact_w = half.detach().double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    wanted = reference(exact_x, exact_w, targets)
    torch.testing.assert_close(losses.double(), wanted, rtol=2e-2, atol=5e-2)
    dx, dw = torch.autograd.grad(total, (half, full))
    wanted_dx, wanted_dw = torch.autograd.grad(wanted.sum(), (exact_x, exact_w))
    assert dx.dtype == torch.bfloat16 and dw.dtype == torch.float32
    for grad, wanted_grad in ((dx, wanted_dx), (dw, wanted_dw)):
        assert (grad.double() - wanted_grad).norm() < 2e-2 * wanted_grad.norm()


def test_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    monkeypatch.setattr(loss_head, "chunk_tokens", lambda *args: 16)
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 4, generator=g, requires_grad=True) for rows in (1000, 256))
    with Largest() as seen:
        head_loss(x, weight, torch.randint(0, 256, (1000,), generator=g), None, CAP)[0].backward()
    assert seen.elements <= 16 * 256


def test_chunks_are_bounded_and_never_empty() -> None:
    for vocab in (64, 8192, 32768, 2**24):
        for memory in (None, 2.0**33, 2.0**37):
            assert chunk_tokens(vocab, memory) >= 64
    assert chunk_tokens(32768) * 32768 <= 2**24


def test_the_chunk_is_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=12 * 2**30))
    assert gpu_memory(torch.device("cuda")) == 12 * 2**30 and gpu_memory(torch.device("cpu")) is None


def test_logits_are_fp32_and_bounded() -> None:
    x, weight, _, _ = inputs(5, scale=1e3)
    logits = head_logits(x.bfloat16(), weight, CAP)
    assert logits.dtype == torch.float32 and logits.abs().max() <= CAP and logits.abs().max() > 14.9
    small = head_logits(x / 1e6, weight, CAP)  # the cap is invisible near zero
    torch.testing.assert_close(small, x @ weight.T / 1e6, rtol=1e-3, atol=1e-6)
