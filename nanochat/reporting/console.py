"""Tables on the console."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanochat.common import say


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print name/value rows."""
    table = Table(title=escape(title), show_header=False)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    with console.capture() as drawn:
        console.print(table)
    say(drawn.get(), end="")
