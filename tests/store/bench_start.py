"""How long a start takes with a million chunk records: `python tests/store/bench_start.py [BLOBS]`.

31 blobs of 32,768 chunks each; the data files are sparse and empty, for a start never reads them. Each ref has its
origin's manifest of 16 KiB. Prints JSON lines.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import MAX_CHUNKS, MIB, BlobShape
from weightfs.core.manifest import Blob, BlobId, Entry, Manifest, Mirror
from weightfs.store import ledger
from weightfs.store.cache import Cache, ChunkState
from weightfs.store.index import Txn
from weightfs.store.ledger import Bits
from weightfs.store.records import ChunkRecord


def fill(cache: Cache, number: int) -> BlobId:
    """One blob, every chunk recorded."""
    sha256 = number.to_bytes(2, "big") * 16
    shape = BlobShape(MAX_CHUNKS * MIB, MIB)
    blob = Blob(BlobId.of_digest(sha256), shape, sha256, (Mirror(f"https://host/{number}.gguf"),))
    entries = (Entry("m.gguf", blob),)
    ref = f"https://host/{number}.gguf"
    cache.put_ref(Manifest(ref, "r1", "https/host", entries, raw=bytes(16 * 1024)), now=1)
    cache.prepare(blob.id)
    record = ChunkRecord(ChunkState.LANDED, 0, cache.epoch, MIB, sha256, 1)

    def job(txn: Txn) -> None:
        for chunk in shape.chunks:
            ledger.put_chunk(txn, blob.id, shape, chunk, record)
        ledger.put_bits(
            txn, blob.id, Bits(ChunkSet(shape.chunk_count, shape.chunks), ChunkSet(shape.chunk_count))
        )

    cache._index.write(job)
    return blob.id


def start(root: Path, label: str) -> Cache:
    """Open, and ask for everything that a mount needs before it serves."""
    began = time.perf_counter()
    cache = Cache.open(root, now=1)
    opened = time.perf_counter()
    blobs = [entry.blob.id for stored in cache.refs() for entry in stored.manifest.entries]
    suspect = sum(len(cache.progress(blob).suspect) for blob in blobs)
    served = time.perf_counter()
    found = {"start": label, "open_s": round(opened - began, 4), "to_serve_s": round(served - began, 4)}
    print(json.dumps(found | {"clean": cache.was_clean, "suspect": suspect, "epoch": cache.epoch}))
    return cache


def main() -> None:
    """Fill, then start after a clean and after an unclean stop."""
    blobs = int(sys.argv[1]) if len(sys.argv) > 1 else 31
    home = Path(tempfile.mkdtemp(prefix="weightfs-start-"))
    try:
        cache = Cache.open(home / "cache", now=1)
        for number in range(blobs):
            fill(cache, number)
        print(
            json.dumps(
                {"records": blobs * MAX_CHUNKS, "index_bytes": (cache.root / "index/data.mdb").stat().st_size}
            )
        )
        cache.close()
        for label in ("clean", "clean again"):
            cache = start(home / "cache", label)
            if label == "clean":
                cache.close()
        # As a kill would leave it: the files as they are now, while this process still has them open.
        shutil.copytree(home / "cache" / "index", home / "copy" / "index")
        (home / "cache" / "blobs").rename(home / "copy" / "blobs")
        start(home / "copy", "after a kill").close()
        start(home / "copy", "after that").close()
        cache.close()
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
