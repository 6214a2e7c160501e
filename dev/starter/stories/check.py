"""A check of generated stories that knows the cast but not how the story was told: it reads the text again.

Names and things must be introduced before they are used, every pronoun must have exactly one character that it can
mean, and the marks must be in order.
"""

import re

from dev.starter.clean import sentences

PRONOUNS = {"he": "he", "him": "he", "his": "he", "himself": "he", "she": "she", "her": "she", "herself": "she"}
MARKS = re.compile(r"[{}~$|+]|\s[,.!?]|[,.!?]{2}|\b(\w+) \1\b|\b[Aa] [aeioAEIO]|\b[Aa]n [^aeiouhAEIOUH]")
QUOTED = re.compile(r'"[^"]*"')


def problem(text: str, cast: list[tuple[str, str]]) -> str:
    """What is wrong with a story, "" if nothing is. `cast`: (name or noun, "he", "she" or "it")."""
    if found := MARKS.search(text):
        return f"mark: {found[0]!r}"
    if text.count('"') % 2:
        return "a quote is not closed"
    spoken = QUOTED.sub(lambda m: '"' + re.sub(r"\w", "x", m[0][1:-1]) + '"', text)
    known: set[str] = set()
    previous: set[str] = set()
    genders = dict(cast)
    labels = re.compile("|".join(rf"\b{re.escape(label)}\b" for label in sorted(genders, key=len, reverse=True)))
    for sentence in sentences(spoken):
        if not re.match(r"[\"'A-Z]", sentence):
            return f"no capital: {sentence!r}"
        here: list[str] = []
        for match in re.finditer(rf"{labels.pattern}|\b(?:{'|'.join(PRONOUNS)})\b", sentence, re.IGNORECASE):
            word, before = match[0], sentence[: match.start()]
            if word in genders:
                new = word not in known
                if word[0].isupper():
                    introduced = bool(re.search(r"\b(?:named|friend|brother|sister|cousin|neighbor) $", before))
                else:
                    introduced = not re.search(r"\b[Tt]he $", before)
                if new and not introduced:
                    return f"{word} comes up unannounced: {sentence!r}"
                known.add(word)
                here.append(word)
            elif word.lower() in PRONOUNS:
                gender = PRONOUNS[word.lower()]
                around = list(dict.fromkeys([*here, *previous]))
                meant = [label for label in around if genders[label] == gender]
                own = word.lower() in ("his", "her") and here and genders[here[0]] == gender
                if not meant or (len(meant) > 1 and not own):
                    return f"{word} means {meant or 'nobody'}: {sentence!r}"
                here.append(here[0] if own else meant[0])
        previous = set(here)
    return ""
