"""Drives the planner: feeds it what happens, and carries out what it says. The only caller of `core.planner`.

Rule: `feed` never awaits, so events are taken one at a time, in the order in which they happened. Waiters are woken by
an event of their own; nobody holds a lock across a fetch.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import trio

from weightfs.core import plan
from weightfs.core.geometry import ChunkSpan
from weightfs.core.manifest import BlobId
from weightfs.core.plan import Failure, Fetch
from weightfs.core.planner import Planner
from weightfs.core.ref import without_secrets
from weightfs.engine import wire
from weightfs.engine.blobs import BlobState
from weightfs.engine.pacing import Pacing, pacer_of
from weightfs.engine.settings import EngineSettings
from weightfs.engine.workers import WorkerPool
from weightfs.errors import CacheError, FailureKind, ReadError

log = logging.getLogger(__name__)

REMOVED = Failure(FailureKind.CANCELLED, "the model was removed")


@dataclass(slots=True)
class _Waiting:
    event: trio.Event = field(default_factory=trio.Event)
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class _Running:
    state: BlobState
    fetch: Fetch
    life: int  # of the file that it writes into


class Fetcher:
    """`landed(state, chunk, digest)` is called for each chunk that became visible, in the trio thread.

    `mend(state, life)` says whether the file that counted in `life` was lost; then there is a new one. CacheError.
    """

    def __init__(
        self,
        planner: Planner,
        pool: WorkerPool,
        landed: Callable[[BlobState, int, bytes], None],
        mend: Callable[[BlobState, int], Awaitable[bool]],
        nursery: trio.Nursery,
        settings: EngineSettings,
    ) -> None:
        self._planner = planner
        self._pool = pool
        self._landed = landed
        self._mend_file = mend
        self._nursery = nursery
        self._blobs: dict[BlobId, BlobState] = {}
        self._jobs: dict[int, _Running] = {}
        self._waiters: dict[int, _Waiting] = {}
        self._next_waiter = 1
        self._alarm = float("inf")
        self._rearm = trio.Event()
        self._ended = trio.Event()
        self._need_room: Callable[[], None] = lambda: None
        self._relieve: Callable[[BlobState, int], Awaitable[bool]]
        self._pacing = Pacing(pacer_of(settings), planner.urgent, lambda job: pool.tell(wire.GoOn(job)))
        self.closed: Failure | None = None
        self.fetched_bytes = 0
        self.mismatches = 0

    def connect(
        self, need_room: Callable[[], None], relieve: Callable[[BlobState, int], Awaitable[bool]]
    ) -> None:
        """Before anything else. `need_room()`: something does not fit into the capacity.

        `relieve(state, job)`: the disk is full, says a job; whether there is room now, so that it may be tried again.
        """
        self._need_room, self._relieve = need_room, relieve

    @property
    def jobs(self) -> int:
        """How many fetches are in flight."""
        return len(self._jobs)

    def reload(self, settings: EngineSettings) -> None:
        """Other bandwidth limits from now on."""
        self._pacing.change(pacer_of(settings))

    @property
    def paced(self) -> int:
        """How many of them keep a bandwidth limit."""
        return self._pacing.jobs

    def add(self, state: BlobState) -> None:
        """Make a blob known. Its `present` set is shared with the planner from here on."""
        self._blobs[state.id] = state
        absent = (
            [c for c in state.shape.chunks if c not in state.present] if state.whole and state.stale else ()
        )
        self.feed(plan.Added(state.id, state.shape, state.blob.mirrors, state.present, absent))

    def remove(self, blob: BlobId) -> None:
        """Forget a blob; its jobs are stopped."""
        self._blobs.pop(blob, None)
        self.feed(plan.Removed(blob))

    async def drained(self, state: BlobState) -> None:
        """Until no fetch of a removed blob is in flight."""
        while any(running.state is state for running in self._jobs.values()):
            self._ended = trio.Event() if self._ended.is_set() else self._ended
            await self._ended.wait()

    def fill(self, state: BlobState) -> None:
        """Put the blob in line for background fill."""
        self.feed(plan.Fill(state.id, on=True))
        if self._planner.is_short:
            self._need_room()  # it may stand behind somebody for whom room was not made

    def abandon(self, state: BlobState) -> None:
        """Stop every fetch of a blob: the file that they write into was lost. The planner plans them anew."""
        for job, running in list(self._jobs.items()):
            if running.state is state:
                self._pool.tell(wire.StopJob(job))

    def feed(self, event: plan.Event) -> None:
        """Tell the planner, and do what it answers."""
        for command in self._planner.feed(event, trio.current_time()):
            match command:
                case plan.Fetch():
                    self._submit(command)
                case plan.Trim(job, at):
                    self._pool.tell(wire.TrimJob(job, at))
                case plan.Stop(job):
                    self._pool.tell(wire.StopJob(job))
                case plan.Wake(waiter, failure):
                    if waiting := self._waiters.pop(waiter, None):
                        waiting.failure = failure
                        waiting.event.set()
                case plan.GaveUp():
                    self._gave_up(command)
                case plan.NeedRoom():
                    self._need_room()
                case plan.SleepUntil(time):
                    self._alarm = time
                    self._rearm.set()

    def _submit(self, fetch: plan.Fetch) -> None:
        state = self._blobs[fetch.blob]
        mirror = state.mirrors[fetch.mirror]
        self._jobs[fetch.job] = _Running(state, fetch, state.life)
        digests = "".join(state.expected(chunk).hex().rjust(64, wire.UNKNOWN) for chunk in fetch.span)
        self._pool.submit(
            wire.FetchJob(
                fetch.job,
                str(state.path),
                state.shape.size,
                state.shape.chunk_length,
                fetch.span.start,
                fetch.span.stop,
                mirror.url,
                mirror.validator,
                digests,
                fetch.whole,
                sorted(fetch.wanted),
                list(state.file or ()),
                self._pacing.begin(fetch.job, mirror.url),
            )
        )

    def _gave_up(self, command: plan.GaveUp) -> None:
        state = self._blobs.get(command.blob)
        if state is None:
            return
        failure = command.failure
        what = f"chunk {failure.chunk} of {state.ref}" if failure.chunk >= 0 else state.ref
        log.error("%s cannot be fetched for now: %s", what, failure.text)
        state.gave_up.set()
        state.notify()  # who waits for the trust of the whole (policy) is told as well

    def handle(self, message: wire.FromWorker) -> None:
        """What a worker said about a fetch."""
        match message:
            case wire.ChunkLanded(job, chunk, digest):
                self._chunk_landed(job, chunk, bytes.fromhex(digest))
            case wire.ChunkMismatched(job, chunk, actual):
                self._mismatched(job, chunk, actual)
            case wire.JobTrimmed(job, stop):
                self.feed(plan.Trimmed(job, stop))
            case wire.Received(job, nbytes):
                self._pacing.pay(job, nbytes)
            case wire.JobDone(job):
                self._over(job)
                self.feed(plan.Done(job))
            case wire.JobFailed():
                self._failed(message)

    def _chunk_landed(self, job: int, chunk: int, digest: bytes) -> None:
        running = self._jobs.get(job)
        if running is None:
            return
        state = running.state
        nbytes = len(state.shape.span_of(chunk))
        self.fetched_bytes += nbytes
        state.fetched_bytes += nbytes
        if running.life != state.life:
            return  # into a file that was lost; it is free again when the job has ended
        if self._blobs.get(state.id) is state:  # first the record, then the readers
            self._landed(state, chunk, digest)
        self.feed(plan.Landed(job, chunk))

    def _mismatched(self, job: int, chunk: int, actual: str) -> None:
        running = self._jobs.get(job)
        if running is None:
            return
        state, fetch = running.state, running.fetch
        self.mismatches += 1
        mirror = without_secrets(state.mirrors[fetch.mirror].url)
        log.warning(
            "chunk %d of %s from mirror %s has SHA-256 %s where the chunk list says %s; discarded, asking elsewhere",
            chunk, state.ref, mirror, actual, state.expected(chunk).hex(),
        )  # fmt: skip
        text = (
            f"chunk {chunk} of {state.ref} from mirror {mirror} does not match its chunk list; "
            "add a mirror that has the right bytes"
        )
        self.feed(plan.Mismatched(job, chunk, Failure(FailureKind.MISMATCH, text, mirror, None, chunk)))

    def _over(self, job: int) -> _Running | None:
        self._pacing.end(job)
        self._ended.set()
        return self._jobs.pop(job, None)

    def _failed(self, message: wire.JobFailed) -> None:
        running = self._over(message.job)
        kind = FailureKind(message.kind)
        if running is not None and kind is not FailureKind.CANCELLED:
            log.info("fetch of %s: %s (%s)", running.state.ref, message.text, kind)
        failure = Failure(kind, message.text, message.mirror, message.retry_after)
        closing = self._nursery.cancel_scope.cancel_called
        if running is not None and kind is FailureKind.DISK and not closing:
            self._nursery.start_soon(self._mend, message.job, running, failure)
        elif running is not None and kind is FailureKind.NO_SPACE and not closing:
            self._nursery.start_soon(self._make_room, message.job, running, failure)
        else:
            self._tell_failed(message.job, failure)

    async def _mend(self, job: int, running: _Running, failure: Failure) -> None:
        """If the file was lost, a new one is made, and the fetch is nobody's fault; else the disk is at fault."""
        try:
            if await self._mend_file(running.state, running.life):
                failure = replace(failure, kind=FailureKind.CANCELLED)
        except CacheError as error:
            failure = replace(failure, text=str(error))
        self._tell_failed(job, failure)

    async def _make_room(self, job: int, running: _Running, failure: Failure) -> None:
        """If something could be evicted, the fetch is tried again, once, before anybody is told of the full disk."""
        if await self._relieve(running.state, job):
            failure = replace(failure, kind=FailureKind.CANCELLED)
        self._tell_failed(job, failure)

    def _tell_failed(self, job: int, failure: Failure) -> None:
        self.feed(plan.Failed(job, failure, random.random()))  # noqa: S311 - jitter, not a secret

    async def wait_for(self, state: BlobState, chunks: ChunkSpan) -> None:
        """Until all of `chunks` are visible. ReadError if they cannot be had; cancel it to withdraw."""
        if self.closed:
            raise self._read_error(state, chunks, self.closed)
        if self._blobs.get(state.id) is not state:
            raise self._read_error(state, chunks, REMOVED)
        number, self._next_waiter = self._next_waiter, self._next_waiter + 1
        waiting = self._waiters[number] = _Waiting()
        self.feed(plan.Need(number, state.id, chunks))
        try:
            await waiting.event.wait()
        finally:
            if self._waiters.pop(number, None):
                self.feed(plan.Withdrawn(number))
        if waiting.failure:
            raise self._read_error(state, chunks, waiting.failure)

    def _read_error(self, state: BlobState, chunks: ChunkSpan, failure: Failure) -> ReadError:
        chunk = failure.chunk if failure.chunk >= 0 else chunks.start
        text = f"cannot read chunk {chunk} of {state.ref}: {failure.text}"
        return ReadError(text, kind=failure.kind, ref=state.ref, chunk=chunk, mirror=failure.mirror)

    def fail_waiters(self, text: str) -> None:
        """Every waiting and every later reader gets a ReadError: the filesystem is going away."""
        self.closed = Failure(FailureKind.CANCELLED, text)
        for number, waiting in list(self._waiters.items()):
            del self._waiters[number]
            waiting.failure = self.closed
            waiting.event.set()
            self.feed(plan.Withdrawn(number))

    async def keep_pace(self) -> None:
        """Lets paced fetches go on when it is time, until cancelled."""
        await self._pacing.run()

    async def keep_time(self) -> None:
        """Ticks for the planner, until cancelled."""
        while True:
            with trio.move_on_at(self._alarm):
                await self._rearm.wait()
            self._rearm = trio.Event()
            if trio.current_time() >= self._alarm:
                self._alarm = float("inf")
                self.feed(plan.Tick())
