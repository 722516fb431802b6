"""What an error is taken for.

Of what a nursery raises, one cause: its tasks here all serve one purpose, and callers catch our own errors. Of an error
of the cache, the kind of failure that the planner and the readers know.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from weightfs.core.plan import Failure
from weightfs.errors import FailureKind, IntegrityError, NoSpaceError, WeightfsError, leaves


@asynccontextmanager
async def one_cause(*expected: type[Exception]) -> AsyncIterator[None]:
    """Of a group, raise the first exception that is no cancellation.

    Several that are unlike stay a group, unless all are `expected`: then the first type named there is raised.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        causes = [error for error in leaves(group) if not isinstance(error, trio.Cancelled)]
        if causes and all(type(error) is type(causes[0]) for error in causes):
            raise causes[0] from causes[0].__cause__
        if causes and all(isinstance(error, expected) for error in causes):
            cause = next(error for kind in expected for error in causes if isinstance(error, kind))
            raise cause from cause.__cause__
        raise


def failure_of(error: WeightfsError) -> Failure:
    """What the planner and the readers are told of an error of the cache."""
    return Failure(kind_of(error), str(error))


def kind_of(error: WeightfsError) -> FailureKind:
    """The kind of an error of the cache."""
    match error:
        case NoSpaceError():
            return FailureKind.NO_SPACE
        case IntegrityError():
            return FailureKind.MISMATCH
        case _:
            return FailureKind.DISK
