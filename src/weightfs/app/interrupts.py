"""SIGINT and SIGTERM end the work in order; a second one ends the process at once.

SIGUSR1, where it is asked for, ends the work too, but for another process to go on with it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

Cleanup = Callable[[], None]


class InterruptedBySignal(Exception):  # noqa: N818  # it is no error: somebody asked for the end
    """The work was cancelled by a signal, and everything is closed; `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


async def run_until_signal(
    work: Callable[[], Awaitable[None]],
    *,
    last_resort: Cleanup = lambda: None,
    leave: Cleanup | None = None,
) -> int | None:
    """Run `work`; the number of the signal that cancelled it, or None if it ended by itself.

    `last_resort` is called, on a second signal, just before the process ends without any clean-up. With `leave`,
    SIGUSR1 is one of the signals, and calls that first; a second one of it changes nothing.
    """
    received: list[int] = []
    async with _watching(received, last_resort, leave) as scope:
        with scope:
            await work()
    return received[0] if received else None


@asynccontextmanager
async def _watching(
    received: list[int], last_resort: Cleanup, leave: Cleanup | None
) -> AsyncIterator[trio.CancelScope]:
    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch, scope, received, last_resort, leave)
        yield scope
        nursery.cancel_scope.cancel()


async def _watch(
    scope: trio.CancelScope,
    received: list[int],
    last_resort: Cleanup,
    leave: Cleanup | None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    watched = {signal.SIGINT, signal.SIGTERM} | ({signal.SIGUSR1} if leave is not None else set())
    with trio.open_signal_receiver(*watched) as signals:
        task_status.started()
        async for signum in signals:
            if received and signum == signal.SIGUSR1:
                continue
            if received:
                last_resort()
                os._exit(128 + signum)
            received.append(signum)
            if leave is not None and signum == signal.SIGUSR1:
                leave()
            scope.cancel()
