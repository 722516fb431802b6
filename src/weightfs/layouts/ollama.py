"""An OLLAMA_MODELS directory: what `ollama serve` reads, and nothing that it would want to clean up.

Rules: a manifest has the registry's own bytes, for their SHA-256 is the model's id. Every blob that a manifest names is
at `blobs/sha256-<hex>`, at full size. Both directories are there even when nothing is in them, and no other directory
is empty: Ollama would try to remove it. Only refs of the scheme `ollama` are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from weightfs.core.manifest import Manifest
from weightfs.core.ollama import SCHEME, parse_ollama
from weightfs.layouts.base import Dir, File, Inline, Item

_PREFIX: Final = f"{SCHEME}://"


class OllamaLayout:
    """`OLLAMA_MODELS=<mount>/ollama`."""

    name = "ollama"

    def entries(self, manifests: Sequence[Manifest]) -> Iterator[tuple[str, Item]]:
        """Yield the two directories, then each model's manifest and those of its blobs that were not there yet."""
        yield f"{self.name}/manifests", Dir()
        yield f"{self.name}/blobs", Dir()
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
