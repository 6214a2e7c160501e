"""Which fields a request may have: a name that is neither a field, nor harmless, nor switched off is refused.

HARMLESS      what these fields ask for does not change the answer's meaning, or there is nothing here to which it
              applies: ignored
NEUTRAL       fields of OpenAI's, vLLM's and llama.cpp's servers that are not built, with the values that mean "off"
null          of any field is its default
"""

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from nanochat.serve.errors import FieldError

REASONS = {  # why fields are harmless
    "who asks, and where the request is billed, stored, cached and scheduled": """user metadata store service_tier
        safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options cache_prompt cache_salt id_slot
        slot_id priority request_id provider transforms ttl keep_alive session_id conversation_id chat_id""",
    "the client's tools: a model may call none of them, and this one never does": "tools functions parallel_tool_calls",
    "hints about speed and effort": """prediction reasoning_effort verbosity reasoning include_reasoning thinking
        moderation""",
    "more figures in the answer": "usage timings_per_token return_progress",
    "settings of samplers that are refused unless they are off": """dynatemp_exponent dry_base dry_allowed_length
        dry_penalty_last_n dry_sequence_breakers xtc_threshold mirostat_tau mirostat_eta repeat_last_n""",
}
HARMLESS = frozenset(name for names in REASONS.values() for name in names.split())
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("auto", "none"),
    "function_call": ("auto", "none"),
    "modalities": (["text"], []),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 0),
    "early_stopping": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_special_tokens": (True, False),  # the prompt's first token is always <|bos|>
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "detokenize": (True,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "bad_words": ([],),
    "logits_processors": ([],),
    "typical_p": (1,),
    "typ_p": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "dynatemp_range": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "top_n_sigma": (-1, 0),
    "repeat_penalty": (1,),  # of llama.cpp, over the last 64 tokens
    "n_probs": (0,),
    "web_search_options": (),
    "audio": (),
}

OTHER_NAMES = {  # of our fields on other servers and endpoints
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "stop_sequences": "stop",
    "json_schema": "response_format",
    "max_tokens": "max_output_tokens",
    "messages": "prompt input",
    "prompt": "messages input",
    "input": "messages prompt",
}


class Body(BaseModel):
    """Types are strict: "1" is not a number, 1 is not a boolean. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class KnownFields(Body):
    """A body whose unknown fields are refused, with the nearest name that is known."""

    harmless: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in data.items():
            if name in known or name in cls.harmless or value is None or value in cls.neutral.get(name, ()):
                continue
            if name in cls.neutral:
                off = " or ".join(map(repr, cls.neutral[name]))
                message = f"not supported; leave it out{f', or give {off}' if off else ''}"
            else:
                near = [other for other in OTHER_NAMES.get(name, "").split() if other in known]
                near += difflib.get_close_matches(str(name)[:100], sorted(known), 1)
                message = f"there is no such field{f'; do you mean {near[0]}?' if near else ''}"
            raise FieldError(str(name)[:100], message)
        return data
