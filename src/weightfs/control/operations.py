"""`ports.Operations` on an engine in this process.

With `metrics`, the only file of control that knows the engine's names.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

import weightfs
from weightfs.control.debugging import RequestsLike, inflight_document, stacks_document
from weightfs.control.documents import to_json
from weightfs.control.jobs import Jobs
from weightfs.control.metrics import MountMeasures
from weightfs.control.ports import BlobStatusLike, Document, EngineLike, StoredRefLike
from weightfs.core.manifest import Blob, Entry, Trust, weakest
from weightfs.core.names import identity
from weightfs.core.ref import Ref, parse_ref
from weightfs.engine.settings import FillMode
from weightfs.engine.turns import in_turns
from weightfs.errors import FailureKind, RefError, SourceError, UsageError

T = TypeVar("T")

# Resolving retries by itself; this bounds the sum, so that no request to the daemon waits for ever.
ADD_BOUND: Final = 300.0  # seconds
# The same for headers that are fetched on request: each file has its own bound, and a ref has many files.
HEADERS_BOUND: Final = 300.0
HEADERS_WAIT: Final = 60.0  # for those that `add` fetches in the background

DEFAULT_FILL: Final = "default"  # as the mount is configured
FILL_MODES: Final = (*(mode.value for mode in FillMode), DEFAULT_FILL)

# Of one ref, in `status`: what `top` and people look at. A file takes some 1,300 bytes, and a client reads 64 MiB.
FILES_AT_MOST: Final = 2000


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """Who answers. `role` is `mount` for a daemon, or the name of the command that works on the cache."""

    role: str
    cache: Path
    mountpoint: Path | None
    started_at: int  # seconds since the epoch
    mount_measures: Callable[[], MountMeasures] | None = None  # what a mount counts, at the time of the call
    reload: Callable[[], Awaitable[object]] | None = (
        None  # reads the configuration again; None: there is no need
    )


class EngineOperations:
    """See `ports.Operations`. Jobs run in `nursery`."""

    def __init__(self, engine: EngineLike, info: ProcessInfo, nursery: trio.Nursery) -> None:
        self._engine = engine
        self._info = info
        self._jobs = Jobs(nursery)
        self.requests: RequestsLike | None = None  # of the mount, once there is one

    async def health(self) -> Document:
        """Version, process id, role, cache and mount point."""
        return {
            "version": weightfs.__version__,
            "pid": os.getpid(),
            "role": self._info.role,
            "cache": str(self._info.cache),
            "mountpoint": None if self._info.mountpoint is None else str(self._info.mountpoint),
            "started_at": self._info.started_at,
        }

    async def status(self) -> Document:
        """Everything."""
        found = await self._engine.survey(FILES_AT_MOST)
        told = await trio.to_thread.run_sync(to_json, found)
        document: Document = {**told, **await self.health()}
        document["refs"] = [{**ref, "fill": ref["fill"] or DEFAULT_FILL} for ref in document["refs"]]
        return document

    async def inflight(self) -> Document:
        """What waits, and for what."""
        return inflight_document(self._engine, self.requests)

    async def stacks(self) -> Document:
        """Where everything is."""
        return stacks_document()

    async def refs(self) -> list[Document]:
        """The refs, each with its blobs."""
        return [await self._ref_document(stored) for stored in self._engine.refs()]

    async def add(self, ref: str, *, refresh: bool = False) -> Document:
        """Resolve and pin."""
        parsed = parse_ref(ref)
        manifest = await _in_time(str(parsed), self._engine.add(parsed, refresh=refresh))
        return await self._ref_document(self._stored(manifest.ref))

    async def update(self, ref: str) -> Document:
        """Follow a tag."""
        name = self._stored(_canonical(ref)).manifest.ref
        try:
            found = await _in_time(name, self._engine.update(name))
        except KeyError:
            raise self._unknown(name) from None
        return {
            "ref": found.ref,
            "old_revision": found.old_revision,
            "new_revision": found.new_revision,
            "outcome": str(found.outcome),
            "rolled_back": found.outcome == "rolled back",
        }

    async def pin(self, ref: str, *, pinned: bool) -> Document:
        """Keep whole, or no longer."""
        name = self._stored(_canonical(ref)).manifest.ref
        try:
            await self._engine.pin(name, pinned=pinned)
        except KeyError:
            raise self._unknown(name) from None
        return await self._ref_document(self._stored(name))

    async def set_fill(self, ref: str, mode: str) -> Document:
        """Complete in the background."""
        name = self._stored(_canonical(ref)).manifest.ref
        if mode not in FILL_MODES:
            raise UsageError(f"the fill mode of a ref is one of {', '.join(FILL_MODES)}")
        try:
            await self._engine.set_fill(name, None if mode == DEFAULT_FILL else FillMode(mode))
        except KeyError:
            raise self._unknown(name) from None
        return await self._ref_document(self._stored(name))

    async def pause(self, ref: str | None, *, paused: bool) -> Document:
        """Hold background fetching back."""
        refs: list[Document] = []
        if ref is None:
            await self._engine.pause_all(paused=paused)
        else:
            name = self._stored(_canonical(ref)).manifest.ref
            try:
                await self._engine.pause(name, paused=paused)
            except KeyError:
                raise self._unknown(name) from None
            refs = [await self._ref_document(self._stored(name))]
        return {"all_paused": self._engine.all_paused, "refs": refs}

    async def remove(self, ref: str) -> Document:
        """Forget a ref."""
        stored = self._stored(_canonical(ref))
        freed = await self._engine.remove(stored.manifest.ref)
        return {"ref": stored.manifest.ref, "freed_bytes": freed}

    async def gc(self, *, dry_run: bool) -> Document:
        """Evict what is too old or beyond the limits."""
        document: Document = to_json(await self._engine.gc(dry_run=dry_run))
        return document

    async def reload(self) -> Document:
        """Read the configuration again."""
        if self._info.reload is None:
            raise UsageError(
                f"weightfs {self._info.role} has this cache and ends by itself; only a mount is reloaded"
            )
        document: Document = to_json(await self._info.reload())
        return document

    async def start_fill(self, ref: str) -> Document:
        """Complete and seal."""
        name = self._stored(_canonical(ref)).manifest.ref

        async def work() -> Document:
            await self._engine.complete(name)
            return await self._ref_document(self._stored(name))

        return self._jobs.start("fill", (name,), work, lambda: self._progress((name,))).document()

    async def start_verify(self, refs: Sequence[str], *, repair: bool) -> Document:
        """Re-hash what is cached."""
        names = tuple(self._stored(_canonical(ref)).manifest.ref for ref in refs)
        checked: dict[str, Any] = {}

        def note(progress: object) -> None:
            checked.update(to_json(progress))

        async def work() -> Document:
            reports: list[Document] = []
            for name in names or tuple(stored.manifest.ref for stored in self._engine.refs()):
                report = await self._engine.verify(name, repair=repair, on_progress=note)
                reports.append({"ref": name, "ok": report.ok, **to_json(report)})
            return {"ok": all(report["ok"] for report in reports), "reports": reports}

        return self._jobs.start("verify", names, work, lambda: dict(checked)).document()

    async def start_repair(self, refs: Sequence[str]) -> Document:
        """Fetch again what is wrong."""
        names = tuple(self._stored(_canonical(ref)).manifest.ref for ref in refs)
        checked: dict[str, Any] = {}

        def note(progress: object) -> None:
            checked.update(to_json(progress))

        async def work() -> Document:
            reports: list[Document] = []
            for name in names or tuple(stored.manifest.ref for stored in self._engine.refs()):
                report = await self._engine.repair(name, on_progress=note)
                document = to_json(report)
                verified = document.pop("verified")
                reports.append({"ref": name, "ok": report.ok, **verified, **document})
            return {"ok": all(report["ok"] for report in reports), "reports": reports}

        return self._jobs.start("repair", names, work, lambda: dict(checked)).document()

    async def headers(self, ref: str, *, wait: float) -> Document:
        """Wait for them."""
        name = self._stored(_canonical(ref)).manifest.ref
        within = min(max(wait, 0.0), HEADERS_WAIT)
        return {"ref": name, "ready": await self._engine.headers_ready(name, within=within)}

    async def details(self, ref: str, *, fetch: bool = False) -> Document:
        """Look into headers."""
        name = self._stored(_canonical(ref)).manifest.ref
        with _headers_bound(name):
            details = await self._engine.details(name, fetch=fetch)
        document: Document = await trio.to_thread.run_sync(to_json, details)
        document["models"] = [{**model.pop("info"), **model} for model in document["models"]]
        return document

    async def tensor_map(self, ref: str, *, layers: bool = False, fetch: bool = False) -> Document:
        """Look into headers and chunk sets."""
        name = self._stored(_canonical(ref)).manifest.ref
        with _headers_bound(name):
            document = await self._engine.tensor_map(name, layers=layers, fetch=fetch)
        # The rest is plain, too much to be gone through here, and free of URLs.
        document["files"] = [{**file, "problem": to_json(file["problem"])} for file in document["files"]]
        return document

    async def chunk_map(self, ref: str) -> Document:
        """Look at chunk sets."""
        name = self._stored(_canonical(ref)).manifest.ref
        with _headers_bound(name):
            return await self._engine.chunk_map(name)

    async def job(self, job_id: str, *, wait: float) -> Document:
        """Poll."""
        return (await self._jobs.wait(job_id, wait)).document()

    async def cancel_job(self, job_id: str) -> Document:
        """Stop."""
        return self._jobs.cancel(job_id).document()

    def _stored(self, name: str) -> StoredRefLike:
        for stored in self._engine.refs():
            if identity(stored.manifest.ref) == identity(name):
                return stored
        raise self._unknown(name)

    def _unknown(self, name: str) -> RefError:
        return RefError(f"{name} is not in the cache {self._info.cache}; `weightfs ls` lists what is")

    def _progress(self, names: Sequence[str]) -> Document:
        size = present = 0
        for name in names:
            with contextlib.suppress(KeyError):  # removed meanwhile
                size, present = map(sum, zip((size, present), self._engine.progress(name), strict=True))
        return {"size_bytes": size, "present_bytes": present}

    async def _ref_document(self, stored: StoredRefLike) -> Document:
        return await trio.to_thread.run_sync(_document_of, stored, await self._blobs(stored))

    async def _blobs(self, stored: StoredRefLike) -> list[tuple[Entry, BlobStatusLike]]:
        """Each file of a ref, but those that are removed meanwhile: readers come between."""
        found: list[tuple[Entry, BlobStatusLike]] = []
        for turn in in_turns(stored.manifest.entries):
            for entry in turn:
                with contextlib.suppress(KeyError):
                    found.append((entry, self._engine.blob_status(entry.blob.id)))
            await trio.lowlevel.checkpoint()
        return found


async def _in_time(ref: str, answer: Awaitable[T]) -> T:
    """The answer of a ref's origin. SourceError if it does not come."""
    try:
        with trio.fail_after(ADD_BOUND):
            return await answer
    except SourceError as error:
        if ref in str(error):
            raise
        raise SourceError(
            f"{ref}: {error}",
            kind=error.kind,
            mirror=error.mirror,
            status=error.status,
            retry_after=error.retry_after,
        ) from error
    except trio.TooSlowError:
        raise SourceError(
            f"{ref}: the origin did not say within {ADD_BOUND:.0f} s what this is; try again later",
            kind=FailureKind.TIMEOUT,
        ) from None


