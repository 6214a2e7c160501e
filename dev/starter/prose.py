"""Encyclopaedic prose: Wikipedia leads and whole Wikipedia articles."""

import bz2
import json
import re
from collections.abc import Iterator
from html import unescape

from dev.starter.archives import Reader
from dev.starter.books import cut
from dev.starter.clean import SEXUAL, is_clean, normalise

EMPTY_BRACKETS = re.compile(r" ?[(\[]\s*[,;:/\s]*\s*[)\]]")


def tidy(text: str) -> str:
    """Drop brackets left empty by lost markup, and spaces before punctuation."""
    text = EMPTY_BRACKETS.sub("", text)
    text = re.sub(r"\(\s*[,;]\s*", "(", text)
    text = re.sub(r"[,;]\s*\)", ")", text)
    text = re.sub(r"\( ", "(", text).replace(" )", ")")
    return re.sub(r" +([,.;:!?])(?=\s|$)", r"\1", text)


# ---------------------------------------------------------------------------------------------------
# Wikipedia leads


def topics(reader: Reader) -> dict[str, str]:
    """Title -> topic (People, Geography, Arts, ...)."""
    return {normalise(e["title"]): e["topic"] for e in json.loads(reader.text("summaries_en-us.json")).values()}


def wikipedia_leads(reader: Reader) -> dict[str, str]:
    """Title -> lead section, for titles whose lead survived extraction whole."""
    leads = {}
    for entry in json.loads(reader.text("summaries_en-us.json")).values():
        title, extract = entry["title"], entry["extract"].strip()
        lost_formula = re.search(r"\S  +\S|\n|\(\)|\( [,;]| ,|=| [.;]", extract) or extract[-1:] not in '.!?")'
        if lost_formula or len(extract) < 120 or SEXUAL.search(title + " " + extract):
            continue
        text = tidy(normalise(re.sub(r"\s*\([^()]*\[[^()]*\][^()]*\)", "", extract)))  # pronunciations
        if is_clean(text):
            leads[normalise(title)] = text
    return dict(sorted(leads.items()))


# ---------------------------------------------------------------------------------------------------
# Whole Wikipedia articles, from a MediaWiki dump


def strip_nested(text: str, opening: str, closing: str) -> str:
    """Remove everything between matching (nested) marks, the marks included."""
    pattern = re.compile(f"{re.escape(opening)}|{re.escape(closing)}")
    depth, out, at = 0, [], 0
    for mark in pattern.finditer(text):
        if depth == 0:
            out.append(text[at : mark.start()])
        depth = depth + 1 if mark.group() == opening else max(0, depth - 1)
        at = mark.end()
    return "".join(out) + (text[at:] if depth == 0 else "")


def plain_links(text: str) -> str:
    """`[[target|words]]` -> words; files and categories vanish; `[http://x words]` -> words."""
    inner = re.compile(r"\[\[([^\[\]]*)\]\]")
    while inner.search(text):
        text = inner.sub(
            lambda m: "" if re.match(r"(?i)\s*(file|image|category|[a-z-]{2,12}):", m[1]) else m[1].split("|")[-1], text
        )
    return re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)


def plain_wikitext(text: str) -> str:
    """Wikitext -> paragraphs and `== headings ==`; lists, tables, templates and references are dropped."""
    text = re.sub(r"(?s)<!--.*?-->", "", text)
    text = re.sub(r"(?is)<ref[^<>]*/>|<ref[^<>]*>.*?</ref>", "", text)
    blocks = "math|gallery|timeline|code|pre|source|syntaxhighlight|blockquote|poem"
    text = re.sub(rf"(?is)<({blocks})\b.*?</\1>", "\0", text)
    text = re.sub(r"\{\{(?:convert|cvt)\|([\d.,]+)\|([^|{}]+)[^{}]*\}\}", r"\1 \2", text)
    text = re.sub(r"\{\{(?:lang|nowrap|transl)\|(?:[^{}|]*\|)*([^{}|]*)\}\}", r"\1", text)
    text = strip_nested(strip_nested(text, "{{", "}}"), "{|", "|}")
    text = re.sub(r"(?is)</?[a-z][^<>]*>|__[A-Z]+__", "", plain_links(text))
    text = re.sub(r"'{2,}", "", text)
    lines = [line for line in text.split("\n") if line[:1] not in ("*", "#", ":", ";", "|", "!", "\0")]
    return normalise("\n".join(line for line in lines if "\0" not in line))


SKIPPED_SECTION = re.compile(
    r"(?i)^(see also|references|external links|further reading|notes|bibliography|sources|footnotes|citations|gallery"
    r"|filmography|discography|works|list of|selected|publications|awards|honou?rs|works cited|literature)"
)


def article_parts(title: str, text: str, limit: int = 9000) -> Iterator[str]:
    """Cut an article at its level-2 headings into documents of at most about `limit` characters."""
    pieces = re.split(r"(?m)^==\s*([^=].*?)\s*==\s*$", text)
    part = f"{title}\n\n{pieces[0].strip()}"
    sections = [(h, piece) for h, body in zip(pieces[1::2], pieces[2::2]) for piece in cut(body.strip(), limit)]
    for heading, body in sections:
        body = re.sub(r"(?m)^=+\s*(.*?)\s*=+$", r"\1", body).strip()
        if SKIPPED_SECTION.match(heading) or len(body) < 300:
            continue
        section = f"{heading}\n\n{body}"
        if len(part) + len(section) > limit:
            yield part
            part = f"{title}: {section}"
        else:
            part += "\n\n" + section
    yield part


def wikipedia_articles(reader: Reader) -> Iterator[str]:
    """Articles of the dump that gensim carries for its tests; redirects, lists and stubs are left out."""
    dump = bz2.decompress(reader.raw("p000000010p000030302-shortened.bz2")).decode()
    for page in re.findall(r"(?s)<page>(.*?)</page>", dump):
        title = re.search(r"<title>(.*?)</title>", page)[1]  # type: ignore[index]
        body = re.search(r"(?s)<text[^>]*>(.*?)</text>", page)
        if not body or "#REDIRECT" in body[1][:40].upper() or re.search(r"[:/]|disambiguation|^List of", title):
            continue
        for part in article_parts(normalise(title), plain_wikitext(unescape(body[1]))):
            paragraphs = [tidy(p) for p in part.split("\n") if not re.search(r"[|{}<>=\[\]]|\(\)| ,|  |''", p)]
            text = normalise("\n".join(p for p in paragraphs if not p.endswith(":")))
            text = re.sub(r"(\n+[^\n]{1,80}(?<![.!?\"')]))+\Z", "", text)  # headings left without a body
            if len(text) > 600 and is_clean(text) and not SEXUAL.search(text):
                yield text
