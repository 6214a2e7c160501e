"""Write multiple-choice tasks of a CORE bundle for lm-evaluation-harness, so that it answers as base_eval does:

python dev/lm_eval/from_core.py BUNDLE EXPORT OUT arc_easy,piqa [ITEMS]
lm_eval --model hf --model_args pretrained=EXPORT,dtype=float32 --include_path OUT --tasks core_arc_easy,core_piqa

The harness scores whole continuations and takes the largest sum; base_eval takes the largest mean over the tokens from
the first that differs between the choices on. So the tokens that all choices begin with go into the context here, and
core_choice.py divides by the number of the others.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from nanochat.evals.core_bundle import CoreTask, read_bundle
from nanochat.evals.core_prompts import make_examples
from nanochat.formats.hf_tokenizer import read_tokenizer
from nanochat.tokenizer import RustBPETokenizer

CHOICE = Path(__file__).parent / "core_choice.py"


def documents(
    task: CoreTask, tokenizer: RustBPETokenizer, max_tokens: int = sys.maxsize, max_items: int = -1
) -> list[dict[str, Any]]:
    """{"context", "choices", "tokens", "gold"} of the items in base_eval's order. Items longer than `max_tokens`
    (base_eval crops them) and those whose choices part within a character are left out.
    """
    found = []
    for example in make_examples(task, tokenizer, sys.maxsize, max_items=max_items):
        start = example.sequences[0].start
        context = tokenizer.decode(example.sequences[0].ids[1:start])
        if max(len(s.ids) for s in example.sequences) > max_tokens or not example.texts[0].startswith(context):
            continue
        choices = [text.removeprefix(context) for text in example.texts]
        if context != context.rstrip():  # the harness moves it behind the context: scored alone, it can be taken off
            choices.append("")
        counts = [s.end - s.start for s in example.sequences]
        found.append({"context": context, "choices": choices, "tokens": counts, "gold": example.gold})
    return found


def write_task(task: CoreTask, out: Path, found: list[dict[str, Any]]) -> str:
    """Write a task's documents and its description into `out`; returns its name there."""
    name = f"core_{task.label}"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in found))
    shutil.copy(CHOICE, out)
    (out / f"{name}.yaml").write_text(
        f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {json.dumps(str((out / name).absolute()) + ".jsonl")}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
process_results: !function core_choice.process_results
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return name


if __name__ == "__main__":
    bundle, export, out, labels, *limit = sys.argv[1:]
    max_tokens = json.loads((Path(export) / "config.json").read_text())["max_position_embeddings"]
    for task in read_bundle(Path(bundle), only=labels).tasks:
        if task.kind != "multiple_choice":
            sys.exit(f"{task.label} is no multiple-choice task")
        found = documents(task, read_tokenizer(Path(export)), max_tokens, int(limit[0]) if limit else -1)
        print(write_task(task, Path(out), found), f"({len(found)} of {len(task.items)} items)")
