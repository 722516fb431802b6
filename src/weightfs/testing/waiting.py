"""Waiting for what nobody tells a test of: another process, or the end of what goes on by itself.

Rule: every wait is bounded, by far more than a busy machine takes. A hang becomes a failure, and nothing is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

import trio

T = TypeVar("T")

DEADLINE: Final = 60.0  # seconds
POLL_SECONDS: Final = 0.01


def until(condition: Callable[[], T], what: str = "this condition") -> T:
    """Poll until `condition` gives something true, and return it; AssertionError after a deadline."""
    deadline = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(POLL_SECONDS)
    return found


async def eventually(condition: Callable[[], T], what: str = "this condition") -> T:
    """The same within a trio run, whose other tasks go on meanwhile."""
    with trio.move_on_after(DEADLINE):
        while not (found := condition()):  # noqa: ASYNC110 - nobody sets an event
            await trio.sleep(POLL_SECONDS)
        return found
    raise AssertionError(f"waited in vain for: {what}")
