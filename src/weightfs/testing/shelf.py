"""Manifests made of real files on this machine's disk, described by JSON, so that a server process can be told them.

Rule: what is made is what the scheme's own source would make: `ollama` refs have a registry's manifest as `raw`, `hf`
refs the list of all files of the revision, with git's SHA-1 alone for the files in `git`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import Blob, BlobId, Entry, Manifest
from weightfs.testing.layouts import content_blob, hub_manifest, ollama_manifest


@dataclass(frozen=True, slots=True)
class Shelved:
    """A manifest and the bytes of its blobs."""

    manifest: Manifest
    contents: dict[BlobId, bytes]


def take(document: dict[str, Any]) -> Shelved:
    """Read `{"ref", "files": {path: place}, "commit"?, "git"?: [path], "slices"?: {path: [of, start, stop]}}`.

    `slices` are paths whose bytes are part of one of the `files`.
    """
    git = document.get("git", ())
    blobs: dict[str, Blob] = {}
    contents: dict[BlobId, bytes] = {}
    for path, place in document["files"].items():
        data = Path(place).read_bytes()
        blobs[path] = content_blob(data, git=path in git)
        contents[blobs[path].id] = data
    scheme, _, name = document["ref"].partition("://")
    match scheme:
        case "ollama":
            manifest = ollama_manifest(name, blobs)
        case "hf":
            manifest = hub_manifest(name, document["commit"], blobs)
        case _:
            entries = [Entry(path, blob) for path, blob in blobs.items()]
            for path, (of, start, stop) in document.get("slices", {}).items():
                entries.append(Entry(path, blobs[of], ByteSpan(start, stop)))
            manifest = Manifest(document["ref"], "1", f"{scheme}/{name}", tuple(entries))
    return Shelved(manifest, contents)
