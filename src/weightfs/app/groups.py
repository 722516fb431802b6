"""Several tasks can fail at once, and trio then raises a group; a person wants the one failure that says most."""

from __future__ import annotations

from weightfs.errors import WeightfsError, leaves


def most_telling(error: BaseException) -> BaseException:
    """`error`, or out of a group: the first of ours, else the first that is no interrupt, else the first."""
    causes = list(leaves(error))
    for kind in (WeightfsError, Exception, BaseException):
        for cause in causes:
            if isinstance(cause, kind):
                return cause
    return error
