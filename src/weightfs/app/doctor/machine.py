"""Verdicts on the kernel, FUSE, limits and the clock: pure functions of what `probes` found."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Final

from weightfs.app.doctor.verdicts import Verdict, ok, problem, warning
from weightfs.units import format_duration

OLDEST: Final = (5, 4)  # FUSE protocol 7.31, the oldest that the handshake accepts
PASSTHROUGH: Final = (6, 9)  # FUSE_PASSTHROUGH came with Linux 6.9
# What the handshake asks for (mount.session); an ordinary user gets less where the module's limit is lower.
WANTED_BACKGROUND: Final = 512
# Connections of the engine's pool (256), one descriptor for each data file that is being read, and the rest.
WANTED_DESCRIPTORS: Final = 1024
LEAST_DESCRIPTORS: Final = 256
# Clocks that are not synchronised drift by seconds; signed links and certificates notice minutes.
TOLERATED_SKEW: Final = 120.0  # seconds
DAY: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Helper:
    """fusermount3. `setuid`: it belongs to root and has the bit."""

    path: str
    setuid: bool


def kernel(release: str) -> Verdict:
    """`release` as uname(2) has it."""
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        return warning(
            "kernel", f"the version {release!r} cannot be read; weightfs needs Linux {_dotted(OLDEST)}"
        )
    version = int(match[1]), int(match[2])
    if version < OLDEST:
        return problem(
            "kernel", f"Linux {release} is too old to mount: weightfs needs {_dotted(OLDEST)}; upgrade it"
        )
    if version < PASSTHROUGH:
        return warning(
            "kernel",
            f"Linux {release} mounts, but reads of complete files pass through the daemon; "
            f"{_dotted(PASSTHROUGH)} or later lets the kernel read them itself",
        )
    return ok("kernel", f"Linux {release}: mounts, and has passthrough (from {_dotted(PASSTHROUGH)} on)")


def device(code: int | None) -> Verdict:
    """`code`: the errno of opening /dev/fuse, None if it opened."""
    match code:
        case None:
            return ok("/dev/fuse", "it is there, and this user may use it")
        case errno.ENOENT | errno.ENXIO | errno.ENODEV:
            text = "it is not there: `modprobe fuse` as root, or start the container with --device /dev/fuse"
        case errno.EACCES:
            text = "this user may not use it: as root, `chmod 666 /dev/fuse`, as udev does by default"
        case errno.EPERM:
            text = "this container or service may not use it: allow it (--device /dev/fuse, DeviceAllow=/dev/fuse rw)"
        case _:
            text = f"it cannot be opened ({errno.errorcode.get(code, code)}): see the kernel's log"
    return problem("/dev/fuse", text)


def helper(found: Helper | None, *, privileged: bool, no_new_privileges: bool) -> Verdict:
    """`privileged`: mount(2) is ours to call, so that no helper is needed."""
    name = "fusermount3"
    if privileged:
        return ok(name, "not needed: this user may mount by itself")
    if found is None:
        return problem(name, "an ordinary user needs it to mount: install the package fuse3")
    if not found.setuid:
        return problem(
            name,
            f"{found.path} is not setuid root: reinstall fuse3, or as root "
            f"`chown root {found.path} && chmod 4755 {found.path}`",
        )
    if no_new_privileges:
        return problem(
            name,
            "this process may gain no privileges, so that fusermount3 cannot mount: start it without "
            "NoNewPrivileges= or --security-opt no-new-privileges",
        )
    return ok(name, f"{found.path} is there, and setuid root")


def allow_other(conf: str | None, *, configured: bool, privileged: bool) -> Verdict:
    """`conf`: the text of /etc/fuse.conf, None if there is none."""
    name = "allow-other"
    if not configured:
        return ok(name, "not configured: the mount is for its own user (and allow-other for others)")
    if privileged:
        return ok(name, "configured, and this user needs no permission for it")
    if "user_allow_other" in (line.strip() for line in (conf or "").splitlines()):
        return ok(name, "configured, and /etc/fuse.conf permits it")
    return problem(
        name,
        "configured, but /etc/fuse.conf does not permit it: add a line `user_allow_other` there as root, "
        "or take allow-other away",
    )


def descriptors(soft: int, hard: int) -> Verdict:
    """RLIMIT_NOFILE; -1: no limit."""
    name = "open files"
    if soft == -1 or soft >= WANTED_DESCRIPTORS:
        return ok(name, f"the limit is {'none' if soft == -1 else soft}")
    way = f"raise it to {WANTED_DESCRIPTORS} or more: `ulimit -n`, or LimitNOFILE= of the service"
    if hard != -1 and hard < WANTED_DESCRIPTORS:
        way += f" (the hard limit is {hard}: root raises it)"
    text = f"the limit of {soft} is soon reached with many files and connections; {way}"
    return (problem if soft < LEAST_DESCRIPTORS else warning)(name, text)


def background(limit: int | None, *, privileged: bool) -> Verdict:
    """`limit`: the module's max_user_bgreq; None if it cannot be read. 0: the kernel's own, from memory."""
    name = "background requests"
    if privileged or limit is None or limit == 0 or limit >= WANTED_BACKGROUND:
        return ok(name, f"the {WANTED_BACKGROUND} that the mount asks for are granted")
    return warning(
        name,
        f"an ordinary user's mount gets {limit} instead of {WANTED_BACKGROUND}, so that waiting reads of one file "
        f"may stall others: as root, `echo {WANTED_BACKGROUND} > /sys/module/fuse/parameters/max_user_bgreq`",
    )


def request_timeout(default: int | None, largest: int | None, read_timeout: float) -> Verdict:
    """The two sysctls in seconds (fs.fuse; None: this kernel has none), and ours; 0 is no bound in each.

    The kernel takes the default, and no more than the largest; a request that is older aborts the whole mount
    (Documentation/admin-guide/sysctl/fs.rst).
    """
    name = "request timeout"
    bounds = [bound for bound in (default, largest) if bound]
    if not bounds:
        return ok(name, "the kernel sets none")
    bound = min(bounds)
    key = "default_request_timeout" if bound == default else "max_request_timeout"
    if not read_timeout or read_timeout >= bound:
        ours = format_duration(read_timeout) if read_timeout else "no bound"
        return problem(
            name,
            f"the kernel aborts a mount whose reader waits {bound} s, and read-timeout is {ours}: set read-timeout "
            f"below it, or as root `sysctl fs.fuse.{key}=0`",
        )
    return ok(name, f"the kernel's {bound} s are more than read-timeout")


def clock(now: float, built: float, skews: dict[str, float]) -> Verdict:
    """`now` and when this program was installed in Unix seconds; by host, how far our clock is ahead in seconds."""
    name = "clock"
    way = "set it, for example with `timedatectl set-ntp true`: certificates and signed links depend on it"
    if now < built - DAY:
        return problem(name, f"it is before the day when weightfs was installed; {way}")
    if not skews:
        return ok(name, "after the installation of weightfs; no source was there to compare it with")
    # A wrong clock differs from every source; one source may be wrong itself.
    host, skew = min(skews.items(), key=lambda item: abs(item[1]))
    if abs(skew) > TOLERATED_SKEW:
        word = "ahead of" if skew > 0 else "behind"
        return problem(name, f"it is {format_duration(abs(skew))} {word} that of {host}; {way}")
    return ok(name, f"it agrees with {host}")


def service(env_watchdog: str, env_cache: str) -> Verdict:
    """Under systemd with Type=notify: `WATCHDOG_USEC` and `CACHE_DIRECTORY`, empty where not set."""
    name = "systemd"
    if not env_watchdog:
        return warning(name, "the service has no watchdog: WatchdogSec=60 restarts a daemon that is stuck")
    if not env_cache:
        return warning(
            name, "the service has no CacheDirectory=, so that the cache is below a home directory; add it"
        )
    return ok(name, "watchdog and cache directory are set")


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
