"""Recipes, and changes to one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stubs import TINY

from nanochat.checkpoint_manager import open_checkpoint
from nanochat.common import UserError
from nanochat.gpt_config import GPTConfig
from nanochat.optim import OptimizerConfig
from nanochat.planning.law import Law
from nanochat.recipe import RECIPES, PlanRules, Recipe, get_recipe, resolve_recipe, with_changes
from nanochat.runtime import Runtime
from nanochat.scaling import MEASURED_SIZE, derive_sizes, network_size
from nanochat.train.pretraining import PretrainConfig, run_recipe
from nanochat.train.run import Run
from nanochat.train.schedules import ScheduleConfig


def test_names_stand_for_what_is_published() -> None:
    first, later = get_recipe("published"), get_recipe("later")
    assert first.model(n_layer=3) == GPTConfig(n_layer=3) and first.optimizer() == OptimizerConfig()
    assert first.schedule(10) == ScheduleConfig(10)
    assert not first.plan.decay_by_horizon and first.plan.batch_exponent == 0.5
    assert later.model(n_layer=3) == GPTConfig.later(n_layer=3) and later.optimizer() == OptimizerConfig.later()
    schedule = later.schedule(2000)
    assert (schedule.warmup_steps, schedule.warmdown_steps, schedule.final_lr_frac) == (40, 1300, 0.05)
    assert (schedule.momentum_peak, schedule.momentum_warmup_steps) == (0.97, 400)
    assert later.model().init == "later" and later.plan == PlanRules(decay_by_horizon=True)
    # The small one is the later one, but for what short runs want.
    small = get_recipe("small")
    network = small.model(n_layer=3, vocab_size=4096)
    published = {"init": "published", "smear": False}
    assert network == GPTConfig.later(n_layer=3, vocab_size=4096, ngram_rows=64 * 4096, **published)
    assert small.model(vocab_size=50_000).ngram_rows == 2**20  # 128 MiB in float32
    assert get_recipe("small,ngram_rows=0").model(n_layer=3) == later.model(n_layer=3, **published)
    assert small.optimizer() == later.optimizer()
    assert small.schedule(10) == OLD_SCHEDULE and small.plan.decay_by_horizon
    assert small.plan.horizon_exponent == 0.2
    assert get_recipe("plain").model(window_pattern="SL").window_pattern == "L"


OLD_SCHEDULE = ScheduleConfig(10, momentum_peak=0.97, momentum_warmdown=True, decay_shape="cosine")


def test_the_default_is_what_was_measured_at_that_size() -> None:
    """Here up to depth 6, and the law's largest network is within; by its authors from depth 12 on."""
    largest = max(params for params, _, _ in Law.load().points)  # type: ignore[union-attr]
    assert largest < MEASURED_SIZE == network_size(6, 384)
    for depth in (1, 2, 3, 4, 5, 6, 12, 20, 24, 26):
        name, head_dim = ("small", 64) if depth <= 6 else ("later", 128)
        width = derive_sizes(depth, head_dim=head_dim).n_embd
        assert resolve_recipe("default,smear=False", depth, width) == f"{name},smear=False"
        network = PretrainConfig(depth=depth, head_dim=head_dim).network(300)(depth)
        assert network.init == ("later" if name == "later" else "published")
    assert resolve_recipe("small", 24, 1536) == "small" and resolve_recipe("published", 1, 64) == "published"


def test_a_resumed_run_keeps_its_recipe() -> None:
    """As recorded; before recipes were recorded with their default resolved, the names meant other schedules."""

    def resumed(recipe: str, meta: dict[str, str]) -> Recipe:
        checkpoint: Any = SimpleNamespace(meta=meta)
        run = Run("base_train", Path(), PretrainConfig(depth=24, recipe=recipe), None, checkpoint)  # type: ignore[arg-type]
        return get_recipe(run_recipe(run, GPTConfig(n_layer=24, n_embd=1536, n_head=12, n_kv_head=12)))

    assert resumed("default", {"recipe": "later,smear=False"}) == get_recipe("later,smear=False")
    assert resumed("default", {}) == get_recipe("small")
    assert resumed("later", {}).schedule(10) == OLD_SCHEDULE
    assert resumed("later,warmdown_ratio=0.3", {}).schedule(10).warmdown_ratio == 0.3
    assert resumed("published", {}) == get_recipe("published")


def test_a_name_that_meant_another_network_is_followed_by_its_changes() -> None:
    sizes = {"n_layer": 3, "n_embd": 128, "n_head": 2, "n_kv_head": 2, "vocab_size": 4096}
    for name in RECIPES:
        assert with_changes(name, get_recipe(name).model(**sizes)) == name
    old = GPTConfig.small(**sizes, smear=True, ngram_rows=0)
    assert with_changes("small", old) == "small,ngram_rows=0,smear=True"
    assert get_recipe(with_changes("default", old)).model(**sizes) == old
    assert with_changes("unknown", old) == "unknown"
    assert with_changes("small", GPTConfig.small(**sizes, window_pattern="SL")) == "small,window_pattern=SL"


