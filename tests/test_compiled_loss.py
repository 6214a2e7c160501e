"""What torch.compile makes of the training loss, seen on a CPU: one graph, right gradients, no graph more than needed.

Not Inductor's kernels: those need the device (test_on_gpu.py).
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stubs import stir
from toy_training import CPU, make_trainer

from nanochat import flash_attention
from nanochat.gpt import GPT, GPTConfig
from nanochat.train.compiling import compiled_loss

FORMS = {"published": GPTConfig, "later": GPTConfig.later, "small": GPTConfig.small, "plain": GPTConfig.plain}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler about itself


class Compiler:
    """Stands in for Inductor: runs the graphs that it would get as they are, and keeps their names."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []  # names of what each calls
        self.splits = True  # into a forward and a backward graph, as Inductor does
        self.saved: list[torch.Tensor] = []  # what the forward pass of the last graph makes for the backward pass

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from functorch.compile import nop
        from torch._dynamo.backends.common import aot_autograd

        self.graphs.append([getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes])
        if not self.splits:
            return graph.forward
        return aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=self.partition)(graph, inputs)

    def partition(self, graph: Any, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        from functorch.compile import min_cut_rematerialization_partition

        parts = min_cut_rematerialization_partition(graph, inputs, num_fwd_outputs=num_fwd_outputs, **options)
        (outputs,) = (node.args[0] for node in parts[0].graph.nodes if node.op == "output")
        made = [node.meta["val"] for node in outputs[num_fwd_outputs:] if node.op != "placeholder"]
        self.saved = [value for value in made if isinstance(value, torch.Tensor)]
        return parts


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler, fullgraph=True))
    monkeypatch.setattr("nanochat.train.compiling.why_not_compiling", lambda device: "")
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *args: None)  # no gradient on CPUs
    monkeypatch.setattr(flash_attention, "chosen", {})
    monkeypatch.setattr(flash_attention, "block_masks", {})
    monkeypatch.setattr(flash_attention, "BACKENDS", flash_attention.BACKENDS.copy())
    torch._dynamo.reset()
    yield compiler
    torch._dynamo.reset()


def use(monkeypatch: pytest.MonkeyPatch, *backends: str) -> None:
    """Let the CPU have these attention backends in a compiled loss."""

    def candidates(device: torch.device, dtype: torch.dtype, compiling: bool) -> list[str]:
        return list(backends) if compiling else ["blocked"]

    monkeypatch.setattr(flash_attention, "candidates", candidates)


