"""What the mount needs of an engine: `weightfs.engine.engine.Engine` has it, and `weightfs.testing`'s fake.

Everything but `read` and `browse` answers from memory, at once: metadata never waits for a disk or for the network,
unless somebody asked for browsing, and then only the lookup of a name that nobody asked about yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId, Manifest
from weightfs.core.ref import Ref


class Status(Protocol):
    """A blob's state as readers may see it (`stat`, extended attributes)."""

    @property
    def size(self) -> int: ...  # noqa: D102 - bytes
    @property
    def present_bytes(self) -> int: ...  # noqa: D102 - bytes that are cached
    @property
    def trust(self) -> str: ...  # noqa: D102 - a `Trust`
    @property
    def complete(self) -> bool: ...  # noqa: D102 - every chunk is cached
    @property
    def sources(self) -> Sequence[str]: ...  # noqa: D102 - URLs without secrets
    @property
    def faults(self) -> str: ...  # noqa: D102 - whose bytes were wrong, or empty
    @property
    def mtime(self) -> int: ...  # noqa: D102 - seconds since 1970


class Space(Protocol):
    """Room of the cache's filesystem."""

    @property
    def total_bytes(self) -> int: ...  # noqa: D102 - bytes
    @property
    def free_bytes(self) -> int: ...  # noqa: D102 - bytes


class MountedEngine(Protocol):
    """The engine as the mount sees it; one trio run."""

    on_change: Callable[[], None]  # called when `manifests()` changed

    @property
    def read_timeout(self) -> float: ...  # noqa: D102 - seconds that a read waits at most, 0: for ever; it may change

    def blob_status(self, id: BlobId, /) -> Status:  # noqa: A002 - the contract's name
        """The state of a blob. KeyError if there is none."""
        ...

    def backing(self, id: BlobId, /) -> Path | None:  # noqa: A002 - the contract's name
        """The cache file, if its bytes are all there and proven as far as they can be: whoever reads it needs no check.

        None if they are not, or not any more, and for a blob that there is not. While the file has this name, its bytes
        may be mended, but never become holes.
        """
        ...

    def refuted(self, id: BlobId, /) -> int:  # noqa: A002 - the contract's name
        """How often the blob was found to be wrong as a whole, since the start; 0 if there is none. Memory."""
        ...

    def opened(self, id: BlobId, /) -> None:  # noqa: A002 - the contract's name
        """A handle was opened. Never waits, never fails."""
        ...

    def released(self, id: BlobId, /) -> None:  # noqa: A002 - the contract's name
        """A handle was released. Never waits, never fails."""
        ...

    def read_nowait(self, id: BlobId, span: ByteSpan, /) -> bytes | None:  # noqa: A002 - the contract's name
        """The same as `read`, if nothing has to be waited for; else None, and `read` is to be asked. Never fails."""
        ...

    def explain(self, id: BlobId, span: ByteSpan, /) -> object:  # noqa: A002 - the contract's name
        """What a read of `span` waits for; its `str` is one line, without secrets. From memory."""
        ...

    async def read(self, id: BlobId, span: ByteSpan, /) -> bytes:  # noqa: A002 - the contract's name
        """Exactly the bytes of `span` (inside the blob). ReadError; bounded by the engine's read timeout."""
        ...

    async def browse(self, ref: Ref, /) -> None:
        """Pin `ref`, which a path names; `manifests()` has it when this returns. WeightfsError; may be cancelled."""
        ...

    def manifests(self) -> Sequence[Manifest]:
        """What there is."""
        ...

    def fail_reads(self) -> None:
        """Every waiting and later read gets ReadError at once."""
        ...

    def statfs(self) -> Space:
        """Room, from memory."""
        ...
