"""What to do after a failed fetch: one row per `FailureKind`, and how long to wait before the next attempt.

Rule: everything that can pass by itself is retried until the reader's own bound (`read_timeout`) ends it;
`permanent` is said only of what waiting cannot mend, because a permanent failure becomes EIO, and EIO on a
page fault is SIGBUS. A digest mismatch or a malformed answer is *not* permanent: a proxy, a captive portal or
a bit flip on the way passes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType

from weightfs.errors import FailureKind

RETRY_AFTER_CAP = 300.0  # seconds; an origin that names a longer time is asked again after this
_MAX_HEADER_CHARS = 64  # the longest HTTP-date has 33
_MAX_DOUBLINGS = 62


@dataclass(frozen=True, slots=True)
class _Rule:
    permanent: bool  # asking the same place again later gives the same answer
    blames: bool  # counts against the mirror


_RULES: Mapping[FailureKind, _Rule] = MappingProxyType(
    {
        FailureKind.CONNECT: _Rule(permanent=False, blames=True),
        FailureKind.TIMEOUT: _Rule(permanent=False, blames=True),
        FailureKind.STALL: _Rule(permanent=False, blames=True),
        FailureKind.RESET: _Rule(permanent=False, blames=True),
        FailureKind.SHORT: _Rule(permanent=False, blames=True),
        FailureKind.BUSY: _Rule(permanent=False, blames=True),
        FailureKind.PROTOCOL: _Rule(permanent=False, blames=True),
        FailureKind.NO_RANGES: _Rule(permanent=False, blames=False),
        FailureKind.REDIRECT: _Rule(permanent=True, blames=True),
        FailureKind.TLS: _Rule(permanent=True, blames=True),
        FailureKind.AUTH: _Rule(permanent=True, blames=True),
        FailureKind.NOT_FOUND: _Rule(permanent=True, blames=True),
        FailureKind.CHANGED: _Rule(permanent=True, blames=True),
        FailureKind.MISMATCH: _Rule(permanent=False, blames=True),
        FailureKind.CANCELLED: _Rule(permanent=True, blames=False),
        FailureKind.WORKER: _Rule(permanent=False, blames=False),
        FailureKind.NO_SPACE: _Rule(permanent=False, blames=False),  # once something was evicted
        FailureKind.DISK: _Rule(permanent=True, blames=False),
    }
)


def is_permanent(kind: FailureKind) -> bool:
    """Whether the same mirror (or, for DISK, the cache) would fail again however long one waits."""
    return _RULES[kind].permanent


def blames_mirror(kind: FailureKind) -> bool:
    """Whether the failure counts against the mirror that was asked."""
    return _RULES[kind].blames


def delay(attempt: int, *, base: float, cap: float, retry_after: float | None, jitter: float) -> float:
    """Seconds to wait before retry number `attempt` (0 for the first one).

    Full jitter: `jitter` in [0, 1) times `base * 2 ** attempt`, at most `cap`. A `retry_after` (seconds) is
    waited out up to RETRY_AFTER_CAP, plus up to `base`, so that clients told the same time do not return in
    the same instant. It never shortens the back-off: a busy origin that says 0 each time is not hammered.
    """
    backoff = jitter * min(cap, base * 2.0 ** min(max(attempt, 0), _MAX_DOUBLINGS))
    if retry_after is None or math.isnan(retry_after):
        return backoff
    return max(backoff, min(max(retry_after, 0.0), RETRY_AFTER_CAP) + jitter * base)


_SECONDS = re.compile(r"[0-9]+")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_TIME = r"(?P<hour>\d{2}):(?P<minute>\d{2}):(?P<second>\d{2})"
# RFC 9110 section 5.6.7. Not strptime: its month names follow the locale. re.ASCII: \d is 0 to 9.
_DATES = tuple(
    re.compile(pattern, re.ASCII)
    for pattern in (
        rf"[A-Z][a-z]{{2}}, (?P<day>\d{{2}}) (?P<month>[A-Z][a-z]{{2}}) (?P<year>\d{{4}}) {_TIME} GMT",
        rf"[A-Z][a-z]{{5,8}}, (?P<day>\d{{2}})-(?P<month>[A-Z][a-z]{{2}})-(?P<year>\d{{2}}) {_TIME} GMT",
        rf"[A-Z][a-z]{{2}} (?P<month>[A-Z][a-z]{{2}}) (?P<day>[ \d]\d) {_TIME} (?P<year>\d{{4}})",
    )
)


def parse_retry_after(value: str, now: datetime) -> float | None:
    """Seconds from `now` (aware) that a Retry-After field names (RFC 9110 section 10.2.3), in either form.

    0.0 for a date that has passed; None for what is neither seconds nor an HTTP-date. An absurdly long time
    is returned as it is: `delay` caps it.
    """
    value = value.strip(" \t")
    if len(value) > _MAX_HEADER_CHARS:
        return None
    if _SECONDS.fullmatch(value):
        return float(value)
    date = _parse_http_date(value, now)
    return None if date is None else max(0.0, (date - now).total_seconds())


def _parse_http_date(value: str, now: datetime) -> datetime | None:
    match = next((found for pattern in _DATES if (found := pattern.fullmatch(value))), None)
    if match is None or match["month"] not in _MONTHS:
        return None
    year = int(match["year"])
    if len(match["year"]) == 2:
        year += now.year // 100 * 100
        if year > now.year + 50:  # the RFC's rule for two digits: not more than 50 years ahead
            year -= 100
    second = 59 if match["second"] == "60" else int(match["second"])  # datetime knows no leap seconds
    try:
        return datetime(
            year,
            _MONTHS.index(match["month"]) + 1,
            int(match["day"]),
            int(match["hour"]),
            int(match["minute"]),
            second,
            tzinfo=UTC,
        )
    except ValueError:
        return None
