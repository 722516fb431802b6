"""What the engine knows in memory about each blob. Owned by the trio thread; nothing here awaits.

Sets of chunks, each inside the one before it: `present` (visible; shared with the planner), `durable` (in the index).
`suspect` are present chunks recorded before an unclean stop: they are hashed again before their first use.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import trio

from weightfs.core.attribution import Attribution
from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import BlobShape, ChunkSpan
from weightfs.core.manifest import Blob, BlobId, Mirror, Policy, Trust
from weightfs.core.readahead import ReadAhead
from weightfs.core.ref import without_secrets
from weightfs.core.uses import Uses
from weightfs.engine.status import BlobStatus
from weightfs.errors import CacheError, NoSpaceError
from weightfs.store.cache import RunState


def wall_clock() -> float:
    """Seconds since 1970, for last uses: they outlive the process, and a monotonic clock does not."""
    return time.time()


@dataclass(slots=True)
class BlobState:
    """One blob. `generation` counts the times that chunks were taken away: a read across such a time is done again."""

    blob: Blob
    ref: str
    path: Path
    present: ChunkSet
    durable: ChunkSet
    suspect: ChunkSet
    readahead: ReadAhead
    policy: Policy
    trust: Trust
    run: RunState | None
    mtime: int
    present_bytes: int
    handles: int = 0
    generation: int = 0
    fetched_bytes: int = 0
    filling: bool = False
    completing: int = 0  # how many wait for all of it (`pull`)
    prepared: bool = False
    preparing: trio.Lock = field(default_factory=trio.Lock)  # held across disk work only
    # The data file's device and inode, and how often it was lost: what was written into a lost one has not landed.
    file: tuple[int, int] | None = None
    life: int = 0
    resumed: int = 0  # chunks that the running SHA-256 took before this process began
    seal_error: CacheError | None = None  # why sealing stands still
    doubted: bool = False  # the whole digest differed once: sealing now compares every chunk with its record
    checking: dict[int, trio.Event] = field(default_factory=dict)  # suspect chunks being hashed
    # Digests that a chunk must have where there is no list: proven once, then dropped (store.Cache.required_digests).
    required: dict[int, bytes] = field(default_factory=dict)
    uses: Uses = field(default_factory=lambda: Uses(BlobShape(0, 1)))  # when what was last read
    # Every chunk was recorded at one time since the file was made: it may be mapped, and is only evicted whole.
    whole: bool = False
    stale: bool = False  # at the start the file took more room than what is recorded of it
    relieved: int = (
        0  # a full disk was given room once, for jobs below this number; 0: since a commit went well
    )
    no_room: NoSpaceError | None = None  # why it is not completed: the cache is full
    # How often it was quarantined, or rot was found in it, since the start: pages of it in the kernel may be wrong.
    refuted: int = 0
    let_go: int = 0  # the byte up to which the pages behind a sequential reader were let go
    faults: Attribution = field(
        default_factory=Attribution
    )  # whose bytes were wrong, since this process began
    changed: trio.Event = field(
        default_factory=trio.Event
    )  # set and replaced at each change of trust or completeness
    gave_up: trio.Event = field(default_factory=trio.Event)

    @property
    def id(self) -> BlobId:
        """The blob's id."""
        return self.blob.id

    @property
    def shape(self) -> BlobShape:
        """The blob's geometry."""
        return self.blob.shape

    @property
    def mirrors(self) -> tuple[Mirror, ...]:
        """Numbered as the planner numbers them: only ever appended to."""
        return self.blob.mirrors

    @property
    def complete(self) -> bool:
        """Every chunk is visible."""
        return self.present.full

    @property
    def sealed(self) -> bool:
        """Nothing is left to be fetched or proven: all durable and, where there is a digest, verified."""
        return self.durable.full and (self.trust is Trust.VERIFIED or not self.blob.digest)

    @property
    def may_be_passed(self) -> bool:
        """Whether the kernel may give the file's bytes to readers without asking (docs/design.md, "Passthrough")."""
        proven = self.sealed and self.complete and self.durable.full and not len(self.suspect)
        return proven and self.policy.allows(self.trust)

    @property
    def frontier(self) -> int:
        """Chunks that the hash of the whole has taken."""
        if self.trust is Trust.VERIFIED:
            return self.shape.chunk_count
        return self.run.frontier if self.run else 0

    def expected(self, chunk: int) -> bytes:
        """What the chunk must hash to; empty if nobody knows."""
        listed = self.blob.chunk_list
        return listed.digest_of(chunk) if listed is not None else self.required.get(chunk, b"")

    def touch(self, chunks: ChunkSpan) -> None:
        """These were read, or have landed."""
        self.uses.touch(chunks, wall_clock())

    def notify(self) -> None:
        """Wake whoever watches this blob."""
        self.changed.set()
        self.changed = trio.Event()

    def status(self) -> BlobStatus:
        """A snapshot."""
        return BlobStatus(
            id=self.id,
            size=self.blob.size,
            present_bytes=self.present_bytes,
            trust=self.trust.value,
            complete=self.complete,
            sha256=self.blob.sha256.hex() if self.blob.sha256 else "",
            digest=self.blob.digest,
            sources=tuple(without_secrets(mirror.url) for mirror in self.mirrors),
            ref=self.ref,
            mtime=self.mtime,
            faults=str(self.faults.counts) if self.faults.counts else "",
        )
