"""The stages of a model's training, and those figures of the report that are its own."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.checkpoint.folder import completed_ns
from nanochat.checkpoint.runs import CHECKPOINT_FOLDERS, run_dir
from nanochat.checkpoint_manager import Checkpoint, open_checkpoint
from nanochat.common import UserError
from nanochat.common.files import read_json
from nanochat.formats.portable import PortableModel, part
from nanochat.formats.training_data import DataSet, data_sets, public_command
from nanochat.gpt_config import GPTConfig
from nanochat.recipe import with_changes
from nanochat.report import load_report
from nanochat.reporting.curves import Curve, metric_of, read_curve, read_metrics
from nanochat.reporting.view import of_usual_split

Record = dict[str, Any]
MAX_STAGES = 8
WEIGHTS = "model.safetensors"
TITLES = {"base": "pretraining", "sft": "finetuning", "rl": "reinforcement learning"}
CHAT_EVALUATIONS = {"sft": "chat_eval", "rl": "chat_eval_rl"}  # in the report, by stage
REPORTED = {"base": ("base_train", "base_eval"), "sft": ("chat_sft", "chat_eval"), "rl": ("chat_rl", "chat_eval_rl")}


@dataclass
class Stage:
    """One training: the stage (base, sft or rl), the run's tag, the last step of it that counts, and what it saved.

    `run` is the run's folder; None if it is not here, and then `meta` has only what another file says.
    """

    name: str
    tag: str
    step: int
    meta: Record = field(default_factory=dict)
    run: Path | None = None
    weights: str = ""  # SHA-256 of the file of weights

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def flags(self) -> Record:
        return part(self.meta, "user_config")

    @property
    def progress(self) -> Record:
        return part(self.meta, "progress")

    @property
    def origin(self) -> str:
        """Where the weights came from, of a model that was imported; "" for one trained here."""
        return str(part(self.meta, "imported").get("from") or "")

    @property
    def command(self) -> str:
        """The command that trains it, as it may be published; "" if that is not known."""
        flags = self.flags
        if len(flags) <= 3 or self.origin:
            return ""
        if self.run and "recipe" in flags and not flags.get("init_from"):
            network = GPTConfig.from_dict(part(self.meta, "model_config"))
            flags = flags | {"recipe": with_changes(str(flags["recipe"]), network), "window_pattern": ""}
        return public_command(self.name, flags)

    def data(self) -> list[DataSet]:
        """What it trained on."""
        flags = self.flags
        if self.name == "base" and not flags.get("data") and self.run:  # the default: what was there
            try:
                record = read_json(self.run / "corpus.json", Record)
            except UserError:
                record = {}
            sources = {shard.get("source") for shard in record.get("train", ()) if isinstance(shard, dict)}
            flags = flags | {"data": ",".join(sorted(str(source) for source in sources))}
        return data_sets(self.name, flags)

    def curves(self) -> list[Curve]:
        """Curves of the metrics up to its step; those of interest only when something looks wrong are left out."""
        lines = (
            [line for line in read_metrics(self.run / "metrics.jsonl") if line["step"] <= self.step] if self.run else []
        )
        if lines and isinstance(before := self.meta.get("before"), dict):
            lines = [{"step": 0} | before, *lines]
        keys = [*sorted({key for line in lines for key in line if key.startswith("accuracy/")})]
        keys += ["val_bpb", "loss", "core"] if self.name != "rl" else ["reward"]  # the loss of RL says nothing
        found = (read_curve(lines, key) for key in keys if not metric_of(key).minor)
        return [curve for curve in found if curve]


def history_of(model: PortableModel, base_dir: Path) -> list[Stage]:
    """The stages of the model's training, the first first; as far as their runs are in the base folder, with them."""
    meta = model.meta
    last = Stage(model.source, str(meta.get("model_tag") or ""), step_of(meta), meta)
    checkpoint = find_checkpoint(last, base_dir)
    if checkpoint and weights_of(checkpoint) == meta.get("weights"):
        adopt(last, checkpoint)
    return [*earlier_stages(last, base_dir), last]


def earlier_stages(last: Stage, base_dir: Path | None) -> list[Stage]:
    """The stages before `last`, the first first; with their runs as far as they are in the base folder."""
    stages = [last]
    while len(stages) < MAX_STAGES and (base := part(stages[0].meta, "base")).get("source") in CHECKPOINT_FOLDERS:
        earlier = Stage(base["source"], str(base.get("tag") or ""), step_of(base), {"recipe": base.get("recipe")})
        checkpoint = find_checkpoint(earlier, base_dir) if base_dir and stages[0].run else None
        if checkpoint and is_older(checkpoint, stages[0]):
            adopt(earlier, checkpoint)
        stages.insert(0, earlier)
    return stages[:-1]


def step_of(values: Record) -> int:
    step = values.get("step")
    return step if isinstance(step, int) else 0


def find_checkpoint(stage: Stage, base_dir: Path) -> Checkpoint | None:
    """The checkpoint with the stage's names in the base folder, its weights not read yet."""
    try:
        checkpoint = open_checkpoint(run_dir(base_dir, stage.name, stage.tag), stage.step, verify=False)
    except UserError:  # deleted since, or of another machine
        return None
    return checkpoint if WEIGHTS in checkpoint.manifest.files else None


def weights_of(checkpoint: Checkpoint) -> str:
    return checkpoint.manifest.files[WEIGHTS]["sha256"]


def is_older(checkpoint: Checkpoint, stage: Stage) -> bool:
    """Whether `stage` can have started from the checkpoint, which could be of a later run of the same name."""
    assert stage.run
    own = find_checkpoint(stage, stage.run.parent.parent)
    same = checkpoint.meta["tokenizer_hash"] == stage.meta.get("tokenizer_hash")
    return same and own is not None and completed_ns(checkpoint.path) <= completed_ns(own.path)


def adopt(stage: Stage, checkpoint: Checkpoint) -> None:
    stage.meta, stage.run, stage.weights = checkpoint.meta, checkpoint.path.parent, weights_of(checkpoint)


def own_report(stages: list[Stage], base_dir: Path) -> Record:
    """The report's values of these very trainings and checkpoints, and its machine if there are any."""
    try:
        report = load_report(base_dir)
    except UserError:
        return {}
    found: Record = {}
    for stage in stages:
        if stage.run:
            found |= {key: held_out(report[key]) for key in keys_of(stage, report, base_dir)}
    return found | ({"machine": report.get("machine") or {}} if found else {})


def held_out(values: Record) -> Record:
    """A stage's values without the tasks that chat_eval measured on another split: the model may have learnt it."""
    intervals = {name: found for name, found in values.get("intervals", {}).items() if of_usual_split(values, name)}
    return {**values, "intervals": intervals} if "splits" in values else values


def reported_name(stage: Stage) -> str:
    """The name by which the report's evaluations of chats know a checkpoint."""
    return f"{stage.name}/{stage.tag}/{stage.step}/{stage.weights[:12]}"


def keys_of(stage: Stage, report: Record, base_dir: Path) -> Iterator[str]:
    """Of the report's two keys of a stage, the training and the evaluation, those that are of this checkpoint."""
    assert stage.run
    training, evaluation = REPORTED[stage.name]
    values = report.get(training) or {}
    metrics = (stage.run / "metrics.jsonl").relative_to(base_dir).as_posix()
    if values.get("metrics") == metrics and values.get("steps") == stage.step:
        yield training
    values = report.get(evaluation) or {}
    if stage.name == "base":
        same = values.get("weights") == stage.weights
    else:
        same = values.get("checkpoint") == reported_name(stage)
    if same:
        yield evaluation
