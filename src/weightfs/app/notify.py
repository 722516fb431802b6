"""sd_notify(3): one datagram to the socket that NOTIFY_SOCKET names. A manager that is not there is no error."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence

STARTED = "X_WEIGHTFS_STARTED"  # =1: it serves, and every new ref has been asked for; for `supervisor`

log = logging.getLogger(__name__)


def has_manager(env: Mapping[str, str] | None = None) -> bool:
    """Whether there is a service manager that wants to be told."""
    return _address(os.environ if env is None else env) != ""


def _address(env: Mapping[str, str]) -> str:
    """A path, an abstract address with a leading @, or nothing: other kinds (vsock) are not for us."""
    address = env.get("NOTIFY_SOCKET", "")
    return address if address.startswith(("/", "@")) else ""


def notify(message: str, env: Mapping[str, str] | None = None, fds: Sequence[int] = ()) -> bool:
    """Send `message` (for example `READY=1`), with copies of descriptors; whether it was sent."""
    address = _address(os.environ if env is None else env)
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # an abstract address: unix(7)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.connect(address)
            if fds:
                socket.send_fds(sock, [message.encode()], fds)
            else:
                sock.send(message.encode())
    except OSError as error:
        log.warning("the service manager could not be told %r: %s", message, error.strerror)
        return False
    return True


def watchdog_interval(env: Mapping[str, str] | None = None) -> float | None:
    """Half of what the service manager allows from one ping to the next, in seconds (sd_watchdog_enabled(3)).

    None: it did not ask for pings, or not this process.
    """
    env = os.environ if env is None else env
    try:
        micros = int(env.get("WATCHDOG_USEC", ""))
        pid = int(env.get("WATCHDOG_PID", str(os.getpid())))
    except ValueError:
        return None
    return micros / 2_000_000 if micros > 0 and pid == os.getpid() else None
