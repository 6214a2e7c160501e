"""The columns of dev/COMPATIBILITY.md, in order: the names of the functions that a client's script may define."""

COLUMNS = ("chat", "stream", "tools", "structured", "max_tokens", "errors")
