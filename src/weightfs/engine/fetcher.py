"""Drives the planner: feeds it what happens, and carries out what it says. The only caller of `core.planner`.

Rule: `feed` never awaits, so events are taken one at a time, in the order in which they happened. Waiters are woken by
an event of their own; nobody holds a lock across a fetch.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from weightfs.core import plan
from weightfs.core.geometry import ChunkSpan
from weightfs.core.manifest import BlobId
from weightfs.core.plan import Failure, Fetch
from weightfs.core.planner import Planner
from weightfs.core.ref import without_secrets
from weightfs.engine import wire
from weightfs.engine.blobs import BlobState
from weightfs.engine.workers import WorkerPool
from weightfs.errors import FailureKind, ReadError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Waiting:
    event: trio.Event = field(default_factory=trio.Event)
    failure: Failure | None = None


class Fetcher:
    """`landed(state, chunk, digest)` is called for each chunk that became visible, in the trio thread."""

    def __init__(
        self, planner: Planner, pool: WorkerPool, landed: Callable[[BlobState, int, bytes], None]
    ) -> None:
        self._planner = planner
        self._pool = pool
        self._landed = landed
        self._blobs: dict[BlobId, BlobState] = {}
        self._jobs: dict[int, tuple[BlobState, Fetch]] = {}
        self._waiters: dict[int, _Waiting] = {}
        self._next_waiter = 1
        self._alarm = float("inf")
        self._rearm = trio.Event()
        self._ended = trio.Event()
        self.closed: Failure | None = None
        self.fetched_bytes = 0
        self.mismatches = 0

    @property
    def jobs(self) -> int:
        """How many fetches are in flight."""
        return len(self._jobs)

    def add(self, state: BlobState) -> None:
        """Make a blob known. Its `present` set is shared with the planner from here on."""
        self._blobs[state.id] = state
        self.feed(plan.Added(state.id, state.shape, state.blob.mirrors, state.present))

    def remove(self, blob: BlobId) -> None:
        """Forget a blob; its jobs are stopped."""
        self._blobs.pop(blob, None)
        self.feed(plan.Removed(blob))

    async def drained(self, state: BlobState) -> None:
        """Until no fetch of a removed blob is in flight."""
        while any(other is state for other, _ in self._jobs.values()):
            self._ended = trio.Event() if self._ended.is_set() else self._ended
            await self._ended.wait()

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
                case plan.SleepUntil(time):
                    self._alarm = time
                    self._rearm.set()

    def _submit(self, fetch: plan.Fetch) -> None:
        state = self._blobs[fetch.blob]
        mirror = state.mirrors[fetch.mirror]
        self._jobs[fetch.job] = (state, fetch)
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
                entry = self._jobs.get(job)
                if entry is None:
                    return
                state = entry[0]
                nbytes = len(state.shape.span_of(chunk))
                self.fetched_bytes += nbytes
                state.fetched_bytes += nbytes
                if state.id in self._blobs:  # first the record, then the readers
                    self._landed(state, chunk, bytes.fromhex(digest))
                self.feed(plan.Landed(job, chunk))
            case wire.ChunkMismatched(job, chunk, actual):
                self._mismatched(job, chunk, actual)
            case wire.JobTrimmed(job, stop):
                self.feed(plan.Trimmed(job, stop))
            case wire.JobDone(job):
                self._jobs.pop(job, None)
                self._ended.set()
                self.feed(plan.Done(job))
            case wire.JobFailed():
                self._failed(message)

    def _mismatched(self, job: int, chunk: int, actual: str) -> None:
        entry = self._jobs.get(job)
        if entry is None:
            return
        state, fetch = entry
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

    def _failed(self, message: wire.JobFailed) -> None:
        entry = self._jobs.pop(message.job, None)
        self._ended.set()
        kind = FailureKind(message.kind)
        if entry is not None and kind in (FailureKind.DISK, FailureKind.NO_SPACE):
            entry[
                0
            ].prepared = False  # the file may be gone or cut: it is looked at again before the next fetch
        if entry is not None and kind is not FailureKind.CANCELLED:
            log.info("fetch of %s: %s (%s)", entry[0].ref, message.text, kind)
        failure = Failure(kind, message.text, message.mirror, message.retry_after)
        self.feed(plan.Failed(message.job, failure, random.random()))  # noqa: S311 - jitter, not a secret

    async def wait_for(self, state: BlobState, chunks: ChunkSpan) -> None:
        """Until all of `chunks` are visible. ReadError if they cannot be had; cancel it to withdraw."""
        if self.closed:
            raise self._read_error(state, chunks, self.closed)
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

    async def keep_time(self) -> None:
        """Ticks for the planner, until cancelled."""
        while True:
            with trio.move_on_at(self._alarm):
                await self._rearm.wait()
            self._rearm = trio.Event()
            if trio.current_time() >= self._alarm:
                self._alarm = float("inf")
                self.feed(plan.Tick())
