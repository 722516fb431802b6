"""The life of a mount: connect, serve, and go without leaving anything behind.

This process never touches its own mount: whoever does waits for himself, and a thread that waits for an answer that a
killed daemon owes keeps that from ending. At the end the order is fixed: fail the reads, unmount while requests are
still answered, and only then stop answering. A daemon that leaves its mount to the next one (`takeover`) does none of
that: it stops answering, and lets go.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from weightfs.core.overdue import Bounds
from weightfs.errors import MountError
from weightfs.layouts.base import Layout
from weightfs.mount import mounttable
from weightfs.mount.browsing import Browser
from weightfs.mount.inodes import Namespace
from weightfs.mount.ops import WeightOperations
from weightfs.mount.passthrough import Passthrough
from weightfs.mount.ports import MountedEngine
from weightfs.mount.session import Connection, Handover, MountOptions, guarded_reads
from weightfs.mount.stats import MountStats
from weightfs.mount.takeover import Hold, Keeper, obtain
from weightfs.mount.trees import Trees
from weightfs.mount.watchdog import Watchdog

PROBE_TIMEOUT = 5.0
_END_TIMEOUT = 5.0  # seconds for the loop to end once the connection has, or it was told to

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount that answers; the value of `serve`'s task status."""

    path: Path
    device: str  # major:minor in mountinfo; the minor number is the FUSE connection's
    stats: MountStats
    resumed: bool = False  # it was another daemon's before, and is in use
    _limiter: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))

    async def probe(self, timeout: float = PROBE_TIMEOUT) -> bool:  # noqa: ASYNC109 - part of the question
        """Whether the mount answers a statvfs, asked by another process; one such question at most at a time."""
        health = mounttable.Health.SILENT
        with trio.move_on_after(timeout):
            ask = partial(mounttable.probe, self.path, timeout)
            try:
                health = await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=self._limiter)
            except MountError as error:
                _log.warning("%s", error)
                return False
        if health is mounttable.Health.SILENT:
            _log.warning("The mount at %s did not answer within %g s", self.path, timeout)
        elif health is mounttable.Health.STALE:
            _log.warning("The mount at %s does not answer: %s", self.path, os.strerror(errno.ENOTCONN))
        return health is mounttable.Health.ALIVE


