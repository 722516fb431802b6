"""Hashing of what is on disk, as jobs of the fetch workers: for sealing, scrubbing and nothing else.

Rule: a worker that dies costs the job another try, not the chunk its good name; only bytes that were read and differ
from their record are called bad.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from weightfs.core.geometry import ChunkSpan
from weightfs.engine import wire
from weightfs.engine.blobs import BlobState
from weightfs.errors import CacheError, FailureKind
from weightfs.store.cache import Cache

BATCH_BYTES = 32 * 1024 * 1024
TRIES = 4


class Hasher:
    """Submits HashJobs and hands out their answers. Job numbers are negative: the planner's are positive."""

    def __init__(self, cache: Cache, submit: Callable[[wire.HashJob], None]) -> None:
        self._cache = cache
        self._submit = submit
        self._next = -1
        self._answers: dict[int, tuple[trio.Event, list[wire.FromWorker]]] = {}

    def handle(self, message: wire.Hashed | wire.JobFailed) -> None:
        """An answer from a worker."""
        if entry := self._answers.pop(message.job, None):
            entry[1].append(message)
            entry[0].set()

    def batch(self, state: BlobState, start: int, stop: int) -> ChunkSpan:
        """At most `BATCH_BYTES` of `[start, stop)`, at least one chunk."""
        return ChunkSpan(start, min(stop, start + max(1, BATCH_BYTES // state.shape.chunk_length)))

    async def hash(
        self, state: BlobState, chunks: ChunkSpan, *, running: bool = False, compare: bool = True
    ) -> wire.Hashed:
        """Hash durable chunks from the disk.

        `compare`: each with its record; `running`: feed the blob's running SHA-256 and go on from its saved state, or
        git's SHA-1, which must then be given everything.
        CacheError if the records or the file cannot be read at all.
        """
        digests = ""
        if compare:
            records = await trio.to_thread.run_sync(self._cache.digests, state.id, chunks)
            digests = "".join(records.get(chunk, b"").hex().rjust(64, wire.UNKNOWN) for chunk in chunks)
        resume = state.run.state.hex() if running and state.run and chunks.start else ""
        failure: wire.JobFailed | None = None
        for _ in range(TRIES):
            number, self._next = self._next, self._next - 1
            job = wire.HashJob(
                number,
                str(state.path),
                state.shape.size,
                state.shape.chunk_length,
                chunks.start,
                chunks.stop,
                digests,
                running,
                resume,
                git=running and state.blob.git_sha1 is not None,
            )
            answer = await self._call(job)
            if isinstance(answer, wire.Hashed):
                return answer
            failure = answer
            if failure.kind != FailureKind.WORKER:
                break
        raise CacheError(
            f"cannot check what is cached of {state.ref}: {failure.text if failure else 'no answer'}"
        )

    async def _call(self, job: wire.HashJob) -> wire.Hashed | wire.JobFailed:
        event, answers = trio.Event(), list[wire.FromWorker]()
        self._answers[job.job] = (event, answers)
        try:
            self._submit(job)
            await event.wait()
        finally:
            self._answers.pop(job.job, None)
        answer = answers[0]
        if not isinstance(answer, wire.Hashed | wire.JobFailed):
            raise TypeError(f"a worker answered a hash job with {type(answer).__name__}")
        return answer
