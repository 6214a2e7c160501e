"""The front matter of a model card: YAML that the hub reads for its filters, licences and evaluation results."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError
from nanochat.formats.history import CHAT_EVALUATIONS, Stage
from nanochat.formats.portable import PortableModel
from nanochat.reporting.curves import Record
from nanochat.reporting.view import skills_of

# Identifiers that the hub knows; others are license_name, beside `license: other`.
LICENCE_IDS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd
bsd-2-clause bsd-3-clause cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 agpl-3.0 gfdl gpl
gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa
unlicense zlib pddl unknown other
"""
LICENCES = frozenset(LICENCE_IDS.split())
# Public benchmarks: (data set on the hub, its subset, split).
BENCHMARKS = {
    "ARC-Easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "ARC-Challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "MMLU": ("cais/mmlu", "all", "test"),
    "GSM8K": ("openai/gsm8k", "main", "test"),
    "HumanEval": ("openai/openai_humaneval", "openai_humaneval", "test"),
}
HUB_ORIGIN = re.compile(r"hub:([\w.-]+/[\w.-]+)(@[0-9a-f]{40})?")  # of an imported model, as import_model records it


@dataclass(frozen=True)
class CardOptions:
    """What the export was asked for."""

    licence: str = ""  # of the weights: an SPDX identifier or any name; "": not stated
    name: str = ""  # on the hub, if it is pushed there
    command: str = ""  # that made the export

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.+-]{0,60}", self.licence, re.ASCII):
            raise UserError(f"--license takes an identifier such as mit, apache-2.0 or cc-by-4.0, got {self.licence!r}")


def front_matter(
    model: PortableModel, stages: Sequence[Stage], report: Record, options: CardOptions, route: str
) -> str:
    """The YAML block with its lines of dashes, as the hub's schema has it."""
    from huggingface_hub import ModelCardData

    sets = [one for stage in stages for one in stage.data()]
    known = bool(sets) and all(stage.data() for stage in stages) and all(one.language for one in sets)
    licence = options.licence.lower()  # the hub's identifiers are those of SPDX in lower case
    results = evaluation_results(model.source, report)
    data = ModelCardData(
        language=sorted({one.language for one in sets}) if known else None,
        license=(licence if licence in LICENCES else "other") if licence else None,
        license_name=licence if licence and licence not in LICENCES else None,
        library_name="transformers.js" if route == "onnx" else "transformers",
        pipeline_tag="text-generation",
        tags=["nanochat", *(["conversational"] if model.is_chat else [])],
        datasets=list(dict.fromkeys(one.hub for one in sets if one.hub)) or None,
        base_model=next((found[1] for stage in stages if (found := HUB_ORIGIN.fullmatch(stage.origin))), None),
        model_name=(options.name.rpartition("/")[2] or "nanochat") if results else None,
        eval_results=results or None,
    )
    return f"---\n{data}\n---\n"


def evaluation_results(source: str, report: Record) -> list[Any]:
    """The model's accuracies on public benchmarks, as the hub's leaderboards read them."""
    from huggingface_hub import EvalResult

    values = report.get(CHAT_EVALUATIONS.get(source, "")) or {}
    results = []
    for skill in skills_of(values):
        if skill.name in BENCHMARKS and skill.total:
            data_set, subset, split = BENCHMARKS[skill.name]
            interval = {"low_95": round(skill.low, 4), "high_95": round(skill.high, 4)}
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=data_set,
                    dataset_name=skill.name,
                    dataset_config=subset,
                    dataset_split=values.get("splits", {}).get(skill.name) or split,
                    metric_type="accuracy",
                    metric_value=round(skill.accuracy, 4),
                    metric_name=f"accuracy on {skill.total} items",
                    metric_args={"num_fewshot": 0, "num_items": skill.total, **interval},
                )
            )
    return results
