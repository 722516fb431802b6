"""What the service manager is told while a mount serves: that it lives (WATCHDOG), and what is going on (STATUS).

Rule: WATCHDOG=1 is sent only after the mount has answered a statvfs from outside the loop, and the engine a question
to its index from a thread such as readers use. What a restart would not mend (an origin out of reach, a full disk) is
said in the status, and never keeps a ping back: a restart costs every reader what it has mapped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Final, Protocol

import trio

from weightfs.app import notify
from weightfs.engine.status import EngineStatus, FileStatus
from weightfs.errors import CacheError
from weightfs.logs import one_line, redact
from weightfs.units import format_size

# The whole engine is asked, in the loop: a few milliseconds with a thousand files, seconds with 100,000. So it is asked
# the less often the longer it takes.
STATUS_SECONDS: Final = 5.0
PAUSE_PER_SECOND: Final = 100.0  # of asking: one percent of the loop's time at most
MAX_TEXT: Final = 400  # characters: systemctl shows it on one line

log = logging.getLogger(__name__)


class ServingEngine(Protocol):
    """The part of `engine.Engine` that is looked at."""

    async def survey(self) -> EngineStatus:
        """Everything, from memory."""
        ...

    async def probe(self) -> None:
        """Return when the index has answered. CacheError."""
        ...


class ServingMount(Protocol):
    """The part of `mount.serve.Mounted` that is looked at."""

    async def probe(self, timeout: float, /) -> bool:  # noqa: ASYNC109 - part of the question
        """Whether the mount answers in time."""
        ...


async def keep_alive(mount: ServingMount, engine: ServingEngine, interval: float) -> None:
    """Ping while mount and engine answer, until cancelled.

    Args:
        mount: What clients see.
        engine: What is behind it.
        interval: Half of the time that the manager allows between two pings, in seconds. A sound mount is never further
            than three halves of it from one ping to the next: half to sleep, and half for each of the two answers.
    """
    while True:
        if await mount.probe(interval / 2) and await _answers(engine, interval / 2):
            notify.notify("WATCHDOG=1")
        await trio.sleep(interval / 2)


async def _answers(engine: ServingEngine, seconds: float) -> bool:
    with trio.move_on_after(seconds):
        try:
            await engine.probe()
        except CacheError as error:  # an answer: the service goes on with what it has in memory
            log.warning("the cache's index gives an error: %s", error)
        return True
    log.warning("the cache's index did not answer within %g s", seconds)
    return False


async def tell_status(engine: ServingEngine, clock: Callable[[], float] = time.perf_counter) -> None:
    """Send the status whenever it changes, every `STATUS_SECONDS` at most, until cancelled.

    `clock`: seconds, monotonic, that go on while the loop stands still.
    """
    told = ""
    before, since = 0, trio.current_time()
    while True:
        began = clock()
        status, now = await engine.survey(), trio.current_time()
        rate = (status.fetched_bytes - before) / (now - since) if now > since else 0.0
        before, since = status.fetched_bytes, now
        text = status_text(status, rate)
        if text != told and notify.notify(f"STATUS={text}"):
            told = text
        await trio.sleep(max(STATUS_SECONDS, PAUSE_PER_SECOND * (clock() - began)))


def status_text(status: EngineStatus, rate: float) -> str:
    """One line: models, how much of them is here, who waits, and what is wrong. Without secrets.

    Args:
        status: The engine's.
        rate: Bytes per second from the network, lately.
    """
    # A blob counts once, wherever it is named.
    files = {file.blob: file for ref in status.refs for file in ref.files}.values()
    parts = [_holdings(len(status.refs), files)]
    waiting = sum(file.waiting_readers for file in files)
    if waiting:
        parts.append(f"{waiting} reader{_s(waiting)} waiting")
    if rate >= 1:
        parts.append(f"fetching {format_size(rate)}/s")
    parts += _trouble(status, files)
    return one_line(redact("; ".join(parts)))[:MAX_TEXT]


def _holdings(refs: int, files: Collection[FileStatus]) -> str:
    if not refs:
        return "no models"
    size = sum(file.size for file in files)
    present = sum(file.present_bytes for file in files)
    # 100 % is said of what is complete alone.
    percent = 100 if present >= size else min(99, present * 100 // max(1, size))
    return f"{refs} model{_s(refs)}, {percent}% of {format_size(size)} here"


def _trouble(status: EngineStatus, files: Collection[FileStatus]) -> list[str]:
    parts = []
    if status.trouble:
        parts.append(f"trouble: {status.trouble}")
    failing = [file for file in files if file.error]
    if failing:
        parts.append(f"{len(failing)} file{_s(len(failing))} cannot be fetched ({failing[0].error})")
    wrong = status.mismatched_chunks
    if wrong:
        parts.append(f"{wrong} chunk{_s(wrong)} came damaged and {'was' if wrong == 1 else 'were'} refused")
    if status.disk_faults:
        parts.append(f"{status.disk_faults} chunk{_s(status.disk_faults)} that the disk did not keep")
    return parts


def _s(count: int) -> str:
    return "" if count == 1 else "s"