def test_windows_are_the_recipes_unless_given() -> None:
    def windows(**flags: Any) -> str:
        return PretrainConfig(**flags).network(300)(1).window_pattern

    assert [windows(recipe=name) for name in ("default", "plain", "small,window_pattern=L")] == ["SSSL", "L", "L"]
    assert windows(window_pattern="SL") == windows(window_pattern="SL", recipe="plain,window_pattern=SL") == "SL"


@pytest.mark.parametrize(
    ("recipe", "windows", "longer"),
    [("plain", "SSSL", "plain"), ("small", "SL", "small,window_pattern=SL"), ("small", "", "small")],
)
def test_the_command_of_a_longer_run_names_its_windows_once(recipe: str, windows: str, longer: str) -> None:
    """Runs of earlier versions recorded --window-pattern=SSSL where none was given, with `plain` too."""
    from nanochat.train.progress import Progress
    from scripts.base_train import longer_run

    network = get_recipe(recipe).model(**({"window_pattern": windows} if windows else {}))
    command = longer_run(PretrainConfig(recipe=recipe, window_pattern=windows), network, Progress(step=1))["command"]
    assert f"--recipe={longer} " in f"{command} " and "--window-pattern" not in command


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
        ("later,", "backout=False"),
        ("later,smaer=1", "known: "),
        ("later,smear", "backout=False"),
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
        "momentum_warmup_steps=-5",
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
    assert saved.meta["recipe"] == "plain,smear=True,lr_scale=2"
    assert saved.meta["model_config"]["smear"] and not saved.meta["model_config"]["backout"]
    start = open_starting_model(None, "base", saved.path.parent, "changed", -1, Runtime.create("cpu"))
    assert start.base["recipe"] == "plain,smear=True,lr_scale=2"


def test_a_checkpoint_from_before_small_had_n_grams(copied: Path, tmp_path: Path) -> None:
    """Its network had smear, its config no fields of n-grams: it resumes and is exported as what it is. Its windows
    were recorded as a flag that nobody gave."""
    from nanochat.checkpoint.manifest import Manifest, file_record
    from nanochat.common import write_json
    from nanochat.formats.card_front import CardOptions
    from nanochat.formats.hf_folder import write_hf
    from nanochat.formats.history import history_of
    from nanochat.formats.portable import read_run
    from nanochat.report import load_report
    from scripts import base_train

    flags = [*TINY, f"--data={copied / 'text.jsonl'}", "--model-tag=old", "--num-iterations=4", "--save-every=2"]
    assert base_train.main([*flags, "--recipe=small,smear=True,ngram_rows=0"]) == 0
    run = copied / "base_checkpoints" / "old"
    wanted = open_checkpoint(run).model_state()
    meta = open_checkpoint(run, 2).meta
    meta["recipe"] = meta["user_config"]["recipe"] = "small"
    meta["user_config"]["window_pattern"] = "SSSL"
    del meta["model_config"]["ngram_rows"], meta["model_config"]["ngram_dim"]
    write_json(run / "000002" / "meta.json", meta)
    manifest = Manifest.read(run / "000002")
    manifest.files["meta.json"] = file_record(run / "000002" / "meta.json")
    manifest.write()
    assert base_train.main([*flags, "--recipe=small", "--resume-from-step=2"]) == 0
    found = open_checkpoint(run)
    assert found.meta["model_config"]["smear"] and found.meta["recipe"] == "small"
    assert found.model_state().keys() == wanted.keys()
    assert all((tensor == wanted[name]).all() for name, tensor in found.model_state().items())
    command = load_report(copied)["base_train"]["longer"]["command"]
    assert "--recipe=small,ngram_rows=0,smear=True" in command
    for step in (2, 4):
        model = read_run(copied, "base", "old", step)
        write_hf(model, tmp_path / str(step), "float32", card=CardOptions())
        command = history_of(model, copied)[0].command
        assert "--recipe=small,ngram_rows=0,smear=True" in command and "--window-pattern" not in command
        assert "small,ngram_rows=0,smear=True" in (tmp_path / str(step) / "README.md").read_text()


def test_every_recipe_is_complete() -> None:
    for name in RECIPES:
        recipe = get_recipe(name)
        assert recipe.model() and recipe.optimizer() and recipe.schedule(5) and recipe.plan


def test_portable_is_the_plain_network_with_the_training_of_small() -> None:
    from nanochat.formats import hf_class

    portable, small, plain = map(get_recipe, ("portable", "small", "plain"))
    assert portable.model() == plain.model() and not hf_class.lacking(portable.model())
    assert hf_class.lacking(small.model())
    for part in ("optimizer", "plan"):
        ours, theirs = (getattr(recipe, part) for recipe in (portable, small))
        assert (ours() == theirs()) if callable(ours) else (ours == theirs)
    assert portable.schedule(50) == small.schedule(50) != plain.schedule(50)
