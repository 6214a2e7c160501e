"""The facts of `describe` as rows of text, what one wants to know first in front."""

from collections.abc import Iterator
from typing import Any

from nanochat.common import format_count, format_seconds
from nanochat.inspection.contents import KINDS

Record = dict[str, Any]
STAGE_WORDS = {"base": "base model", "sft": "chat model (sft)", "rl": "chat model (rl)"}
HF_SIZES = {  # names in config.json of most architectures
    "layers": ("num_hidden_layers", "n_layer"),
    "width": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "key/value heads": ("num_key_value_heads",),
    "context": ("max_position_embeddings", "n_positions"),
    "vocabulary": ("vocab_size",),
}
MAX_TEXT = 1000  # characters of a value, which a file that others wrote may have millions of
DTYPE_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def rows_of(facts: Record) -> list[tuple[str, str]]:
    """(name, value) rows."""
    makers = (
        identity,
        network,
        foreign_network,
        parameters,
        memory,
        training,
        figures,
        tokenizer,
        files,
        exports,
        notes,
    )
    rows = [(name, value) for make in makers for name, value in make(facts) if value]
    return [(name, value if len(value) <= MAX_TEXT else value[:MAX_TEXT] + "…") for name, value in rows]


def identity(facts: Record) -> Iterator[tuple[str, str]]:
    """What it is, where it is from, when it was saved."""
    parts = [STAGE_WORDS.get(facts.get("stage", ""), ""), facts.get("run", "")]
    parts += [f"step {facts['step']:,}"] if is_number(facts.get("step")) else []
    kind, what = KINDS[facts["kind"]], ", ".join(part for part in parts if part)
    yield "what", kind if not what else what if facts["kind"] == "checkpoint" else f"{kind}: {what}"
    if others := [step for step in facts.get("steps", []) if step != facts["step"]]:
        yield "other steps", short_list(others) + ("" if facts["step"] > others[-1] else " (newest)")
    if chain := [ancestor(entry) for entry in facts.get("from", [])]:
        yield "trained from", ", then ".join(chain)


def ancestor(entry: Record) -> str:
    data = f" of {entry['data']}" if entry.get("data") else ""
    known = [f"{format_count(entry['tokens'])} tokens{data}"] if is_number(entry.get("tokens")) else []
    known += [f"{entry['val_bpb']:.4f} bpb"] if is_number(entry.get("val_bpb")) else []
    return f"{entry['stage']} {entry['run']} step {entry['step']}" + (f" ({', '.join(known)})" if known else "")


def network(facts: Record) -> Iterator[tuple[str, str]]:
    """Sizes and features of a network of ours."""
    model = facts.get("model", {})
    if "form" not in model:
        return
    config = model["config"]
    heads = f"{config['n_head']} heads of {config['n_embd'] // config['n_head']}"
    if config["n_kv_head"] < config["n_head"]:
        heads += f" ({config['n_kv_head']} key/value)"
    yield (
        "network",
        f"{config['n_layer']} layers x {config['n_embd']}, {heads}, context {config['sequence_len']:,}, "
        f"vocabulary {config['vocab_size']:,}",
    )
    changes = "".join(f", {name}={value}" for name, value in model["changes"].items())
    yield "form", model["form"] + changes + (f": {', '.join(model['features'])}" if model["features"] else "")


def foreign_network(facts: Record) -> Iterator[tuple[str, str]]:
    """Sizes of another program's network, as its config.json has them."""
    model = facts.get("model", {})
    if "form" in model or not model:
        return
    config = model["config"]
    yield "network", f"model_type {config.get('model_type', 'not given')!s:.80}"
    found = {word: value for word, names in HF_SIZES.items() for name in names if is_number(value := config.get(name))}
    yield (
        "sizes",
        ", ".join(f"{value:,} {word}" if "head" in word else f"{word} {value:,}" for word, value in found.items()),
    )


def parameters(facts: Record) -> Iterator[tuple[str, str]]:
    counts = dict(facts.get("parameters", {}))
    total = counts.pop("total", 0)
    if total:
        roles = ", ".join(f"{name.replace('_', ' ')} {format_count(n)}" for name, n in counts.items() if n)
        yield "parameters", f"{total:,}" + (f" ({roles})" if roles else "")
    dtypes = facts.get("dtypes", {})
    words = [
        DTYPE_WORDS.get(name, name) + (f" {n / max(1, sum(dtypes.values())):.0%}" if len(dtypes) > 1 else "")
        for name, n in dtypes.items()
    ]
    yield "weights in", ", ".join(words)


