"""What can be `host[:port]` in a URL, beyond its characters. Pure."""

from __future__ import annotations

import ipaddress

MAX_PORT = (1 << 16) - 1


def is_authority(text: str) -> bool:
    """Whether the port of `host[:port]`, if there is one, is from 1 to 65535, and what is in brackets an IPv6 address.

    Every client refuses others, each with an exception of its own.
    """
    host, bracket, rest = text.rpartition("]")
    if bracket:
        try:
            ipaddress.IPv6Address(host.removeprefix("["))
        except ValueError:
            return False
    port = rest.partition(":")[2]
    return not port or (port.isascii() and port.isdigit() and 0 < int(port) <= MAX_PORT)
