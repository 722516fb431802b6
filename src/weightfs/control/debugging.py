"""What is in flight, and where the process is: documents for `weightfs debug`.

Rule: bounded, whatever happens: the oldest requests are told, the rest is counted. No secret is in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

from weightfs.control.documents import to_json
from weightfs.control.ports import Document
from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId
from weightfs.stacks import stacks

REQUESTS_AT_MOST: Final = 256  # of the 2,048 that a mount handles at a time: some 300 kB


class RequestLike(Protocol):
    """`mount.requests.RequestStatus`: a dataclass."""

    @property
    def blob(self) -> BlobId | None:
        """What is read."""
        ...

    @property
    def span(self) -> ByteSpan | None:
        """Of the blob."""
        ...


class RequestsLike(Protocol):
    """`mount.requests.Requests`."""

    def __len__(self) -> int: ...

    @property
    def overdue(self) -> int:
        """How many were, since the start."""
        ...

    @property
    def left_behind(self) -> int:
        """Works that hang, whose requests have been answered."""
        ...

    def status(self, at_most: int, /) -> Sequence[RequestLike]:
        """The oldest requests."""
        ...


class ExplainingEngine(Protocol):
    """The part of `engine.Engine` that is asked."""

    def explain(self, blob: BlobId, span: ByteSpan, /) -> object:
        """`engine.explain.WaitStatus`, or None."""
        ...

    def fetches(self) -> Sequence[object]:
        """`engine.explain.FetchStatus` each."""
        ...


def inflight_document(engine: ExplainingEngine, requests: RequestsLike | None) -> Document:
    """The kernel's requests, each with what it waits for, and the fetches. `requests`: the mount's, if there is one."""
    told = [] if requests is None else requests.status(REQUESTS_AT_MOST)
    total = 0 if requests is None else len(requests)
    return {
        "requests": [_request(engine, request) for request in told],
        "requests_left_out": max(0, total - len(told)),
        "left_behind": 0 if requests is None else requests.left_behind,
        "overdue": 0 if requests is None else requests.overdue,
        "fetches": to_json(list(engine.fetches())),
    }


def _request(engine: ExplainingEngine, request: RequestLike) -> Any:
    document = to_json(request)
    document["wait"] = None
    if request.blob is not None and request.span is not None:
        document["wait"] = to_json(engine.explain(request.blob, request.span))
    return document


def stacks_document() -> Document:
    """See `weightfs.stacks`."""
    document: Document = to_json(stacks())
    return document
