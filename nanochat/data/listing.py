"""List the files that --data names, and count by kind what is used and what is not.

Used for text (own_files.py) and for conversations alike; each says which kinds of file it can read.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath

from nanochat.common import UserError
from nanochat.common.output import ProgressLine
from nanochat.data.filesystems import ending_of
from nanochat.data.remote import Source, find_remote, is_url

COMPRESSIONS = ("", ".gz", ".zst")
LONGEST_NAME = 255  # characters of a file name, on all usual file systems
MAX_NAME = 100  # characters of a list of entries that is shown whole
WEIGHT, MAX_WEIGHT = re.compile(r"\d*\.?\d+"), 1000


def with_compressions(*kinds: str) -> tuple[str, ...]:
    """`.txt` -> `.txt`, `.txt.gz`, `.txt.zst`"""
    return tuple(kind + compression for kind in kinds for compression in COMPRESSIONS)


def kind_among(kinds: Sequence[str], path: Source | PurePath) -> str | None:
    """The entry of `kinds` that the file's name ends in, whatever its case, or None."""
    name = path.name.lower()
    return next((kind for kind in kinds if name.endswith(kind)), None)


@dataclass
class FileListing:
    """What --data stands for: the files to read, sorted within each entry, and how many others of each kind."""

    files: list[Source] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)  # ending, or another reason -> files
    usable: Sequence[str] = ()  # the kinds that can be read

    def leave_out(self, left_out: Mapping[str, str]) -> None:
        """Count among the others, by reason, these of the files, which turned out not to be usable."""
        self.unused.update(left_out[str(file)] for file in self.files if str(file) in left_out)
        self.files = [file for file in self.files if str(file) not in left_out]

    def describe(self) -> str:
        """`12 files: 10 .jsonl, 2 .md; not used: 3 .pdf, 1 hidden`"""
        kinds = Counter(kind_among(self.usable, file) or "" for file in self.files)
        used = f"{len(self.files):,} file{'' if len(self.files) == 1 else 's'}: {counts(kinds)}"
        return f"{used}; not used: {unused}" if (unused := counts(self.unused)) else used


def counts(kinds: Counter[str]) -> str:
    """`10 .jsonl, 2 .md`, the most frequent first."""
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common() if count)


def list_data(
    data: str, kinds: Sequence[str], base_dir: Path, *, known_names: Sequence[str] = (), follow_links: bool = True
) -> FileListing:
    """The files of the given kinds that --data stands for: paths, folders, globs and URLs, separated by commas.

    A folder is read with its subfolders, linked ones too, without hidden files. Raises UserError for an entry that
    names nothing, and where no file can be used; `known_names` are listed there.
    """
    listing, seen = FileListing(usable=kinds), set[Source]()
    for entry in split_entries(data, known_names):
        entry = entry.removeprefix("file://")
        files: Sequence[Source]
        if is_url(entry):
            files, unused = find_remote(entry, partial(kind_among, kinds), base_dir)
        else:
            files, unused = find_local(entry, kinds, known_names, follow_links)
        if not files:
            found = f"none of these can be used: {counts(unused)}" if unused else "the folder is empty"
            raise UserError(f"--data {entry}: {found}; the kinds read are {', '.join(kinds)}")
        listing.files += [file for file in files if file not in seen]
        seen.update(files)
        listing.unused += unused
    if not listing.files:
        raise UserError(f"--data {data}: it names no file")
    return listing


def split_entries(data: str, known_names: Sequence[str] = ()) -> list[str]:
    """The entries of a comma-separated list. A comma inside a path that exists, or inside a URL, separates nothing."""
    entries: list[str] = []
    parts = data.split(",")
    while parts:
        if entries and is_url(entries[-1]) and not is_own_entry(parts[0], known_names):
            entries[-1] += f",{parts.pop(0)}"
            continue
        taken = 1 if "://" in parts[0] else parts_of_path(parts)
        entries.append(",".join(parts[:taken]))
        del parts[:taken]
    return [entry for entry in (entry if exists(entry) else entry.strip() for entry in entries) if entry]