async def serve(
    mountpoint: Path,
    engine: MountedEngine,
    layouts: Sequence[Layout],
    options: MountOptions | None = None,
    *,
    stats: MountStats | None = None,
    keeper: Keeper | None = None,
    task_status: trio.TaskStatus[Mounted] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount `engine`'s manifests and serve them until cancelled, or until unmounted from outside.

    `task_status` is told when the mount answers. In the main thread SIGALRM is used (see
    `session.guarded_reads`). What `keeper` kept for us is taken over; and if it says at the end that this daemon is
    leaving, the mount stays as it is.

    Raises:
        MountError: the mount could not be made, or its connection broke.
    """
    options = options or MountOptions()
    stats = stats if stats is not None else MountStats()
    hold = await trio.to_thread.run_sync(obtain, mountpoint, options, keeper)
    connection = hold.connection
    handover = Handover(connection, resumed=hold.resumed)
    left = False
    try:
        passthrough = Passthrough(lambda: handover.fd)
        trees = Trees(engine, layouts)
        operations = WeightOperations(
            engine,
            trees.make(),
            stats,
            handover.takeover,
            passthrough,
            _browser(engine, options),
            settled=trees.settled,
            ledger=hold.ledger,
            fresh=not hold.resumed,
        )
        with _rebuilding(operations, engine, trees):
            handover.attach(operations)
            session = _Session(hold, handover, operations, engine, options, passthrough, trees, keeper)
            with guarded_reads(handover.fd, session.lost), _quiet_pyfuse3(), passthrough.installed():
                try:
                    await session.run(stats, task_status)
                finally:
                    left = session.left
    finally:
        handover.close()
        if not left:
            await _end(connection, keeper)
        with trio.CancelScope(shield=True):
            await stats.requests.shelter.drained()  # the mount is gone; what it used may be closed next


async def _end(connection: Connection, keeper: Keeper | None) -> None:
    if keeper is not None:
        keeper.drop()
    with trio.CancelScope(shield=True), trio.move_on_after(mounttable.HELPER_TIMEOUT):
        await trio.to_thread.run_sync(_leave_nothing, connection, abandon_on_cancel=True)


def bounds_of(engine: MountedEngine, options: MountOptions) -> Bounds:
    """When the watchdog takes a request for overdue."""
    browse_timeout = options.browse_timeout if options.browse else 0.0
    return Bounds.of(read_timeout=engine.read_timeout, browse_timeout=browse_timeout)


def _browser(engine: MountedEngine, options: MountOptions) -> Browser | None:
    if not options.browse:
        return None
    return Browser(engine, ttl=options.browse_ttl, timeout=options.browse_timeout)


@contextlib.contextmanager
def _rebuilding(operations: WeightOperations, engine: MountedEngine, trees: Trees) -> Iterator[None]:
    """Show a new tree whenever the manifests change."""

    def show(namespace: Namespace) -> None:
        operations.show(namespace, int(time.time()))

    previous = engine.on_change
    trees.show = show
    show(trees.make())  # what changed while the operations were made
    engine.on_change = trees.changed
    try:
        yield
    finally:
        engine.on_change = previous


class _Session:
    """pyfuse3's loop, and its orderly end."""

    def __init__(
        self,
        hold: Hold,
        handover: Handover,
        operations: WeightOperations,
        engine: MountedEngine,
        options: MountOptions,
        passthrough: Passthrough,
        trees: Trees,
        keeper: Keeper | None,
    ) -> None:
        self.left = False  # the mount is the next daemon's
        self._trees = trees
        self._hold = hold
        self._inherited = len(hold.ledger)
        self._keeper = keeper
        self._connection = hold.connection
        self._handover = handover
        self._operations = operations
        self._engine = engine
        self._options = options
        self._passthrough = passthrough
        self._over = trio.Event()  # the connection has ended; handlers may still be waiting
        self._ended = trio.Event()  # the loop and every handler have
        self._scope = trio.CancelScope(
            shield=True
        )  # the loop outlives a cancellation, to serve until the unmount
        self._trees_scope = trio.CancelScope(shield=True)  # and so does what makes the trees
        self._failure: BaseException | None = None

    async def run(self, stats: MountStats, task_status: trio.TaskStatus[Mounted]) -> None:
        """Serve until the connection ends or we are cancelled. MountError if it broke."""
        await self._serve(stats, task_status)
        if self._failure is not None:
            raise MountError(
                f"The mount at {self._connection.path} failed and is unmounted: {self._failure}."
            )

    async def _serve(self, stats: MountStats, task_status: trio.TaskStatus[Mounted]) -> None:
        path = self._connection.path
        mounted = Mounted(path, self._connection.device, stats, self._hold.resumed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._loop)
            nursery.start_soon(self._make_trees)
            bounds = partial(bounds_of, self._engine, self._options)
            nursery.start_soon(Watchdog(stats.requests, bounds, self._engine.explain).run)
            try:
                answers = await mounted.probe() and self._handover.failure is None
                if not answers and not self._over.is_set():
                    self._failure = self._handover.failure or TimeoutError(
                        "it did not answer its own statvfs"
                    )
                    return  # through `finally`; raised below the nursery, which would wrap it
                self._hold.ledger.attempts = 0
                if self._hold.resumed:
                    _log.info("The mount at %s goes on; inodes that are open: %d", path, self._inherited)
                if self._options.passthrough and not self._over.is_set():
                    await self._passthrough.start(path, agreed=self._connection.passthrough)
                task_status.started(mounted)
                await self._over.wait()
            finally:
                with trio.CancelScope(shield=True):
                    await self._stop()
                nursery.cancel_scope.cancel()

    def lost(self) -> None:
        """The kernel has ended the connection: unmounted from outside, or aborted."""
        self._over.set()

    async def _loop(self) -> None:
        with self._scope:
            try:
                await pyfuse3.main(max_tasks=self._options.max_tasks)
            except Exception as error:  # noqa: BLE001 - told by `run`, after the mount is gone
                _log.exception("pyfuse3's loop failed")
                self._failure = error
            finally:
                self._over.set()
                self._ended.set()

    async def _make_trees(self) -> None:
        with self._trees_scope:
            await self._trees.run()

    async def _stop(self) -> None:
        """Fail the reads, unmount while requests are still answered, and end the loop: each within bounds."""
        if self._hold.kept and self._keeper is not None and self._keeper.leaving and not self._over.is_set():
            # Nothing may wake a handler before it is cancelled: its answer would be an error, and the last word.
            self.left = self._failure is None
        if self.left:
            self._scope.cancel()
            self._trees_scope.cancel()
            return
        self._trees.stop()
        self._operations.stop_holding()
        self._engine.fail_reads()
        if not self._ended.is_set():
            gone = await self._take_away()
            # After an unmount the kernel ends the loop. Else, or if it does not (another mount namespace holds
            # the mount too), the loop is told to end.
            if not (gone and await self._wait_for_end()):
                pyfuse3.terminate()
                await self._wait_for_end()
        self._scope.cancel()
        self._trees_scope.cancel()

    async def _take_away(self) -> bool:
        """Unmount, or detach a busy mount when the time is over. True: the kernel will end the connection."""
        patience = 0.0 if self._over.is_set() else self._options.unmount_timeout  # a dead mount has no users
        with trio.move_on_after(patience):
            while not await self._unmount(lazy=False):  # noqa: ASYNC110 - no event says "not busy any more"
                await trio.sleep(0.05)
            return True
        if not self._over.is_set():
            _log.warning(
                "%s is in use; it is detached, and reads of what is open there fail", self._connection.path
            )
        with trio.move_on_after(mounttable.HELPER_TIMEOUT):
            await self._unmount(lazy=True)
        return self._over.is_set()

    async def _wait_for_end(self) -> bool:
        with trio.move_on_after(_END_TIMEOUT):
            await self._ended.wait()
            return True
        return False

    async def _unmount(self, *, lazy: bool) -> bool:
        return await trio.to_thread.run_sync(
            partial(_unmount, self._connection, lazy=lazy), abandon_on_cancel=True
        )


def _ours(connection: Connection) -> mounttable.Mount | None:
    """Our mount, if it is on top at its place."""
    top = mounttable.mounts_at(connection.path)[-1:]
    return top[0] if top and top[0].device == connection.device else None


def _unmount(connection: Connection, *, lazy: bool) -> bool:
    """Take our mount away. True: it is not there any more; False: it is busy."""
    if _ours(connection) is None:
        return not any(mount.device == connection.device for mount in mounttable.mounts_at(connection.path))
    try:
        mounttable.take_away(connection.path, lazy=lazy)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EINVAL):
            _log.warning("%s could not be unmounted: %s", connection.path, error.strerror)
        return _ours(connection) is None
    return True


def _leave_nothing(connection: Connection) -> None:
    """After the connection has ended: if our mount is still there, it is dead, and is detached."""
    if _ours(connection) is not None:
        _unmount(connection, lazy=True)


@contextlib.contextmanager
def _quiet_pyfuse3() -> Iterator[None]:
    """pyfuse3 calls it an error that an answer's reader is gone (ENOENT); readers are killed every day."""

    def relevant(record: logging.LogRecord) -> bool:
        return not (isinstance(record.args, tuple) and record.args == (os.strerror(errno.ENOENT),))

    logger = logging.getLogger("pyfuse3")
    logger.addFilter(relevant)
    try:
        yield
    finally:
        logger.removeFilter(relevant)
