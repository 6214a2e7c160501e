"""Reference text in sentences: WordNet entries, countries and recipes."""

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from dev.starter.archives import Reader
from dev.starter.clean import RUDE, SEXUAL, is_clean, normalise, stable_hash

BAD_GLOSS = re.compile(
    r"\b(obscene|offensive|disparaging|slurs?|vulgar|derogatory|genus|sexual\w*|prostitut\w*|raped?|genitals?"
    r"|contemptuous|ethnic|copulat\w*)\b|'{3}|\(\d{4}-\d{2,4}\)",
    re.IGNORECASE,
)
MEANS = (
    '"{word}" means {gloss}.',
    'The word "{word}" means {gloss}.',
    "{Word}: {gloss}.",
    '"{word}" is a word that means {gloss}.',
)
ALSO = (" It can also mean {gloss}.", " Another meaning is {gloss}.", " It may also mean {gloss}.")


# ---------------------------------------------------------------------------------------------------
# WordNet


def glosses(reader: Reader, least: int = 1) -> list[tuple[str, list[str]]]:
    """(lemma, up to four definitions), the most frequent lemmas first.

    A definition shared by synonyms goes to the most frequent of them only. Lemmas seen fewer than `least`
    times in the newspaper counts beside the glosses are left out.
    """
    counts = {}
    for line in gzip.decompress(reader.raw("frequencies.txt.gz")).decode().splitlines():
        word, count = line.split("\t")
        counts[word] = int(count)
    entries = [line.split("\t") for line in gzip.decompress(reader.raw("glosses.txt.gz")).decode().splitlines()]
    used: set[str] = set()
    kept = []
    for lemma, text in sorted(entries, key=lambda e: (-counts.get(e[0], 0), e[0])):
        if counts.get(lemma, 0) < least or not re.fullmatch(r"[a-z]{3,}", lemma) or RUDE.search(lemma):
            continue
        fresh = [g for g in map(tidy_gloss, text.split(" | ")) if g and g not in used]
        used.update(fresh)
        if fresh:
            kept.append((lemma, list(dict.fromkeys(fresh))[:4]))
    return kept


def tidy_gloss(gloss: str) -> str:
    """One definition without its domain label, example or final stop; "" if it is not fit for use."""
    gloss = re.sub(r"^\([^)]*\)\s*", "", normalise(gloss)).split('; "')[0].rstrip(".;:, ")
    bad = len(gloss) < 10 or len(gloss) > 200 or BAD_GLOSS.search(gloss) or RUDE.search(gloss) or not is_clean(gloss)
    return "" if bad or gloss.count("(") != gloss.count(")") else gloss