def memory(facts: Record) -> Iterator[tuple[str, str]]:
    if "memory" in facts:
        sizes = {name: size(count) for name, count in facts["memory"].items()}
        yield "memory to run", f"{sizes['float32']} in float32, {sizes['bfloat16']} in bfloat16"
        token, full = sizes["kv_cache_per_token"], sizes["kv_cache_full"]
        yield "KV cache", f"{token} a token, {full} at the whole context (bfloat16)"


def training(facts: Record) -> Iterator[tuple[str, str]]:
    """How much, how long, on what, from which text."""
    values = facts.get("training", {})
    amount = []
    if is_number(steps := values.get("steps")):
        planned = values.get("planned_steps")
        amount.append(f"{steps:,} of {planned:,} steps" if is_number(planned) else f"{steps:,} steps")
    if is_number(values.get("tokens")):
        ratio = values.get("tokens_per_parameter")
        each = f" ({ratio:.2f} per parameter)" if is_number(ratio) else ""
        amount.append(f"{format_count(values['tokens'])} tokens{each}")
    amount += [f"{values['flops']:.2e} FLOPs"] if is_number(values.get("flops")) else []
    seconds = values.get("wall_seconds", values.get("seconds"))
    if is_number(seconds):
        amount.append(format_seconds(seconds))
    yield "trained", ", ".join(amount)
    ranks = values.get("world_size")
    many = f"{ranks} x " if is_number(ranks) and ranks > 1 else ""
    where = [many + str(values["device"])] if values.get("device") else []
    where += [str(values[key]) for key in ("processor", "dtype") if values.get(key)]
    yield "on", ", ".join(where)
    if facts.get("saved_at"):
        yield "saved", facts["saved_at"].replace("T", " ").replace("+00:00", " UTC")
    recipe = [str(values["recipe"])] if "recipe" in values else []
    yield "recipe", ", ".join(recipe + ([f"seed {values['seed']}"] if "seed" in values else []))
    yield "data", str(values.get("data", ""))
    yield "its licence", str(values.get("licence", ""))


def figures(facts: Record) -> Iterator[tuple[str, str]]:
    values = dict(facts.get("figures", {}))
    bpb, best = values.pop("val_bpb", None), values.pop("best_val_bpb", None)
    if is_number(bpb):
        yield "bits per byte", f"{bpb:.4f}" + (f" (best {best:.4f})" if is_number(best) and best < bpb else "")
    yield "figures", ", ".join(f"{name} {value:.4g}" for name, value in values.items() if is_number(value))


def tokenizer(facts: Record) -> Iterator[tuple[str, str]]:
    if values := facts.get("tokenizer"):
        parts = [f"{values['kind']}, {values['vocab_size']:,} tokens, {len(values['special_tokens'])} special"]
        parts += (
            [f"{values['bytes_per_token']:.2f} bytes per token"] if is_number(values.get("bytes_per_token")) else []
        )
        parts += [f"hash {values['hash'][:12]}"] if values.get("hash") else []
        yield "tokenizer", ", ".join(parts)


def files(facts: Record) -> Iterator[tuple[str, str]]:
    if sizes := facts.get("files"):
        largest = sorted(sizes.items(), key=lambda item: -item[1])
        names = ", ".join(f"{name} {size(n)}" for name, n in largest[:4])
        more = f", {len(largest) - 4} more" if len(largest) > 4 else ""
        state = "" if facts["integrity"] == "not recorded" else f"; {facts['integrity']}"
        yield "files", f"{size(sum(sizes.values()))}: {names}{more}{state}"


def exports(facts: Record) -> Iterator[tuple[str, str]]:
    """How transformers loads it, or would load its export."""
    code = "with the modelling file of nanochat (trust_remote_code=True)"
    if route := facts.get("route"):
        loaders = {"class": "transformers, with its own NanoChat class", "code": f"transformers, {code}"}
        yield "loaded by", loaders.get(route, f"what reads {route.upper()}")
    elif values := facts.get("exports"):
        lacks = f"its own NanoChat class lacks {', '.join(values['lacks'])}"
        yield "exports to", "transformers' own NanoChat class" if values["class"] else f"transformers {code}; {lacks}"


def notes(facts: Record) -> Iterator[tuple[str, str]]:
    for note in facts.get("notes", []):
        yield "note", note


def size(count: float) -> str:
    """`7866512` -> `7.5 MiB`."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f} bytes"


def short_list(values: list[int], shown: int = 6) -> str:
    """`100, 200, … 1,200`"""
    words = [f"{value:,}" for value in values]
    return ", ".join(words if len(words) <= shown else [*words[:2], "…", *words[-2:]])


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
