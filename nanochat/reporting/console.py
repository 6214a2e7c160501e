"""Tables on the console."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanochat.common import say


def print_table(title: str, rows: Iterable[Sequence[str]], columns: Sequence[str] = ()) -> None:
    """Print rows of text; without `columns` the table has no header, as for name/value rows."""
    table = Table(*map(escape, columns), title=escape(title), show_header=any(columns))
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    with console.capture() as drawn:
        console.print(table)
    say(drawn.get(), end="")
