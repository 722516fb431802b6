from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.retry import (
    RETRY_AFTER_CAP,
    blames_mirror,
    delay,
    is_permanent,
    parse_retry_after,
)
from weightfs.errors import FailureKind

NOW = datetime(2026, 6, 1, 12, 0, 0, tzinfo=UTC)
jitters = st.floats(0, 1, exclude_max=True)
attempts = st.integers(0, 10_000)

# Written out a second time on purpose: a changed cell must be changed here too.
PERMANENT = {"redirect", "tls", "auth", "not_found", "changed", "cancelled", "disk"}
NOT_THE_MIRRORS_FAULT = {"no_ranges", "cancelled", "worker", "no_space", "disk"}


def test_every_kind_has_a_row_that_makes_sense() -> None:
    for kind in FailureKind:
        assert is_permanent(kind) == (kind in PERMANENT)
        assert blames_mirror(kind) == (kind not in NOT_THE_MIRRORS_FAULT)


@given(attempts, jitters)
def test_full_jitter_stays_between_nothing_and_the_doubling(attempt: int, jitter: float) -> None:
    wait = delay(attempt, base=0.5, cap=30.0, retry_after=None, jitter=jitter)
    assert 0 <= wait <= 30.0
    assert wait <= 0.5 * 2.0 ** min(attempt, 60)
    assert wait == pytest.approx(jitter * min(30.0, 0.5 * 2.0 ** min(attempt, 60)))


def test_the_doublings_one_by_one() -> None:
    waits = [delay(n, base=1.0, cap=10.0, retry_after=None, jitter=0.5) for n in range(-1, 6)]
    assert waits == [0.5, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


@given(attempts, jitters, st.floats(allow_nan=False))
def test_retry_after_is_waited_out_and_bounded(attempt: int, jitter: float, retry_after: float) -> None:
    wait = delay(attempt, base=0.5, cap=30.0, retry_after=retry_after, jitter=jitter)
    assert min(max(retry_after, 0.0), RETRY_AFTER_CAP) <= wait <= RETRY_AFTER_CAP + 0.5
    assert wait >= delay(attempt, base=0.5, cap=30.0, retry_after=None, jitter=jitter)


def test_clients_told_the_same_time_come_back_apart() -> None:
    waits = {delay(0, base=1.0, cap=30.0, retry_after=60.0, jitter=jitter) for jitter in (0.0, 0.25, 0.5)}
    assert waits == {60.0, 60.25, 60.5}


def test_not_a_number_is_no_retry_after() -> None:
    assert delay(1, base=1.0, cap=30.0, retry_after=math.nan, jitter=0.5) == 1.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 7\t", 7.0),
        ("Mon, 01 Jun 2026 12:01:30 GMT", 90.0),
        ("Monday, 01-Jun-26 12:01:30 GMT", 90.0),
        ("Mon Jun  1 12:01:30 2026", 90.0),
        ("Mon, 01 Jun 2026 11:00:00 GMT", 0.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0.0),  # 1994: 2094 would be over 50 years ahead
        ("Tuesday, 01-Jun-76 12:00:00 GMT", (datetime(2076, 6, 1, 12, tzinfo=UTC) - NOW).total_seconds()),
        ("Mon, 01 Jun 2026 12:00:60 GMT", 59.0),  # a leap second
        (
            "Fri, 31 Dec 9999 23:59:59 GMT",
            (datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC) - NOW).total_seconds(),
        ),
        ("9" * 64, 1e64),
    ],
)
def test_retry_after_in_each_form(value: str, seconds: float) -> None:
    assert parse_retry_after(value, NOW) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "-1",
        "+1",
        "1.5",
        "1e3",
        "0x10",
        "1_000",
        "١٢",  # digits, but not ASCII
        "soon",
        "nan",
        "inf",
        "9" * 65,
        "9" * 5_000,  # int() would refuse it with a ValueError
        "60, 120",
        "60\n",
        "Mon, 01 Jun 2026 12:01:30",
        "Mon, 01 Jun 2026 12:01:30 CET",
        "Mon, 01 jun 2026 12:01:30 GMT",
        "Mon, 01 Foo 2026 12:01:30 GMT",
        "Mon, 31 Feb 2026 12:01:30 GMT",
        "Mon, 01 Jun 2026 24:00:00 GMT",
        "Mon, 01 Jun 2026 12:01:61 GMT",
        "Mon, 01 Jun 0000 12:01:30 GMT",
        "Mon, ٠١ Jun 2026 12:01:30 GMT",
    ],
)
def test_junk_is_no_time(value: str) -> None:
    assert parse_retry_after(value, NOW) is None


@given(st.integers(0, 10**9))
def test_any_date_that_the_standard_library_writes(seconds: int) -> None:
    then = NOW + timedelta(seconds=seconds)
    assert parse_retry_after(format_datetime(then, usegmt=True), NOW) == seconds
    # "now" may be in any zone; the header never is
    assert (
        parse_retry_after(format_datetime(then, usegmt=True), NOW.astimezone(timezone(timedelta(hours=5))))
        == seconds
    )


@given(st.text(max_size=80))
def test_never_raises_and_never_gives_a_negative(value: str) -> None:
    seconds = parse_retry_after(value, NOW)
    assert seconds is None or (seconds >= 0 and math.isfinite(seconds))