def _document_of(stored: StoredRefLike, blobs: Sequence[tuple[Entry, BlobStatusLike]]) -> Document:
    manifest = stored.manifest
    unique = {entry.blob.id: (entry.blob.size, status) for entry, status in blobs}.values()
    return {
        "ref": manifest.ref,
        "revision": manifest.revision,
        "added_at": stored.added_at,
        "pinned": stored.pinned,
        "paused": stored.paused,
        "fill": stored.fill or DEFAULT_FILL,
        "previous": list(stored.previous),
        "size_bytes": sum(size for size, _ in unique),
        "present_bytes": sum(status.present_bytes for _, status in unique),
        "complete": all(status.complete for _, status in unique),
        "trust": weakest(Trust(status.trust) for _, status in unique).value,
        "blobs": [
            {"path": f"models/{manifest.tree}/{entry.path}", **_blob_document(entry.blob, status)}
            for entry, status in blobs
        ],
    }


def _blob_document(blob: Blob, status: BlobStatusLike) -> Document:
    return {
        "id": str(blob.id),
        "size_bytes": blob.size,
        "present_bytes": status.present_bytes,
        "complete": status.complete,
        "trust": str(status.trust),
        "sha256": status.sha256,
        "digest": status.digest,
        "sources": to_json(list(status.sources)),
    }


@contextlib.contextmanager
def _headers_bound(ref: str) -> Iterator[None]:
    """SourceError if reading headers takes too long; KeyError, where the ref was removed meanwhile, as RefError."""
    try:
        with trio.fail_after(HEADERS_BOUND):
            yield
    except trio.TooSlowError:
        raise SourceError(
            f"{ref}: its headers did not come within {HEADERS_BOUND:.0f} s; what came is kept, so try again",
            kind=FailureKind.TIMEOUT,
        ) from None
    except KeyError:
        raise RefError(f"{ref} was removed meanwhile; `weightfs ls` lists what is there") from None


def _canonical(ref: str) -> str:
    parsed: Ref = parse_ref(ref)
    return str(parsed)
