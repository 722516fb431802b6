"""How manifests appear as directories: a layout is a pure function from manifests to paths.

A layout never does I/O and never depends on what is cached. The same blob may appear at many paths: it has
one inode.

What it says of a manifest depends on that manifest and on those of its group (`group_of`), on no others. So what all
manifests make is what the groups make, one by one: a change of one ref costs no new look at the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from weightfs.core import hub
from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import Blob, Manifest


@dataclass(frozen=True, slots=True)
class File:
    """A regular file with a blob's bytes, all of them or those of `span`."""

    blob: Blob
    span: ByteSpan | None = None


@dataclass(frozen=True, slots=True)
class Inline:
    """A small regular file whose bytes follow from the manifests: there at once, and for as long as they are."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Dir:
    """A directory that exists even if nothing is in it; those above a file or link need not be listed."""


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link; `target` is relative, so that it holds wherever the mount is."""

    target: str


Item = File | Inline | Dir | Link


def group_of(manifest: Manifest) -> str:
    """Manifests with the same answer are presented together: those of one repository of the Hub."""
    prefix = f"{hub.SCHEME}://"
    if not manifest.ref.startswith(prefix):
        return manifest.ref
    name = hub.parse_hub(manifest.ref.removeprefix(prefix))
    return f"{prefix}{name.kind}/{name.repo}"


class Layout(Protocol):
    """A way to present manifests. Conformance: `weightfs.testing.layouts.LayoutTests`."""

    @property
    def name(self) -> str:
        """The directory below the mount's root that holds everything of this layout."""
        ...

    def entries(self, manifests: Sequence[Manifest]) -> Iterable[tuple[str, Item]]:
        """Paths below the mount's root (`check_path` accepts each) and what is there, in a fixed order."""
        ...
