"""What ARC and MMLU share: one letter is the whole answer."""

from collections.abc import Sequence

from tasks.answers import Conversation, final_text, reference_text
from tasks.common import Task, render_mc


class MultipleChoice(Task):
    """Conversations of one question with `letters`, answered by one of them."""

    eval_type = "categorical"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """The completion must be the right letter and nothing else (a closing period is forgiven)."""
        return final_text(conversation, completion).rstrip(".") == reference_text(conversation)


def mc_conversation(question: str, letters: Sequence[str], choices: Sequence[str], answer: str) -> Conversation:
    """The conversation of one multiple-choice item; `letters` goes along for scoring by logits."""
    assert answer in letters, f"the answer {answer!r} is not among the letters {list(letters)}"
    messages = [
        {"role": "user", "content": render_mc(question, letters, choices)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "letters": list(letters)}
