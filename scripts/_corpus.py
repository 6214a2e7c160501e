"""Opening the data of a run, alike on all of its processes."""

from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import UserError, read_json
from nanochat.data.corpus import Corpus
from nanochat.dataloader import unpack_skipped
from nanochat.dataset import resolve_corpus
from nanochat.runtime import Runtime

RECORD = "corpus.json"  # in a run's folder: which shards it began with


def open_corpus(
    data: str,
    skip_bad: bool,
    runtime: Runtime,
    base_dir: Path,
    run: Path | None = None,
    checkpoint: Checkpoint | None = None,
) -> Corpus:
    """What --data names. A bad shard that the main process leaves out, if it may, all leave out.

    Resuming, each shard has its place again, and what was left out stays so. Raises UserError for data that the
    processes see differently, or that is not what the checkpoint's run was trained on.
    """
    earlier: dict[str, Any] = {"skipped": unpack_skipped(checkpoint.loader_state()) if checkpoint else {}}
    if run and checkpoint and (run / RECORD).exists():
        record = read_json(run / RECORD)
        if record["fingerprint"] == checkpoint.meta["corpus"]:
            earlier["recorded"] = record
    found: list[Corpus] = []

    def first() -> dict[str, str]:
        found.append(resolve_corpus(data, base_dir, skip_bad=skip_bad, **earlier))
        return found[0].skipped

    earlier["skipped"] = runtime.broadcast(first, "opening the data")
    corpus = found[0] if found else resolve_corpus(data, base_dir, skip_bad=skip_bad, **earlier)
    own = f"{corpus.fingerprint} {sorted(corpus.skipped)}"
    for rank, other in enumerate(seen := runtime.all_gather_text(own, "comparing the data")):
        if other != seen[0]:
            raise UserError(f"--data is not the same for all processes: rank {rank} finds other files than rank 0")
    if checkpoint and checkpoint.meta["corpus"] != corpus.fingerprint:
        raise UserError(
            f"the data has changed since step {checkpoint.step} was saved: cannot resume exactly; "
            "give the same --data, or start a new run with --init-from"
        )
    return corpus
