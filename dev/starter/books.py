"""Public-domain tales, and speeches in parts."""

import re
from collections.abc import Iterator

from dev.starter.archives import Reader
from dev.starter.clean import is_clean, normalise, sentences

# Tales of the archive whose English is a living translator's: left out.
NOT_PUBLIC_DOMAIN = {
    "Herr Korbes",
    "Pack of Scoundrels",
    "The Crumbs on the Table",
    "The Hare and the Hedgehog",
    "The Wolf and the Man",
}


def short_paragraphs(paragraph: str, limit: int = 2000) -> list[str]:
    """A very long paragraph, broken up after every eight sentences."""
    if len(paragraph) <= limit:
        return [paragraph]
    parts = sentences(paragraph)
    return [" ".join(parts[i : i + 8]) for i in range(0, len(parts), 8)]


def cut(text: str, limit: int = 8000) -> Iterator[str]:
    """Cut a long text at paragraph boundaries into parts of about equal length, none much over `limit`."""
    paragraphs = [piece for p in text.split("\n\n") for piece in short_paragraphs(p)]
    share = len(text) / max(1, -(-len(text) // limit))
    part: list[str] = []
    for paragraph in paragraphs:
        if part and sum(map(len, part)) + len(paragraph) / 2 > share:
            yield "\n\n".join(part)
            part = []
        part.append(paragraph)
    yield "\n\n".join(part)


def tales(reader: Reader) -> Iterator[str]:
    """Grimm's and Andersen's tales, each whole: title, then paragraphs of a few sentences."""
    rows = []
    for file, title_at, text_at in (("andersen.tab", 0, 1), ("grimm-tales.tab", 1, 3)):
        for line in reader.text(f"datasets/{file}").split("\n")[3:]:
            cells = line.split("\t")
            if len(cells) > text_at and cells[title_at] not in NOT_PUBLIC_DOMAIN:
                rows.append((cells[title_at], cells[text_at]))
    for title, text in rows:
        text = re.sub(r'^"|"$', "", text).replace('""', '"')
        lines = sentences(normalise(re.sub(r"^C(?=The mother)", "", text)))
        body = "\n\n".join(" ".join(lines[i : i + 5]) for i in range(0, len(lines), 5))
        yield f"{normalise(title)}\n\n{body}"


def speeches(reader: Reader) -> Iterator[str]:
    """State of the Union addresses from 1900 on, in parts; lost paragraph breaks are put back."""
    for path in reader.names(".txt", within="/sotu/data/"):
        year, name = re.search(r"/(\d{4})_(\w+?)_[a-z]+\.txt$", path).groups()  # type: ignore[union-attr]
        if int(year) < 1900:
            continue
        text = re.sub(r"(?<=[a-z)][.!?])(?=[A-Z])|(?<=[a-z][.!?][\"'])(?=[A-Z])", "\n\n", reader.text(path))
        text = re.sub(r"[\[(](?:Applause|Laughter)[^\])]*[\])]|\[[^\]]*\]", "", text)
        paragraphs = [re.sub(r"\s*\n\s*", " ", p) for p in re.split(r"\n\s*\n", text)]
        for part in cut(normalise("\n\n".join(p.strip() for p in paragraphs if p.strip())), 6000):
            if len(part) > 800 and is_clean(part):
                yield f"State of the Union, {year}, {name.replace('_', ' ').title()}\n\n{part}"
