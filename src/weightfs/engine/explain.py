"""What a reader waits for, and what is being fetched: for `weightfs debug inflight`, and for the watchdog's log.

Rules: from memory, at once, and bounded: a read of the kernel touches two chunks, and whoever asks about more is told
of the first `CHUNKS_AT_MOST`. No secret is in it. `str` of a `WaitStatus` is one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from weightfs.core.geometry import ByteSpan, ChunkSpan
from weightfs.core.planner import Planner
from weightfs.core.planword import ChunkState, ChunkWord
from weightfs.core.ref import without_secrets
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.logs import one_line, redact
from weightfs.units import format_duration

CHUNKS_AT_MOST: Final = 8


@dataclass(frozen=True, slots=True)
class ChunkStatus:
    """One chunk that a reader touches. `state` is a `ChunkState`; `age` of its fetch and `rest` in seconds."""

    chunk: int
    state: str
    suspect: bool  # present, and hashed again before its first use
    waiters: int
    job: int | None
    mirror: str
    age: float | None
    rest: float | None  # until it may be tried again
    why: str

    def __str__(self) -> str:
        """A few words."""
        parts = [f"chunk {self.chunk} {self.state}"]
        if self.suspect:
            parts.append("not hashed since the last unclean stop")
        if self.job is not None and self.age is not None:
            parts.append(f"job {self.job} from {self.mirror} for {format_duration(self.age)}")
        if self.rest is not None:
            parts.append(f"for another {format_duration(self.rest)}")
        if self.why:
            parts.append(self.why)
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class WaitStatus:
    """What holds up a read of one blob. `obstacle`: what holds up the whole blob, or empty."""

    ref: str
    blob: str  # hex
    present_chunks: int
    chunk_count: int
    waiting_readers: int
    obstacle: str
    chunks: tuple[ChunkStatus, ...]
    left_out: int  # chunks beyond `CHUNKS_AT_MOST`
    worker_pids: tuple[int, ...]

    def __str__(self) -> str:
        """One line."""
        parts = [
            f"{self.ref} has {self.present_chunks} of {self.chunk_count} chunks, {self.waiting_readers} readers wait"
        ]
        if self.obstacle:
            parts.append(self.obstacle)
        parts += map(str, self.chunks)
        if self.left_out:
            parts.append(f"{self.left_out} more chunks")
        parts.append(f"fetch workers {', '.join(map(str, self.worker_pids)) or 'in this process'}")
        return one_line(redact("; ".join(parts)))


@dataclass(frozen=True, slots=True)
class FetchStatus:
    """One fetch in flight. `age` in seconds; `last_chunk` is fetched too."""

    job: int
    ref: str
    blob: str  # hex
    mirror: str
    priority: str
    first_chunk: int
    last_chunk: int
    bytes_left: int
    age: float


def explain_wait(
    state: BlobState | None, planner: Planner, span: ByteSpan, pids: Sequence[int], now: float
) -> WaitStatus | None:
    """Why a read of `span` has not been answered; None if its blob was removed."""
    if state is None or not planner.knows(state.id):
        return None
    chunks = state.shape.chunks_covering(span)
    told = ChunkSpan(chunks.start, min(chunks.stop, chunks.start + CHUNKS_AT_MOST))
    return WaitStatus(
        ref=without_secrets(state.ref),
        blob=str(state.id),
        present_chunks=len(state.present),
        chunk_count=state.shape.chunk_count,
        waiting_readers=planner.waiting(state.id),
        obstacle=redact("; ".join(_obstacles(state))),
        chunks=tuple(_chunk(word, state) for word in planner.words(state.id, told, now)),
        left_out=len(chunks) - len(told),
        worker_pids=tuple(pids),
    )


def _obstacles(state: BlobState) -> Iterator[str]:
    if not state.policy.allows(state.trust):
        yield f"it is {state.trust}, and policy {state.policy} lets nobody read it yet"
    if state.preparing.locked():
        yield "its file is being made ready on the disk"
    if state.checking:
        yield f"{len(state.checking)} chunks are being hashed again"
    if state.no_room is not None:
        yield str(state.no_room)
    if state.seal_error is not None:
        yield f"it cannot be sealed: {state.seal_error}"


def _chunk(word: ChunkWord, state: BlobState) -> ChunkStatus:
    suspect = word.state is ChunkState.PRESENT and word.chunk in state.suspect
    return ChunkStatus(
        chunk=word.chunk,
        state=word.state.value,
        suspect=suspect,
        waiters=word.waiters,
        job=word.job,
        mirror=without_secrets(word.mirror) if word.mirror else "",
        age=word.age,
        rest=word.rest,
        why=redact(word.why),
    )


def describe_fetches(catalog: Catalog, planner: Planner, now: float) -> tuple[FetchStatus, ...]:
    """Every fetch in flight, oldest first: at most `Limits.max_jobs`."""
    found = []
    for job in planner.jobs(now):
        state = catalog.get(job.blob)
        found.append(
            FetchStatus(
                job=job.job,
                ref=without_secrets(state.ref) if state is not None else "",
                blob=str(job.blob),
                mirror=without_secrets(job.mirror) if job.mirror else "",
                priority=job.priority.name.lower(),
                first_chunk=job.chunks.start,
                last_chunk=job.chunks.stop - 1,
                bytes_left=job.nbytes_left,
                age=job.age,
            )
        )
    return tuple(found)
