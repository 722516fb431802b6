"""Several tasks can fail at once, and trio then raises a group; a person wants the one failure that says most."""

from __future__ import annotations

from collections.abc import Iterator

from weightfs.errors import WeightfsError


def most_telling(error: BaseException) -> BaseException:
    """`error`, or out of a group: the first of ours, else the first that is no interrupt, else the first."""
    leaves = list(_leaves(error))
    for kind in (WeightfsError, Exception, BaseException):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return error


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error
