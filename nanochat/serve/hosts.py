"""Who a request is addressed to, and which page it comes from, where no key is required.

A browser runs scripts of any page. Without a key two things keep such a script from using a server that listens to this
machine only: the name in the `Host` header has to be this machine's, since a page can let its own name resolve to
127.0.0.1 (DNS rebinding), and the `Origin` has to be the same or an allowed one.
"""

import ipaddress
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from nanochat.common import UserError
from nanochat.serve.api import Settings
from nanochat.serve.errors import ApiError


def host_name(authority: str) -> str:
    """The name or address in HOST[:PORT], in lower case, without brackets and a final dot; "" if it is malformed."""
    try:
        split = urlsplit(f"//{authority}")
        _ = split.port
        plain = not (split.username or split.path or split.query or split.fragment)
        return (split.hostname or "").removesuffix(".") if plain else ""
    except ValueError:
        return ""


def check_allowed(hosts: Sequence[str], origins: Sequence[str]) -> None:
    """Raise UserError for a name in --allow-host, or an origin in --cors, that no request can have."""
    for host in hosts:
        if host != "*" and ("*" in host or not (host_name(host) or parse_address(host))):
            raise UserError(f"--allow-host={host}: give a name or an address, as chat.example.com, or * for any")
    for origin in origins:
        scheme, _, authority = origin.partition("://")
        if origin not in ("*", "null") and not (scheme and host_name(authority) and origin == origin.lower()):
            raise UserError(f"--cors={origin}: give SCHEME://HOST[:PORT], as https://example.com, or * for any")


def parse_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An IP address; an IPv4 one inside IPv6 (::ffff:127.0.0.1) as IPv4. None if it is a name."""
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_loopback(name: str) -> bool:
    """Whether it is an address or a name that only this machine's programs can use."""
    address = parse_address(name)
    return address.is_loopback if address else name == "localhost" or name.endswith(".localhost")


def is_own(name: str, server: Any) -> bool:
    """Whether it is a name or an address of this machine. `server` is (address, port) that the request came to."""
    if is_loopback(name):
        return True
    if address := parse_address(name):
        return server is not None and address == parse_address(server[0])
    own = socket.gethostname().lower()
    return name in (own, own.partition(".")[0], f"{own}.local")


def check_addressed(scope: Any, settings: Settings) -> None:
    """Raise ApiError if a request has another machine's name as Host, or comes from another site's page."""
    headers = Headers(scope=scope)
    authority, origin = headers.get("host", ""), headers.get("origin")
    name = host_name(authority)
    allowed = {str(parse_address(host) or host_name(host)) for host in settings.allow_hosts} - {""}
    if authority and "*" not in settings.allow_hosts and name not in allowed and not is_own(name, scope.get("server")):
        raise ApiError(
            403,
            f"{authority[:200]!r} is not a name of this machine. To accept it, start the server with "
            f"--allow-host={name[:200] or 'NAME'}, or require a key with --api-key-file",
            code="unknown_host",
        )
    if origin and not {origin, "*"} & set(settings.cors_origins) and host_name(origin.partition("://")[2]) != name:
        raise ApiError(
            403,
            f"pages of {origin[:200]!r} may not use this server. To let them, start it with --cors={origin[:200]}",
            code="unknown_origin",
        )
