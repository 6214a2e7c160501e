"""Recipes: everything about the network and its training that is not a size, a horizon or a seed, under one name.

A recipe may be followed by changes: "later,smear=False,muon_beta2=0.95" is the later recipe except for two fields. So
an experiment is one flag, and the checkpoint records it. `bench/recipe.py` measures the effect.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from nanochat.common import UserError
from nanochat.gpt_config import GPTConfig
from nanochat.optim import OptimizerConfig
from nanochat.scaling import MEASURED_SIZE, network_size
from nanochat.train.schedules import ScheduleConfig


@dataclass(frozen=True)
class PlanRules:
    """How rates and decay follow from the batch and the horizon; scaling.make_plan has the formulas."""

    decay_by_horizon: bool = False
    most_decay: float = 0.1
    batch_exponent: float = 0.5
    horizon_exponent: float = 0.0
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.lr_scale < 0 or not 0 <= self.batch_exponent <= 1 or not 0 <= self.horizon_exponent <= 1:
            raise UserError("--recipe: lr_scale cannot be negative, the exponents of batch and horizon lie from 0 to 1")
        if self.most_decay < 0:
            raise UserError(f"--recipe: most_decay, a share of a weight, cannot be negative, got {self.most_decay:g}")


@dataclass(frozen=True)
class Recipe:
    """Constructors of the model config and optimizer config, and changes to the fields of each part."""

    model_form: Callable[..., GPTConfig] = GPTConfig
    optimizer_form: Callable[..., OptimizerConfig] = OptimizerConfig
    model_changes: Mapping[str, Any] = field(default_factory=dict)
    optimizer_changes: Mapping[str, Any] = field(default_factory=dict)
    schedule_changes: Mapping[str, Any] = field(default_factory=dict)
    plan_changes: Mapping[str, Any] = field(default_factory=dict)

    def model(self, **sizes: Any) -> GPTConfig:
        """The network of these sizes."""
        return self.model_form(**{**sizes, **self.model_changes})

    def optimizer(self, **given: Any) -> OptimizerConfig:
        """The optimizer's rates; `given` overrides the recipe."""
        return self.optimizer_form(**{**self.optimizer_changes, **given})

    def schedule(self, num_steps: int, **given: Any) -> ScheduleConfig:
        """The schedule of a pretraining run; `given` overrides the recipe."""
        return ScheduleConfig(num_steps, **{**self.schedule_changes, **given})

    @property
    def plan(self) -> PlanRules:
        return PlanRules(**self.plan_changes)


# As its authors train depths 12 to 26 on GPUs; the last four of the schedule's values and the flags of runs/speedrun.sh
# are those of their latest run of depth 24.
LATER = Recipe(
    GPTConfig.later,
    OptimizerConfig.later,
    schedule_changes={
        "momentum_peak": 0.97,
        "momentum_warmdown": True,
        "decay_shape": "cosine",
        "momentum_warmup_steps": 400,
        "warmup_steps": 40,
        "warmdown_ratio": 0.65,
        "final_lr_frac": 0.05,
    },
    plan_changes={"decay_by_horizon": True},
)
# The later one's network and rates, with the published initialisation and schedule of the rate, n-grams in place of
# smear, and rates that rise as the horizon gets shorter: better in the short runs of small models that were compared
# here (dev/LOG.md, 2026-11-24 and 29).
SMALL = replace(
    LATER,
    model_form=GPTConfig.small,
    schedule_changes={"momentum_peak": 0.97, "momentum_warmdown": True, "decay_shape": "cosine"},
    plan_changes={**LATER.plan_changes, "horizon_exponent": 0.2},
)
RECIPES = {
    "default": SMALL,  # a run's is small or later, by the size of its network: see resolve_recipe
    "small": SMALL,
    "published": Recipe(),
    "later": LATER,
    # Full attention and no extras, to measure features against.
    "plain": Recipe(GPTConfig.plain, model_changes={"window_pattern": "L"}),
    # That network with the training of small, for models that other programs shall run (docs/portable.md).
    "portable": replace(SMALL, model_form=GPTConfig.plain, model_changes={"window_pattern": "L"}),
}
FIRST_MEANINGS = {
    "default": "small",
    "later": "later,momentum_warmup_steps=300,warmup_steps=0,warmdown_ratio=0.5,final_lr_frac=0.0",
}
"""What these names meant in the checkpoints that do not record a resolved recipe."""

