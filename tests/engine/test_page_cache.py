"""Pages are not kept twice: behind a sequential reader, the cache file's are let go; the mount's cache has them."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import random
from pathlib import Path

import pytest
import trio

from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.ref import parse_ref
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.testing.engines import running_engine
from weightfs.testing.nginx import Nginx

SIZE = 96 * MIB


def resident(path: Path) -> int:
    """Bytes of a file in the page cache (mincore(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    with path.open("rb") as file:
        size = path.stat().st_size
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        try:
            assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
        finally:
            libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.nginx
async def test_a_sequential_reader_leaves_few_pages_of_the_cache_file_behind(tmp_path: Path) -> None:
    content = random.Random(4).randbytes(MIB) * (SIZE // MIB)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "m.bin").write_bytes(content)
    with Nginx(tmp_path / "o") as nginx:
        ref = parse_ref(nginx.url("m.bin") + "#sha256=" + hashlib.sha256(content).hexdigest())
        settings = EngineSettings(workers=0, fill=FillMode.NEVER)
        async with running_engine(tmp_path / "cache", settings) as engine:
            blob = (await engine.add(ref)).entries[0].blob
            with trio.fail_after(60):
                await engine.complete(str(ref))
            file = next(path for path in (tmp_path / "cache" / "blobs").rglob("*") if path.is_file())
            assert resident(file) > SIZE // 2, "it was just written"
            for start in range(0, SIZE, MIB):
                span = ByteSpan(start, start + MIB)
                assert await engine.read(blob.id, span) == content[:MIB]
                await trio.lowlevel.checkpoint()
            with trio.fail_after(30):
                while resident(file) > SIZE // 2:
                    await trio.to_thread.run_sync(lambda: None)
