"""Sizes and durations as people write them: a number and its unit, nothing else."""

from __future__ import annotations

import re
from typing import Final

_NUMBER = re.compile(r"\s*(?P<number>\d{1,18}(?:\.\d{1,9})?)\s*(?P<unit>[A-Za-zµ]*)\s*", re.ASCII)

# IEC 80000-13: KiB is 1024 bytes, kB is 1000. A bare "M" could be either, so it is refused.
SIZE_UNITS: Final = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
DURATION_UNITS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}


def parse_size(text: str) -> int:
    """Bytes. ValueError with one clause that shows how to write it."""
    match = _NUMBER.fullmatch(text)
    if match is None or match["unit"] not in SIZE_UNITS:
        raise ValueError(
            f"{text!r} is not a size; write a number of bytes, or for example 512KiB, 64MiB or 10GB"
        )
    number, unit = match["number"], SIZE_UNITS[match["unit"]]
    if "." not in number:
        return int(number) * unit
    return round(float(number) * unit)


def parse_duration(text: str) -> float:
    """Seconds. ValueError with one clause that shows how to write it."""
    match = _NUMBER.fullmatch(text)
    if match is None or match["unit"] not in DURATION_UNITS:
        raise ValueError(f"{text!r} is not a duration; write seconds, or for example 500ms, 30s, 10m or 1h")
    return float(match["number"]) * DURATION_UNITS[match["unit"]]


def format_size(count: float) -> str:
    """`1536` → `1.5 KiB`: three significant digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    if unit == "B" or count >= 100:
        return f"{count:.0f} {unit}"
    return f"{count:.1f} {unit}"


def exact_size(count: int) -> str:
    """`16777216` → `16MiB`: nothing is rounded, and `parse_size` reads it."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count and not count % SIZE_UNITS[unit]:
            return f"{count // SIZE_UNITS[unit]}{unit}"
    return str(count)


def exact_duration(seconds: float) -> str:
    """`600` → `10m`: nothing is rounded, and `parse_duration` reads it."""
    for unit in ("d", "h", "m"):
        if seconds and not seconds % DURATION_UNITS[unit]:
            return f"{seconds / DURATION_UNITS[unit]:.0f}{unit}"
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + ("s" if seconds else "")


def format_count(count: int) -> str:
    """`8030261312` → `8.03 B`: three significant digits and thousands, as parameters of models are counted."""
    scaled = float(count)
    for unit in ("", "K", "M", "B", "T"):
        if scaled < 999.5 or unit == "T":
            break
        scaled /= 1000
    if not unit:
        return str(count)
    decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{decimals}f} {unit}"


def format_duration(seconds: float) -> str:
    """`90` → `1m30s`; under ten seconds with one decimal."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    parts = [(hours, "h"), (minutes, "m"), (left, "s")]
    return "".join(f"{count}{unit}" for count, unit in parts if count) or "0s"


def counted(count: int, noun: str) -> str:
    """For example `1 ref`, `2 refs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
