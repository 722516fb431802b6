"""The watchdog of a mount: a request beyond its bound is told of once, with all that is known, and answered.

The bounds are `core.overdue`'s. Only that one request is ended: a read gets EIO, everything else ETIMEDOUT. The engine
sees a reader that went away; work that cannot be cancelled, for it sits in a thread, is left behind (see `requests`).
With `read-timeout` 0 a read is only told of. The watchdog is a task: it sees nothing while the loop itself stands
still.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId
from weightfs.core.overdue import Bound, Bounds
from weightfs.logs import one_line, redact
from weightfs.mount.requests import Request, Requests
from weightfs.stacks import on_one_line, task_frames, threads_of
from weightfs.units import format_duration

LOOK_EVERY: Final = 5.0  # seconds: small beside the bounds
TELL_AT_MOST: Final = 4  # lines per look: there is mostly one reason; of one kind the log takes five a minute

_log = logging.getLogger(__name__)


class Watchdog:
    """One per mount.

    `bounds()` may change while it runs; those of a request are what they were when it was first looked at.
    `explain(blob, span)`: how the engine is as to a read; its `str` is one line without secrets.
    """

    def __init__(
        self,
        requests: Requests,
        bounds: Callable[[], Bounds],
        explain: Callable[[BlobId, ByteSpan], object],
    ) -> None:
        self._requests = requests
        self._bounds = bounds
        self._explain = explain

    async def run(self) -> None:
        """Look every few seconds, until cancelled."""
        while True:
            due = trio.current_time() + LOOK_EVERY
            await trio.sleep_until(due)
            if trio.current_time() > due + LOOK_EVERY:
                # The process was stopped, or the loop busy: who has a bound of his own goes first.
                await trio.sleep(LOOK_EVERY)
            try:
                self.look(trio.current_time())
            except Exception:  # noqa: BLE001 - a fault here must not take the mount with it
                _log.exception("The watchdog's look failed")

    def look(self, now: float) -> None:
        """Tell of what is overdue, and end its wait."""
        bounds = self._bounds()
        news: list[tuple[Request, Bound]] = []
        for request in self._requests:
            bound = request.bound = request.bound or bounds.of_request(request.op)
            if not request.told and _is_overdue(request, bound, now):
                news.append((request, bound))
        for request, bound in news[:TELL_AT_MOST]:
            self._tell(request, bound, now)
        if len(news) > TELL_AT_MOST:
            _log.error(
                "%d more requests are overdue; see `weightfs debug inflight`", len(news) - TELL_AT_MOST
            )
        self._requests.overdue += len(news)
        for request, bound in news:
            request.told = True
            if request.wait is not None and bound.answered:
                self._requests.shelter.give_up(request.wait, "it was overdue, and the watchdog ended it")

    def _tell(self, request: Request, bound: Bound, now: float) -> None:
        _log.error(
            "A %s is overdue: request %d, %s, for %s, the bound is %s; %s; %s",
            request.op,
            request.number,
            _subject(request),
            format_duration(now - request.since),
            format_duration(bound.seconds),
            _verdict(request, bound),
            self._state(request),
        )

    def _state(self, request: Request) -> str:
        """Never fails: whatever is broken there, the caller is answered."""
        parts = []
        try:
            if request.blob is not None and request.span is not None:
                parts.append(str(self._explain(request.blob, request.span)))
            task = request.wait.task if request.wait is not None else request.task
            if task is not None:
                parts.append(f"its task is at {on_one_line(task_frames(task))}")
                parts += [f"its thread is at {on_one_line(frames)}" for frames in threads_of(task)]
        except Exception:  # noqa: BLE001
            _log.exception("The state of request %d cannot be told", request.number)
            parts.append("more cannot be told")
        return one_line(redact("; ".join(parts)))


def _is_overdue(request: Request, bound: Bound, now: float) -> bool:
    if request.held:
        return False  # its answer is known, and its time is bounded
    since = request.since if request.wait is None else request.wait.since
    return now - since > bound.seconds


def _subject(request: Request) -> str:
    offset, size = request.offset_and_size
    parts = [f"inode {request.inode}"]
    if request.name:
        parts.append(f"name {request.name!r}")
    if offset is not None and size is not None:
        parts.append(f"bytes [{offset}, {offset + size})")
    if request.pid is not None:
        parts.append(f"asked by process {request.pid}")
    return ", ".join(parts)


def _verdict(request: Request, bound: Bound) -> str:
    if not bound.answered:
        return "read-timeout is 0, so it goes on waiting"
    if request.wait is None:
        return "it cannot be ended"
    return "it gets EIO" if request.op == "read" else "it gets ETIMEDOUT"
