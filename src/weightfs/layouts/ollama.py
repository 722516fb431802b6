"""An OLLAMA_MODELS directory: what `ollama serve` reads, and nothing that it would want to clean up.

Rules: a manifest has the registry's own bytes, for their SHA-256 is the model's id. Every blob that a manifest names is
at `blobs/sha256-<hex>`, at full size. Three directories are there even when nothing is in them, for Ollama makes what
is missing of them, which fails here; no other directory is empty: Ollama would try to remove it. Only refs of the
scheme `ollama` are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from weightfs.core.manifest import Manifest
from weightfs.core.ollama import SCHEME, parse_ollama
from weightfs.layouts.base import Dir, File, Inline, Item

# Ollama 0.40 looks into `manifests-v2` first, which it makes itself, then into `manifests`, which is all that older
# ones know.
DIRECTORIES: Final = ("manifests", "manifests-v2", "blobs")

_PREFIX: Final = f"{SCHEME}://"


class OllamaLayout:
    """`OLLAMA_MODELS=<mount>/ollama`."""

    name = "ollama"

    def entries(self, manifests: Sequence[Manifest]) -> Iterator[tuple[str, Item]]:
        """Yield the directories, then each model's manifest and those of its blobs that were not there yet."""
        for directory in DIRECTORIES:
            yield f"{self.name}/{directory}", Dir()
        shown: set[bytes] = set()
        for manifest in manifests:
            if not (manifest.ref.startswith(_PREFIX) and manifest.raw):
                continue
            name = parse_ollama(manifest.ref.removeprefix(_PREFIX))
            yield f"{self.name}/manifests/{name.path}", Inline(manifest.raw)
            for entry in manifest.entries:
                digest = entry.blob.sha256
                if digest is not None and digest not in shown:
                    shown.add(digest)
                    yield f"{self.name}/blobs/sha256-{digest.hex()}", File(entry.blob)
