"""Hugging Face causal language models with the interfaces of the evaluations. Needs the extra `transformers`."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.common import UserError, is_out_of_memory
from nanochat.evals.core_prompts import Example, Scored
from nanochat.evals.scoring import Score, pad_rows, score_batches, scores_of
from nanochat.runtime import Runtime

BATCH_TOKENS = 4096


class HFTokenizer:
    """A Hugging Face tokenizer with the methods that the evaluations and the data loader call."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        bos = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
        if bos is None:
            raise UserError("--hf-path: the tokenizer needs a bos or an eos token to start a text with")
        self.bos: int = bos

    def encode(self, text: Any, **ignored: Any) -> Any:
        """Token ids of a text, or of each text of a list; the names of special tokens in it are text like any other."""
        if not isinstance(text, str) and not text:
            return []
        texts = text if isinstance(text, str) else list(text)
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def get_bos_token_id(self) -> int:
        return self.bos

    def get_vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def token_bytes(self) -> list[int]:
        """Length of each token in bytes, 0 for special tokens. A byte-level vocabulary has one character per byte.

        Raises UserError for another kind of vocabulary.
        """
        special = set(self.tokenizer.all_special_ids)
        added = {i: text for text, i in self.tokenizer.get_added_vocab().items()}
        letters = set(byte_letters())
        sizes = []
        for i, name in enumerate(self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))):
            if i in special or name is None:
                sizes.append(0)
            elif i in added:
                sizes.append(len(added[i].encode()))
            elif letters.issuperset(name):
                sizes.append(len(name))
            else:
                raise UserError(
                    "--hf-path: bits per byte need a byte-level vocabulary such as GPT-2's, but token "
                    f"{i} is {name!r}; leave bpb out"
                )
        return sizes


def byte_letters() -> dict[str, int]:
    """The byte of each of the 256 characters that a byte-level vocabulary writes bytes with, in the order of GPT-2's
    ranks: printable bytes as themselves, the others as characters from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class HFModel:
    """A Hugging Face model that scores examples and returns token losses."""

    def __init__(self, model: Any, max_tokens: int, device: torch.device) -> None:
        self.model, self.max_tokens, self.device = model, max_tokens, device
        self.training = False
        self.config = SimpleNamespace(sequence_len=max_tokens)

    def eval(self) -> None:
        """Switch dropout off."""
        self.model.eval()

    def train(self, mode: bool = True) -> None:
        """Ignored: the model is only evaluated."""

    def __call__(self, idx: torch.Tensor, targets: torch.Tensor, loss_reduction: str = "none") -> torch.Tensor:
        """Loss of each token, (B*T,); 0 where there is no target."""
        assert loss_reduction == "none"
        logits = self.model(idx).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")

    @torch.no_grad()
    def score(self, examples: Sequence[Example]) -> list[list[Score]]:
        """Scores of each example's sequences, in order."""
        return score_batches(examples, BATCH_TOKENS, self._score_batch)

    def _score_batch(self, sequences: Sequence[Scored]) -> list[Score]:
        """Score sequences padded on the right, which causal attention ignores."""
        logits = self.model(pad_rows([s.ids for s in sequences], self.device)).logits  # (B, T, V)
        scored = torch.cat([logits[row, s.start - 1 : s.end - 1] for row, s in enumerate(sequences)]).float()
        return scores_of(scored, sequences)


def load_hf_model(path: str, runtime: Runtime, trust_remote_code: bool = False) -> tuple[HFModel, HFTokenizer]:
    """Load the model and tokenizer of a hub name or folder, weights from safetensors only.

    `trust_remote_code` runs the Python files of the folder; nobody is asked, and without it nothing is run. It needs a
    folder, whose files stay as they were read. Raises UserError if the extra is not installed or there is no such
    model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError("--hf-path needs transformers: pip install 'nanochat[transformers]'") from error
    is_folder = Path(path).is_dir()
    if trust_remote_code and not is_folder:
        raise UserError(f"--trust-remote-code takes code from a folder only: download {path}, and read its *.py first")
    # A folder may name code that lies on the hub; local_files_only keeps to the folder.
    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": is_folder}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **settings)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, dtype=runtime.dtype, output_loading_info=True, **settings
        )
    except Exception as error:  # of damaged files any: KeyError, SafetensorError, what the tokenizers' library raises
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise UserError(
                f"--hf-path={path} brings its own code; --trust-remote-code runs it, if you trust its author"
            ) from error
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"--hf-path={path}: {kind}{(str(error).strip().splitlines() or [''])[0][:300]}") from error
    if missing := sorted(loaded["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(f"--hf-path={path}: its files lack the weights {', '.join(missing)[:200]}; copy it again")
    limits = [getattr(model.config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    max_tokens = next((limit for limit in limits if isinstance(limit, int) and limit > 0), 2048)
    return HFModel(model.to(runtime.device).eval(), max_tokens, runtime.device), HFTokenizer(tokenizer)
