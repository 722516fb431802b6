"""An engine for the control socket: refs in memory, and work that ends when the test says so."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from weightfs.control.operations import EngineOperations, ProcessInfo
from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.manifest import Blob, BlobId, Entry, Manifest, Mirror, Trust
from weightfs.core.ref import Ref, tree_of
from weightfs.engine.settings import FillMode


@dataclass(slots=True)
class FakeStored:
    """`control.ports.StoredRefLike`."""

    manifest: Manifest
    added_at: int = 1_700_000_000
    previous: tuple[str, ...] = ()
    pinned: bool = False
    paused: bool = False
    fill: str = ""


@dataclass(frozen=True, slots=True)
class FakeUpdate:
    """`control.ports.RefUpdateLike`."""

    ref: str
    old_revision: str = "1"
    new_revision: str = "2"
    outcome: str = "updated"


@dataclass(slots=True)
class FakeBlobStatus:
    """`control.ports.BlobStatusLike`."""

    size: int
    present_bytes: int = 0
    trust: str = Trust.PROVISIONAL
    complete: bool = False
    sha256: str = ""
    digest: str = ""
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FakeReport:
    """`control.ports.VerifyReportLike`."""

    checked_chunks: int = 1
    checked_bytes: int = 10
    bad: tuple[tuple[str, int], ...] = ()
    repaired: int = 0
    quarantined: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """As the engine's."""
        return len(self.bad) == self.repaired and not self.quarantined


@dataclass(frozen=True, slots=True)
class FakeRepair:
    """`engine.status.RepairReport`."""

    verified: FakeReport
    mended: tuple[object, ...] = ()
    wrong: tuple[tuple[str, object], ...] = ()

    @property
    def ok(self) -> bool:
        """As the engine's."""
        return self.verified.ok


@dataclass(frozen=True, slots=True)
class FakeProgress:
    """`engine.status.VerifyProgress`."""

    ref: str
    done: int
    total: int


