"""The flags of every training stage and of the scripts that read text, and which of them a resumed run may change."""

from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from nanochat.common import say
from nanochat.common.files import check_value
from nanochat.common.ranges import Range, check_ranges
from nanochat.dataset import Corpus, resolve_corpus
from nanochat.optim import OptimizerConfig
from nanochat.recipe import get_recipe
from nanochat.runtime import TIMEOUT_SECONDS, Runtime


class OnResume(Enum):
    """Where a resumed run takes a flag from. Flags without this stay as in the saved run: they change the numbers."""

    NEW = "from the command line, given or not"
    IF_GIVEN = "from the command line if given there, else from the saved run"


@dataclass
class DataConfig:
    """The flags of every script that reads text: which documents."""

    data: Annotated[str, OnResume.IF_GIVEN] = ""
    """starter, fineweb-edu, climbmix, or files, folders, globs and URLs, separated by commas; empty: downloaded or
    starter."""
    text_field: str = "text"
    """The field or column of your own data that holds the text."""
    skip_bad_shards: Annotated[bool, OnResume.NEW] = False
    """Continue without files of the data that are missing or damaged, and name them."""

    def open_corpus(self, base_dir: Path) -> Corpus:
        """The corpus; prints which files are used and which are not."""
        corpus = resolve_corpus(self.data, base_dir, text_field=self.text_field, skip_bad=self.skip_bad_shards)
        if corpus.files:
            say(f"data: {corpus.describe()}")
        return corpus


