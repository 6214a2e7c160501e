"""Write multiple-choice tasks of a CORE bundle for lm-evaluation-harness, with the prompts of base_eval:

python dev/lm_eval/from_core.py BUNDLE OUT arc_easy,piqa [ITEMS]
lm_eval --model hf --model_args pretrained=EXPORT,dtype=float32 --include_path OUT --tasks core_arc_easy,core_piqa
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from nanochat.evals.core_bundle import CoreTask, read_bundle
from nanochat.evals.core_prompts import reference_example, reference_shots


class NoTokens:
    """A tokenizer for prompts of which only the text is read."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def get_bos_token_id(self) -> int:
        return 0


def documents(task: CoreTask, max_items: int) -> list[dict[str, Any]]:
    """{"context", "choices", "gold"} of the items in base_eval's order: few-shot prompts, and what follows them."""
    found = []
    for item, shots in reference_shots(task, len(task.items) if max_items < 0 else max_items):
        text = reference_example(task, item, shots, NoTokens()).texts[0]
        context = text.removesuffix(item["choices"][0])
        found.append({"context": context, "choices": item["choices"], "gold": item["gold"]})
    return found


def write_task(task: CoreTask, out: Path, max_items: int = -1) -> str:
    """Write the task's items and its description into `out`; returns its name there."""
    name = f"core_{task.label}"
    out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(document) + "\n" for document in documents(task, max_items))
    (out / f"{name}.jsonl").write_text("".join(lines))
    description = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((out / f"{name}.jsonl").absolute())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",  # the context ends with it
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (out / f"{name}.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
    return name


if __name__ == "__main__":
    bundle, out, labels, *limit = sys.argv[1:]
    for task in read_bundle(Path(bundle), only=labels).tasks:
        if task.kind != "multiple_choice":
            sys.exit(f"{task.label} is no multiple-choice task")
        print(write_task(task, Path(out), int(limit[0]) if limit else -1))
