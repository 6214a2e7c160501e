"""What a model was trained on, as it may be published: data sets with their licences, and flags without paths.

Names of the user's own files, tags of runs and folders are nobody else's business: they stay out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from nanochat.data.listing import split_entries
from nanochat.dataset import STARTER_VAL
from nanochat.train.commands import describe_flags
from nanochat.train.finetuning import FinetuneConfig
from nanochat.train.pretraining import PretrainConfig
from nanochat.train.reinforcement import RLConfig


@dataclass(frozen=True)
class DataSet:
    """A source of texts, conversations or tasks. `hub` is its name among the hub's data sets, if it has one there."""

    short: str
    name: str
    licence: str
    hub: str = ""
    language: str = "en"


STARTER = DataSet(
    "starter data",
    "nanochat's starter data, in the package (nanochat/starter/ATTRIBUTION.md)",
    "by source: CC BY-SA 4.0, CC BY 4.0, Apache-2.0, MIT, BSD-3-Clause, public domain",
)
GENERATED = DataSet("generated tasks", "arithmetic, spelling and word problems that nanochat generates", "MIT")
IDENTITY = DataSet("identity", "nanochat's conversations about itself", "MIT")
GSM8K = DataSet("GSM8K", "GSM8K", "MIT", "openai/gsm8k")
OWN = DataSet("own data", "data of its author's own, not published", "not stated", language="")
EARLIER = DataSet("data of an earlier run", "data of the earlier run that it started from", "not recorded", language="")

TEXTS = {  # by the name after base_train's --data
    "starter": (STARTER,),
    STARTER_VAL: (),  # nothing is trained on it
    "fineweb-edu": (
        DataSet("FineWeb-Edu", "FineWeb-Edu, 100B tokens, shuffled", "ODC-By 1.0", "karpathy/fineweb-edu-100b-shuffle"),
    ),
    "climbmix": (DataSet("ClimbMix", "ClimbMix, shuffled", "CC BY-NC 4.0", "karpathy/climbmix-400b-shuffle"),),
}
CONVERSATIONS = {  # by the name after chat_sft's --data
    "starter": (STARTER, GENERATED),
    "published": (
        DataSet("SmolTalk", "SmolTalk", "Apache-2.0", "HuggingFaceTB/smol-smoltalk"),
        DataSet("MMLU", "MMLU, auxiliary training questions", "MIT", "cais/mmlu"),
        GSM8K,
        GENERATED,
        IDENTITY,
    ),
}
REWARDED = {"GSM8K": (GSM8K,)}  # by the name after chat_rl's --tasks; all others are generated

# Flags that may be published: numbers, switches and these texts, but for those that do not change the model.
PUBLIC_TEXTS = ("recipe", "window_pattern", "fp8_recipe", "source", "tasks")
LEFT_OUT = (
    *("resume", "resume_from_step", "tensorboard", "timeout", "model_step", "keep_last", "save_every", "eval_every"),
    *("eval_tokens", "sample_every", "core_metric_every", "core_metric_max_per_task", "device_batch_size", "strict"),
)
OWN_DATA = "OWN_DATA"  # in place of names of files
SCRIPTS = {
    "base": ("base_train", PretrainConfig),
    "sft": ("chat_sft", FinetuneConfig),
    "rl": ("chat_rl", RLConfig),
}


def data_sets(stage: str, flags: Mapping[str, Any]) -> list[DataSet]:
    """The data that a stage (base, sft or rl) with these flags trained on; [] if the flags do not say."""
    found: dict[DataSet, None] = {}
    if stage == "rl":
        for name in str(flags.get("tasks") or "").split(","):
            found |= dict.fromkeys(REWARDED.get(name.strip(), (GENERATED,)) if name.strip() else ())
    else:
        known = TEXTS if stage == "base" else CONVERSATIONS
        for name in names_of(flags, known):
            found |= dict.fromkeys(known.get(name, (OWN,)))
        if found and flags.get("init_from"):
            found[EARLIER] = None
    return list(found)


def names_of(flags: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The entries of --data without their numbers of passes; those that are not `known` as OWN_DATA."""
    data = flags.get("data")
    entries = split_entries(data, list(known)) if isinstance(data, str) else []
    names = [entry.rpartition(":")[0] or entry for entry in entries]
    return list(dict.fromkeys(name if name in known else OWN_DATA for name in names))


def public_flags(stage: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's flags that may be published."""
    public = {
        name: value
        for name, value in flags.items()
        if (name in PUBLIC_TEXTS and isinstance(value, str)) or isinstance(value, bool | int | float)
    }
    if names := names_of(flags, TEXTS if stage == "base" else CONVERSATIONS):
        public["data"] = ",".join(names)
    if flags.get("init_from"):
        public["init_from"] = "ANOTHER_RUN"
    return {name: value for name, value in public.items() if name not in LEFT_OUT}


def public_command(stage: str, flags: Mapping[str, Any]) -> str:
    """The command of a stage, with what may be published of its flags, as far as they are not the default."""
    script, config = SCRIPTS[stage]
    defaults = {item.name: item.default for item in fields(config)}
    given = {name: value for name, value in public_flags(stage, flags).items() if value != defaults.get(name)}
    return f"python -m scripts.{script} {describe_flags(given)}".rstrip()
