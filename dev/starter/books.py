"""Public-domain books and speeches, cut into chapters, scenes, tales and parts of speeches."""

import json
import re
import struct
import zlib
from collections.abc import Iterator
from itertools import groupby

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


def reflow(text: str) -> str:
    """Join hard-wrapped lines into paragraphs; paragraphs are separated by a blank line."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\r", ""))
    return normalise("\n\n".join(re.sub(r"\s*\n\s*", " ", p.strip()) for p in paragraphs if p.strip()))


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


def kjv(reader: Reader) -> Iterator[str]:
    """The King James Bible by chapter: a heading and the verses as running text."""
    verses = [json.loads(line) for line in reader.text("bible/data/kjv.jsonl").splitlines()]
    for (book, chapter), group in groupby(verses, key=lambda v: (v["book"], v["chapter"])):
        text = " ".join(re.sub(r"[\[\]{}¶]|<[^>]*>", "", v["text"]) for v in group)
        yield normalise(f"{book} {chapter}\n\n{text}")


def shakespeare(reader: Reader) -> Iterator[str]:
    """Plays by scene, poems whole: verse lines kept, stage directions in brackets dropped."""
    for path in reader.names("_gut.txt", within="shksprdata/texts/"):
        text = re.sub(r"(?s)\[[^\]]*\]", "", reader.text(path).replace("\r", "").replace("_", ""))
        title = normalise(text.strip().split("\n")[0]).title().replace("'S", "'s")
        parts = re.split(r"(?mi)^[ \t]*(?=(?:act [ivx]+\.? ?)?scene\.? [ivx\d]+\b)", text)
        if len(parts) < 5:
            parts = re.split(r"\n\s*\n(?=[IVXLC]+\.?\s*\n)", text) if "sonnet" in path else []
        for part in parts[1:]:
            head, _, body = normalise(re.sub(r"(?mi)^\s*act [ivx]+\.?\s*$", "", part)).partition("\n")
            if len(body) > 500 and is_clean(body):
                for piece in cut(body):
                    yield f"{title}\n{head.strip()}\n\n{piece}"


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


def moby_dick(reader: Reader) -> Iterator[str]:
    """Moby Dick by chapter."""
    for path in reader.names(".txt", within="/moby-dick/data/chapter_"):
        for part in cut(reflow(reader.text(path))):
            if len(part) > 500:
                yield part


def r_strings(data: bytes) -> list[str]:
    """The strings of one serialised R character vector (XDR format, version 3)."""
    at = 14
    at += 4 + struct.unpack(">i", data[at : at + 4])[0]  # native encoding's name
    count = struct.unpack(">i", data[at + 4 : at + 8])[0]
    at, out = at + 8, []
    for _ in range(count):
        size = struct.unpack(">i", data[at + 4 : at + 8])[0]
        out.append(data[at + 8 : at + 8 + max(size, 0)].decode("utf-8", "ignore"))
        at += 8 + max(size, 0)
    return out


def austen(reader: Reader) -> Iterator[str]:
    """Six novels by chapter, from an R database: zlib streams, each after its length."""
    data, at = reader.raw("data/Rdata.rdb"), 0
    while at < len(data):
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(data[at + 4 :]))
        at = len(data) - len(stream.unused_data)
        chapters = re.split(r"(?mi)^chapter [ivxlc\d]+\.?\s*$", "\n".join(lines).replace("_", ""))
        title = normalise(lines[0]).title()
        for number, chapter in enumerate(chapters[1:], 1):
            text = re.sub(r"(?s)\bFINIS\b.*|\bTHE END\b.*|(?m:^\s*VOLUME [IVX]+\s*$)|\[[^\]]*\]", "", chapter)
            for part in cut(reflow(text)):
                if len(part) > 500 and is_clean(part):
                    yield f"{title}, Chapter {number}\n\n{part}"