def loss_and_gradients(model: GPT, loss_fn: Any, *batch: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    total, losses = loss_fn(*batch)
    total.backward()
    return [total.detach(), losses, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


SIZES = {"sequence_len": 160, "vocab_size": 300, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}


@pytest.mark.parametrize(
    "form, backend", [("later", "flex"), ("small", "flex"), ("published", "sdpa"), ("plain", "blocked")]
)
def test_one_graph_with_the_plain_loss_and_gradients(
    form: str, backend: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each backend of attention is traced; flex runs in its own slow form, with the masks that prepare made."""
    model = stir(GPT.create(FORMS[form](**SIZES, window_pattern="SL")), 0.1)
    tokens = torch.randint(300, (2, 161), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    targets[0, :50] = -1
    weights = torch.rand(2, 160, generator=torch.Generator().manual_seed(1))
    wanted = loss_and_gradients(model, model.loss, inputs, targets, weights)
    use(monkeypatch, backend)
    monkeypatch.setattr(flash_attention, "is_right", lambda *args: True)
    monkeypatch.setattr("nanochat.loss_head.chunk_tokens", lambda *args: 64)  # several chunks, as with real sizes
    loss_fn = compiled_loss(model, "on", CPU)
    found = loss_and_gradients(model, loss_fn, inputs, targets, weights)
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).norm() <= 1e-5 * y.norm() + 5e-6
    (called,) = compiler.graphs
    assert "argsort" not in called and called.count("flex_attention") == (
        2 if backend == "flex" else 0
    )  # argsort: a mask
    assert sorted(window for _, window, _ in flash_attention.block_masks) == ([128, 160] if backend == "flex" else [])
    # Gradients of the head and of its input are kept, not logits: those would take 320 x 300 numbers, or 64 x 300.
    shapes = [tuple(x.shape) for x in compiler.saved]
    assert shapes.count((300, 32)) == 1 and (320, 32) in shapes
    assert not any(shape[-1:] == (300,) for shape in shapes)


@pytest.mark.parametrize("weights", [False, True])
def test_a_run_compiles_its_two_shapes_once(weights: bool, compiler: Compiler) -> None:
    """6 rows in micro-batches of 4 and 2, steps with other rates, an evaluation between them."""
    compiler.splits = False
    trainer = make_trainer(device_batch_size=4, weights=weights)
    step = trainer.step
    step.loss_fn = compiled_loss(step.model, "on", CPU)
    for _ in range(3):
        step(trainer.loader.next_batch())
        step.model.eval()
        with torch.no_grad():
            step.model(torch.zeros(3, 9, dtype=torch.long))
        step.model.train()
    assert len(compiler.graphs) == 2


Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
blocked = flash_attention.BACKENDS["blocked"]


@torch.library.custom_op("nanochat_test::attend", mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    return blocked(q, k, v, window).contiguous()


@torch.library.custom_op("nanochat_test::attend_backward", mutates_args=())
def attend_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> Three:
    T, group, scale = q.size(1), q.size(2) // k.size(2), q.size(3) ** -0.5
    keys, values = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    ago = torch.arange(T)[:, None] - torch.arange(T)
    scores = torch.einsum("bthd,bshd->bhts", q, keys) * scale
    weights = scores.masked_fill((ago < 0) | (ago > window), -torch.inf).softmax(-1)
    by_weight = torch.einsum("bthd,bshd->bhts", grad, values)
    by_score = weights * (by_weight - (weights * by_weight).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("bhts,bshd->bthd", by_score, keys)
    dk, dv = (torch.einsum("bhts,bthd->bshd", *pair) for pair in ((by_score, q), (weights, grad)))
    return dq, *(x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv))  # type: ignore[return-value]


attend.register_fake(lambda q, k, v, window: torch.empty_like(q))
attend_backward.register_fake(lambda grad, q, k, v, window: tuple(map(torch.empty_like, (q, k, v))))


class Registered(torch.autograd.Function):
    """FlashAttention 3 as its packages register it: an autograd.Function around operators with a fake form."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.window = window
        return attend(q, k, v, window)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return *attend_backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.window), None


def registered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window_size: tuple[int, int]) -> Any:
    return Registered.apply(q, k, v, window_size[0])


@torch.compiler.disable
def opaque(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window_size: tuple[int, int]) -> Any:
    """As old builds of FlashAttention 3, which the compiler cannot look into."""
    return blocked(q, k, v, window_size[0])


@pytest.mark.parametrize("kernel, chosen", [(registered, "fa3"), (opaque, "sdpa")])
def test_fa3_is_used_if_the_loss_stays_one_graph(
    kernel: Any, chosen: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "fa3", "sdpa")
    monkeypatch.setitem(flash_attention.BACKENDS, "fa3", functools.partial(flash_attention._fa3, kernel=kernel))
    model = GPT.create(GPTConfig(**SIZES))
    loss_fn = compiled_loss(model, "on", CPU)
    compiler.graphs.clear()
    tokens = torch.zeros(2, 160, dtype=torch.long)
    loss_fn(tokens, tokens)[0].backward()
    assert list(flash_attention.chosen.values()) == [chosen] and len(compiler.graphs) == 1
    assert bool(capsys.readouterr().err) == (chosen != "fa3")


def test_more_shapes_than_the_compiler_allows(compiler: Compiler) -> None:
    """The search for a device batch may try ten sizes; past its limit the compiler would run the rest uncompiled."""
    compiler.splits = False
    model = GPT.create(GPTConfig(**SIZES | {"sequence_len": 8, "n_layer": 1}))
    with torch._dynamo.config.patch(recompile_limit=1):
        loss_fn = compiled_loss(model, "on", CPU)
        for rows in (1, 2, 3):
            loss_fn(torch.zeros(rows, 8, dtype=torch.long), torch.zeros(rows, 8, dtype=torch.long))
    assert len(compiler.graphs) == 3