@dataclass(slots=True)
class FakeControlEngine:
    """`control.ports.EngineLike`. Set `error` to make the next call fail, `gate` to make long work wait."""

    size: int = 1000
    stored: dict[str, FakeStored] = field(default_factory=dict)
    blobs: dict[BlobId, FakeBlobStatus] = field(default_factory=dict)
    error: Exception | None = None
    gate: trio.Event = field(default_factory=trio.Event)
    report: FakeReport = field(default_factory=FakeReport)
    padding: str = ""  # makes the status as large as a test wants it
    refreshed: list[bool] = field(default_factory=list)
    outcome: str = "updated"  # of the next updates
    all_paused: bool = False
    forget_to_answer: bool = False  # whoever asks an origin waits for ever

    def _fail(self) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    async def _ask_origin(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.forget_to_answer:
            await trio.sleep_forever()

    async def add(self, ref: Ref, *, refresh: bool = False) -> Manifest:
        """Pin a made-up blob."""
        await self._ask_origin()
        self._fail()
        self.refreshed.append(refresh)
        tree, name = tree_of(ref) if ref.scheme in ("http", "https", "file") else (ref.scheme, "model")
        digest = hashlib.sha256(str(ref).encode()).digest()
        blob = Blob(BlobId.of_digest(digest), BlobShape.of(self.size), digest, (Mirror(ref.url),))
        manifest = Manifest(str(ref), "1", tree, (Entry(name, blob),))
        self.stored[str(ref)] = FakeStored(manifest)
        self.blobs[blob.id] = FakeBlobStatus(
            self.size, sha256=digest.hex(), digest=blob.digest, sources=(ref.url,)
        )
        return manifest

    async def update(self, ref_text: str) -> FakeUpdate:
        """Say that it was `outcome`."""
        await self._ask_origin()
        self._fail()
        return FakeUpdate(ref_text, outcome=self.outcome)

    async def pin(self, ref_text: str, *, pinned: bool) -> None:
        """Note it."""
        await trio.lowlevel.checkpoint()
        self._fail()
        self.stored[ref_text].pinned = pinned

    async def set_fill(self, ref_text: str, mode: FillMode | None) -> None:
        """Note it."""
        await trio.lowlevel.checkpoint()
        self._fail()
        self.stored[ref_text].fill = "" if mode is None else mode.value

    async def pause(self, ref_text: str, *, paused: bool) -> None:
        """Note it."""
        await trio.lowlevel.checkpoint()
        self._fail()
        self.stored[ref_text].paused = paused

    async def pause_all(self, *, paused: bool) -> None:
        """Note it."""
        await trio.lowlevel.checkpoint()
        self._fail()
        self.all_paused = paused

    async def remove(self, ref_text: str) -> int:
        """Forget."""
        await trio.lowlevel.checkpoint()
        self._fail()
        del self.stored[ref_text]
        return self.size

    def refs(self) -> list[FakeStored]:
        """What was added."""
        return list(self.stored.values())

    def blob_status(self, blob_id: BlobId) -> FakeBlobStatus:
        """Of one blob."""
        return self.blobs[blob_id]

    async def complete(self, ref_text: str) -> None:
        """Wait for the gate, then be verified."""
        self._fail()
        blob = self.stored[ref_text].manifest.entries[0].blob
        self.blobs[blob.id].present_bytes = self.size // 2
        await self.gate.wait()
        self._fail()
        self.blobs[blob.id] = FakeBlobStatus(self.size, self.size, Trust.VERIFIED, complete=True)

    async def verify(self, ref_text: str, *, repair: bool, on_progress: Callable[[Any], None]) -> FakeReport:
        """Wait for the gate, then report."""
        del repair  # the report is the test's
        on_progress(FakeProgress(ref_text, 1, 2))
        await self.gate.wait()
        self._fail()
        return self.report

    async def repair(self, ref_text: str, *, on_progress: Callable[[Any], None]) -> FakeRepair:
        """As `verify`."""
        return FakeRepair(await self.verify(ref_text, repair=True, on_progress=on_progress))

    async def gc(self, *, dry_run: bool) -> dict[str, Any]:
        """Nothing to evict."""
        await trio.lowlevel.checkpoint()
        self._fail()
        sizes = dict.fromkeys(("freed_bytes", "missing_bytes", "held_bytes"), 0)
        return {"dry_run": dry_run, "evicted": [], "limit_bytes": None, **sizes}

    async def headers_ready(self, ref_text: str, *, within: float) -> bool:
        """Once the gate is open."""
        del ref_text  # all alike
        with trio.move_on_after(within):
            await self.gate.wait()
        return self.gate.is_set()

    async def details(self, ref_text: str, *, fetch: bool = False) -> dict[str, Any]:
        """Of one model; `fetch` comes back as its number of tensors."""
        await trio.lowlevel.checkpoint()
        self._fail()
        model = {"name": "m.gguf", "info": {"format": "gguf", "tensor_count": int(fetch)}, "files": []}
        return {"ref": ref_text, "models": [model], "files": []}

    async def tensor_map(self, ref_text: str, *, layers: bool = False, fetch: bool = False) -> dict[str, Any]:
        """What was asked for."""
        await trio.lowlevel.checkpoint()
        self._fail()
        files = [{"path": "models/m", "problem": "https://u:p@h/m?token=1 is gone"}]
        return {"ref": ref_text, "by": "layer" if layers else "tensor", "files": files, "fetch": fetch}

    async def chunk_map(self, ref_text: str) -> dict[str, Any]:
        """Of no file."""
        await trio.lowlevel.checkpoint()
        self._fail()
        return {"ref": ref_text, "files": []}

    def explain(self, blob_id: BlobId, span: ByteSpan) -> dict[str, Any]:
        """The span comes back."""
        return {"blob": str(blob_id), "start": span.start, "why": "https://u:p@h/m?token=1 is slow"}

    def fetches(self) -> list[dict[str, Any]]:
        """One."""
        return [{"job": 1, "mirror": "https://u:p@h/m?token=1", "age": 2.5}]

    def progress(self, ref_text: str) -> tuple[int, int]:
        """As `blob_status` says."""
        blobs = [entry.blob for entry in self.stored[ref_text].manifest.entries]
        return sum(blob.size for blob in blobs), sum(
            self.blob_status(blob.id).present_bytes for blob in blobs
        )

    async def survey(self, files_at_most: int) -> dict[str, Any]:  # noqa: ARG002
        """A small part of the engine's."""
        self._fail()
        refs = []
        for name, stored in self.stored.items():
            size, present = self.progress(name)
            sums = {"size_bytes": size, "present_bytes": present}
            refs.append({"ref": name, "files": [], "fill": stored.fill, **sums})
        return {"uptime": float("inf"), "refs": refs, "jobs": [], "padding": self.padding}


@contextlib.asynccontextmanager
async def fake_operations(cache: Path) -> AsyncIterator[tuple[FakeControlEngine, EngineOperations]]:
    """The real operations over a fake engine."""
    engine = FakeControlEngine()
    async with trio.open_nursery() as nursery:
        info = ProcessInfo("mount", cache, Path("/mnt/models"), 1_700_000_000)
        yield engine, EngineOperations(engine, info, nursery)
        nursery.cancel_scope.cancel()
