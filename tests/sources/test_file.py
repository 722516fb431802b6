from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.manifest import Manifest, Trust
from weightfs.core.metalink import write_metalink
from weightfs.core.ref import Ref, parse_ref
from weightfs.errors import ChunkListError, FailureKind, RefError, SourceError
from weightfs.sources import file, open_source, schemes
from weightfs.sources.base import FetchSettings, Source
from weightfs.sources.file import FileSource
from weightfs.sources.publish import describe
from weightfs.testing.nginx import Nginx
from weightfs.testing.sources import SourceTests

DATA = hashlib.shake_128(b"x").digest(3_000_000)


class TestConformance(SourceTests):
    @asynccontextmanager
    async def serving(self, data: bytes, tmp_path: Path) -> AsyncIterator[tuple[Source, Ref]]:
        (tmp_path / "m #%ü.gguf").write_bytes(data)
        async with FileSource(FetchSettings()) as source:
            yield source, parse_ref(str(tmp_path / "m #%ü.gguf"))


async def resolve(path: Path) -> Manifest:
    return await FileSource(FetchSettings()).resolve(parse_ref(str(path)))


async def read(manifest: Manifest, span: ByteSpan) -> bytes:
    blob = manifest.entries[0].blob
    async with FileSource(FetchSettings()).open_range(blob.mirrors[0], blob.shape, span) as body:
        return b"".join([piece async for piece in body])


async def test_other_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(DATA)
    manifest = await resolve(path)
    for change in (DATA + b"x", DATA[:-1], DATA):  # the last: same bytes, other time
        path.write_bytes(change)
        os.utime(path, ns=(1, 1))
        with pytest.raises(SourceError) as caught:
            await read(manifest, ByteSpan(0, 10))
        assert caught.value.kind is FailureKind.CHANGED


async def test_change_amid_a_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(DATA)
    blob = (await resolve(path)).entries[0].blob
    for size, kind in ((len(DATA) + 1, FailureKind.CHANGED), (1 << 20, FailureKind.SHORT)):
        source = FileSource(FetchSettings())
        path.write_bytes(DATA)
        blob = (await resolve(path)).entries[0].blob
        async with source.open_range(blob.mirrors[0], blob.shape, ByteSpan(0, blob.size)) as body:
            await anext(body)
            os.truncate(path, size)
            with pytest.raises(SourceError) as caught:
                [piece async for piece in body]
        assert caught.value.kind is kind


async def test_list_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(DATA)
    (tmp_path / "m.meta4").write_bytes(write_metalink(describe(path)))
    blob = (await resolve(path)).entries[0].blob
    assert (blob.initial_trust, blob.sha256) == (Trust.ATTESTED, hashlib.sha256(DATA).digest())
    (tmp_path / "m.meta4").write_bytes(b"<metalink>")
    with pytest.raises(ChunkListError):
        await resolve(path)


@pytest.mark.nginx
async def test_http_mirror_of_a_local_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(DATA)
    with Nginx(tmp_path) as nginx:
        (tmp_path / "m.meta4").write_bytes(write_metalink(describe(path, [nginx.url("m")])))
        async with FileSource(FetchSettings()) as source:
            blob = (await source.resolve(parse_ref(str(path)))).entries[0].blob
            assert [mirror.url.partition(":")[0] for mirror in blob.mirrors] == ["file", "http"]
            async with source.open_range(blob.mirrors[1], blob.shape, ByteSpan(5, 50)) as body:
                assert b"".join([piece async for piece in body]) == DATA[5:50]


async def test_directory_lists_regular_files_and_stays_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    (root / "sub").mkdir(parents=True)
    (root / "a").write_bytes(b"a")
    (root / "sub" / "b").write_bytes(b"bb")
    (tmp_path / "outside").write_bytes(b"secret")
    (root / "inside-link").symlink_to("sub/b")
    (root / "outside-link").symlink_to("../outside")
    (root / "dangling").symlink_to("nothing")
    os.mkfifo(root / "fifo")
    manifest = await resolve(root)
    assert [(entry.path, entry.blob.size) for entry in manifest.entries] == [
        ("models/a", 1),
        ("models/inside-link", 2),
        ("models/sub/b", 2),
    ]
    monkeypatch.setattr(file, "MAX_FILES", 2)
    with pytest.raises(SourceError, match="more than 2"):
        await resolve(root)


async def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        await resolve(tmp_path / "none")
    assert caught.value.kind is FailureKind.NOT_FOUND
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceError, match="neither"):
        await resolve(tmp_path / "fifo")
    (tmp_path / "m").write_bytes(b"12345")
    manifest = await resolve(tmp_path / "m")
    (tmp_path / "m").unlink()
    os.mkfifo(tmp_path / "m")  # must not wait for a writer
    with pytest.raises(SourceError) as caught:
        await read(manifest, ByteSpan(0, 5))
    assert caught.value.kind is FailureKind.CHANGED
    with pytest.raises(ValueError, match="not within"):
        await read(manifest, ByteSpan(0, 6))
    assert BlobShape.of(5).size == 5


def test_sources_are_found_by_scheme() -> None:
    assert set(schemes()) >= {"file", "http", "https"}
    for scheme in ("file", "http", "https"):
        assert open_source(scheme, FetchSettings()) is not None
    with pytest.raises(RefError, match="did you mean https://"):
        open_source("htps", FetchSettings())
    for name in ("base", "minisign", "publish", "_client", "os"):
        with pytest.raises(RefError):
            open_source(name, FetchSettings())