def definition(word: str, meanings: list[str], countable: set[str]) -> str:
    """A word's meanings as sentences: "A cat is ..." for nouns that take an article, else '"quick" means ...'."""
    gloss, pick = meanings[0], stable_hash(word, "definition")
    if re.match(r"an? ", gloss) and word in countable and pick % 4:
        first = f"{'An' if word[0] in 'aeiou' else 'A'} {word} is {gloss}."
    else:
        first = MEANS[pick // 4 % len(MEANS)].format(word=word, Word=word.capitalize(), gloss=gloss)
    rest = [ALSO[(pick + i) % len(ALSO)].format(gloss=g) for i, g in enumerate(meanings[1:4])]
    return first + "".join(rest)


def seen_with_article(texts: Iterable[str]) -> set[str]:
    """Words that the texts have after "a" or "an": nouns that can be counted, and adjectives."""
    return {word for text in texts for word in re.findall(r"\b[Aa]n? ([a-z]+)\b(?! [a-z]+ly)", text)}


def wordnet(reader: Reader, countable: set[str], per_document: int = 8) -> Iterator[str]:
    """Dictionary pages: `per_document` neighbours of the alphabet, one entry a line."""
    entries = sorted(glosses(reader))
    for at in range(0, len(entries), per_document):
        yield "\n".join(definition(*entry, countable) for entry in entries[at : at + per_document])


# ---------------------------------------------------------------------------------------------------
# Countries


def field(country: dict[str, Any], *path: str) -> str:
    """The plain text of one field, "" if it has none."""
    value: Any = country
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    text = value.get("text", "") if isinstance(value, dict) else value or ""
    text = re.sub(r"(?i)<br ?/?>|</?p>", "; ", str(text))
    text = normalise(re.sub(r"<[^>]*>", "", text))
    text = re.sub(r"\s*\((?:19|20)\d\d(?: est\.?)?\)", "", text)
    text = re.sub(r"(?:;\s*)*\bnote:.*", "", text, flags=re.DOTALL)
    return re.sub(r"(\s*;)+", ";", text).strip(" ;.")


ACRONYMS = {"NATO", "UNESCO", "ASEAN", "OPEC", "ISIS", "ECOWAS", "SADC", "CARICOM", "UNICEF", "BRICS", "UNITA", "FARC"}


def usual_names(text: str) -> str:
    """The factbook sets surnames in capitals (Charles DE GAULLE): give them back their usual form."""
    surname = r"(\b[A-Z][a-zà-ÿ'.-]+,? )((?:[A-ZÀ-Þ'-]{2,} )*[A-ZÀ-Þ'-]{3,})\b"
    text = re.sub(r"\b[A-Z]{2,}(?:-[A-Z]{2,})+\b|\b[A-Z]{5,}(?=-[A-Z][a-z]|'s)", lambda m: m[0].title(), text)
    return re.sub(surname, lambda m: m[0] if m[2] in ACRONYMS or m[1] in ("The ", "In ") else m[1] + m[2].title(), text)


def with_article(name: str) -> str:
    """ "United States" -> "the United States"."""
    plural = r"\b(States|Kingdom|Republic|Islands|Emirates|Netherlands|Philippines|Bahamas|Maldives|Gambia)\b"
    return f"the {name}" if re.search(plural, name) else name


COUNTRY_LINES = (
    ("It lies in {value}.", ("Geography", "Location")),
    ("Its total area is {value}.", ("Geography", "Area", "total ")),
    ("In size it is {value}.", ("Geography", "Area - comparative")),
    ("It borders {value}.", ("Geography", "Land boundaries", "border countries")),
    ("Climate: {value}.", ("Geography", "Climate")),
    ("Land: {value}.", ("Geography", "Terrain")),
    ("Highest point: {value}.", ("Geography", "Elevation", "highest point")),
    ("Natural resources: {value}.", ("Geography", "Natural resources")),
    ("Natural hazards: {value}.", ("Geography", "Natural hazards")),
    ("About {value} people live there.", ("People and Society", "Population", "total")),
    ("Where people live: {value}.", ("People and Society", "Population distribution")),
    ("Languages: {value}.", ("People and Society", "Languages", "Languages")),
    ("Religions: {value}.", ("People and Society", "Religions")),
    ("Government: {value}.", ("Government", "Government type")),
    ("The capital is {value}.", ("Government", "Capital", "name")),
    ("How the capital got its name: {value}.", ("Government", "Capital", "etymology")),
    ("Where the country's name comes from: {value}.", ("Government", "Country name", "etymology")),
    ("National holiday: {value}.", ("Government", "National holiday")),
    ("Flag: {value}.", ("Government", "Flag")),
    ("National symbols: {value}.", ("Government", "National symbol(s)")),
    ("Economy: {value}.", ("Economy", "Economic overview")),
    ("Farm products: {value}.", ("Economy", "Agricultural products")),
    ("Industries: {value}.", ("Economy", "Industries")),
    ("Exports: {value}.", ("Economy", "Exports - commodities")),
)


def countries(reader: Reader) -> dict[str, dict[str, Any]]:
    """Short country name -> the factbook's record, sorted by name."""
    found = {}
    for path in reader.names(".json", within="/data/"):
        record = json.loads(reader.text(path))
        if not isinstance(record, dict) or "Government" not in record:
            continue
        name = field(record, "Government", "Country name", "conventional short form").split(";")[0].strip()
        name = re.sub(r"\s*\(.*|^The ", "", name)
        if name and name.lower() != "none":
            found[name] = record
    return dict(sorted(found.items()))


def capital_of(country: dict[str, Any]) -> str:
    """The name of its capital, if there is one and it is short and plain, else ""."""
    name = re.split(r"[;(]", field(country, "Government", "Capital", "name"))[0].strip()
    return name if re.fullmatch(r"[^\d,:]{2,30}", name) else ""


def factbook(reader: Reader) -> Iterator[str]:
    """One document per country: its background in prose, then facts as short lines."""
    for name, record in countries(reader).items():
        lines = [name, "", usual_names(field(record, "Introduction", "Background")).replace(".; ", ".\n") + "."]
        for template, path in COUNTRY_LINES:
            value = usual_names(field(record, *path))
            if path[-1] == "border countries":
                value = re.sub(r" [\d,.]+ km", "", value).replace(";", ",")
            if value and len(value) < 420 and not re.search(r"(?i)^(n/?a|none)\b", value):
                lines.append(template.format(value=value))
        text = normalise("\n".join(lines)).replace(" ;", ";").replace("..", ".")
        if len(text) > 300 and is_clean(text):
            yield text


# ---------------------------------------------------------------------------------------------------
# Recipes


def recipe_text(text: str) -> str:
    """One line of a recipe without lost amounts, `()`, references and link residue; "" if it is beyond repair."""
    text = re.sub(r"(?is)<ref[^>]*>.*|</?bdi>", "", text)
    text = re.sub(r"\(\s*/?\s*\)|\( ?or\s*\)", "", text)
    text = re.sub(r"\((\S[^()]*?)[/,]\s*\)", r"(\1)", text)
    text = re.sub(r"\(figures are [^)]*\)|'{2,}|(?<=\d) ea\.?(?= )", "", text)
    text = re.sub(r"\s+([,.;:)])", r"\1", normalise(text))
    return "" if re.search(r"[|{}\[\]<>=_]|thumb|https?:", text) else text


def recipe_list(reader: Reader) -> list[tuple[str, list[str], list[str]]]:
    """(title, ingredients, steps) of every whole recipe, by title."""
    out = []
    for entry in json.loads(reader.text("recipes_en-us.json")).values():
        title = normalise(entry["title"])
        ingredients = [recipe_text(line) for line in entry["ingredients"]]
        steps = [recipe_text(line) for line in entry["steps"]]
        whole = len(steps) > 1 and len(ingredients) > 1 and all(steps) and all(ingredients)
        if whole and not re.search(r"[/|:<\[]|\bI{2,}\b", title) and sum(map(len, steps)) > 120:
            out.append((title, ingredients, steps))
    return sorted(out)


def as_method(steps: list[str]) -> str:
    """The steps of a recipe as a paragraph."""
    return " ".join(s if s[-1] in ".!?)" else s + "." for s in steps)


def recipes(reader: Reader) -> Iterator[str]:
    """Title, ingredients one a line, then the method as a paragraph."""
    for title, ingredients, steps in recipe_list(reader):
        things = "\n".join(f"- {i}" for i in ingredients)
        text = f"How to make {title}\n\nYou need:\n{things}\n\n{as_method(steps)}"
        if is_clean(text) and not SEXUAL.search(text):
            yield text
