"""What control needs of the engine, and what the command line needs of control: two small protocols.

`Operations` has two implementations that give the same documents: `operations.EngineOperations` beside an
engine in this process, and `client.ControlClient` in front of a daemon. So every command is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId, Manifest
from weightfs.core.ref import Ref
from weightfs.engine.settings import FillMode

# What JSON can say, with string keys; docs/configuration.md lists the fields of each document.
Document: TypeAlias = dict[str, Any]


class StoredRefLike(Protocol):
    """`store.cache.StoredRef`."""

    @property
    def manifest(self) -> Manifest:
        """What the ref resolved to."""
        ...

    @property
    def added_at(self) -> int:
        """Seconds since the epoch."""
        ...

    @property
    def previous(self) -> tuple[str, ...]:
        """Revisions that the ref had before, latest first."""
        ...

    @property
    def pinned(self) -> bool:
        """It is to be kept whole."""
        ...

    @property
    def paused(self) -> bool:
        """Nothing of it is fetched in the background."""
        ...

    @property
    def fill(self) -> str:
        """How much of it is, or empty: as configured."""
        ...


class BlobStatusLike(Protocol):
    """`engine.status.BlobStatus`."""

    @property
    def present_bytes(self) -> int:
        """Bytes in the cache."""
        ...

    @property
    def trust(self) -> str:
        """A `core.manifest.Trust`."""
        ...

    @property
    def complete(self) -> bool:
        """Every chunk is there."""
        ...

    @property
    def sha256(self) -> str:
        """64 hex digits, or empty if no origin gives one."""
        ...

    @property
    def digest(self) -> str:
        """`core.manifest.Blob.digest`."""
        ...

    @property
    def sources(self) -> Sequence[str]:
        """URLs without secrets."""
        ...


class VerifyReportLike(Protocol):
    """`engine.status.VerifyReport`: a dataclass."""

    @property
    def ok(self) -> bool:
        """Nothing wrong, or all of it repaired."""
        ...


class RefUpdateLike(Protocol):
    """`engine.status.RefUpdate`."""

    @property
    def ref(self) -> str:
        """As it is known."""
        ...

    @property
    def old_revision(self) -> str:
        """What it was."""
        ...

    @property
    def new_revision(self) -> str:
        """What it is now."""
        ...

    @property
    def outcome(self) -> str:
        """`unchanged`, `updated` or `rolled back`."""
        ...


class EngineLike(Protocol):
    """The part of `engine.Engine` that control uses."""

    async def add(self, ref: Ref, /, *, refresh: bool = False) -> Manifest:
        """Resolve and pin."""
        ...

    async def update(self, ref_text: str, /) -> RefUpdateLike:
        """Ask again, and follow. KeyError."""
        ...

    async def pin(self, ref_text: str, /, *, pinned: bool) -> None:
        """Keep whole, or no longer. KeyError."""
        ...

    async def set_fill(self, ref_text: str, mode: FillMode | None, /) -> None:
        """How much of it is completed in the background; None: as configured. KeyError."""
        ...

    async def pause(self, ref_text: str, /, *, paused: bool) -> None:
        """Fetch nothing of it in the background, or again. KeyError."""
        ...

    async def pause_all(self, *, paused: bool) -> None:
        """Fetch nothing at all in the background, or again."""
        ...

    async def remove(self, ref_text: str, /) -> int:
        """Forget; bytes freed. KeyError."""
        ...

    @property
    def all_paused(self) -> bool:
        """What `pause_all` said last, in this life or before."""
        ...

    def refs(self) -> Sequence[StoredRefLike]:
        """What is pinned."""
        ...

    def blob_status(self, blob_id: BlobId, /) -> BlobStatusLike:
        """One blob."""
        ...

    async def gc(self, *, dry_run: bool) -> object:
        """Evict what is too old or beyond the limits, or only say what: `engine.status.GcReport`."""
        ...

    async def complete(self, ref_text: str, /) -> None:
        """Return when every blob of the ref is complete and sealed. KeyError, ReadError, IntegrityError."""
        ...

    async def verify(
        self, ref_text: str, /, *, repair: bool, on_progress: Callable[[Any], None]
    ) -> VerifyReportLike:
        """Re-hash what is cached."""
        ...

    async def repair(self, ref_text: str, /, *, on_progress: Callable[[Any], None]) -> VerifyReportLike:
        """Fetch again what is bad or quarantined."""
        ...

    def progress(self, ref_text: str, /) -> tuple[int, int]:
        """Bytes of a ref's blobs, and how many of them are cached. KeyError."""
        ...

    async def survey(self, files_at_most: int, /) -> object:
        """A tree of frozen dataclasses; of each ref at most so many files."""
        ...

    def explain(self, blob_id: BlobId, span: ByteSpan, /) -> object:
        """What a read of `span` waits for: `engine.explain.WaitStatus`, or None."""
        ...

    def fetches(self) -> Sequence[object]:
        """What is in flight: `engine.explain.FetchStatus` each."""
        ...

    async def headers_ready(self, ref_text: str, /, *, within: float) -> bool:
        """Wait, at most `within` seconds, for what `add` and `update` fetch in the background; whether it is there."""
        ...

    async def details(self, ref_text: str, /, *, fetch: bool = False) -> object:
        """`engine.details.RefDetails`. KeyError."""
        ...

    async def tensor_map(self, ref_text: str, /, *, layers: bool = False, fetch: bool = False) -> Document:
        """Tensors, or layers, file by file, as plain values. KeyError."""
        ...

    async def chunk_map(self, ref_text: str, /) -> Document:
        """Runs of chunks, file by file, as plain values. KeyError."""
        ...


