"""The pretraining loader: no token lost, exact resumption, and the same global batch for any world size."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from nanochat import tokenizer as tokenizer_module
from nanochat.checkpoint.tensor_file import read_tensors, tensor_chunks, write_file
from nanochat.common import UserError
from nanochat.data import document_order, row_streams
from nanochat.data.batches import Prefetcher, seeded_rng
from nanochat.data.corpus import Corpus, Document
from nanochat.data.document_order import Cursor, DocumentOrder, SegmentReader, split_text
from nanochat.data.pretokenized import token_path
from nanochat.data.row_streams import RowPacker
from nanochat.data.tokenize_shards import tokenize_shards
from nanochat.dataloader import PretrainLoader, tokenizing_distributed_data_loader_with_state_bos_bestfit
from nanochat.dataset import resolve_corpus
from nanochat.runtime import MAX_LOADER_THREADS, Runtime
from nanochat.tokenizer import RustBPETokenizer

BOS = 99_999


class FakeCorpus(Corpus):
    """Row groups of documents. Document "17:5" is the 5 tokens 1700 to 1704, so that each token tells its document."""

    def __init__(self, sizes, longest=40, seed=0):
        super().__init__("fake", f"{sizes} {longest} {seed}")
        rng, number = np.random.default_rng(seed), 0
        self.row_groups = []
        for size in sizes:
            lengths = rng.integers(1, longest + 1, size)
            self.row_groups.append([f"{number + i}:{length}" for i, length in enumerate(lengths)])
            number += size
        self.reads = Counter()

    def num_row_groups(self, split):
        return len(self.row_groups)

    def read(self, split, index):
        self.reads[index] += 1
        return [Document(text, "fake") for text in self.row_groups[index]]

    @property
    def texts(self):
        return [text for group in self.row_groups for text in group]


class FakeTokenizer:
    def encode(self, texts, num_threads=1):
        return [tokens_of(text) for text in texts]

    def get_bos_token_id(self):
        return BOS

    def get_vocab_size(self):
        return BOS + 1


def tokens_of(text):
    number, length = map(int, text.split(":"))
    return [100 * number + i for i in range(length)]


def make_loader(corpus=None, T=16, rows=8, **settings):
    return PretrainLoader(
        corpus or FakeCorpus([7, 0, 12, 3, 9]), FakeTokenizer(), sequence_len=T, rows_per_step=rows, **settings
    )


def take_rows(loader, steps):
    """The rows of T+1 of each step, (steps, N, T+1), having checked that targets are inputs moved by one."""
    rows = []
    for _ in range(steps):
        batch = loader.next_batch()
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.is_contiguous() and batch.targets.is_contiguous() and batch.weights is None
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        rows.append(torch.cat([batch.inputs, batch.targets[:, -1:]], 1).numpy())
    loader.close()
    return np.array(rows)


# ---------------------------------------------------------------------------------------------------
# What rows hold


def test_rows_are_full_and_start_with_bos():
    rows = take_rows(make_loader(T=16, rows=8), 20)
    assert rows.shape == (20, 8, 17)
    assert (rows[:, :, 0] == BOS).all()


def test_rows_hold_documents_as_they_are():
    """Between one bos and the next stands a run of one document's tokens, from its start or after a crop."""
    for row in take_rows(make_loader(), 20).reshape(-1, 17):
        starts = np.flatnonzero(row == BOS)
        for start, end in pairwise([*starts, len(row)]):
            run = row[start + 1 : end]
            assert (np.diff(run) == 1).all()
            assert len(set(run // 100)) <= 1


@pytest.mark.parametrize("T", [2, 3, 16, 100])
def test_no_token_is_lost_or_repeated(T):
    """In rows or in the pools: exactly the tokens of the documents read, as often as they were read."""
    corpus = FakeCorpus([7, 0, 12, 3, 9])
    order = DocumentOrder(SegmentReader(corpus), "train", num_streams=2, own_streams=2, seed=0)
    read, take = Counter(), order.take

    def spy(*args):
        texts, cursor = take(*args)
        for text in texts:
            read.update(tokens_of(text.text))
        return texts, cursor

    order.take = spy
    packer = RowPacker(order, FakeTokenizer(), [0, 1], sequence_len=T, rows_per_stream=3000 // T)
    seen = Counter()
    batch, _ = packer.next_step()
    rows = torch.cat([batch.inputs, batch.targets[:, -1:]], 1)
    seen.update(rows[rows != BOS].tolist())
    for state in packer.state():
        for segment in state.segments:
            seen.update(segment.ids.tolist())
    assert seen == read
    assert set(read) == {token for text in corpus.texts for token in tokens_of(text)}


def test_every_token_is_a_target():
    """An epoch and a bit: what was in an epoch's rows was also a target, crops and all."""
    corpus = FakeCorpus([40], longest=90)
    loader = make_loader(corpus, T=16, rows=2)
    targets = np.concatenate([loader.next_batch().targets.numpy().ravel() for _ in range(300)])
    loader.close()
    assert set(targets.tolist()) - {BOS} == {token for text in corpus.texts for token in tokens_of(text)}


def test_the_share_of_cropped_documents():
    """Documents of 10 tokens with bos in rows of 15: one whole, one cropped; its tail of 6 joins a whole one, ..."""
    corpus = FakeCorpus([0])
    corpus.row_groups = [[f"{i}:9" for i in range(50)]]
    loader = make_loader(corpus, T=14, rows=1)
    rows = take_rows(loader, 8).reshape(8, 15)
    stats = loader.stats()
    first, cropped = set(), set()
    for row in rows:
        starts = np.flatnonzero(row == BOS)
        for start, end in pairwise([*starts, len(row)]):
            run = row[start + 1 : end]
            if len(run) and run[0] % 100 == 0:
                first.add(run[0])
                cropped |= {run[0]} if len(run) < 9 else set()
    assert stats["documents"] == len(first)
    assert stats["cropped_share"] == pytest.approx(len(cropped) / len(first))
    assert 0 < stats["cropped_share"] < 1
    assert (stats["tokens"], stats["rows"]) == (8 * 14, 8)


# ---------------------------------------------------------------------------------------------------
# Order


def read_epochs(corpus, num_streams, epochs, **settings):
    """The documents of each epoch, by reading each stream until it is past them."""
    order = DocumentOrder(
        SegmentReader(corpus), "train", num_streams=num_streams, own_streams=num_streams, **{"seed": 0, **settings}
    )
    found = [[] for _ in range(epochs)]
    for stream in range(num_streams):
        cursor = Cursor()
        while cursor.epoch < epochs:
            texts, cursor = order.take(stream, cursor, 4, 10**6)
            assert len({text.epoch for text in texts}) == 1
            if texts[0].epoch < epochs:
                found[texts[0].epoch] += [text.text for text in texts]
    return found


@pytest.mark.parametrize("sizes", [[7, 0, 12, 3, 9], [1], [2, 0], [3] * 40, [50]])
@pytest.mark.parametrize("num_streams", [1, 4])
def test_every_epoch_is_the_whole_corpus_in_another_order(sizes, num_streams):
    """Not the tail of the first epoch again, and not one pass only."""
    corpus = FakeCorpus(sizes)
    epochs = read_epochs(corpus, num_streams, 3)
    assert all(sorted(epoch) == sorted(corpus.texts) for epoch in epochs)
    if sum(sizes) > 20:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_row_group_is_shared_by_many_streams():
    corpus = FakeCorpus([400])
    order = DocumentOrder(SegmentReader(corpus), "train", num_streams=8, own_streams=8, seed=0)
    firsts = [order.take(stream, Cursor(), 50, 10**6)[0] for stream in range(8)]
    assert all(len(texts) >= 40 for texts in firsts)
    assert len({text.text for texts in firsts for text in texts}) == sum(map(len, firsts))


def test_seeds():
    same, again, other, minus = (take_rows(make_loader(seed=seed), 4).tolist() for seed in (1, 1, 2, -1))
    assert same == again != other
    assert minus != same, "random.seed(-1) == random.seed(1) once mixed train and test"
    draws = {
        tuple(seeded_rng(*key).integers(0, 2**62, 2))
        for key in [(1, 0), (1, 0, 1), (1, 1, 0), (1, 0, 0, 1), (2, 0), (1, -1), (1, 2**32), (1, 1, 1), (0, 1)]
    }
    assert len(draws) == 9


# ---------------------------------------------------------------------------------------------------
# Any world size


@pytest.mark.parametrize("rows", [4, 12])
def test_the_global_batch_does_not_depend_on_the_world_size(rows):
    alone = take_rows(make_loader(rows=rows), 12)
    for world_size in (2, 3, 4):
        merged = np.zeros_like(alone)
        for rank in range(world_size):
            loader = make_loader(rows=rows, rank=rank, world_size=world_size)
            own = [j for j in range(rows) if j % loader.num_streams % world_size == rank]
            merged[:, own] = take_rows(loader, 12)
        np.testing.assert_array_equal(merged, alone)


def test_a_state_of_two_ranks_loads_in_one_three_or_four():
    whole = take_rows(make_loader(), 12)
    state = {}
    for rank in range(2):
        loader = make_loader(rank=rank, world_size=2)
        take_rows(loader, 5)
        state |= loader.state_dict()
    for world_size in (1, 3, 4):
        for rank in range(world_size):
            loader = make_loader(rank=rank, world_size=world_size)
            loader.load_state_dict(state)
            own = [j for j in range(8) if j % world_size == rank]
            np.testing.assert_array_equal(take_rows(loader, 7), whole[5:, own])


# ---------------------------------------------------------------------------------------------------
# Resuming


def test_a_restored_loader_goes_on_exactly_from_every_step():
    """Over three epochs and their borders; the saved state is that of the batch, not of the thread ahead of it."""
    loader = make_loader(FakeCorpus([7, 0, 5]), rows=2)
    states, rows, read_before = [loader.state_dict()], [], []
    while loader.stats()["epoch"] < 3:
        batch = loader.next_batch()
        rows.append(batch.inputs.numpy())
        read_before.append(batch.read_before)
        states.append(loader.state_dict())
    loader.close()
    assert 20 < len(rows) < 200
    for step in range(len(rows) - 3):
        restored = make_loader(FakeCorpus([7, 0, 5]), rows=2)
        restored.load_state_dict(states[step])
        assert_same_state(restored.state_dict(), states[step])
        for expected, again, state in zip(rows[step : step + 3], read_before[step:], states[step + 1 :]):
            batch = restored.next_batch()
            np.testing.assert_array_equal(batch.inputs.numpy(), expected)
            assert batch.read_before == again
            assert_same_state(restored.state_dict(), state)
        restored.close()


def test_rows_of_later_epochs_are_counted_as_read_before():
    """A small corpus is read ahead by an epoch, so rows of both come up for a while; they count as new."""
    corpus = FakeCorpus([40])
    loader = make_loader(corpus, rows=4)
    rows = sum(len(tokens_of(text)) + 1 for text in corpus.texts) / 16  # of an epoch
    counts = [loader.next_batch().read_before for _ in range(round(10 * rows / 4))]
    loader.close()
    assert counts[0] == 0 and counts[-1] == 4
    assert 0.9 * rows < sum(4 - count for count in counts) < 3 * rows


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype, key
        np.testing.assert_array_equal(value, other[key], err_msg=key)


def test_going_back_in_the_same_loader():
    loader = make_loader()
    take_rows(loader, 3)
    state = loader.state_dict()
    ahead = take_rows(loader, 5)
    loader.load_state_dict(state)
    np.testing.assert_array_equal(take_rows(loader, 5), ahead)


IN_ANOTHER_PROCESS = """
import sys, numpy as np
from pathlib import Path
from test_dataloader import make_loader, read_tensors
loader = make_loader()
loader.load_state_dict({name: tensor.numpy() for name, tensor in read_tensors(Path(sys.argv[1]))[0].items()})
print(np.array([loader.next_batch().inputs.numpy() for _ in range(5)]).tolist())
"""  # and no close(): the interpreter must end all the same


def test_a_new_process_goes_on_from_a_file_and_exits_cleanly(tmp_path):
    loader = make_loader()
    take_rows(loader, 4)
    write_file(tmp_path / "state.safetensors", tensor_chunks(loader.state_dict()))
    ahead = take_rows(loader, 5)[:, :, :-1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_ANOTHER_PROCESS, tmp_path / "state.safetensors"],
        cwd=__file__.rsplit("/", 1)[0],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{ahead.tolist()}\n"


@pytest.mark.parametrize("change", [{"seed": 1}, {"T": 17}, {"rows": 2}, {"corpus": FakeCorpus([8])}, {"split": "val"}])
def test_another_runs_state_is_refused_by_name(change):
    state = make_loader().state_dict()
    with pytest.raises(UserError, match=r"seed|sequence len|streams|data fingerprint"):
        make_loader(**change).load_state_dict(state)


def test_timing_does_not_matter():
    class Slow(FakeTokenizer):
        def encode(self, texts, num_threads=1):
            time.sleep(0.001 * (len(texts) % 5))
            return super().encode(texts)

    loader = PretrainLoader(FakeCorpus([7, 0, 12, 3, 9]), Slow(), sequence_len=16, rows_per_step=8)
    np.testing.assert_array_equal(take_rows(loader, 15), take_rows(make_loader(), 15))


# ---------------------------------------------------------------------------------------------------
# Odd corpora and odd sizes


@pytest.mark.parametrize("sizes", [[1], [0, 1, 0], [2], [5, 1], [0] * 30 + [3]])
def test_fewer_documents_than_streams(sizes):
    corpus = FakeCorpus(sizes)
    rows = take_rows(make_loader(corpus, T=12, rows=32), 12)
    assert (rows[:, :, 0] == BOS).all()
    assert set(rows.ravel().tolist()) == {BOS} | {token for text in corpus.texts for token in tokens_of(text)}


def test_one_document_longer_than_many_rows():
    corpus = FakeCorpus([0])
    corpus.row_groups = [["0:95"]]
    rows = take_rows(make_loader(corpus, T=8, rows=1), 40).reshape(40, 9)
    assert set(rows.ravel().tolist()) == {BOS, *range(95)}
    assert (rows == 0).sum() <= 40 / 12 + 3, "read ahead by no more than an epoch"


@pytest.mark.parametrize("sizes", [[], [0], [0] * 50])
def test_no_text_is_an_error_not_an_endless_search(sizes):
    corpus = FakeCorpus(sizes)
    corpus.row_groups = [["", ""] for _ in sizes]
    with pytest.raises(UserError, match=r"fake.*train"):
        make_loader(corpus).next_batch()


def test_sizes_that_do_not_go_together():
    for settings, pattern in (
        ({"T": 1}, "--max-seq-len"),
        ({"rows": 0}, "--total-batch-size"),
        ({"rows": 8, "num_streams": 3}, "3 .* 8 "),
        ({"rows": 9, "world_size": 2}, "--total-batch-size"),
    ):
        with pytest.raises(UserError, match=pattern):
            make_loader(**settings)
    assert make_loader(rows=24).num_streams == 8
    assert make_loader(rows=64, num_streams=16).num_streams == 16


def test_row_groups_are_released():
    """Row groups held for ever made memory grow. Each is read once an epoch and kept only while needed."""
    corpus = FakeCorpus([3] * 200)
    order = DocumentOrder(SegmentReader(corpus), "train", num_streams=2, own_streams=2, seed=0)
    cursors = [Cursor(), Cursor()]
    while cursors[0].epoch == 0:
        for stream in range(2):
            _, cursors[stream] = order.take(stream, cursors[stream], 1, 10**6)
            assert len(order._cache) <= 2
    assert max(corpus.reads.values()) <= 2  # the next epoch has begun


def test_kept_text_is_bounded(monkeypatch):
    monkeypatch.setattr(document_order, "CACHE_BYTES", 2000)
    order = DocumentOrder(SegmentReader(FakeCorpus([10] * 20)), "train", num_streams=8, own_streams=8, seed=0)
    for stream in range(8):
        order.take(stream, Cursor(), 100, 10**6)
        assert order._cached_bytes <= 2000
        assert order._cached_bytes == sum(size for size, _ in order._cache.values())


def test_the_pool_of_a_stream_is_bounded():
    loader = make_loader(FakeCorpus([300] * 3), T=64, rows=2)
    take_rows(loader, 20)
    max_tokens = row_streams.POOL_ROWS[1] * 65 + row_streams.TAKE_DOCUMENTS * 41
    assert all(
        len(state.segments) < 600 and sum(p.length for p in state.segments) < max_tokens for state in loader._state
    )


def test_very_long_texts_are_tokenised_in_segments(monkeypatch):
    monkeypatch.setattr(document_order, "MAX_SEGMENT_CHARS", 20)
    text = "Der Wind weht über das Land.\nEin Satz folgt, und " + "x" * 50 + " Ende"
    segments = split_text(text)
    assert "".join(segments) == text
    assert all(0 < len(segment) <= 20 for segment in segments)
    assert segments[0] == "Der Wind weht über "
    assert split_text("") == []
    assert split_text("short") == ["short"]


# ---------------------------------------------------------------------------------------------------
# The thread


def test_an_error_while_reading_reaches_the_caller():
    class Broken(FakeCorpus):
        def read(self, split, index):
            raise UserError("shard 7 is damaged")

    loader = make_loader(Broken([3] * 9))
    for _ in range(2):
        with pytest.raises(UserError, match="shard 7"):
            loader.next_batch()
    loader.close()


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "nanochat-prefetch"]


def test_the_thread_ends_with_close_and_with_the_loader():
    gc.collect()
    before = len(prefetch_threads())
    loader = make_loader()
    assert len(prefetch_threads()) == before, "the thread starts with the first batch"
    first = loader.next_batch()
    assert len(prefetch_threads()) == before + 1
    loader.close()
    loader.close()
    assert len(prefetch_threads()) == before
    assert not torch.equal(loader.next_batch().inputs, first.inputs), "it goes on after close"
    del loader
    gc.collect()
    assert len(prefetch_threads()) == before


def test_the_prefetcher_stays_within_its_depth():
    made = []
    prefetcher = Prefetcher(lambda: made.append(0) or len(made), depth=3)
    assert [prefetcher.get() for _ in range(5)] == [1, 2, 3, 4, 5]
    while len(made) < 5 + 3:
        time.sleep(0.001)
    prefetcher.close()
    assert len(made) == 5 + 3


# ---------------------------------------------------------------------------------------------------
# With a real corpus and tokenizer, and under the published name


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = [f"Žluťoučký kůň číslo {i}. " + "犬が走る。" * (i % 9) + "\n\nمرحبا 🦜" for i in range(150)]
    (folder / "texts.jsonl").write_text("".join(f'{{"text": {text!r}}}\n'.replace("'", '"') for text in texts), "utf-8")
    corpus = resolve_corpus(str(folder / "texts.jsonl"), folder / "base")
    return corpus, RustBPETokenizer.train_from_iterator(texts, 300)


def test_real_documents_come_back_whole(real):
    corpus, tokenizer = real
    loader = PretrainLoader(corpus, tokenizer, sequence_len=2048, rows_per_step=2)
    assert loader.packer.dtype == np.uint16
    found = set()
    while loader.stats()["epoch"] < 3:
        for row in loader.next_batch().inputs.tolist():
            found |= set(tokenizer.decode(row).split("<|bos|>"))
    loader.close()
    assert {document.text for document in corpus.iter_documents("train")} <= found
    assert not {document.text for document in corpus.iter_documents("val")} & found


def test_a_real_state_survives_the_file(real, tmp_path):
    corpus, tokenizer = real
    loader, restored = (PretrainLoader(corpus, tokenizer, sequence_len=64, rows_per_step=4) for _ in range(2))
    take_rows(loader, 3)
    write_file(tmp_path / "state.safetensors", tensor_chunks(loader.state_dict()))
    tensors, _ = read_tensors(tmp_path / "state.safetensors")
    restored.load_state_dict({name: tensor.numpy() for name, tensor in tensors.items()})
    assert_same_state(restored.state_dict(), loader.state_dict())
    np.testing.assert_array_equal(take_rows(restored, 5), take_rows(loader, 5))


def test_rows_do_not_depend_on_the_threads_that_tokenise(real, monkeypatch):
    """Nor does resuming: each loader goes on from a state that another number of threads has made."""
    monkeypatch.setattr(tokenizer_module, "MIN_GROUP_CHARS", 50)  # a group for nearly every document
    corpus, tokenizer = real
    sizes = {"sequence_len": 32, "rows_per_step": 4}
    loader = PretrainLoader(corpus, tokenizer, **sizes)
    whole = take_rows(loader, 12)
    state = PretrainLoader(corpus, tokenizer, **sizes).state_dict()
    for number, threads in enumerate((2, 4, 1, 3)):
        loader = PretrainLoader(corpus, tokenizer, num_threads=threads, **sizes)
        loader.load_state_dict(state)
        np.testing.assert_array_equal(take_rows(loader, 3), whole[3 * number : 3 * number + 3])
        state = loader.state_dict()


def test_a_rank_tokenises_on_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    gpu = Runtime(torch.device("cuda", 0), torch.bfloat16, "test", seed=0)
    for cores, ranks, threads in ((2, None, 1), (8, None, 7), (208, 8, MAX_LOADER_THREADS), (32, 8, 3), (4, 8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as under torchrun
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks)) if ranks else monkeypatch.delenv("LOCAL_WORLD_SIZE", False)
        assert gpu.loader_threads == threads
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert Runtime(torch.device("cpu"), torch.float32, "test", seed=0).loader_threads == 1, "training needs the cores"


def test_what_helps_a_slow_loader(real, tmp_path):
    """tok_data, unless the tokens are there already or the data has no files."""
    corpus, tokenizer = real
    assert "scripts.tok_data" in PretrainLoader(corpus, tokenizer, sequence_len=8, rows_per_step=1).advice
    shards = tokenize_shards(
        {s: token_path(corpus.token_folder, s, tokenizer) for s in corpus.shards["train"]}, tokenizer, 1
    )
    assert [tokens > 0 for _, tokens in shards] == [True]
    loader = PretrainLoader(corpus, tokenizer, sequence_len=8, rows_per_step=1)
    take_rows(loader, 1)
    assert "cores" in loader.advice and "cores" in make_loader().advice


def test_the_published_loader(real):
    corpus, tokenizer = real
    make = tokenizing_distributed_data_loader_with_state_bos_bestfit
    loader = make(tokenizer, 3, 32, "train", corpus=corpus)
    batches = [next(loader) for _ in range(6)]
    loader.close()
    assert not prefetch_threads()
    inputs, targets, state = batches[2]
    assert inputs.shape == targets.shape == (3, 32)
    resumed = make(tokenizer, 3, 32, "train", corpus=corpus, resume_state_dict=state)
    for inputs, targets, _ in batches[3:]:
        again = next(resumed)
        assert torch.equal(again[0], inputs) and torch.equal(again[1], targets)
    resumed.close()
