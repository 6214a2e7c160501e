"""The differences of `compare` as rows of text."""

from typing import Any

from nanochat.inspection.describe_rows import is_number
from nanochat.inspection.tensor_diff import group_of

Record = dict[str, Any]
MAX_WIDTH = 200  # characters of a value
MAX_NAMES = 10  # of tensors that only one of the two has
TENSOR_COLUMNS = ("tensors", "differ", "max |A-B|", "relative", "cosine")


def rows_of(found: Record) -> list[tuple[str, str, str]]:
    """(name, A, B): first what makes them different models, then how they were made."""
    rows = [(name, *map(text, pair)) for name, pair in found["config"].items()]
    if (tokenizer := found["tokenizer"]) and not tokenizer["same"]:
        rows.append(("vocabulary", *(f"{size:,}" for size in tokenizer["sizes"])))
        rows.append(("tokens of its own", f"{tokenizer['only_a']:,}", f"{tokenizer['only_b']:,}"))
        if first := tokenizer["first"]:
            rows.append((f"first other token, {first['id']:,}", repr(first["a"]), repr(first["b"])))
        else:
            rows.append(("split pattern or special tokens", "differ", "differ"))
    if weights := found["weights"]:
        rows += [("dtype", *pair.split(", ")) for pair in weights["dtypes"]]
        rows += [(name, *map(text, pair)) for name, pair in list(weights["shapes"].items())[:MAX_NAMES]]
        rows += [(name, "there", "missing") for name in weights["only_a"][:MAX_NAMES]]
        rows += [(name, "missing", "there") for name in weights["only_b"][:MAX_NAMES]]
    for part, prefix in (("figures", ""), ("training", ""), ("flags", "--")):
        rows += [
            (prefix + name.replace("_", "-" if prefix else " "), *map(text, pair)) for name, pair in found[part].items()
        ]
    return rows


def text(value: Any) -> str:
    """A value of a config or a record."""
    if isinstance(value, bool) or value is None:
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    words = f"{value:.5g}" if is_number(value) else str(value)
    return words if len(words) <= MAX_WIDTH else words[:MAX_WIDTH] + "…"


def tensor_rows(weights: Record | None, every: bool) -> list[tuple[str, ...]]:
    """The TENSOR_COLUMNS of the tensors whose values differ, the largest relative difference first: of each, or of each
    group of one role in all layers. Where all is rounding, only of each."""
    changed = weights["changed"] if weights and (every or not weights["rounded"]) else []
    groups: dict[str, list[Record]] = {}
    for tensor in changed:
        groups.setdefault(tensor["name"] if every else group_of(tensor["name"]), []).append(tensor)
    return [
        (
            name.removeprefix("transformer.").removesuffix(".weight"),
            f"{len(group):,}",
            number(largest(group, "max"), "{:.3g}"),
            number(largest(group, "relative"), "{:.3g}"),
            number(min((t["cosine"] for t in group if t["cosine"] is not None), default=None), "{:.6f}"),
        )
        for name, group in groups.items()
    ]


def largest(group: list[Record], key: str) -> float | None:
    """None if one of them is not finite."""
    values = [tensor[key] for tensor in group]
    return None if None in values else max(values)


def number(value: float | None, form: str) -> str:
    return "not finite" if value is None else form.format(value)
