"""A request for text and the sequences that come of it: what enters the running batch (decoding.py).

GenerationRequest  prompt ids, how many tokens and samples, how to draw them and within which grammar, which log
                   probabilities
TokenSequence      one sample of a request while it is decoded
Token              one decoded token of a sequence; TokenLogprobs, its log probability and the alternatives
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nanochat.common import UserError
from nanochat.inference.sampling import SamplingParams, make_rng


class ContextExceeded(UserError):
    """A prompt that is longer than the model's context, or leaves no token of it for an answer."""

    def __init__(self, what: str, num_tokens: int, max_context: int) -> None:
        # Clients recognise the error by "this model's maximum context length is" and "prompt is too long".
        super().__init__(
            f"The prompt is too long: {what} takes {num_tokens} tokens, and this model's maximum context length is "
            f"{max_context} tokens, answer included. Shorten it."
        )


@dataclass(frozen=True)
class GenerationRequest:
    """Continue one prompt `num_samples` times. Raises ValueError for a value out of range."""

    prompt: list[int]
    max_tokens: int  # after the prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_samples: int = 1
    top_logprobs: int | None = None  # per token: its log probability and so many most likely tokens; None: neither
    prompt_logprobs: bool = False  # also for the prompt's tokens
    first_index: int = 0  # sample i draws the random numbers of sample first_index + i of the seed
    client: str = ""  # clients that wait are served in turn
    group: str = ""  # requests of one group take one place in the queue
    dropped_messages: int = 0  # of the conversation, left out of the prompt: for the answer's usage
    grammar: str | None = None  # the answer matches it: inference/grammar.py; no tools are called then
    stop_token_ids: Sequence[int] = ()  # end the answer as an end token does
    min_tokens: int = 0  # no end token and none of stop_token_ids before the answer has so many
    ignore_eos: bool = False  # no end token at all
    answer_begun: int = 0  # how many of the prompt's last tokens belong to the answer, which goes on from there

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt is empty; start it with <|bos|>")
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens must be 0 or more, got {self.max_tokens}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            raise ValueError("min_tokens and ignore_eos cannot be combined with a grammar, which says where to end")

    def fit(self, max_context: int) -> "GenerationRequest":
        """This request with max_tokens limited to the room after the prompt. Raises ContextExceeded if the prompt is
        longer than the context."""
        if len(self.prompt) > max_context:
            raise ContextExceeded("it", len(self.prompt), max_context)
        return replace(self, max_tokens=min(self.max_tokens, max_context - len(self.prompt)))

    def sequences(self) -> list["TokenSequence"]:
        """A new sequence for each sample."""
        return [TokenSequence(self, self.first_index + i) for i in range(self.num_samples)]


@dataclass(slots=True)
class TokenLogprobs:
    """A token's log probability, in nats, and the most likely tokens in its place with theirs."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class TokenSequence:
    """One sample of a request. `tokens` holds what follows the prompt, without the token that ended it."""

    request: GenerationRequest  # fitted to the model's context
    index: int = 0  # of the sample, for its random numbers
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)  # 1 where the model chose the token, 0 where a tool forced it
    end: int | None = None  # the end or stop token the model chose; None while running, and at the token limit
    logprob: float = 0.0  # sum over the tokens that the model chose, where the request has top_logprobs
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt's tokens but the first
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache

    def __post_init__(self) -> None:
        self.rng = make_rng(self.request.sampling.seed, self.index)
        self.done = self.room == 0 and not self.request.prompt_logprobs

    @property
    def prompt(self) -> list[int]:
        return self.request.prompt

    @property
    def context(self) -> list[int]:
        """The prompt and the tokens after it."""
        return self.prompt + self.tokens if self.tokens else self.prompt

    @property
    def room(self) -> int:
        """Tokens that may still follow."""
        return self.request.max_tokens - len(self.tokens)


@dataclass(eq=False, slots=True)
class Token:
    """One token of a sequence. `mask`: 1 if the model chose it, 0 if a tool forced it."""

    sequence: TokenSequence
    id: int
    mask: int
    logprobs: TokenLogprobs | None = None

    @property
    def is_end(self) -> bool:
        """Whether this is the end token that the model chose."""
        return bool(self.mask) and self.id == self.sequence.end
