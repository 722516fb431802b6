"""A cache with many chunk records, made through the store's own interface: what a start has to cope with.

The data files are sparse and hold nothing; every record says that its chunk landed.
"""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

from weightfs.core.geometry import MAX_CHUNKS, MIN_CHUNK_LENGTH, BlobShape
from weightfs.core.manifest import Blob, BlobId, Entry, Manifest, Mirror
from weightfs.store.cache import Cache, ChunkState, Landing

HOST = "origin.invalid"


def fill_cache(root: Path, records: int) -> list[str]:
    """Put blobs with `records` chunk records in all into the cache at `root`; their refs."""
    now = int(time.time())
    digests = random.Random(0)
    cache = Cache.open(root, now=now)
    refs = []
    try:
        for first in range(0, records, MAX_CHUNKS):
            count = min(MAX_CHUNKS, records - first)
            blob, manifest = _described(f"blob-{first // MAX_CHUNKS:02}.gguf", count)
            cache.put_ref(manifest, now=now)
            cache.prepare(blob.id)
            landings = [
                Landing(blob.id, chunk, digests.randbytes(32), ChunkState.LANDED, 0) for chunk in range(count)
            ]
            cache.commit(landings, now=now)
            refs.append(manifest.ref)
    finally:
        cache.close()
    return refs


def _described(name: str, chunks: int) -> tuple[Blob, Manifest]:
    ref = f"https://{HOST}/{name}"
    shape = BlobShape(chunks * MIN_CHUNK_LENGTH, MIN_CHUNK_LENGTH)
    sha256 = hashlib.sha256(ref.encode()).digest()
    blob = Blob(BlobId.of_digest(sha256), shape, sha256, (Mirror(ref),))
    return blob, Manifest(ref, sha256.hex(), f"https/{HOST}", (Entry(name, blob),))
