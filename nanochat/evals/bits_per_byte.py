"""Bits per byte of a model on a corpus, on each of its sources, and on any loader's batches."""

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import chain, islice
from typing import Any

import torch

from nanochat.common import UserError
from nanochat.data.corpus import Corpus, Document, NoText
from nanochat.dataloader import PretrainLoader
from nanochat.distributed.rank_checks import raise_on_all_ranks
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate_bpb
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer

MAX_DOCUMENTS = 100_000  # searched for sources
EVAL_ROWS = 32  # per evaluation step over all ranks: fixed, so that the result does not depend on the world size


def measured_tokens(tokens: int, T: int, rows: int = EVAL_ROWS) -> int:
    """How many tokens are measured where `tokens` are asked for: whole steps of `rows` rows of T, at least one."""
    return max(1, tokens // (rows * T)) * rows * T


def corpus_bpb(
    model: GPT,
    corpus: Corpus,
    tokenizer: RustBPETokenizer,
    runtime: Runtime,
    *,
    split: str,
    tokens: int,
    device_batch_size: int,
) -> float:
    """Bits per byte over measured_tokens(tokens, T) tokens of a split, the same rows every time.

    Collective: every rank must call it. Raises NoText on all ranks if none finds any text.
    """
    T = model.config.sequence_len
    make_loader = partial(
        PretrainLoader,
        corpus,
        tokenizer,
        sequence_len=T,
        rows_per_step=EVAL_ROWS,
        split=split,
        seed=0,
        rank=runtime.rank,
        world_size=runtime.world_size,
        empty_if_bad=True,
        num_threads=runtime.loader_threads,
    )
    steps = measured_tokens(tokens, T) // (EVAL_ROWS * T)
    bpb = loader_bpb(model, make_loader, tokenizer, runtime, steps, device_batch_size)
    if math.isinf(bpb):
        raise NoText(f"{corpus.name}: no text is left in its {split} split to measure on")
    return bpb


def bpb_by_source(
    model: GPT, corpus: Corpus, tokenizer: RustBPETokenizer, runtime: Runtime, *, split: str, tokens: int
) -> list[dict[str, Any]]:
    """Bits per byte of each source of a split, over at most `tokens` tokens, and the number of documents found.

    Collective: every rank must call it. Each takes some of the sources; the results do not depend on the world size.
    Raises DataError on all ranks if one cannot read the split.
    """
    found: dict[str, list[Document]] = {}
    chars: Counter[str] = Counter()
    failure = None
    try:
        for document in islice(corpus.iter_documents(split), MAX_DOCUMENTS):
            if chars[document.source] < 6 * tokens:  # more characters than that many tokens have
                found.setdefault(document.source, []).append(document)
                chars[document.source] += len(document.text)
    except (UserError, OSError) as error:
        failure = error
    raise_on_all_ranks(runtime, failure)
    # One rank may have skipped a bad shard, and with it all of a source.
    known = [set(names) for names in runtime.all_gather(list(found), "comparing the sources")]
    sources = sorted(set.intersection(*known))
    figures, token_bytes = torch.zeros(len(sources), dtype=torch.float32), torch.tensor(tokenizer.token_bytes)
    for number in range(runtime.rank, len(sources), runtime.world_size):
        rows = rows_once(found[sources[number]], tokenizer, model.config.sequence_len, tokens)
        figures[number] = evaluate_bpb(model, rows, 10**9, token_bytes)
    figures = runtime.all_reduce_sum(figures.to(runtime.device), "summing the losses by source").cpu()
    return [
        {"source": source, "documents": len(found[source]), "bits per byte": float(figure)}
        for source, figure in zip(sources, figures)
    ]


def rows_once(
    documents: Iterable[Document], tokenizer: RustBPETokenizer, T: int, tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The documents one after another, each once, as (inputs, targets), each (1, at most T); at most `tokens` in all.

    Documents and rows begin after a bos, as in training.
    """
    bos = tokenizer.get_bos_token_id()
    stream = chain.from_iterable(tokenizer.encode(document.text, append=bos) for document in documents)
    ids = list(islice(stream, tokens))
    for start in range(0, len(ids), T):
        row = torch.tensor([[bos, *ids[start : start + T]]])
        yield row[:, :-1], row[:, 1:]


def loader_bpb(
    model: GPT,
    make_loader: Callable[[], Any],
    tokenizer: RustBPETokenizer,
    runtime: Runtime,
    steps: int,
    device_batch_size: int,
) -> float:
    """Bits per byte over the first `steps` batches of a new loader, or all it has; inf if it has none."""

    def micro_batches() -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        # The loader is made in here: it may read at once, and evaluate_bpb shares a failure in here with all ranks.
        with suppress(StopIteration, NoText), closing(make_loader()) as loader:
            for _ in range(steps):
                batch = loader.next_batch()
                for start in range(0, batch.inputs.size(0), device_batch_size):
                    rows = slice(start, start + device_batch_size)
                    yield batch.inputs[rows], batch.targets[rows]

    with closing(micro_batches()) as batches:
        return evaluate_bpb(model, batches, 10**9, torch.tensor(tokenizer.token_bytes), runtime)
