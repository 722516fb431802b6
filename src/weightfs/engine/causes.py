"""One cause for what a nursery raises: its tasks here all serve one purpose, and callers catch our own errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions in a tree of groups, flat."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


@asynccontextmanager
async def one_cause() -> AsyncIterator[None]:
    """Of a group, raise the first exception that is no cancellation; several that are unlike stay a group."""
    try:
        yield
    except BaseExceptionGroup as group:
        causes = [error for error in leaves(group) if not isinstance(error, trio.Cancelled)]
        if causes and all(type(error) is type(causes[0]) for error in causes):
            raise causes[0] from causes[0].__cause__
        raise