# Which dataclass has which fields. Sizes and horizons have their own flags.
SIZES = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "num_steps"}
OWNERS = {
    "model_changes": GPTConfig,
    "optimizer_changes": OptimizerConfig,
    "schedule_changes": ScheduleConfig,
    "plan_changes": PlanRules,
}


def get_recipe(text: str) -> Recipe:
    """The recipe that `text` names: "later", or "later,smear=False,matrix_lr=0.03".

    Raises UserError for a name, a field or a value that does not exist.
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name not in RECIPES:
        raise UserError(f"--recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    recipe = RECIPES[name]
    changed = {kind: dict(getattr(recipe, kind)) for kind in OWNERS}
    for change in changes:
        key, equals, value = change.partition("=")
        kind = next((kind for kind, owner in OWNERS.items() if key in _types(owner)), None)
        if not equals or kind is None:
            known = ", ".join(sorted({key for owner in OWNERS.values() for key in _types(owner)}))
            raise UserError(f"--recipe: after the name come changes like backout=False, not {change!r}; known: {known}")
        changed[kind][key] = _read(key, value, _types(OWNERS[kind])[key])
    return Recipe(recipe.model_form, recipe.optimizer_form, **changed)


def resolve_recipe(text: str, n_layer: int, n_embd: int) -> str:
    """`text` with the name "default" replaced by the recipe for a network of this size: `small` up to the largest that
    was measured here, above it `later`, which its authors verified there."""
    name, comma, changes = text.partition(",")
    if name.strip() != "default":
        return text
    return ("small" if network_size(n_layer, n_embd) <= MEASURED_SIZE else "later") + comma + changes


def first_meaning(text: str) -> str:
    """A recipe of a run that recorded no resolved one, as it was then."""
    name, comma, changes = text.partition(",")
    return FIRST_MEANINGS.get(name.strip(), name) + comma + changes


def with_changes(text: str, config: GPTConfig) -> str:
    """`text` with the changes that make its network `config`, as its name may have meant another when that was made."""
    found = config.to_dict()
    sizes = {name: found[name] for name in SIZES if name in found}
    try:
        named = get_recipe(resolve_recipe(text, config.n_layer, config.n_embd)).model(**sizes).to_dict()
    except UserError:  # of another version
        return text
    return ",".join([text, *(f"{name}={value}" for name, value in found.items() if value != named[name])])


def recipe_rules(text: str) -> dict[str, Any]:
    """The arguments of scaling.make_plan that come from the (resolved) recipe."""
    recipe = get_recipe(text)
    rates = recipe.optimizer()
    return {"recipe": text, **vars(recipe.plan), "weight_decay": rates.weight_decay, "matrix_lr": rates.matrix_lr}


def _types(owner: Any) -> dict[str, Any]:
    """The fields of a dataclass that a recipe may set, and their types."""
    hints = get_type_hints(owner)
    return {f.name: hints[f.name] for f in fields(owner) if f.name not in SIZES}


def _read(key: str, value: str, kind: Any) -> Any:
    """`value` converted to the field's type."""
    if kind is float and value.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        raise UserError(f"--recipe: {key} must be a finite number, got {value}")
    words: dict[str, Any] = {"true": True, "false": False, "1": True, "0": False}
    try:
        return words[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise UserError(f"--recipe: {key} takes a {kind.__name__}, got {value!r}") from None
