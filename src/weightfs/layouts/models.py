"""The plain layout: `models/<tree>/<path>`, for browsing and for every runtime that takes a file name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightfs.core.manifest import Manifest
from weightfs.layouts.base import Dir, File, Item


class ModelsLayout:
    """Each entry of each manifest below its tree; `models` itself is there even when nothing is."""

    name = "models"

    def entries(self, manifests: Sequence[Manifest]) -> Iterator[tuple[str, Item]]:
        """Yield `models`, then `models/<tree>/<path>` in the order of the manifests and their entries."""
        yield self.name, Dir()
        for manifest in manifests:
            for entry in manifest.entries:
                yield f"{self.name}/{manifest.tree}/{entry.path}", File(entry.blob, entry.span)
