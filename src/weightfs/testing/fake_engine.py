"""An engine in memory: what the mount sees of one, with every answer under the test's control.

Files are made up from their names, so that a client in another process knows what bytes to expect:
byte `i` of a file is byte `i % 65521` of a block that follows from its name (`pattern`). 65,521 is a prime:
no two aligned reads look alike. Beside them there may be manifests with real bytes (`put`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.manifest import Blob, BlobId, Entry, Manifest, Mirror, Trust
from weightfs.core.ref import Ref
from weightfs.errors import FailureKind, ReadError, SourceError

PERIOD = 65_521
TREE = "https/fake.example"


def pattern(name: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of the file `name`."""
    block = hashlib.shake_128(name.encode()).digest(PERIOD)
    first = start // PERIOD * PERIOD
    return (block * (-(-(stop - first) // PERIOD)))[start - first : stop - first]


@dataclass(frozen=True, slots=True)
class FakeStatus:
    """`mount.ports.Status`."""

    id: BlobId
    size: int
    present_bytes: int
    trust: Trust
    complete: bool
    sources: tuple[str, ...]
    ref: str
    mtime: int
    faults: str = ""


@dataclass(frozen=True, slots=True)
class FakeSpace:
    """`mount.ports.Space`."""

    total_bytes: int
    free_bytes: int


@dataclass(slots=True)
class FakeFile:
    """A file and what its reads do, in order: wait for `gate`, raise `error`, give bytes (and `excess`)."""

    name: str
    blob: Blob
    block: bytes
    present: int
    gate: trio.Event | None = None
    error: Exception | None = None
    excess: int = 0
    reads: list[ByteSpan] = field(default_factory=list)
    handles: int = 0
    path: Path | None = None
    content: bytes | None = None  # instead of the pattern

    def bytes_of(self, span: ByteSpan) -> bytes:
        """The file's bytes."""
        if self.content is not None:
            return self.content[span.start : span.stop]
        first = span.start // PERIOD * PERIOD
        count = -(-(span.stop - first) // PERIOD)
        return (self.block * count)[span.start - first : span.stop - first]


class FakeEngine:
    """`mount.ports.MountedEngine`. Files are named by their path below `models/https/fake.example`.

    With a `cache` directory, complete files are there, and may be read there (`backing`).
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache
        self.files: dict[str, FakeFile] = {}
        self.on_change: Callable[[], None] = lambda: None
        self.waiting = 0
        self.most_waiting = 0
        self.failing_all = False
        self.mtime = 1_700_000_000
        self.read_timeout = 600.0  # said, and not kept
        self._by_id: dict[BlobId, FakeFile] = {}
        self._ending = trio.Event()
        self._others: dict[str, Manifest] = {}
        self.offers: dict[str, Callable[[], None] | Exception] = {}  # what an origin has, or says instead
        self.asked: list[str] = []  # of origins, in order
        self.browsing: trio.Event | None = None  # answers about names wait for it

    # --- the test's side

    def add(self, sizes: Iterable[tuple[str, int]], *, present: float = 0.0) -> None:
        """Add files, `present` (0 to 1) of each cached, and tell the mount once."""
        for name, size in sizes:
            digest = hashlib.sha256(f"{name} {size}".encode()).digest()
            blob = Blob(
                BlobId.of_digest(digest),
                BlobShape.of(size),
                digest,
                (Mirror(f"https://fake.example/{name}"),),
            )
            block = hashlib.shake_128(name.encode()).digest(PERIOD)
            self.files[name] = self._by_id[blob.id] = FakeFile(name, blob, block, int(size * present))
            if present == 1.0:
                self._keep(self.files[name])
        self.on_change()

    def put(self, manifest: Manifest, contents: Mapping[BlobId, bytes], *, present: float = 0.0) -> None:
        """Pin a manifest of any scheme. Its files are named `<tree>/<path>` here; a blob is one file, the first."""
        for entry in manifest.entries:
            blob = entry.blob
            if blob.id in self._by_id:
                continue
            data = contents[blob.id]
            assert len(data) == blob.size
            name = f"{manifest.tree}/{entry.path}"
            file = FakeFile(name, blob, b"", int(blob.size * present), content=data)
            self.files[name] = self._by_id[blob.id] = file
            if present == 1.0:
                self._keep(file)
        self._others[manifest.ref] = manifest
        self.on_change()

    def unpin(self, ref: str) -> None:
        """Forget a manifest that was put; its bytes stay known."""
        del self._others[ref]
        self.on_change()

    def complete(self, name: str) -> None:
        """All of the file is cached and proven from now on."""
        file = self.files[name]
        file.present = file.blob.size
        self._keep(file)

    def spoil(self, name: str) -> None:
        """One byte of what is cached of the file counts as lost."""
        self.files[name].present -= 1

    def _keep(self, file: FakeFile) -> None:
        if self._cache is None:
            return
        file.path = self._cache / str(file.blob.id)
        with file.path.open("wb") as out:
            for start in range(0, file.blob.size, PERIOD * 64):
                out.write(file.bytes_of(ByteSpan(start, min(start + PERIOD * 64, file.blob.size))))

    def remove(self, name: str) -> None:
        """Forget a file and delete what is cached of it, as `weightfs rm` does."""
        file = self.files.pop(name)
        del self._by_id[file.blob.id]
        self.on_change()
        if file.path is not None:
            file.path.unlink(missing_ok=True)

    def hold(self, name: str) -> None:
        """Reads of the file wait from now on."""
        self.files[name].gate = trio.Event()

    def let_go(self, name: str) -> None:
        """They go on."""
        gate, self.files[name].gate = self.files[name].gate, None
        if gate is not None:
            gate.set()

    def fail(self, name: str, kind: FailureKind | None, chunk: int = -1) -> None:
        """Reads of the file raise ReadError from now on (None: they are well again)."""
        self.files[name].error = (
            None if kind is None else ReadError(f"{name} fails on purpose", kind=kind, chunk=chunk)
        )

    # --- the mount's side

    def manifests(self) -> tuple[Manifest, ...]:
        """One manifest with every made-up file, and those that were put."""
        entries = tuple(Entry(file.name, file.blob) for file in self.files.values() if file.content is None)
        return (Manifest("https://fake.example/", "1", TREE, entries), *self._others.values())

    def blob_status(self, id: BlobId) -> FakeStatus:  # noqa: A002 - the contract's name
        """As told by `add`."""
        file = self._by_id[id]
        size = file.blob.size
        complete = file.present == size
        trust = Trust.VERIFIED if complete else Trust.PROVISIONAL
        sources = tuple(mirror.url for mirror in file.blob.mirrors)
        return FakeStatus(
            id, size, file.present, trust, complete, sources, "https://fake.example/", self.mtime
        )

    def backing(self, id: BlobId) -> Path | None:  # noqa: A002 - the contract's name
        """The file in `cache`, while all of it is there."""
        file = self._by_id.get(id)
        return file.path if file is not None and file.present == file.blob.size else None

    def refuted(self, id: BlobId) -> int:  # noqa: A002, ARG002 - the contract's name; nothing is
        """Never."""
        return 0

    def opened(self, id: BlobId) -> None:  # noqa: A002 - the contract's name
        """Count handles."""
        if id in self._by_id:  # else it was removed while its name was still cached
            self._by_id[id].handles += 1

    def released(self, id: BlobId) -> None:  # noqa: A002 - the contract's name
        """Count handles."""
        if id in self._by_id:
            self._by_id[id].handles -= 1

    async def browse(self, ref: Ref) -> None:
        """Pin what is offered, once `browsing` allows it. SourceError if nothing is."""
        self.asked.append(str(ref))
        if self.browsing is not None:
            await self.browsing.wait()
        offer = self.offers.get(str(ref))
        match offer:
            case None:
                raise SourceError(f"there is no {ref}", kind=FailureKind.NOT_FOUND)
            case Exception():
                raise offer
            case _:
                offer()

    def read_nowait(self, id: BlobId, span: ByteSpan) -> bytes | None:  # noqa: A002 - the contract's name
        """Nothing is there at once: every read may be told to wait."""
        del id, span
        return None

    def explain(self, id: BlobId, span: ByteSpan) -> str:  # noqa: A002 - the contract's name
        """The file's name, and how many reads wait."""
        return f"{self._by_id[id].name} from byte {span.start} on, {self.waiting} readers wait"

    async def read(self, id: BlobId, span: ByteSpan) -> bytes:  # noqa: A002 - the contract's name
        """Wait, fail or give bytes, as the file is told to."""
        file = self._by_id[id]
        file.reads.append(span)
        if file.gate is not None:
            await self._wait(file.gate)
        if self.failing_all:
            raise ReadError("the mount is going away", kind=FailureKind.CANCELLED)
        if file.error is not None:
            raise file.error
        return file.bytes_of(span) + bytes(file.excess)

    async def _wait(self, gate: trio.Event) -> None:
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        try:
            async with trio.open_nursery() as nursery:

                async def until(event: trio.Event) -> None:
                    await event.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until, gate)
                nursery.start_soon(until, self._ending)
        finally:
            self.waiting -= 1

    def fail_reads(self) -> None:
        """End every wait with an error."""
        self.failing_all = True
        self._ending.set()

    def statfs(self) -> FakeSpace:
        """A terabyte, half of it free."""
        return FakeSpace(1 << 40, 1 << 39)
