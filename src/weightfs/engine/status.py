"""What the engine tells about itself: frozen snapshots, ready for `dataclasses.asdict` and JSON. No secrets in them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from weightfs.core.attribution import FaultCounts
from weightfs.core.manifest import BlobId


@dataclass(frozen=True, slots=True)
class BlobStatus:
    """One blob as stat, extended attributes and `status` show it. Sizes in bytes."""

    id: BlobId
    size: int
    present_bytes: int
    trust: str
    complete: bool
    sha256: str  # 64 hex digits, or "" where no origin publishes it
    digest: str  # as `core.manifest.Blob.digest`
    sources: tuple[str, ...]  # URLs without secrets
    ref: str
    mtime: int  # seconds since 1970
    faults: str  # as text, "wire=1 disk=0 origin=0", or "" if there were none


@dataclass(frozen=True, slots=True)
class MirrorStatus:
    """One mirror of one blob. `rate` in bytes per second, None before it gave any."""

    url: str
    faults: int
    mismatches: int
    nbytes: int
    rate: float | None
    benched_for: float  # seconds
    wrong: FaultCounts  # of its chunks, by cause


@dataclass(frozen=True, slots=True)
class FileStatus:
    """One path of a ref. `path` is below the mount's root in the `models` layout."""

    path: str
    blob: str  # hex
    size: int
    chunk_length: int
    chunk_count: int
    present_chunks: int
    present_bytes: int
    durable_chunks: int
    sealed_chunks: int  # that the hash of the whole has taken
    fetched_bytes: int  # from the network since this process started
    trust: str
    policy: str
    sha256: str
    digest: str
    signer: str
    open_handles: int
    waiting_readers: int
    filling: bool
    error: str  # why it is not tried at the moment, or ""
    mirrors: tuple[MirrorStatus, ...]
    wrong: FaultCounts  # chunks that were wrong since this process started, by cause


@dataclass(frozen=True, slots=True)
class RefStatus:
    """One ref and its files, or those of them that there is most to tell of; the rest is counted.

    All but `files` is of all of them, each blob once.
    """

    ref: str
    revision: str
    added_at: int
    pinned: bool  # to be kept whole
    paused: bool  # nothing of it is fetched in the background
    fill: str  # the mode that was set for this ref, or ""
    files: tuple[FileStatus, ...]
    wrong: FaultCounts
    size_bytes: int
    present_bytes: int
    complete: bool
    trust: str  # the weakest of any
    files_left_out: int
    fetched_bytes: int
    waiting_readers: int


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One fetch in flight. `age` in seconds."""

    job: int
    blob: str
    first_chunk: int
    last_chunk: int
    mirror: str
    priority: str
    age: float
    bytes_left: int


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The whole."""

    version: str
    pid: int
    worker_pids: tuple[int, ...]
    uptime: float
    cache: str
    cache_bytes: int
    held_bytes: int  # what chunks take: cached, in flight, and those whose room was not given back
    limit_bytes: int | None  # what they may take now, by `max-size` and `min-free`
    evicted_bytes: int  # since this process started
    free_bytes: int
    fetched_bytes: int
    mismatched_chunks: int
    disk_faults: int
    disk: str  # of the cache: healthy, unstable or bypassed
    uncached_bytes: int  # of `fetched_bytes`, those that were given to readers and not kept
    trouble: str
    paused: bool  # nothing at all is fetched in the background
    refs: tuple[RefStatus, ...]
    jobs: tuple[JobStatus, ...]


@dataclass(frozen=True, slots=True)
class EvictedStatus:
    """What an eviction takes or took. `idle_seconds`: since its last use; `whole`: all of it that was cached."""

    ref: str
    blob: str  # hex
    nbytes: int
    idle_seconds: float
    whole: bool


@dataclass(frozen=True, slots=True)
class GcReport:
    """What `gc` did, or would do. `missing_bytes`: what it should free, and everything left is pinned or in use."""

    dry_run: bool
    evicted: tuple[EvictedStatus, ...]
    freed_bytes: int
    missing_bytes: int
    held_bytes: int
    limit_bytes: int | None


@dataclass(frozen=True, slots=True)
class CacheSpace:
    """Room of the cache's filesystem, a moment ago."""

    total_bytes: int
    free_bytes: int


class Outcome(enum.StrEnum):
    """What `update` found. A ref that had the new revision before was set back, or somebody replays an old answer."""

    UNCHANGED = "unchanged"
    UPDATED = "updated"
    ROLLED_BACK = "rolled back"


@dataclass(frozen=True, slots=True)
class RefUpdate:
    """A ref was asked for again: what it was, and what it is now."""

    ref: str
    old_revision: str
    new_revision: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """How far `verify` is, in bytes."""

    ref: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found: `bad` are (path, chunk) whose bytes on disk differ from their record."""

    checked_chunks: int
    checked_bytes: int
    bad: tuple[tuple[str, int], ...]
    repaired: int
    quarantined: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing wrong, or all of it repaired."""
        return len(self.bad) == self.repaired and not self.quarantined


@dataclass(frozen=True, slots=True)
class Mended:
    """A chunk of a quarantined file that one mirror gave wrong, and another gave right."""

    path: str
    chunk: int
    wrong_from: str
    right_from: str


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What `repair` found and did. `wrong`: by path, whose faults there were since this process started."""

    verified: VerifyReport
    mended: tuple[Mended, ...]
    wrong: dict[str, FaultCounts]

    @property
    def ok(self) -> bool:
        """All is right now."""
        return self.verified.ok
