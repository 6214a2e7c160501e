"""Tables and rendered conversations on the console."""

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from nanochat.common import on_terminal, say, visible
from nanochat.conversation import Conversation, Tokenizer, render
from nanochat.reporting.view import numeric_columns

PREVIEW_TOKENS = 300


def print_table(title: str, rows: Sequence[Sequence[str]], columns: Sequence[str] = ()) -> None:
    """Print rows of text, numbers to the right; without `columns` the table has no header, as for name/value rows."""
    numeric = numeric_columns(rows, len(columns))
    headers = [Column(escape(name), justify="right" if right else "left") for name, right in zip(columns, numeric)]
    table = Table(*headers, title=escape(visible(title)), show_header=any(columns))
    for row in rows:
        table.add_row(*(escape(visible(cell)) for cell in row))
    console = Console()
    with console.capture() as drawn:
        console.print(table)
    say(drawn.get(), end="")


def print_facts(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print (name, value) rows: as a table on a terminal, elsewhere one a line, unbroken, for grep and cut."""
    if on_terminal():
        print_table(title, rows)
        return
    width = max(len(name) for name, _ in rows)
    for name, value in [("path", title), *rows]:
        say(visible(f"{name:<{width}}  {value}").replace("\n", " "))


def print_conversation(tokenizer: Tokenizer, conversation: Conversation) -> None:
    """Print a conversation as the model sees it. What it does not learn to say is dimmed; in a log, where nothing can
    be, what it learns to say stands in [[ ]]."""
    ids, mask = render(tokenizer, conversation)
    live, text = on_terminal(), Text()
    for learnt, run in groupby(zip(ids[:PREVIEW_TOKENS], mask), key=lambda pair: pair[1]):
        piece = visible(tokenizer.decode([token for token, _ in run]))
        text.append(piece if live or not learnt else f"[[{piece}]]", style="" if learnt else "dim")
    if len(ids) > PREVIEW_TOKENS:
        text.append(f" … ({len(ids):,} tokens)", style="dim")
    marks = "what it learns to say is bright" if live else "it learns to say what is in [[ ]]"
    console = Console()
    with console.capture() as drawn:
        console.print(f"the first conversation as the model sees it; {marks}:", text, sep="\n", soft_wrap=True)
    say(drawn.get(), end="")
