"""meta.json: what a step says about its model and its run."""

from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, StringConstraints
from typing_extensions import TypedDict

from nanochat.checkpoint.manifest import Sha256, damaged
from nanochat.common import UserError
from nanochat.common.files import read_json

Step = Annotated[int, Field(ge=0, le=2**40)]
Count = Annotated[int, Field(ge=1, le=2**40)]
Number = int | float | None


class Plan(TypedDict):
    num_steps: Count  # a deadline may have moved it
    planned_steps: NotRequired[Count]  # before the first step
    total_batch_tokens: Count


class RuntimeSettings(TypedDict):
    """See numeric_settings in train/snapshot.py."""

    device_batch_size: Annotated[int, Field(ge=1, le=2**20)]
    num_threads: Annotated[int, Field(ge=1, le=2**12)]
    dtype: str
    device: str
    kernels: bool | str
    world_size: NotRequired[Count]


class SourceModel(TypedDict):
    """The model that a finetuning run started from."""

    tag: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=255)]
    step: Step
    recipe: str


class Flags(TypedDict, total=False):
    """Of the run's flags, those that are read by themselves."""

    recipe: str
    data: str
    target_flops: float


class Fields(TypedDict):
    """Only what save_checkpoint adds must be there; training adds the rest, and a caller of its own what it likes."""

    step: Step
    tokenizer_hash: Sha256
    model_config: dict[str, Any]  # of GPTConfig
    optimizer_steps: NotRequired[dict[str, Step]]
    plan: NotRequired[Plan]
    progress: NotRequired[dict[str, Number]]  # of Progress
    runtime: NotRequired[RuntimeSettings]
    user_config: NotRequired[Flags]
    corpus_name: NotRequired[str]  # of pretraining; what --data names, or found if it was left out
    recipe: NotRequired[str]  # of pretraining, with its default resolved; older runs have it in user_config alone
    base: NotRequired[SourceModel]
    before: NotRequired[dict[str, Number]]  # RL: the figures before the first step


class Meta(dict[str, Any]):
    """The values of meta.json. To ask for one that is not there is a UserError: it was saved for another purpose."""

    def __init__(self, values: dict[str, Any], where: object) -> None:
        super().__init__(values)
        self.where = where

    @classmethod
    def read(cls, path: Path) -> "Meta":
        """Read the file of a step whose manifest is of this version. Raises DamagedCheckpoint."""
        with damaged():
            return cls(read_json(path, Fields, follow_links=False, extra="allow"), path)

    def __missing__(self, name: str) -> Any:
        raise UserError(f"{self.where} has no {name!r}, which is needed here; choose another step or start fresh")
