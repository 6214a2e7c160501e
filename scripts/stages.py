"""The `nanochat` command: lists the stages in order and runs them."""

import importlib
import sys
from collections.abc import Sequence

from nanochat.common import UserError
from scripts import _cli

STAGES = {
    "tok_train": "train the tokenizer on raw text",
    "tok_eval": "compare its compression with GPT-2's and GPT-4's",
    "tok_data": "tokenise a corpus in advance, in several processes (optional)",
    "plan": "estimate a run: steps, memory, time, cost",
    "base_train": "pretrain a base model",
    "fit_law": "fit a scaling law to finished runs, and draw it",
    "contamination": "find benchmark items in the training text",
    "base_eval": "evaluate the base model: bits per byte, samples, CORE",
    "chat_sft": "finetune it on conversations",
    "chat_rl": "train it on its own answers, by how good they are",
    "chat_eval": "measure the chat model's skills",
    "chat_cli": "talk to it in the terminal",
    "chat_web": "talk to it in the browser; serve it to any OpenAI client",
    "info": "say what a checkpoint, an export or another model's files hold",
    "diff": "say what differs between two models",
    "export": "write it in another program's format: transformers, ONNX, GGUF, MLX",
    "report": "draw the report again, and print its path",
    "import_model": "bring a model of another program or machine here",
    "launch": "start a stage in many processes, on many machines",
}


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(
            "usage: nanochat STAGE [flags]     (nanochat STAGE --help lists a stage's flags)\n\nthe stages, in order:"
        )
        for name, summary in STAGES.items():
            print(f"  {name:<{max(map(len, STAGES))}}  {summary}")
        return 0
    if args[0] not in STAGES:
        raise UserError(f"unknown stage {args[0]!r}; the stages are {', '.join(STAGES)}")
    return importlib.import_module(f"scripts.{args[0]}").main(args[1:])


def entry() -> None:
    """Console entry point."""
    _cli.run(main)


if __name__ == "__main__":
    entry()
