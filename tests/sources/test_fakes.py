"""What is shipped for tests does what it says."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import Mirror, Trust
from weightfs.core.ref import Ref
from weightfs.errors import FailureKind, SourceError
from weightfs.sources.base import Source
from weightfs.testing.nginx import Nginx
from weightfs.testing.origin import Fault, FaultKind, origin_in_thread
from weightfs.testing.sources import Failing, FlakySource, MemorySource, SourceTests
from weightfs.testing.tls import make_tls

DATA = bytes(range(256)) * 1000
REF = Ref("memory", "memory://m", "memory://m")


class TestMemory(SourceTests):
    @asynccontextmanager
    async def serving(self, data: bytes, tmp_path: Path) -> AsyncIterator[tuple[Source, Ref]]:
        yield MemorySource({"m": data}), REF


async def test_memory_source_attests_and_records() -> None:
    source = MemorySource({"m": DATA})
    blob = (await source.resolve(REF)).entries[0].blob
    assert blob.initial_trust is Trust.ATTESTED
    assert MemorySource({"m": DATA}, attested=False).blob("m").initial_trust is Trust.PROVISIONAL
    async with source.open_range(blob.mirrors[0], blob.shape, ByteSpan(1, 2)) as body:
        assert [piece async for piece in body] == [DATA[1:2]]
    assert source.opened == [("memory://m", ByteSpan(1, 2))]
    source.files["m"] = DATA[1:]
    with pytest.raises(SourceError, match="changed"):
        async with source.open_range(blob.mirrors[0], blob.shape, ByteSpan(1, 2)):
            pass


@pytest.mark.parametrize("after", [0, 1, 65_536, 100_000])
async def test_flaky_source_fails_where_it_was_told_to(after: int) -> None:
    def plan(number: int, _mirror: Mirror, _span: ByteSpan) -> Failing | None:
        return [Failing(FailureKind.RESET, after), Failing(None, after), None][number]

    source = FlakySource(MemorySource({"m": DATA}), plan)
    blob = (await source.resolve(REF)).entries[0].blob
    got = b""

    async def read() -> None:
        nonlocal got
        got = b""
        async with source.open_range(blob.mirrors[0], blob.shape, ByteSpan(0, len(DATA))) as body:
            async for piece in body:
                got += piece

    with pytest.raises(SourceError) as caught:
        await read()
    assert (caught.value.kind, got) == (FailureKind.RESET, DATA[:after])
    await read()
    assert [at for at in range(len(DATA)) if got[at] != DATA[at]] == [after]
    await read()
    assert got == DATA


def get(url: str, context: ssl.SSLContext | None = None, **headers: str) -> tuple[int, bytes]:
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=10) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_origin_in_a_thread(tmp_path: Path) -> None:
    tls = make_tls(tmp_path)
    with origin_in_thread({"/m": DATA}, tls=tls) as origin:
        context = ssl.create_default_context(cafile=tls.ca)
        origin.script("/m", Fault(FaultKind.STATUS, status=503), Fault(FaultKind.BIT_FLIP))
        assert get(origin.url("/m"), context)[0] == 503
        status, body = get(origin.url("/m"), context, Range="bytes=10-19")
        assert status == 206
        assert [at for at in range(10) if body[at] != DATA[10 + at]] == [5]
        assert get(origin.url("/m"), context) == (200, DATA)
        assert get(origin.url("/none"), context)[0] == 404
        assert [seen.headers.get("range") for seen in origin.requests("/m")] == [None, "bytes=10-19", None]


@pytest.mark.nginx
def test_nginx_counts_and_can_go_away(tmp_path: Path) -> None:
    (tmp_path / "a file").write_bytes(DATA)
    with Nginx(tmp_path, server_config="location /none/ { return 410; }") as nginx:
        context = ssl.create_default_context(cafile=nginx.ca_file)
        assert get(nginx.url("a file"), Range="bytes=5-9") == (206, DATA[5:10])
        assert get(nginx.https_url("a file"), context) == (200, DATA)
        assert get(nginx.url("none/x"))[0] == 410
        first, second, _ = nginx.wait_for_requests(3)
        assert (first.scheme, first.status, second.scheme, second.sent) == ("http", 206, "https", len(DATA))
        assert nginx.bytes_sent("a file") == 5 + len(DATA)
        assert nginx.ranges("a file") == ["bytes=5-9", ""]
        with pytest.raises(TimeoutError):
            nginx.wait_for_requests(4, seconds=0.01)
        nginx.forget_requests()
        assert nginx.requests() == []
        nginx.pause()
        with pytest.raises(urllib.error.URLError):
            get(nginx.url("a file"))
        nginx.resume()
        assert get(nginx.url("a file"))[0] == 200
        home = nginx.ca_file.parent
    assert not home.exists()