def parts_of_path(parts: Sequence[str]) -> int:
    """How many of the first parts, joined by commas, are a path that exists: as many as possible; 1 if none are."""
    joined, taken = parts[0], 1
    for end, part in enumerate(parts[1:], start=2):
        joined += f",{part}"
        folder, name = os.path.split(joined)
        if len(name) > LONGEST_NAME or ("/" in part and not exists(folder)):
            break  # nothing longer exists
        if exists(joined):
            taken = end
    return taken


def shown(entries: Sequence[str]) -> str:
    """Entries as a name for messages: `a.txt,b.txt`, of many `a.txt and 40 more`."""
    name = ",".join(entries)
    return name if len(entries) < 3 or len(name) < MAX_NAME else f"{entries[0]} and {len(entries) - 1} more"


def split_weight(entry: str) -> tuple[str, float]:
    """`mine.jsonl:3` -> (`mine.jsonl`, 3.0). 1 without a number, for a path that exists, and for a URL's port."""
    name, colon, number = entry.rpartition(":")
    if not colon or not WEIGHT.fullmatch(number) or exists(entry) or re.fullmatch(r"\w+://[^/]*", name):
        return entry, 1.0
    if not 0 < float(number) <= MAX_WEIGHT:
        raise UserError(f"--data {entry}: the number after the colon must be above 0 and at most {MAX_WEIGHT}")
    return name, float(number)


def is_own_entry(part: str, known_names: Sequence[str]) -> bool:
    """Whether what follows a comma after a URL is another entry rather than more of the URL."""
    part = split_weight(part)[0]
    return is_url(part) or part.strip() in known_names or exists(part) or bool(glob.glob(part, recursive=True))


def exists(path: str) -> bool:
    """Whether there is such a file or folder."""
    return os.path.exists(os.path.expanduser(path))


def find_local(
    entry: str, kinds: Sequence[str], known_names: Sequence[str], follow_links: bool
) -> tuple[list[Path], Counter[str]]:
    """(usable files, sorted; counts of the others) of one path, folder or glob. UserError if it names nothing."""
    unused: Counter[str] = Counter()
    try:
        given = Path(entry).expanduser()
        matches = [given] if given.exists() else [Path(match) for match in glob.glob(str(given), recursive=True)]
        paths: set[Path] = set()
        progress = ProgressLine(lambda: f"found {len(paths):,} files in {entry}")
        for match in matches:
            for path in walk(match, unused, follow_links) if match.is_dir() else regular([match], unused):
                paths.add(path)
                progress.show()
        progress.close()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--data {entry}: cannot read it ({reason})") from error
    if not matches:
        names = ", ".join(("a glob", "a URL", *known_names))
        raise UserError(f"--data {entry}: no such file or folder; give a path or one of: {names}")
    usable = [path for path in paths if kind_among(kinds, path)]
    unused.update(ending_of(path) for path in paths if not kind_among(kinds, path))
    return sorted(usable), unused


def regular(paths: Iterable[Path], unused: Counter[str]) -> Iterator[Path]:
    """Those that can be opened without waiting for another program, unlike pipes and devices."""
    for path in paths:
        if path.is_file() or not path.exists():
            yield path
        else:
            unused["not a regular file"] += 1


def walk(folder: Path, unused: Counter[str], follow_links: bool) -> Iterator[Path]:
    """All files below a folder except hidden ones. Raises OSError for a folder that may not be read.

    Linked folders come last, so that a folder reached in two ways has the path without links, and each once.
    """
    seen: set[tuple[int, int]] = set()
    waiting, links = [folder], list[Path]()
    while waiting or links:
        here = waiting.pop() if waiting else links.pop(0)
        stat = here.stat()
        if (stat.st_dev, stat.st_ino) in seen:
            unused["linked folder read already"] += 1
            continue
        seen.add((stat.st_dev, stat.st_ino))
        with os.scandir(here) as entries:
            for item in entries:
                path = here / item.name
                if item.name.startswith("."):
                    unused["hidden"] += 1
                elif item.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif item.is_dir() and follow_links:
                    links.append(path)
                elif item.is_dir():
                    unused["linked folder"] += 1
                elif item.is_file() or not path.exists():  # a link to nothing is an error when it is read
                    yield path
                else:
                    unused["not a regular file"] += 1
