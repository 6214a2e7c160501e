"""Any Hugging Face causal language model behind the interfaces that evaluations use. Needs the extra `transformers`."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.core_eval import Score, scores_of
from nanochat.data.batches import by_length
from nanochat.evals.core_prompts import Example
from nanochat.runtime import Runtime

BATCH_TOKENS = 4096


class HFTokenizer:
    """A Hugging Face tokenizer with the methods that evaluations and the loader call."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        bos = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
        if bos is None:
            raise UserError("--hf-path: this tokenizer has neither a bos nor an eos token to start a text with")
        self.bos: int = bos

    def encode(self, text: Any, **ignored: Any) -> Any:
        """Ids of a text, or of each of a list, without special tokens."""
        if isinstance(text, str):
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer(list(text), add_special_tokens=False)["input_ids"] if text else []

    def get_bos_token_id(self) -> int:
        return self.bos

    def get_vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def token_bytes(self) -> list[int]:
        """Length of each token in bytes, 0 for special ones. Byte-level tokens spell a byte with one character.

        Raises UserError for a vocabulary of another kind.
        """
        special = set(self.tokenizer.all_special_ids)
        added = {i: text for text, i in self.tokenizer.get_added_vocab().items()}
        letters = byte_letters()
        sizes = []
        for i, name in enumerate(self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))):
            if i in special or name is None:
                sizes.append(0)
            elif i in added:
                sizes.append(len(added[i].encode()))
            elif set(name) <= letters:
                sizes.append(len(name))
            else:
                raise UserError(
                    "--hf-path: bits per byte need a byte-level vocabulary (GPT-2's kind), which this is "
                    f"not (token {i} is {name!r}); leave bpb out"
                )
        return sizes


def byte_letters() -> set[str]:
    """The 256 characters that GPT-2's kind of vocabulary spells bytes with: printable ones stand for themselves, the
    others for characters from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return {chr(b) for b in own} | {chr(0x100 + i) for i in range(256 - len(own))}


class HFModel:
    """Scores examples, and gives token losses, with a Hugging Face model."""

    def __init__(self, model: Any, max_tokens: int, device: torch.device) -> None:
        self.model, self.max_tokens, self.device = model, max_tokens, device
        self.training = False
        self.config = SimpleNamespace(sequence_len=max_tokens)

    def eval(self) -> None:
        """No dropout."""
        self.model.eval()

    def train(self, mode: bool = True) -> None:
        """Evaluated only."""

    def __call__(self, idx: torch.Tensor, targets: torch.Tensor, loss_reduction: str = "none") -> torch.Tensor:
        """Each token's loss (B*T,), 0 without a target."""
        assert loss_reduction == "none"
        logits = self.model(idx).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")

    @torch.no_grad()
    def score(self, examples: Sequence[Example]) -> list[list[Score]]:
        """Scores of each example's sequences, in order."""
        at = [(i, j) for i, e in enumerate(examples) for j in range(len(e.sequences))]
        found: list[list[Any]] = [[None] * len(e.sequences) for e in examples]
        for numbers in by_length([len(examples[i].sequences[j].ids) for i, j in at], BATCH_TOKENS):
            batch = [at[n] for n in numbers]
            sequences = [examples[i].sequences[j] for i, j in batch]
            longest = max(len(s.ids) for s in sequences)
            # Padding at the end, which causal attention does not see.
            idx = torch.tensor([[*s.ids, *[0] * (longest - len(s.ids))] for s in sequences], device=self.device)
            logits = self.model(idx).logits
            wanted = torch.cat([logits[r, s.start - 1 : s.end - 1] for r, s in enumerate(sequences)]).float()
            targets = torch.tensor([t for s in sequences for t in s.ids[s.start : s.end]], device=self.device)
            for (i, j), score in zip(batch, scores_of(wanted, targets, [s.end - s.start for s in sequences])):
                found[i][j] = score
        return found


def load_hf_model(path: str, runtime: Runtime) -> tuple[HFModel, HFTokenizer]:
    """The model and tokenizer of that hub name or folder. Weights are read from safetensors only.

    Raises UserError where the extra is not installed or there is no such model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError("--hf-path needs transformers: pip install 'nanochat[transformers]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, dtype=runtime.dtype)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"--hf-path={path}: {first}") from error
    limits = [getattr(model.config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    max_tokens = next((limit for limit in limits if isinstance(limit, int) and limit > 0), 2048)
    return HFModel(model.to(runtime.device).eval(), max_tokens, runtime.device), HFTokenizer(tokenizer)
