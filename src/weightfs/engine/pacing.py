"""Bandwidth limits: says to fetches in flight when they may go on. The rules are `core.bandwidth`'s.

Only bytes of chunks count; manifests and chunk lists are small. Where no limit is set, nobody asks and nothing runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from urllib.parse import urlsplit

import trio

from weightfs.core.bandwidth import Pacer
from weightfs.engine.settings import EngineSettings

LOOK_SECONDS = 60.0  # a step of a timetable is noticed no later than this


def minute_of_day() -> int:
    """Of the local time, as the timetable has it."""
    now = time.localtime()
    return now.tm_hour * 60 + now.tm_min


def pacer_of(settings: EngineSettings) -> Pacer:
    """With the limits that are set."""
    return Pacer(settings.bandwidth, dict(settings.host_bandwidth))


class Pacing:
    """`go_on(job)` lets a fetch that has paid receive more. Owned by the trio thread."""

    def __init__(self, pacer: Pacer, urgent: Callable[[int], bool], go_on: Callable[[int], None]) -> None:
        self._pacer = pacer
        self._urgent = urgent
        self._go_on = go_on
        self._hosts: dict[int, str] = {}  # of the jobs in flight that are paced
        self._due = float("inf")
        self._rearm = trio.Event()

    @property
    def jobs(self) -> int:
        """How many fetches in flight are paced."""
        return len(self._hosts)

    def change(self, pacer: Pacer) -> None:
        """Other limits: who waits goes on, and pays by the new ones. What began without a limit goes on without."""
        waiting = [job for job in self._pacer.waiting if job in self._hosts]  # it has others' jobs, too
        self._pacer = pacer
        for job in waiting:
            self._go_on(job)

    def begin(self, job: int, url: str) -> bool:
        """A fetch from `url` begins; whether it has to pay."""
        host = urlsplit(url).hostname
        if host is None or not self._pacer.paces(host):  # None: a file
            return False
        self._hosts[job] = host
        return True

    def pay(self, job: int, nbytes: int) -> None:
        """It has received so much."""
        if (host := self._hosts.get(job)) is not None:
            self._pacer.pay(job, host, nbytes, urgent=self._urgent(job))
            self._serve()

    def end(self, job: int) -> None:
        """It has ended."""
        if self._hosts.pop(job, None) is not None:
            self._pacer.forget(job)

    def _serve(self) -> None:
        now = trio.current_time()
        jobs, due = self._pacer.next(now, minute_of_day())
        for job in jobs:
            self._go_on(job)
        self._due = min(due, now + LOOK_SECONDS) if self._hosts else float("inf")
        self._rearm.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with trio.move_on_at(self._due):
                await self._rearm.wait()
            self._rearm = trio.Event()
            if trio.current_time() >= self._due:
                self._serve()
