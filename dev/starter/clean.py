"""Cleaning shared by all sources: Unicode and whitespace, residue and rudeness filters, near duplicates."""

import hashlib
import html
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

RESIDUE = re.compile(
    r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|</?[a-z][a-z0-9]*(?:\s[^<>]*)?/?>|&(?:amp|lt|gt|nbsp|quot|#\d+);"
    r"|\[(?:\d{1,3}|citation needed|edit|note \d+)\]|https?://|www\.\w|<\||\|>|\ufffd|Project Gutenberg|Gutenberg-tm",
    re.IGNORECASE,
)
"""Markup, links, mojibake, chat control tokens and publisher boilerplate: a document with any of it is dropped."""

MOJIBAKE = re.compile(r"[ÃÂ][\u0080-\u00bf]|â€|ï»¿|[\u0080-\u009f\ue000-\uf8ff]")
RUDE = re.compile(
    r"\b(?:fuck\w*|motherf\w*|shit\w*|bullshit|bitch\w*|cunt\w*|dick(?:head|s)?|cock(?:sucker|s)?|puss(?:y|ies)|penis\w*"
    r"|vagina\w*|porn\w*|whores?|sluts?|slutty|nigg\w+|fag(?:got)?s?|retard(?:s|ed)?|rape[ds]?|raping|rapist\w*|tits"
    r"|masturbat\w*|orgasm\w*|anal|boobs?|titties|nudes?|naked|horny|sex|sexy|sexual\w*|blowjob\w*|dildo\w*|incest\w*"
    r"|pedophil\w*|asshole\w*|ass|arse|bastards?|damn|goddamn|cum|erotic\w*|hooker\w*|prostitut\w*|suicid\w*|hitler"
    r"|kill (?:your|my)self|nazis?|wtf|stfu|lmfao|crap|piss(?:ed)?|hentai|fetish\w*|intercourse|genital\w*|testic\w*"
    r"|clitor\w*)\b",
    re.IGNORECASE,
)
"""For talk and answers. Encyclopaedic text is held to SEXUAL only."""
SEXUAL = re.compile(
    r"\b(?:fuck\w*|porn\w*|masturbat\w*|orgasm\w*|penis\w*|vagina\w*|anal sex|oral sex|clitor\w*|blowjob|dildo\w*"
    r"|fetish\w*|ejaculat\w*|erotic\w*|nigg\w+|pedophil\w*|incest\w*|sexual (?:intercourse|arousal|practice|act)s?)\b",
    re.IGNORECASE,
)
QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " ", "\u2009": " "})
SENTENCE_END = re.compile(r"[.!?…]['\")\]]*(?=\s|$)")


def normalise(text: str) -> str:
    """NFC, straight quotes, no control or zero-width characters, single spaces, at most one blank line."""
    text = unicodedata.normalize("NFC", html.unescape(text)).translate(QUOTES)
    text = re.sub(r"\r\n?|[\u2028\u2029\x0b\x0c]", "\n", text)
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c)[0] != "C")
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def is_clean(text: str) -> bool:
    """True if no markup, link, boilerplate or mojibake is left."""
    return not (RESIDUE.search(text) or MOJIBAKE.search(text))


def key(text: str) -> str:
    """Letters and digits only, case-folded: texts with equal keys count as duplicates."""
    return re.sub(r"[^\w]+", " ", text.casefold()).strip()


def stable_hash(text: str, salt: str = "") -> int:
    """A 64-bit hash that is the same on every machine and run."""
    return int.from_bytes(hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=8).digest(), "big")


def fraction(text: str, salt: str = "") -> float:
    """`stable_hash` as a number in [0, 1)."""
    return stable_hash(text, salt) / 2**64


def sentences(text: str) -> list[str]:
    """Split one paragraph into sentences at end marks followed by a capital; abbreviations stay whole."""
    cuts = re.finditer(
        r"(?<![A-Z]\.)(?<!\b[A-Z])(?<!\bSt)(?<!\bDr)(?<!\bMr)(?<!\bMrs)(?<!\bJr)(?<!\bSr)(?<!\bvs)(?<!\bno)(?<!\bNo)"
        r"(?<!\bca)(?<!\bc)(?<!\bapprox)(?<!\bi\.e)(?<!\be\.g)(?<!\bMt)(?<!\bal)[.!?]['\")]*\s+(?=['\"(]?[A-Z0-9])",
        text,
    )
    out, at = [], 0
    for cut in cuts:
        out.append(text[at : cut.end()].strip())
        at = cut.end()
    return [s for s in [*out, text[at:].strip()] if s]


def start_sentence(text: str) -> str:
    """With a capital first letter, the rest as it is."""
    return text[0].upper() + text[1:]


def cut_to_sentence(text: str) -> str:
    """Cut an unfinished answer back to its last full sentence; "" if it has none."""
    ends = [m.end() for m in SENTENCE_END.finditer(text)]
    return text[: ends[-1]].rstrip() if ends else ""


def repetitive(text: str) -> bool:
    """True if a sentence comes twice, a word comes thrice in a row, or one 4-gram fills over 4% of a long text."""
    parts = [key(s) for s in sentences(text.replace("\n", " "))]
    long = [p for p in parts if len(p) > 20]
    if len(set(long)) < len(long) or re.search(r"\b(\w+)(?: \1\b){2}", key(text)):
        return True
    words = key(text).split()
    grams = [" ".join(words[i : i + 4]) for i in range(len(words) - 3)]
    return bool(grams) and len(words) > 40 and max(map(grams.count, set(grams))) > max(2, 0.04 * len(grams))


class NearDuplicates:
    """MinHash with banding over 5-word shingles (Broder 1997): finds texts alike at Jaccard of roughly 0.7 up."""

    def __init__(self, bands: int = 12, rows: int = 5, seed: int = 20) -> None:
        rng = np.random.default_rng(seed)
        self._shape = (bands, rows)
        self._a = rng.integers(1, 2**61, bands * rows, dtype=np.uint64) | np.uint64(1)
        self._b = rng.integers(0, 2**61, bands * rows, dtype=np.uint64)
        self._seen: set[bytes] = set()
        self._words: dict[str, int] = {}

    def _word(self, word: str) -> int:
        if word not in self._words:
            self._words[word] = stable_hash(word)
        return self._words[word]

    def _bands(self, text: str) -> list[bytes]:
        words = np.array([self._word(w) for w in key(text).split()] or [0], dtype=np.uint64)
        width = min(5, len(words))
        hashes = np.zeros(len(words) - width + 1, dtype=np.uint64)  # one per shingle, a polynomial of its words
        for at in range(width):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[at : at + len(hashes)]
        mixed = hashes[None, :] * self._a[:, None] + self._b[:, None]  # (bands * rows, shingles), modulo 2**64
        signature = (mixed ^ (mixed >> np.uint64(29))).min(axis=1).reshape(self._shape)
        return [bytes([i]) + row.tobytes() for i, row in enumerate(signature)]

    def is_new(self, text: str) -> bool:
        """False if a text like this one was seen before; else remember it."""
        bands = self._bands(text)
        if any(band in self._seen for band in bands):
            return False
        self._seen.update(bands)
        return True


def deduplicate(docs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Keep the first of exact and near duplicates among (source, text), across sources."""
    exact: set[str] = set()
    near = NearDuplicates()
    kept = []
    for source, text in docs:
        name = key(text)
        if name in exact or not near.is_new(text):
            continue
        exact.add(name)
        kept.append((source, text))
    return kept
