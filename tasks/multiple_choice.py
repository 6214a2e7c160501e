"""Multiple-choice questions: the answer is a single letter."""

from collections.abc import Sequence

from nanochat.conversation import Conversation
from tasks.answers import exchange, final_text, reference_text
from tasks.hub import HubTask


class MultipleChoice(HubTask):
    """Conversations of one question with `letters`, answered by one of them."""

    eval_type = "categorical"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """The completion must be the right letter and nothing else, except a closing period."""
        return final_text(conversation, completion).rstrip(".") == reference_text(conversation)


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A multiple-choice question as one user message.

    The letter follows its choice without a space, so that it is the same token as in the answer.
    """
    assert len(letters) == len(choices)
    options = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices))
    return f"Multiple Choice question: {question}\n{options}\nRespond only with the letter of the correct answer."


def mc_conversation(question: str, letters: Sequence[str], choices: Sequence[str], answer: str) -> Conversation:
    """The conversation of one multiple-choice item; `letters` is what categorical evaluation compares."""
    assert answer in letters, f"the answer {answer!r} is not among the letters {list(letters)}"
    return exchange(render_mc(question, letters, choices), answer, letters=list(letters))
