"""Every error that weightfs raises on purpose.

An error carries fields; its text is one sentence that says what failed, for which ref, chunk and mirror, and what
the person can do. Third-party exceptions are translated to these where the library is touched, and nowhere else.

::

    WeightfsError                     exit code
    ├── UsageError                    2   what was typed or configured is wrong
    │   ├── RefError
    │   └── ConfigError
    ├── SourceError                   3   an origin did not give what was asked of it
    ├── IntegrityError                4   bytes, digests or signatures disagree
    │   ├── ChunkListError                a .meta4 that is malformed, hostile or for another file
    │   └── SignatureError
    ├── CacheError                    5
    │   ├── CacheBusyError                another weightfs owns the cache directory
    │   ├── CacheFormatError              made by a newer weightfs
    │   ├── CacheCorruptError             the index cannot be read
    │   ├── NoSpaceError
    │   ├── NoDescriptorsError            this process, or the machine, has no file descriptors left
    │   └── DiskFault                     the disk, or a hand in the cache, lost or changed bytes
    │       └── LostFileError                 a data file is gone, short or another one: the disk may be well
    ├── MountError                    6   mount point, /dev/fuse, fusermount3, stale mount
    └── DaemonError                   7   the daemon did not answer, or ended before it served
"""

from __future__ import annotations

import enum
from collections.abc import Iterator


class FailureKind(enum.StrEnum):
    """Why one fetch from one mirror failed: decides retry, blame and errno (`core.retry` holds the table)."""

    CONNECT = "connect"  # refused, unreachable, DNS, TLS handshake in progress when cut
    TIMEOUT = "timeout"  # no answer within the connect or header bound
    STALL = "stall"  # headers came, then no byte for the stall bound
    RESET = "reset"  # the connection ended amid headers or body
    SHORT = "short"  # the body ended before the promised length
    BUSY = "busy"  # 408, 425, 429, 500, 502, 503, 504: honours Retry-After
    PROTOCOL = (
        "protocol"  # wrong Content-Range, encoding, length, status: this mirror cannot be trusted with ranges
    )
    NO_RANGES = "no_ranges"  # 200 to a range request: only a whole stream can be had
    REDIRECT = "redirect"  # loop, too many, forbidden scheme or address
    TLS = "tls"  # certificate or handshake refused
    AUTH = "auth"  # 401, 403, 407
    NOT_FOUND = "not_found"  # 404, 410
    CHANGED = "changed"  # validator or total length is no longer the pinned one
    MISMATCH = "mismatch"  # chunk digest differs from the trusted list
    CANCELLED = "cancelled"  # stopped on request
    WORKER = "worker"  # the fetch worker died; nothing was the mirror's fault
    NO_SPACE = "no_space"  # ENOSPC or EDQUOT of the cache
    DISK = "disk"  # EIO or EROFS of the cache


class WeightfsError(Exception):
    """The root. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(WeightfsError):
    """What was typed or configured is wrong; nothing was done."""

    exit_code = 2


class RefError(UsageError):
    """A ref that cannot be parsed or whose scheme is unknown."""


class ConfigError(UsageError):
    """A configuration file, option or environment variable is wrong."""


class SourceError(WeightfsError):
    """An origin did not give what was asked of it.

    `kind` says how, `mirror` which one (a URL without query, userinfo or fragment: those may hold secrets),
    `retry_after` is in seconds if the origin named a time.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        kind: FailureKind,
        mirror: str = "",
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.mirror = mirror
        self.status = status
        self.retry_after = retry_after


class IntegrityError(WeightfsError):
    """Bytes, digests or signatures disagree."""

    exit_code = 4


class ChunkListError(IntegrityError):
    """A chunk manifest (.meta4) is malformed, hostile, or for another file."""


class SignatureError(IntegrityError):
    """A signature is missing where one is required, malformed, by an unknown key, or wrong."""


class CacheError(WeightfsError):
    """The cache directory cannot be used as it is."""

    exit_code = 5


class CacheBusyError(CacheError):
    """Another weightfs process owns this cache directory; `pid` is its process id when the lock file tells it."""

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class CacheFormatError(CacheError):
    """The cache was written by a newer weightfs."""


class CacheCorruptError(CacheError):
    """The index cannot be read; the message says what the next start does. `what`: what was found, in a few words."""

    def __init__(self, message: str, *, what: str = "") -> None:
        super().__init__(message)
        self.what = what


class NoSpaceError(CacheError):
    """The cache's filesystem or quota has no room left."""


class NoDescriptorsError(CacheError):
    """EMFILE or ENFILE: others close theirs in a while. It says nothing of the disk, nor of what is on it."""


class DiskFault(CacheError):  # noqa: N818 - a fault of the disk, as the design names it
    """The cache's disk gave an I/O error or became read-only, or a data file is not what it was (LostFileError).

    `blob` is the blob's id in hex, or empty where the fault is not one blob's.
    """

    def __init__(self, message: str, *, blob: str = "") -> None:
        super().__init__(message)
        self.blob = blob


class LostFileError(DiskFault):
    """A data file is gone, ends early, or is not the file that it was: nothing that was in it counts."""


class MountError(WeightfsError):
    """Mount point, /dev/fuse, fusermount3 or a stale mount."""

    exit_code = 6


class DaemonError(WeightfsError):
    """The daemon did not answer its control socket, or ended before it served."""

    exit_code = 7


class ReadError(WeightfsError):
    """A reader's bytes could not be had within their bounds; `mount.errno` maps `kind` to an errno.

    `ref` and `chunk` name what was wanted, `mirror` the last one that was asked.
    """

    def __init__(
        self, message: str, *, kind: FailureKind, ref: str = "", chunk: int = -1, mirror: str = ""
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.ref = ref
        self.chunk = chunk
        self.mirror = mirror


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions in a tree of groups, in order; the error itself if it is no group."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from leaves(part)
    else:
        yield error
