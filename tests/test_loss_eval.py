"""Bits per byte against a hand count."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from ranks import run_ranks

from nanochat.common import BadShard, UserError
from nanochat.data.corpus import Document
from nanochat.distributed.rank_checks import DataError
from nanochat.distributed.signals import StopRequested, raise_if_stop_requested, stop_when
from nanochat.evals.bits_per_byte import bpb_by_source, measured_tokens, rows_once
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.runtime import Runtime

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


def broken_on_rank_1(runtime: Runtime) -> str:
    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
        if runtime.rank == 1:
            raise UserError("val.parquet is damaged")
        yield torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)

    with pytest.raises(DataError) as error:
        evaluate_bpb(MODEL, batches(), 2, torch.ones(10), runtime)
    assert MODEL.training
    return str(error.value)


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_one_rank_cannot_read_all_are_told(world_size: int) -> None:
    assert run_ranks(world_size, broken_on_rank_1, timeout=20) == ["val.parquet is damaged"] * world_size


def asked_on_rank_1(runtime: Runtime) -> str:
    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
        with stop_when(lambda: runtime.rank == 1):
            raise_if_stop_requested()

    with pytest.raises(StopRequested) as stop:
        evaluate_bpb(MODEL, batches(), 2, torch.ones(10), runtime)
    return str(stop.value)


def test_what_one_rank_does_not_wait_for_all_leave() -> None:
    assert run_ranks(2, asked_on_rank_1, timeout=20) == ["stop requested"] * 2


def test_takes_at_most_steps_batches_and_splitting_changes_nothing() -> None:
    sizes = torch.ones(10)
    data = torch.randint(10, (6, 9), generator=torch.Generator().manual_seed(0))
    whole = evaluate_bpb(MODEL, [(data[:, :-1], data[:, 1:])], 1, sizes)
    parts = evaluate_bpb(MODEL, [(row[None, :-1], row[None, 1:]) for row in data], 99, sizes)
    assert whole == pytest.approx(parts, rel=1e-5)
    batches = iter([(data[:1, :-1], data[:1, 1:])] * 5)
    assert evaluate_bpb(MODEL, batches, 1, sizes) != pytest.approx(whole, rel=1e-6)
    assert len(list(batches)) == 4, "none is taken that is not measured"


def test_measured_tokens_are_whole_steps() -> None:
    assert [measured_tokens(n, 2048) for n in (1, 1000, 200_000)] == [65_536, 65_536, 196_608]
    assert [measured_tokens(n, 16, rows=8) for n in (1, 128, 300)] == [128, 128, 256]


def test_no_bytes_is_infinite_and_the_mode_is_restored() -> None:
    MODEL.train()
    nothing = torch.full((1, 4), -1)
    assert evaluate_bpb(MODEL, [(torch.zeros(1, 4, dtype=torch.long), nothing)], 1, torch.ones(10)) == math.inf
    assert MODEL.training


class Sources:
    """Three sources, one document each. On rank 1 `missing` is left out, or reading fails there."""

    name = fingerprint = "three sources"

    def __init__(self, runtime: Runtime, missing: str = "", fails: bool = False) -> None:
        self.missing, self.fails = (missing, fails) if runtime.rank == 1 else ("", False)

    def iter_documents(self, split: str) -> Iterator[Document]:
        for text, source in (("abcd" * 7, "a"), ("xyz" * 9, "b"), ("hello there " * 2, "c")):
            if source != self.missing:
                yield Document(text, source)
        if self.fails:
            raise BadShard("c.parquet is damaged", "c.parquet")


class Bytes:
    token_bytes: ClassVar[list[int]] = [1] * 256 + [0] * 44

    def encode(self, text: str, append: int) -> list[int]:
        return [*text.encode(), append]

    def get_bos_token_id(self) -> int:
        return 256

    def get_vocab_size(self) -> int:
        return 300


def of_sources() -> GPT:
    model = GPT.create(GPTConfig(sequence_len=24, vocab_size=300, n_layer=1, n_head=2, n_kv_head=2, n_embd=16), seed=1)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


def by_source(runtime: Runtime, *settings: Any, tokens: int = 24) -> list[dict[str, Any]]:
    corpus = Sources(runtime, *settings)
    return bpb_by_source(of_sources(), corpus, Bytes(), runtime, split="val", tokens=tokens)  # type: ignore[arg-type]


def by_source_fails(runtime: Runtime) -> str:
    with pytest.raises(DataError) as error:
        by_source(runtime, "", True)
    return str(error.value)


def test_bits_per_byte_by_source_do_not_depend_on_the_processes() -> None:
    """Against the loss of each source's documents, which all fit in one row, scored by hand."""
    whole, model = Runtime.create("cpu"), of_sources()
    alone = by_source(whole)
    assert [row["source"] for row in alone] == ["a", "b", "c"]
    for row, document in zip(alone, Sources(whole).iter_documents("val")):
        ids = torch.tensor([[256, *document.text.encode()[:24]]])
        expected = model(ids[:, :-1], ids[:, 1:]).item() / math.log(2)
        assert row["bits per byte"] == pytest.approx(expected, rel=1e-4) and row["documents"] == 1
    for rows in run_ranks(2, by_source, timeout=20):
        for row, one in zip(rows, alone, strict=True):
            assert row == one | {"bits per byte": pytest.approx(one["bits per byte"])}


def test_a_source_is_measured_once() -> None:
    """However many tokens are asked for: by hand, on the rows that its text fills."""
    whole, model = Runtime.create("cpu"), of_sources()
    for row, document in zip(by_source(whole, tokens=1000), Sources(whole).iter_documents("val")):
        ids, nats = list(document.text.encode()), 0.0
        for part in (ids[:24], ids[24:]):
            inputs, targets = torch.tensor([[256, *part[:-1]]]), torch.tensor([part])
            nats += model(inputs, targets, loss_reduction="sum").item() if part else 0.0
        assert row["bits per byte"] == pytest.approx(nats / math.log(2) / len(ids), rel=1e-4)


def test_rows_have_each_document_once() -> None:
    documents = [Document("abcde", ""), Document("xyz", "")]
    wanted = [*b"abcde", 256, *b"xyz", 256]
    for tokens in (100, 6):
        rows = [(x[0].tolist(), y[0].tolist()) for x, y in rows_once(documents, Bytes(), 4, tokens)]  # type: ignore[arg-type]
        assert [id for _, targets in rows for id in targets] == wanted[:tokens]
        assert all(inputs == [256, *targets[:-1]] and len(inputs) <= 4 for inputs, targets in rows)


def test_sources_that_one_rank_cannot_read_stop_all_or_are_left_out_by_all() -> None:
    assert run_ranks(2, by_source_fails, timeout=20) == ["c.parquet is damaged"] * 2
    assert [[row["source"] for row in rows] for rows in run_ranks(2, by_source, "a", timeout=20)] == [["b", "c"]] * 2