class Operations(Protocol):
    """What can be asked of a cache. Every method may raise any WeightfsError."""

    async def health(self) -> Document:
        """Who answers: version, pid, role, cache, mount point."""
        ...

    async def status(self) -> Document:
        """Everything: process, refs with their blobs and mirrors, workers, totals, what is in flight."""
        ...

    async def inflight(self) -> Document:
        """The kernel's requests that wait, each with what it waits for, and the fetches, oldest first. Bounded."""
        ...

    async def stacks(self) -> Document:
        """Where the tasks and threads of the process are: `weightfs.stacks.Stacks`. Bounded."""
        ...

    async def refs(self) -> list[Document]:
        """The refs, each with its blobs."""
        ...

    async def add(self, ref: str, *, refresh: bool = False) -> Document:
        """Pin what `ref` is; its document. The origin of a known one is asked again only with `refresh`."""
        ...

    async def update(self, ref: str) -> Document:
        """Ask what the known `ref` is now: `{ref, old_revision, new_revision, outcome, rolled_back}`."""
        ...

    async def pin(self, ref: str, *, pinned: bool) -> Document:
        """Keep the known `ref` whole, or no longer; its document."""
        ...

    async def set_fill(self, ref: str, mode: str) -> Document:
        """Complete the known `ref` in the background (`all`), when it is open (`opened`), `never`, or by `default`."""
        ...

    async def pause(self, ref: str | None, *, paused: bool) -> Document:
        """Hold the background fetching of `ref`, or of everything, back, or let it go on: `{all_paused, refs}`."""
        ...

    async def remove(self, ref: str) -> Document:
        """Forget `ref`, and drop the blobs that no other ref names: `{ref, freed_bytes}`."""
        ...

    async def gc(self, *, dry_run: bool) -> Document:
        """Evict what is too old or beyond the limits, or only say what: the fields of `engine.status.GcReport`."""
        ...

    async def reload(self) -> Document:
        """Read the configuration again: `{at_next_start, added}`. UsageError if it is wrong: the old one stays."""
        ...

    async def start_fill(self, ref: str) -> Document:
        """Begin to complete and seal every blob of `ref`; the job's document."""
        ...

    async def start_verify(self, refs: Sequence[str], *, repair: bool) -> Document:
        """Begin to re-hash what is cached of `refs` (of all, if empty); the job's document."""
        ...

    async def start_repair(self, refs: Sequence[str]) -> Document:
        """Begin to fetch again what is bad or quarantined of `refs` (of all, if empty); the job's document."""
        ...

    async def headers(self, ref: str, *, wait: float) -> Document:
        """Whether the small files and headers of `ref` are there, or given up: `{ref, ready}`, after at most `wait`."""
        ...

    async def details(self, ref: str, *, fetch: bool = False) -> Document:
        """What the headers of `ref`'s files say, and how much of each is cached and verified.

        Cached headers only; with `fetch` those that are missing are fetched first.
        """
        ...

    async def tensor_map(self, ref: str, *, layers: bool = False, fetch: bool = False) -> Document:
        """Where each tensor of `ref`, or with `layers` each layer, lies, and how much of it is cached and verified."""
        ...

    async def chunk_map(self, ref: str) -> Document:
        """Which chunks of each file of `ref` are there, quarantined, or on their way, as runs."""
        ...

    async def job(self, job_id: str, *, wait: float) -> Document:
        """A job's document: at once if it has ended, else after at most `wait` seconds."""
        ...

    async def cancel_job(self, job_id: str) -> Document:
        """Stop a job; what has landed stays."""
        ...
