"""Two hosts on one machine, to cut the network between them: network namespaces joined by a veth pair, without root.

Each host is held by a process that ends when this one does, however that comes about, and its namespace with it.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

INTERFACE = "veth0"  # its name on either host
# Seconds between attempts double for as long as a cable is cut; a second at most, where the kernel has it (6.15), lets
# the hosts find each other soon after. Without it a return takes up to as long as the cut did.
IMPATIENT = "echo 1000 2> /dev/null > /proc/sys/net/ipv4/tcp_rto_max_ms || true"
HOLD = "ip link set lo up && echo up && read -r _"  # until its standard input is closed


class NoHosts(RuntimeError):
    """This machine does not let us make network namespaces; the message says why."""


class TwoHosts:
    """Hosts 0 and 1, at `addresses`. Use as a context manager. Raises NoHosts where the system forbids it.

    The lower address is host 1's: torchrun gives rank 0 to the host whose address comes first in the alphabet, so
    it is the host that gets cut off that writes the checkpoints, and rank 0 has to move.
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
                subprocess.run(self.command(host, ["sh", "-c", IMPATIENT]), capture_output=True)
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
        """The same command, as one that runs on that host; its process is the command's own."""
        target = f"--target={self.holders[host].pid}"
        return ["nsenter", target, "--user", "--net", "--preserve-credentials", *command]

    def popen(self, host: int, command: Sequence[str], **arguments: Any) -> "subprocess.Popen[bytes]":
        """Start a command on that host, gloo bound to the network between the two."""
        environment = {**(arguments.pop("env", None) or os.environ), "GLOO_SOCKET_IFNAME": INTERFACE}
        return subprocess.Popen(self.command(host, command), env=environment, **arguments)

    def link(self, host: int, state: str) -> None:
        """Set that host's end of the cable "down" or "up". What is under way gets no answer, and no refusal either."""
        self._ip(host, "link", "set", INTERFACE, state)

    def close(self) -> None:
        """End the holders; the namespaces go with the last process in them."""
        for holder in self.holders:
            holder.kill()
            holder.communicate()

    def __enter__(self) -> "TwoHosts":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
