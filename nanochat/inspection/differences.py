"""What differs between two Contents: the dictionary that `nanochat diff --json` prints.

Keys; [a, b] are the two values, and what only one of the two knows is left out, or null where its absence matters:
  a, b        {"path", "what"}
  same        whether the models are: the network's config, the weights and the tokenizer, as far as both have them.
              Not the training: two ways may lead to one model
  verdict     the same in words
  config      {field: [a, b]} that differ; of other programs' models the fields of config.json
  training    {name: [a, b]} that differ: steps, tokens, recipe, data, ... (nanochat/inspection/describe.py)
  flags       {flag: [a, b]} that differ, of the commands that trained them
  figures     {name: [a, b]} that differ: bits per byte, accuracies
  tokenizer   {"same", "sizes": [a, b], "only_a", "only_b": numbers of tokens, "first": {"id", "a", "b"}}
  weights     fields of tensor_diff.WeightsDiff, null if one of the two has no weights that can be read
"""

from collections.abc import Callable
from typing import Any

from nanochat.common import UserError
from nanochat.formats.portable import part
from nanochat.inspection.contents import Contents
from nanochat.inspection.describe import SIZES, describe, effective
from nanochat.inspection.describe_rows import ancestor, rows_of
from nanochat.inspection.tensor_diff import WeightsDiff, compare_weights
from nanochat.inspection.tokenizer_facts import TokenizerFacts

Record = dict[str, Any]
NOT_OF_THE_RUN = {"resume", "resume_from_step", "model_tag", "run", "tensorboard"}  # flags
NOT_OF_THE_NETWORK = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "nanochat_config"}
NOT_COMPARED = {"licence", "planned_steps"}


def compare(
    a: Contents, b: Contents, values: bool = True, progress: Callable[[int, int], None] = lambda done, total: None
) -> Record:
    """The differences, in JSON types. `values`: read the weights, one tensor at a time; `progress` as in
    compare_weights. Raises UserError if the two have nothing in common."""
    facts = describe(a), describe(b)
    weights = compare_weights(a, b, values, progress) if a.tensors and b.tensors else None
    tokenizer = compare_tokenizers(a.tokenizer, b.tokenizer) if a.tokenizer and b.tokenizer else None
    if weights is None and tokenizer is None:
        raise UserError(f"{a.path} and {b.path} have nothing in common to compare: neither weights nor a tokenizer")
    config, has_configs = compare_configs(a, b), bool((a.config and b.config) or (a.settings and b.settings))
    same = not config and (weights is None or weights.same) and (tokenizer is None or tokenizer["same"])
    training = [{**origin(f), **f.get("training", {})} for f in facts]
    flags = [{k: v for k, v in part(c.meta, "user_config").items() if k not in NOT_OF_THE_RUN} for c in (a, b)]
    return {
        "a": {"path": str(a.path), "what": rows_of(facts[0])[0][1]},
        "b": {"path": str(b.path), "what": rows_of(facts[1])[0][1]},
        "same": same,
        "verdict": verdict(same, config if has_configs else None, weights, tokenizer),
        "config": config,
        "training": {name: pair for name, pair in in_both(*training).items() if name not in NOT_COMPARED},
        "flags": in_both(*flags),
        "figures": in_both(*(f.get("figures", {}) for f in facts)),
        "tokenizer": tokenizer,
        "weights": weights and weights.to_dict(),
    }


def origin(facts: Record) -> Record:
    """Which run it is of, and from which it was trained directly."""
    known: Record = {name: facts[name] for name in ("stage", "run") if name in facts}
    if before := facts.get("from"):
        known["from"] = ancestor({name: before[-1][name] for name in ("stage", "run", "step")})
    return known


def in_both(a: Record, b: Record) -> dict[str, list[Any]]:
    """The values that differ, of the names that both have."""
    return {name: [a[name], b[name]] for name in a if name in b and a[name] != b[name]}


def compare_configs(a: Contents, b: Contents) -> dict[str, list[Any]]:
    """The fields that decide what is computed, where they differ. Nothing if one of the two has no config."""
    if a.config and b.config:
        one, two = ({**effective(c), **{name: getattr(c, name) for name in SIZES}} for c in (a.config, b.config))
    elif a.settings and b.settings:
        one, two = ({k: v for k, v in c.settings.items() if k not in NOT_OF_THE_NETWORK} for c in (a, b))
    else:
        return {}
    names = list(dict.fromkeys([*one, *two]))
    return {name: [one.get(name), two.get(name)] for name in names if one.get(name) != two.get(name)}


def compare_tokenizers(a: TokenizerFacts, b: TokenizerFacts) -> Record:
    """Whether they have the same tokens under the same ids, and the first that differs."""
    sizes = [a.vocab_size, b.vocab_size]
    if a.hash and a.hash == b.hash:
        return {"same": True, "sizes": sizes, "only_a": 0, "only_b": 0, "first": None}
    one, two = a.tokens(), b.tokens()
    first = next((i for i, (x, y) in enumerate(zip(one, two)) if x != y), min(len(one), len(two)))
    pair = {key: shown(tokens[first]) if first < len(tokens) else None for key, tokens in (("a", one), ("b", two))}
    same = one == two and not (a.hash or b.hash)  # the same tokens under another split pattern are another tokenizer
    return {
        "same": same,
        "sizes": sizes,
        "only_a": len({*one} - {*two}),
        "only_b": len({*two} - {*one}),
        "first": None if one == two else {"id": first, **pair},
    }


def shown(token: bytes | str) -> str:
    return token.decode("utf-8", "backslashreplace") if isinstance(token, bytes) else token


def verdict(same: bool, config: Record | None, weights: WeightsDiff | None, tokenizer: Record | None) -> str:
    """One line: the same model or not, and why. None is what one of the two lacks."""
    equal, different = list[str](), list[str]()
    if config:
        different.append(f"the config ({', '.join(config)})")
    if config is not None and not config:
        equal.append("the config")
    if weights:
        count = f"{weights.identical:,} tensors" if weights.compared != "shapes" else "names and shapes of the tensors"
        if weights.same:
            equal.append(count + (" (the files' hashes)" if weights.compared == "hashes" else ""))
        else:
            different.append(weights_in_words(weights))
    if tokenizer:
        (equal if tokenizer["same"] else different).append("the tokenizer")
    listed = f"{', '.join(equal)} {'are' if len(equal) > 1 else 'is'} equal"
    unread = "" if weights else "; weights were not compared"
    if same:
        return f"the same {'model' if weights else 'as far as both go'}: {listed}{unread}"
    rounded = weights is not None and weights.rounded and different == [weights_in_words(weights)]
    kind = "the same model, rounded" if rounded else "different"
    return f"{kind}: {'; '.join(different)}" + (f"; {listed}" if equal else "") + unread


def weights_in_words(weights: WeightsDiff) -> str:
    changed = f"{len(weights.changed):,} of {max(weights.tensors):,} tensors"
    if weights.rounded:
        return f"{changed} differ by rounding ({', '.join(weights.dtypes)})"
    parts = [f"{changed} have other values"] if weights.changed else []
    parts += [f"{len(weights.shapes):,} have other shapes"] if weights.shapes else []
    parts += [
        f"{len(names):,} only in {side}" for side, names in (("A", weights.only_a), ("B", weights.only_b)) if names
    ]
    return ", ".join(parts)
