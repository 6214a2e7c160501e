"""Two hosts on one machine whose network can be cut: network namespaces joined by a veth pair, without root.

A process holds each namespace. It reads from a pipe of this process, so it exits with it in any case.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

INTERFACE = "veth0"  # its name on either host
# TCP doubles the time between retries as long as the network is cut, so a return takes up to as long as the cut did.
# Kernels from 6.15 on can limit it, here to a second.
LIMIT_RETRIES = "echo 1000 2> /dev/null > /proc/sys/net/ipv4/tcp_rto_max_ms || true"
HOLD = "ip link set lo up && echo up && read -r _"  # until its standard input is closed


class NoHosts(RuntimeError):
    """This machine does not permit network namespaces; the message says why."""


class TwoHosts:
    """Hosts 0 and 1, at `addresses`. A context manager. Raises NoHosts if the system does not permit it.

    Host 1 has the lower address: torchrun gives rank 0 to the host whose address sorts first, so rank 0 is on the host
    that is cut off, and has to move.
    """

    addresses = ("10.77.0.2", "10.77.0.1")

    def __init__(self) -> None:
        if missing := [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]:
            raise NoHosts(f"not installed: {', '.join(missing)}")
        self.holders: list[subprocess.Popen[str]] = []
        try:
            self._hold(["unshare", "--user", "--map-root-user", "--net"])
            self._hold(
                ["nsenter", f"--target={self.holders[0].pid}", "--user", "--preserve-credentials", "unshare", "--net"]
            )
            peer = str(self.holders[1].pid)
            self._ip(0, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", peer)
            for host, address in enumerate(self.addresses):
                self._ip(host, "addr", "add", f"{address}/24", "dev", INTERFACE)
                self.link(host, "up")
                subprocess.run(self.command(host, ["sh", "-c", LIMIT_RETRIES]), capture_output=True)
        except BaseException:
            self.close()
            raise

    def _hold(self, command: list[str]) -> None:
        holder = subprocess.Popen(
            [*command, "sh", "-c", HOLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.holders.append(holder)
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != "up\n":
            raise NoHosts(f"no network namespaces: {holder.stderr.read().strip()}")

    def _ip(self, host: int, *words: str) -> None:
        done = subprocess.run(self.command(host, ["ip", *words]), capture_output=True, text=True)
        if done.returncode:
            raise NoHosts(f"ip {' '.join(words)}: {done.stderr.strip()}")

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """Wrap a command to run on that host, under the same process id."""
        target = f"--target={self.holders[host].pid}"
        return ["nsenter", target, "--user", "--net", "--preserve-credentials", *command]

    def popen(self, host: int, command: Sequence[str], **arguments: Any) -> "subprocess.Popen[bytes]":
        """Start a command on that host, with gloo bound to the network between the two."""
        environment = {**(arguments.pop("env", None) or os.environ), "GLOO_SOCKET_IFNAME": INTERFACE}
        return subprocess.Popen(self.command(host, command), env=environment, **arguments)

    def link(self, host: int, state: str) -> None:
        """Set that host's network interface "down" or "up". While it is down, packets get no answer and no error."""
        self._ip(host, "link", "set", INTERFACE, state)

    def close(self) -> None:
        """Kill the holders; a namespace disappears with its last process."""
        for holder in self.holders:
            holder.kill()
            holder.communicate()

    def __enter__(self) -> "TwoHosts":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
