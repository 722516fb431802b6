"""Faults of real servers and lines: nginx whose worker is killed, expired certificates, connections that are cut."""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId, Trust
from weightfs.core.plan import Limits
from weightfs.core.ref import Ref, parse_ref
from weightfs.engine.engine import Engine
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.sources.base import FetchSettings
from weightfs.testing.engines import running_engine
from weightfs.testing.nginx import Nginx
from weightfs.testing.origin import Fault, FaultKind, OriginFile, open_origin
from weightfs.testing.published import CHUNK, chunk_list, sample
from weightfs.testing.tls import make_tls
from weightfs.testing.waiting import eventually

pytestmark = pytest.mark.nginx

SIZE = 40 * CHUNK + 5
DATA = sample(SIZE)
SETTINGS = EngineSettings(
    workers=0,
    fill=FillMode.NEVER,
    limits=Limits(backoff_base=0.01, backoff_cap=0.05, hold_base=0.05, hold_cap=0.2),
    fetch=FetchSettings(connect_timeout=2.0, timeout=2.0, stall_timeout=0.3),
)
SECONDS = 30


@asynccontextmanager
async def published(
    root: Path, first: str, settings: EngineSettings = SETTINGS
) -> AsyncIterator[tuple[Engine, Ref, BlobId]]:
    """An engine with a file whose list is at an honest origin: the mirror `first` is asked first, the origin then."""
    async with open_origin({"/m.bin": DATA}) as honest:
        honest.files["/m.bin.meta4"] = OriginFile(chunk_list(DATA, [first, honest.url("m.bin")]))
        async with running_engine(root, settings) as engine:
            ref = parse_ref(honest.url("m.bin"))
            blob = (await engine.add(ref)).entries[0].blob
            assert blob.mirrors[0].url == first
            with trio.fail_after(SECONDS):
                yield engine, ref, blob.id
                assert await engine.read(blob.id, ByteSpan(0, SIZE)) == DATA
                assert engine.blob_status(blob.id).trust == Trust.VERIFIED


@pytest.fixture
def served(tmp_path: Path) -> Path:
    root = tmp_path / "served"
    root.mkdir()
    (root / "m.bin").write_bytes(DATA)
    return root


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "weightfs")


def logged(caplog: pytest.LogCaptureFixture, *words: str) -> bool:
    """Whether one line has all the words."""
    return any(all(word in record.getMessage() for word in words) for record in caplog.records)


async def test_a_worker_of_nginx_is_killed_amid_the_body(
    tmp_path: Path, served: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Nginx(served, limit_rate="512k") as nginx:
        async with published(tmp_path / "cache", nginx.url("m.bin")) as (engine, ref, blob):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.complete, str(ref))
                await eventually(lambda: engine.blob_status(blob).present_bytes)
                (worker,) = nginx.worker_pids
                os.kill(worker, signal.SIGKILL)
            assert not any(request.status == 206 and request.sent == SIZE for request in nginx.requests())
            assert logged(caplog, nginx.url("m.bin"), "(reset)") or logged(
                caplog, nginx.url("m.bin"), "(short)"
            )


async def test_a_certificate_that_has_expired(
    tmp_path: Path, served: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tls = make_tls(tmp_path / "tls", expired=True)
    settings = replace(SETTINGS, fetch=replace(SETTINGS.fetch, ca_file=str(tls.ca)))
    with Nginx(served, tls=tls) as nginx:
        first = nginx.https_url("m.bin")
        async with published(tmp_path / "cache", first, settings) as (engine, ref, _):
            await engine.complete(str(ref))
        assert logged(caplog, first, "expired", "(tls)")
        assert nginx.bytes_sent() == 0


async def test_a_redirect_to_a_host_with_a_bad_certificate(
    tmp_path: Path, served: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Nginx(served) as nginx:
        async with open_origin({"/m.bin": DATA}) as first:
            first.always["/m.bin"] = Fault(FaultKind.REDIRECT, location=nginx.https_url("m.bin"))
            async with published(tmp_path / "cache", first.url("m.bin")) as (engine, ref, _):
                await engine.complete(str(ref))
        assert logged(caplog, nginx.https_url("m.bin"), "(tls)")
        assert nginx.bytes_sent() == 0


@asynccontextmanager
async def cutting(port: int, after: int, *, silent: bool) -> AsyncIterator[int]:
    """A relay that ends each connection by RST after so many bytes towards the client, or forwards no more of it."""

    async def upwards(client: trio.SocketStream, server: trio.SocketStream) -> None:
        async for data in client:
            await server.send_all(data)

    async def serve(client: trio.SocketStream) -> None:
        try:
            async with await trio.open_tcp_stream("127.0.0.1", port) as server, trio.open_nursery() as both:
                both.start_soon(upwards, client, server)
                passed = 0
                while passed < after and (data := await server.receive_some(CHUNK)):
                    await client.send_all(data)
                    passed += len(data)
                if silent:
                    await trio.sleep_forever()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                both.cancel_scope.cancel()
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client went away first

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_a_connection_that_is_reset_amid_the_body(
    tmp_path: Path, served: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The only mirror, by a line that lives for a few chunks: every reset costs what was on its way, and no more."""
    (served / "m.bin.meta4").write_bytes(b"")
    with Nginx(served) as nginx:
        async with cutting(nginx.port, 6 * CHUNK, silent=False) as port:
            url = f"http://127.0.0.1:{port}/m.bin"
            (served / "m.bin.meta4").write_bytes(chunk_list(DATA, [url]))
            async with running_engine(tmp_path / "cache", SETTINGS) as engine:
                with trio.fail_after(SECONDS):
                    blob = (await engine.add(parse_ref(url))).entries[0].blob
                    assert await engine.read(blob.id, ByteSpan(0, SIZE)) == DATA
    assert logged(caplog, url, "(reset)")


@pytest.mark.parametrize(("silent", "kind"), [(False, "(reset)"), (True, "(stall)")])
async def test_a_line_that_is_cut_is_left_for_another_mirror(
    tmp_path: Path, served: Path, caplog: pytest.LogCaptureFixture, silent: bool, kind: str
) -> None:
    with Nginx(served) as nginx:
        async with cutting(nginx.tls_port, 2 * CHUNK, silent=silent) as port:
            first = f"https://127.0.0.1:{port}/m.bin"
            settings = replace(SETTINGS, fetch=replace(SETTINGS.fetch, ca_file=str(nginx.ca_file)))
            async with published(tmp_path / "cache", first, settings) as (engine, ref, _):
                await engine.complete(str(ref))
    assert logged(caplog, first, kind)
