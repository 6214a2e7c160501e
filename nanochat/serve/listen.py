"""The listening socket of chat_web: the requested port, or the next free one."""

import errno
import socket
from pathlib import Path

from nanochat.common import UserError

DEFAULT_PORT = 8000
PORTS_TRIED = 20
BACKLOG = 2048
TCP_LISTEN = "0A"  # state in /proc/net/tcp


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. A requested port must be free; -1 takes the first free one from DEFAULT_PORT on."""
    candidates = [port] if port != -1 else range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED)
    for candidate in candidates:
        listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, candidate))
            listening.listen(BACKLOG)
            return listening
        except OSError as error:
            listening.close()
            taken = error.errno == errno.EADDRINUSE
            if port != -1:
                by = f", by {owner}" if taken and (owner := port_owner(candidate)) else ""
                raise UserError(
                    f"cannot listen on {host}:{candidate} ({error.strerror}{by}); give another --port, "
                    "or none for a free one"
                ) from error
            if not isinstance(error, PermissionError) and not taken:
                raise UserError(f"cannot listen on {host}: {error.strerror}") from error
    raise UserError(f"no port from {candidates[0]} to {candidates[-1]} is free; give one with --port")


def port_owner(port: int) -> str:
    """The process that listens on a port, as `python (process 1234)`; empty if it cannot be found (only on Linux)."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:
            continue
        inodes |= {f"socket:[{r[9]}]" for r in rows if r[3] == TCP_LISTEN and int(r[1].rpartition(":")[2], 16) == port}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(fd.readlink()) in inodes for fd in process.glob("fd/*")):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:
            continue
    return ""
