"""The model that base_eval evaluates: a checkpoint of a base run, or a Hugging Face model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError
from nanochat.dataset import Corpus, open_corpus
from nanochat.evals.bits_per_byte import EVAL_ROWS
from nanochat.evals.scoring import GPTScorer, Scorer
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.runtime import Runtime
from nanochat.train.build import choose_device_batch


@dataclass
class Subject:
    """A model under evaluation, with what depends on its kind."""

    name: str
    model: Any  # GPT, or HFModel with the same interface for losses
    tokenizer: Any
    scorer: Scorer
    bpb_tokens: int  # default tokens per split
    device_batch_size: int
    folder: str  # of its details, in base_eval/
    meta: dict[str, Any] | None = None  # of the checkpoint; None for a Hugging Face model, which has no report stage


def load_checkpoint(tag: str, step: int, int8: bool, device_batch_size: int, runtime: Runtime) -> Subject:
    """A base run's checkpoint: the latest run without a tag, the last step for -1."""
    model, tokenizer, meta = load_model("base", runtime, model_tag=tag, step=step)
    name = meta["model_tag"]
    if int8:
        model = DecodingWeights(model, int8=True).current()
    runtime.print0(f"{runtime.describe()}\nbase model: {name}, step {meta['step']}{', int8' * int8}")
    tokens = 2**18 if runtime.device.type == "cpu" else 40 * 2**19
    rows = choose_device_batch(device_batch_size, EVAL_ROWS, model.config.sequence_len, runtime)
    folder = f"{name}_{meta['step']:06d}"
    return Subject(name, model, tokenizer, GPTScorer(model), tokens, rows, folder, meta)


def load_hf(path: str, runtime: Runtime, trust_remote_code: bool = False) -> Subject:
    """A Hugging Face model, by its name on the hub or its folder; `trust_remote_code` runs the folder's code."""
    from nanochat.evals.hf_model import load_hf_model

    model, tokenizer = load_hf_model(path, runtime, trust_remote_code)
    runtime.print0(f"{runtime.describe()}\nHugging Face model: {path}, context {model.max_tokens}")
    rows = max(1, 8192 // model.max_tokens)
    return Subject(path, model, tokenizer, model, 2**18, rows, path.strip("/").replace("/", "-"))


def open_evaluation_corpus(
    subject: Subject, data: str, runtime: Runtime, base_dir: Path, *, text_field: str, skip_bad: bool
) -> Corpus:
    """The corpus named by --data, else the one the model was trained on."""
    meta = subject.meta or {}
    given, trained_on = data, meta.get("user_config", {})
    if not given:
        data, text_field = trained_on.get("data", ""), trained_on.get("text_field", text_field)
    try:
        corpus = open_corpus(data, base_dir, runtime, text_field=text_field, skip_bad=skip_bad)
    except UserError as error:
        if given or not meta:
            raise
        raise UserError(
            f"the model's training data cannot be read ({error}); give other text with --data, or --eval without bpb"
        ) from error
    if corpus.fingerprint != meta.get("corpus", corpus.fingerprint):
        runtime.print0(f"bits per byte are of {corpus.name}, not of the model's training data")
    return corpus
