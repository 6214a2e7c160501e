"""Recipes, and changes to one."""

import pytest
from stubs import TINY

from nanochat.checkpoint_manager import open_checkpoint
from nanochat.common import UserError
from nanochat.gpt_config import GPTConfig
from nanochat.optim import OptimizerConfig
from nanochat.recipe import RECIPES, get_recipe
from nanochat.runtime import Runtime
from nanochat.train.schedules import ScheduleConfig


def test_names_stand_for_what_is_published() -> None:
    published, later = get_recipe("published"), get_recipe("later")
    assert published.model(n_layer=3) == GPTConfig(n_layer=3) and published.optimizer() == OptimizerConfig()
    assert published.schedule(10) == ScheduleConfig(10)
    assert not published.plan.decay_by_horizon and published.plan.batch_exponent == 0.5
    assert later.model(n_layer=3) == GPTConfig.later(n_layer=3) and later.optimizer() == OptimizerConfig.later()
    assert later.schedule(10).momentum_peak == 0.97 and later.plan.decay_by_horizon
    # The default is the later one, but for what short runs want.
    default = get_recipe("default")
    assert default.model(n_layer=3) == later.model(n_layer=3, init="published")
    assert default.optimizer() == later.optimizer()
    assert default.schedule(10) == later.schedule(10) and default.plan.decay_by_horizon
    assert (default.plan.horizon_exponent, later.plan.horizon_exponent) == (0.2, 0.0)
    assert get_recipe("plain").model(window_pattern="SL").window_pattern == "L"


def test_changes_reach_their_owner() -> None:
    recipe = get_recipe("later, smear=false, matrix_lr=0.03, decay_shape=linear, batch_exponent=0.25, init=published")
    config = recipe.model(n_layer=2)
    assert not config.smear and config.init == "published" and config.backout and config.n_layer == 2
    assert recipe.optimizer().matrix_lr == 0.03 and recipe.optimizer(matrix_lr=0.1).matrix_lr == 0.1
    assert recipe.schedule(7).decay_shape == "linear" and recipe.schedule(7).momentum_peak == 0.97
    assert recipe.plan.batch_exponent == 0.25 and recipe.plan.decay_by_horizon
    assert get_recipe("later").model().smear, "the recipe itself stays"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("latest", "one of default"),
        ("", "one of"),
        ("later,", "smear=False"),
        ("later,smaer=1", "known: "),
        ("later,smear", "smear=False"),
        ("later,smear=maybe", "takes a bool"),
        ("later,rope_base=x", "takes a float"),
        ("later,matrix_lr=nan", "finite"),
        ("later,lr_scale=-1", "lr_scale"),
        ("later,horizon_exponent=2", "exponents"),
        ("later,most_decay=-1", "most_decay"),
        ("later,n_layer=3", "not 'n_layer=3'"),
        ("later,num_steps=3", "not 'num_steps=3'"),
    ],
)
def test_mistakes_are_named(text: str, says: str) -> None:
    with pytest.raises(UserError, match="--recipe") as caught:
        assert get_recipe(text).plan
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        "softcap=0.0",
        "rope_base=0.0",
        "smear_channels=0",
        "muon_beta2=1.5",
        "matrix_lr=-1.0",
        "decay_shape=foo",
        "momentum_peak=5.0",
    ],
)
def test_values_that_cannot_be_are_refused(change: str) -> None:
    recipe = get_recipe(f"later,{change}")
    with pytest.raises(UserError, match=change.split("=")[0]):
        assert recipe.model() and recipe.optimizer() and recipe.schedule(5)


def test_a_changed_recipe_trains_and_is_remembered(copied) -> None:  # type: ignore[no-untyped-def]
    from nanochat.train.starting_model import open_starting_model
    from scripts import base_train

    flags = [f for f in TINY if not f.startswith(("--recipe", "--model-tag"))]
    text = f"--data={copied / 'text.jsonl'}"
    assert base_train.main([*flags, text, "--recipe=plain,smear=True,lr_scale=2", "--model-tag=changed"]) == 0
    saved = open_checkpoint(copied / "base_checkpoints" / "changed")
    assert saved.meta["model_config"]["smear"] and not saved.meta["model_config"]["backout"]
    start = open_starting_model(None, "base", saved.path.parent, "changed", -1, Runtime.create("cpu"))
    assert start.base["recipe"] == "plain,smear=True,lr_scale=2"


def test_every_recipe_is_complete() -> None:
    for name in RECIPES:
        recipe = get_recipe(name)
        assert recipe.model() and recipe.optimizer() and recipe.schedule(5) and recipe.plan
