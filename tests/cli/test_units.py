"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.units import (
    DURATION_UNITS,
    SIZE_UNITS,
    exact_duration,
    exact_size,
    format_count,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1048576", 2**20),
        ("64MiB", 2**26),
        ("64 MiB", 2**26),
        ("10GB", 10**10),
        ("1.5KiB", 1536),
        ("2kB", 2000),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("30", 30), ("500ms", 0.5), ("10m", 600), ("1.5h", 5400), ("2d", 172_800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "MiB", "64M", "64mib", "-1", "1e9", "0x10", "1 2", "1_000", "٣", "9" * 40, "nan", "inf"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="for example"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1w", "10M", "1h30m", "nan", "inf", "1e3s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="for example"):
        parse_duration(text)


@given(st.integers(0, 10**15), st.sampled_from(sorted(SIZE_UNITS)))
def test_every_whole_size_is_exact(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * SIZE_UNITS[unit]


@given(st.integers(0, 10**9), st.sampled_from(sorted(DURATION_UNITS)))
def test_every_duration(number: int, unit: str) -> None:
    assert parse_duration(f"{number} {unit}") == number * DURATION_UNITS[unit]


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_says_how_to_write_one(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError as error:
        assert "for example" in str(error)  # noqa: PT017  # either outcome is right


def test_shown() -> None:
    assert [format_size(n) for n in (0, 1023, 1536, 150 * 2**20, 5 * 2**50)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "150 MiB",
        "5120 TiB",
    ]
    assert [format_duration(s) for s in (0.25, 90, 3600, 86_401)] == ["0.2s", "1m30s", "1h", "24h1s"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 K"),
        (9_996, "10.0 K"),
        (135_000_000, "135 M"),
        (999_600_000, "1.00 B"),
        (8_030_261_312, "8.03 B"),
        (70_553_706_496, "70.6 B"),
        (1_026_000_000_000, "1.03 T"),
        (5 * 10**18, "5000000 T"),
    ],
)
def test_counts(count: int, text: str) -> None:
    assert format_count(count) == text


@given(st.integers(0, 1 << 50))
def test_an_exact_size_is_read_back(count: int) -> None:
    assert parse_size(exact_size(count)) == count
    assert exact_size(3 << 20) == "3MiB"


@given(st.integers(0, 10**9).map(lambda thousandths: thousandths / 1000))
def test_an_exact_duration_is_read_back(seconds: float) -> None:
    assert parse_duration(exact_duration(seconds)) == pytest.approx(seconds, rel=1e-9)
    assert [exact_duration(one) for one in (0, 0.5, 90, 600, 7200)] == ["0", "0.5s", "90s", "10m", "2h"]