@dataclass
class TrainConfig:
    """The flags that base_train, chat_sft and chat_rl share."""

    run: Annotated[str, OnResume.NEW] = "dummy"
    """Name of the wandb run; "dummy" logs to the run's folder only."""
    tensorboard: Annotated[bool, OnResume.NEW] = False
    """Also log to tensorboard, in the run's folder."""
    device_type: Annotated[str, OnResume.NEW] = ""
    """cuda, mps or cpu; empty picks the best there is."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 42
    """Seeds weights and data order."""
    deterministic: Annotated[bool, OnResume.IF_GIVEN] = False
    """The same bits in every run on the same NVIDIA GPUs, more slowly; on a CPU they always are."""
    model_tag: str = ""
    """Name of the run's folder; empty derives it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """on, off, or auto: torch.compile on CUDA only, where it pays back, and where it works."""
    minutes: Annotated[float, Range(above=0, unset=-1)] = -1.0
    """Be done after this long, from the program's start to its end: the number of steps follows the clock."""
    num_iterations: Annotated[int, Range(1, unset=-1)] = -1
    """Optimizer steps; -1 derives them."""
    device_batch_size: Annotated[int, Range(1, unset=-1), OnResume.IF_GIVEN] = -1
    """Rows per micro-batch and rank; -1 chooses what fits in memory. Does not change the result."""
    total_batch_size: Annotated[int, Range(1, unset=-1)] = -1
    """Tokens per optimizer step over all ranks; -1 derives it."""
    embedding_lr: Annotated[float, Range(0, unset=-1)] = -1.0
    """Rate of the token embedding at width 768 and 2^19 tokens a step; -1 takes the recipe's, here and below."""
    unembedding_lr: Annotated[float, Range(0, unset=-1)] = -1.0
    """Rate of the output head."""
    matrix_lr: Annotated[float, Range(0, unset=-1)] = -1.0
    """Rate of the matrices inside the blocks (Muon)."""
    scalar_lr: Annotated[float, Range(0, unset=-1)] = -1.0
    """Rate of the per-layer scalars."""
    weight_decay: Annotated[float, Range(0, unset=-1)] = -1.0
    """Cautious decay of the matrices at depth 12; scaled to the run as the recipe says."""
    adam_beta1: Annotated[float, Range(0, below=1, unset=-1)] = -1.0
    """AdamW's first moment decay; x0_lambdas keep 0.96."""
    adam_beta2: Annotated[float, Range(0, below=1, unset=-1)] = -1.0
    """AdamW's second moment decay."""
    eval_every: Annotated[int, Range(-1), OnResume.NEW] = 250
    """Steps between evaluations on validation data; -1 only at the end."""
    eval_tokens: Annotated[int, Range(1, unset=-1), OnResume.NEW] = -1
    """Tokens per evaluation; -1 is 2^17 on a CPU and 20 * 2^19 elsewhere."""
    sample_every: Annotated[int, Range(-1), OnResume.NEW] = 2000
    """Steps between samples; -1 only at the end."""
    save_every: Annotated[int, Range(-1), OnResume.NEW] = -1
    """Steps between checkpoints; -1 only at the end (and on Ctrl-C, SIGTERM or SIGUSR1)."""
    keep_last: Annotated[int, Range(0), OnResume.IF_GIVEN] = 2
    """Checkpoints kept; 0 keeps all."""
    resume: Annotated[bool, OnResume.NEW] = False
    """Resume from the run's latest good checkpoint: to the same bits on a CPU, on a GPU with --deterministic."""
    resume_from_step: Annotated[int, Range(-1), OnResume.NEW] = -1
    """Resume from this step's checkpoint."""
    timeout: Annotated[float, Range(above=0), OnResume.NEW] = TIMEOUT_SECONDS
    """Seconds that ranks wait for one that hangs or is gone before the run ends with exit code 1."""

    @property
    def ends_on_time(self) -> bool:
        """True if the clock, not a number of steps, ends the run."""
        return self.minutes > 0 and self.num_iterations <= 0

    @property
    def horizon_flags(self) -> dict[str, Any]:
        """The flags given that say how long the run is, in order of precedence: only the first counts."""
        names = ("num_iterations", "minutes", "target_flops", "target_param_data_ratio", "num_epochs")
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return {name: value for name, value in values.items() if value not in (-1, getattr(type(self), name))}

    def start_from(self, tag: str) -> dict[str, Any]:
        """The flags that start a new run of this stage from the weights of its run `tag`, with their values."""
        raise NotImplementedError

    def optimizer_config(self, recipe: str) -> OptimizerConfig:
        """The recipe's rates, overridden by those of the command line."""
        names = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay", "adam_beta1", "adam_beta2")
        given = {name: getattr(self, name) for name in names if getattr(self, name) >= 0}
        if "adam_beta2" in given:
            given |= {"head_beta2": self.adam_beta2, "embed_beta2": self.adam_beta2}
        return get_recipe(recipe).optimizer(**given)

    def evaluation_tokens(self, runtime: Runtime) -> int:
        return self.eval_tokens if self.eval_tokens > 0 else (2**17 if runtime.device.type == "cpu" else 20 * 2**19)


Config = TypeVar("Config", bound=TrainConfig)
HORIZON = frozenset({"num_iterations", "minutes", "num_epochs", "target_flops", "target_param_data_ratio"})
"""The flags, of all stages, that say how long a run is."""


def resume_rules(config: TrainConfig) -> dict[str, OnResume]:
    """The flags that a resumed run may change, by name."""
    hints = get_type_hints(type(config), include_extras=True)
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: mark for name, found in marks.items() for mark in found if isinstance(mark, OnResume)}


def changed_flags(given: TrainConfig, saved: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given and differ from the saved ones; a default value counts as not given, -1 as "derive"."""
    defaults = asdict(type(given)())
    return {k: v for k, v in asdict(given).items() if k in saved and v not in (saved[k], -1, defaults[k])}


def merge_saved_config(given: Config, saved: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """(the saved run's flags, with those that may change taken from `given`; the given ones that are ignored)."""
    values, rules, changed = asdict(given), resume_rules(given), changed_flags(given, saved)
    for name, value in saved.items():
        is_new = rules.get(name) is OnResume.NEW or (rules.get(name) is OnResume.IF_GIVEN and name in changed)
        if name in values and not is_new:
            values[name] = value
    merged = check_value(values, "the saved run's flags", type(given), extra="forbid")
    check_ranges(merged)
    return merged, {name: value for name, value in changed.items() if name not in rules}
