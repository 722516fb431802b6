"""The range reader against an origin that commits every fault: exact bytes, or the right failure, in bounded time."""

from __future__ import annotations

import hashlib
import ipaddress
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.manifest import Mirror
from weightfs.errors import FailureKind, SourceError
from weightfs.sources._client import HttpClient
from weightfs.sources._ranged import RangeReader
from weightfs.sources._stream import Address, BulkBackend, Resolver
from weightfs.sources.base import FetchSettings
from weightfs.testing.nginx import Nginx
from weightfs.testing.origin import Fault, FaultKind, Origin, open_origin, refused_url
from weightfs.testing.tls import make_tls

DATA = random.Random(1).randbytes(700_001)
SHAPE = BlobShape.of(len(DATA))
SPAN = ByteSpan(100_000, 400_000)
PATH = "/m.gguf"
TAG = f'"{hashlib.sha256(DATA).hexdigest()[:16]}"'
K = FaultKind


@pytest.fixture
def clock() -> MockClock:
    # Autojump skips waiting; the threshold leaves the loopback sockets the time to deliver.
    return MockClock(autojump_threshold=0.05)


async def read(
    reader: RangeReader, mirror: Mirror | str, span: ByteSpan = SPAN, *, whole: bool = False
) -> bytes:
    if isinstance(mirror, str):
        mirror = Mirror(mirror, validator=TAG)
    got = bytearray()
    async with reader.open(mirror, SHAPE, span, whole=whole) as body:
        async for piece in body:
            got += piece
            assert DATA.startswith(bytes(got), span.start) or got == piece
    return bytes(got)


class Reading:
    def __init__(self, **settings: Any) -> None:
        self.client = HttpClient(FetchSettings(**settings))
        self.reader = RangeReader(self.client)

    async def __aenter__(self) -> RangeReader:
        return self.reader

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()


REFUSED = [
    (Fault(K.RESET_BEFORE_HEAD), FailureKind.RESET),
    (Fault(K.CLOSE_BEFORE_HEAD), FailureKind.RESET),
    (Fault(K.RESET_MID_HEAD), FailureKind.RESET),
    (Fault(K.GARBAGE), FailureKind.PROTOCOL),
    (Fault(K.HUGE_HEAD), FailureKind.PROTOCOL),
    (Fault(K.RESET_MID_BODY, after=5000), FailureKind.RESET),
    (Fault(K.STALL_BEFORE_HEAD), FailureKind.TIMEOUT),
    (Fault(K.DRIP_HEAD), FailureKind.TIMEOUT),
    (Fault(K.STALL_BEFORE_BODY), FailureKind.STALL),
    (Fault(K.STALL_MID_BODY, after=5000), FailureKind.STALL),
    (Fault(K.DRIP_BODY), FailureKind.STALL),
    (Fault(K.SHORT_BODY, after=5000), FailureKind.SHORT),
    (Fault(K.CHUNKED_SHORT), FailureKind.SHORT),
    (Fault(K.CHUNKED_LONG), FailureKind.PROTOCOL),
    (Fault(K.NO_RANGES), FailureKind.NO_RANGES),
    (Fault(K.WRONG_START), FailureKind.PROTOCOL),
    (Fault(K.WRONG_END), FailureKind.PROTOCOL),
    (Fault(K.WRONG_TOTAL), FailureKind.CHANGED),
    (Fault(K.BAD_RANGE_SYNTAX), FailureKind.PROTOCOL),
    (Fault(K.NO_CONTENT_RANGE), FailureKind.PROTOCOL),
    (Fault(K.WRONG_LENGTH), FailureKind.PROTOCOL),
    (Fault(K.TWO_LENGTHS), FailureKind.PROTOCOL),
    (Fault(K.MULTIPART), FailureKind.PROTOCOL),
    (Fault(K.GZIP), FailureKind.PROTOCOL),
    (Fault(K.HTML_206), FailureKind.PROTOCOL),
    (Fault(K.HTML_200), FailureKind.PROTOCOL),
    (Fault(K.NOT_SATISFIABLE), FailureKind.PROTOCOL),
    (Fault(K.NEW_ETAG), FailureKind.CHANGED),
    (Fault(K.NEW_SIZE), FailureKind.CHANGED),
    (Fault(K.REDIRECT, location="ftp://127.0.0.1/m.gguf"), FailureKind.REDIRECT),
    (Fault(K.REDIRECT, location="file:///etc/passwd"), FailureKind.REDIRECT),
    (Fault(K.REDIRECT, location="http://user:secret@127.0.0.1/"), FailureKind.REDIRECT),
    (Fault(K.REDIRECT, location=""), FailureKind.REDIRECT),
    (Fault(K.REDIRECT, location="http://[broken/"), FailureKind.REDIRECT),
    (Fault(K.REDIRECT, location="?sig=sesame"), FailureKind.REDIRECT),
    (Fault(K.STATUS, status=401), FailureKind.AUTH),
    (Fault(K.STATUS, status=403), FailureKind.AUTH),
    (Fault(K.STATUS, status=404), FailureKind.NOT_FOUND),
    (Fault(K.STATUS, status=410), FailureKind.NOT_FOUND),
    (Fault(K.STATUS, status=412), FailureKind.CHANGED),
    (Fault(K.STATUS, status=418), FailureKind.PROTOCOL),
    *((Fault(K.STATUS, status=s), FailureKind.BUSY) for s in (408, 425, 429, 500, 502, 503, 504)),
]


@pytest.mark.parametrize(
    ("fault", "kind"),
    REFUSED,
    ids=[f"{f.kind.name}-{f.status if f.kind is K.STATUS else f.location}" for f, _ in REFUSED],
)
async def test_fault_is_refused_with_its_kind(clock: MockClock, fault: Fault, kind: FailureKind) -> None:
    async with (
        open_origin({PATH: DATA}) as origin,
        Reading(connect_timeout=3, timeout=5, stall_timeout=7) as reader,
    ):
        origin.script(PATH, fault)
        with pytest.raises(SourceError) as caught, trio.fail_after(120):
            await read(reader, origin.url(PATH + "?sig=sesame"))
        assert caught.value.kind is kind
        assert caught.value.mirror == origin.url(PATH)
        assert "sesame" not in str(caught.value)
        assert "secret" not in str(caught.value)
        # The connection's trouble stays with it: the next read is right.
        assert await read(reader, origin.url(PATH)) == DATA[SPAN.start : SPAN.stop]


@pytest.mark.parametrize("kind", [K.HONEST, K.CHUNKED, K.NO_LENGTH, K.LONG_BODY, K.WEAK_ETAG])
async def test_harmless_oddities_give_exact_bytes(kind: FaultKind) -> None:
    async with open_origin({PATH: DATA}) as origin, Reading() as reader:
        origin.script(PATH, Fault(kind))
        mirror = Mirror(origin.url(PATH))
        for _ in range(2):
            assert await read(reader, mirror) == DATA[SPAN.start : SPAN.stop]


async def test_excess_that_comes_as_a_chunk_of_its_own_is_refused() -> None:
    span = ByteSpan(0, 2 * 65_536)  # the origin's chunks end where the span does
    async with open_origin({PATH: DATA}) as origin, Reading() as reader:
        origin.script(PATH, Fault(K.CHUNKED_LONG))
        got = b""
        async with reader.open(Mirror(origin.url(PATH)), SHAPE, span) as body:

            async def collect() -> None:
                nonlocal got
                async for piece in body:
                    got += piece

            with pytest.raises(SourceError, match="more than") as caught:
                await collect()
        assert caught.value.kind is FailureKind.PROTOCOL
        assert len(got) < len(span)  # the last piece was held back


async def test_request_asks_for_exactly_the_span() -> None:
    async with open_origin({PATH: DATA}) as origin, Reading() as reader:
        await read(reader, origin.url(PATH))
        sent = origin.seen[0].headers
        assert sent["range"] == "bytes=100000-399999"
        assert sent["accept-encoding"] == "identity"
        assert sent["if-range"] == TAG
        assert sent["user-agent"].startswith("weightfs/")


async def test_weak_validator_is_not_sent_but_compared() -> None:
    async with open_origin({PATH: DATA}) as origin, Reading() as reader:
        mirror = Mirror(origin.url(PATH), validator="Sun, 22 Nov 2026 00:00:00 GMT")
        assert await read(reader, mirror) == DATA[SPAN.start : SPAN.stop]
        assert "if-range" not in origin.seen[0].headers
        newer = (("Last-Modified", "Mon, 23 Nov 2026 00:00:00 GMT"),)
        origin.script(PATH, Fault(headers=newer))
        with pytest.raises(SourceError) as caught:
            await read(reader, mirror)
        assert caught.value.kind is FailureKind.CHANGED


async def test_empty_span_asks_nobody() -> None:
    async with Reading() as reader:
        assert await read(reader, refused_url(), ByteSpan(5, 5)) == b""


async def test_whole_stream_when_there_are_no_ranges() -> None:
    everything = ByteSpan(0, len(DATA))
    async with open_origin({PATH: DATA}) as origin, Reading() as reader:
        for kind in (K.NO_RANGES, K.CHUNKED, K.NO_LENGTH):
            origin.script(PATH, Fault(kind))
            assert await read(reader, origin.url(PATH), everything, whole=True) == DATA
        assert all("range" not in seen.headers for seen in origin.seen)
        for kind, failure in (
            (K.NEW_SIZE, FailureKind.CHANGED),
            (K.HTML_200, FailureKind.PROTOCOL),
            (K.NEW_ETAG, FailureKind.CHANGED),
            (K.GZIP, FailureKind.PROTOCOL),
        ):
            origin.script(PATH, Fault(kind))
            with pytest.raises(SourceError) as caught:
                await read(reader, origin.url(PATH), everything, whole=True)
            assert caught.value.kind is failure


async def test_refused_connection() -> None:
    async with Reading() as reader:
        with pytest.raises(SourceError) as caught:
            await read(reader, refused_url())
        assert caught.value.kind is FailureKind.CONNECT


async def test_retry_after_and_rate_limit_are_reported() -> None:
    async with open_origin({PATH: DATA}) as origin, Reading() as reader:
        for headers, seconds in (
            ((("Retry-After", "7"),), 7),
            ((("Retry-After", "soon"),), None),
            ((("RateLimit", '"api";r=0;t=55'),), 55),
            ((("RateLimit", '"api";r=3;t=55'),), None),
            ((("Retry-After", "9" * 12),), float("9" * 12)),
        ):
            origin.script(PATH, Fault(K.STATUS, status=429, headers=headers))
            with pytest.raises(SourceError) as caught:
                await read(reader, origin.url(PATH))
            assert caught.value.retry_after == seconds
            assert caught.value.status == 429


async def test_connection_is_reused_after_full_reads_and_not_after_broken_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_origin({PATH: DATA}) as origin, Reading() as reader:
        opened: list[int] = []
        backend = reader._client._backend
        connect = backend.connect_address

        async def counting(address: Address, port: int) -> socket.socket:
            opened.append(port)
            return await connect(address, port)

        monkeypatch.setattr(backend, "connect_address", counting)
        for _ in range(3):
            await read(reader, origin.url(PATH))
        assert len(opened) == 1
        async with reader.open(Mirror(origin.url(PATH)), SHAPE, ByteSpan(0, SHAPE.size)) as body:
            await anext(body)  # at most 512 KiB of it, and leave
        await read(reader, origin.url(PATH))
        assert len(opened) == 2
        origin.script(PATH, Fault(K.LONG_BODY))
        await read(reader, origin.url(PATH))
        assert await read(reader, origin.url(PATH)) == DATA[SPAN.start : SPAN.stop]


async def test_idle_connection_that_died_is_replaced_silently() -> None:
    async with open_origin({PATH: DATA}) as origin, Reading() as reader:
        await read(reader, origin.url(PATH))
        origin.script(PATH, Fault(K.CLOSE_BEFORE_HEAD))
        assert await read(reader, origin.url(PATH)) == DATA[SPAN.start : SPAN.stop]
        assert len(origin.seen) == 3


async def test_cancelled_read_leaves_nothing_behind(clock: MockClock) -> None:
    async with open_origin({PATH: DATA}) as origin, Reading() as reader:
        origin.script(PATH, Fault(K.STALL_MID_BODY, after=5000))
        with trio.move_on_after(1) as scope:
            await read(reader, origin.url(PATH))
        assert scope.cancelled_caught
        assert await read(reader, origin.url(PATH)) == DATA[SPAN.start : SPAN.stop]
        (transport,) = reader._client._transports.values()
        assert all(connection.is_idle() for connection in transport.connections)


async def test_slow_reader_is_no_stall(clock: MockClock) -> None:
    async with open_origin({PATH: DATA}) as origin, Reading(stall_timeout=2) as reader:
        got = b""
        async with reader.open(Mirror(origin.url(PATH)), SHAPE, SPAN) as body:
            async for piece in body:
                got += piece
                await trio.sleep(10)
        assert got == DATA[SPAN.start : SPAN.stop]


def redirecting(origin: Origin, path: str, location: str) -> None:
    origin.always[path] = Fault(K.REDIRECT, location=location)


@pytest.mark.parametrize("location", ["http://127.0.0.1:99999/x", "http://xn--zz/x", "http://xn--a.b/x"])
async def test_a_redirect_to_what_no_server_can_be_is_the_mirrors_fault(location: str) -> None:
    async with open_origin({PATH: DATA}) as origin, Reading() as reader:
        redirecting(origin, PATH, location)
        with pytest.raises(SourceError):
            await read(reader, Mirror(origin.url(PATH)))


async def test_redirect_is_remembered_and_found_out_once_for_all() -> None:
    async with open_origin({"/signed": DATA}) as origin, Reading() as reader:
        redirecting(origin, PATH, "/signed?Expires=99999999999&sig=1")
        results: list[bytes] = []

        async def one() -> None:
            results.append(await read(reader, Mirror(origin.url(PATH))))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(one)
        assert results == [DATA[SPAN.start : SPAN.stop]] * 20
        assert len(origin.requests(PATH)) == 1
        assert len(origin.requests("/signed")) == 20


@pytest.mark.parametrize("status", [401, 403, 404, 410])
async def test_expired_signed_url_is_resolved_again_once_for_all(status: int) -> None:
    async with open_origin({"/old": DATA, "/new": DATA}) as origin, Reading() as reader:
        redirecting(origin, PATH, "/old?sig=1")
        mirror = Mirror(origin.url(PATH))
        await read(reader, mirror)
        origin.always["/old"] = Fault(K.STATUS, status=status)
        redirecting(origin, PATH, "/new?sig=2")
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(read, reader, mirror)
        assert len(origin.requests(PATH)) == 2
        assert len(origin.requests("/new")) == 8


async def test_signed_url_that_stays_refused_is_an_error_not_a_loop() -> None:
    async with open_origin({"/signed": DATA}) as origin, Reading() as reader:
        redirecting(origin, PATH, "/signed")
        await read(reader, Mirror(origin.url(PATH)))
        origin.always["/signed"] = Fault(K.STATUS, status=403)
        with pytest.raises(SourceError) as caught:
            await read(reader, Mirror(origin.url(PATH)))
        assert caught.value.kind is FailureKind.AUTH
        assert len(origin.requests(PATH)) == 2


async def test_signed_url_is_not_used_past_its_end() -> None:
    now = 1_700_000_000.0
    client = HttpClient(FetchSettings(), wall_clock=lambda: now)
    reader = RangeReader(client)
    async with open_origin({"/signed": DATA}) as origin:
        redirecting(origin, PATH, "/signed?Expires=1700000600")
        await read(reader, Mirror(origin.url(PATH)))
        now += 500
        await read(reader, Mirror(origin.url(PATH)))
        assert len(origin.requests(PATH)) == 1
        now += 90  # within the margin before its end
        await read(reader, Mirror(origin.url(PATH)))
        assert len(origin.requests(PATH)) == 2
        await client.aclose()


async def test_failed_leader_lets_the_next_one_try() -> None:
    async with open_origin({"/signed": DATA}) as origin, Reading() as reader:
        redirecting(origin, PATH, "/signed")
        origin.script(PATH, Fault(K.RESET_BEFORE_HEAD))
        failures: list[FailureKind] = []

        async def one() -> None:
            try:
                await read(reader, Mirror(origin.url(PATH)))
            except SourceError as error:
                failures.append(error.kind)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
        assert failures == [FailureKind.RESET]


@pytest.mark.parametrize("kind", [K.STALL_BEFORE_HEAD, K.DRIP_HEAD])
async def test_a_slow_head_is_bounded_where_the_way_is_known_too(clock: MockClock, kind: FaultKind) -> None:
    """Whoever finds the way out has a bound for all of it; who knows it has that of the head alone."""
    async with open_origin({PATH: DATA}) as origin, Reading(timeout=5) as reader:
        assert await read(reader, origin.url(PATH)) == DATA[SPAN.start : SPAN.stop]
        origin.script(PATH, Fault(kind))
        with pytest.raises(SourceError) as caught, trio.fail_after(120):
            await read(reader, origin.url(PATH))
        assert caught.value.kind is FailureKind.TIMEOUT


async def test_a_loop_is_not_followed() -> None:
    async with open_origin({PATH: DATA}) as origin, Reading() as reader:
        origin.always[PATH] = Fault(K.REDIRECT, location=PATH)
        with pytest.raises(SourceError, match="in a loop"):
            await read(reader, origin.url(PATH))
        assert len(origin.requests(PATH)) == 1


async def test_long_chain_is_refused() -> None:
    async with open_origin({"/9": DATA, "/8": DATA}) as origin, Reading() as reader:
        for hop in range(9):
            redirecting(origin, f"/{hop}", f"/{hop + 1}")
        with pytest.raises(SourceError) as caught:
            await read(reader, Mirror(origin.url("/0")))
        assert caught.value.kind is FailureKind.REDIRECT
        assert await read(reader, Mirror(origin.url("/1"))) == DATA[SPAN.start : SPAN.stop]


async def test_secrets_stay_at_home() -> None:
    async with open_origin({"/b": DATA, "/c": DATA}) as other, open_origin({"/c": DATA}) as home:
        settings = FetchSettings(headers=(("X-Key", "sesame"),), header_origins=(home.url("/"),))
        client = HttpClient(settings)
        reader = RangeReader(client)

        async def ask(url: str) -> bytes:
            async with reader.open(
                Mirror(url), SHAPE, SPAN, secrets=(("Authorization", "Bearer t"),)
            ) as body:
                return b"".join([piece async for piece in body])

        for path, target in (("/a", other.url("/b")), ("/way-back", other.url("/back"))):
            redirecting(home, path, target)
        redirecting(other, "/back", home.url("/c0"))
        redirecting(home, "/c0", "/c")  # at home again, but on a stranger's word
        for _ in range(2):  # found out, then remembered
            await ask(home.url("/a"))
            await ask(home.url("/way-back"))
        for seen in (*home.requests("/a"), *home.requests("/way-back")):
            assert (seen.headers["x-key"], seen.headers["authorization"]) == ("sesame", "Bearer t")
        for seen in (*other.seen, *home.requests("/c0"), *home.requests("/c")):
            assert not {"x-key", "authorization"} & seen.headers.keys()
        await ask(other.url("/c"))  # a mirror elsewhere: its own Authorization, not the user's headers
        assert "x-key" not in other.seen[-1].headers
        assert other.seen[-1].headers["authorization"] == "Bearer t"
        await client.aclose()


class LyingResolver(Resolver):
    """Says that public.test is public and private.test is not; both are really here."""

    async def look_up(self, host: str) -> tuple[Address, ...]:
        return (ipaddress.ip_address("93.184.215.14" if host == "public.test" else "10.1.2.3"),)


class LyingBackend(BulkBackend):
    async def connect_address(self, address: Address, port: int) -> socket.socket:
        return await super().connect_address(ipaddress.ip_address("127.0.0.1"), port)


@pytest.mark.parametrize(
    "target",
    [
        "private.test",
        "127.0.0.1",
        "localhost",
        "169.254.169.254",
        "[::1]",
        "[::ffff:10.0.0.1]",
        "0.0.0.0",
        "100.64.0.1",
    ],
)
async def test_public_host_may_not_lead_to_a_private_one(target: str) -> None:
    async with open_origin({"/secret": DATA}) as origin:
        client = HttpClient(FetchSettings(), backend=LyingBackend(LyingResolver()))
        redirecting(origin, PATH, f"http://{target}:{origin.port}/secret")
        with pytest.raises(SourceError, match="private_hosts") as caught:
            await read(RangeReader(client), Mirror(origin.url(PATH, "public.test")))
        assert caught.value.kind is FailureKind.REDIRECT
        assert not origin.requests("/secret")
        await client.aclose()


async def test_listed_private_host_and_private_to_private_are_allowed() -> None:
    async with open_origin({"/f": DATA}) as origin:
        for settings, start in (
            (FetchSettings(private_hosts=("private.test",)), "public.test"),
            (FetchSettings(), "other-private.test"),
        ):
            client = HttpClient(settings, backend=LyingBackend(LyingResolver()))
            redirecting(origin, PATH, f"http://private.test:{origin.port}/f")
            assert (
                await read(RangeReader(client), Mirror(origin.url(PATH, start)))
                == DATA[SPAN.start : SPAN.stop]
            )
            await client.aclose()


async def test_https_never_leads_to_http_and_bad_certificates_are_refused(tmp_path: Path) -> None:
    good, bad, old = (make_tls(tmp_path / name, expired=name == "old") for name in ("good", "bad", "old"))
    async with open_origin({PATH: DATA}) as plain, open_origin({PATH: DATA}, tls=good) as origin:
        async with Reading(ca_file=str(good.ca)) as reader:
            assert await read(reader, origin.url(PATH)) == DATA[SPAN.start : SPAN.stop]
            redirecting(origin, "/down", plain.url(PATH))
            with pytest.raises(SourceError) as caught:
                await read(reader, Mirror(origin.url("/down")))
            assert caught.value.kind is FailureKind.REDIRECT
            async with open_origin({PATH: DATA}, tls=bad) as stranger:
                redirecting(origin, "/stranger", stranger.url(PATH))
                for url in (stranger.url(PATH), origin.url("/stranger")):
                    with pytest.raises(SourceError) as caught:
                        await read(reader, Mirror(url))
                    assert caught.value.kind is FailureKind.TLS
        async with open_origin({PATH: DATA}, tls=old) as expired, Reading(ca_file=str(old.ca)) as reader:
            with pytest.raises(SourceError, match="expired") as caught:
                await read(reader, expired.url(PATH))
            assert caught.value.kind is FailureKind.TLS


@pytest.mark.parametrize("kind", [K.SHORT_BODY, K.RESET_MID_BODY, K.STALL_MID_BODY])
async def test_faults_amid_a_tls_body(clock: MockClock, tmp_path: Path, kind: FaultKind) -> None:
    tls = make_tls(tmp_path)
    async with open_origin({PATH: DATA}, tls=tls) as origin, Reading(ca_file=str(tls.ca)) as reader:
        origin.script(PATH, Fault(kind, after=50_000))
        with pytest.raises(SourceError) as caught:
            await read(reader, origin.url(PATH))
        assert caught.value.kind in (FailureKind.SHORT, FailureKind.RESET, FailureKind.STALL)
        assert await read(reader, origin.url(PATH)) == DATA[SPAN.start : SPAN.stop]


@pytest.mark.nginx
async def test_parallel_spans_from_a_real_server(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(12_345_678)
    (tmp_path / "m.gguf").write_bytes(data)
    shape = BlobShape.of(len(data))
    with Nginx(tmp_path) as nginx:
        async with Reading(ca_file=str(nginx.ca_file)) as reader:
            got: dict[tuple[str, ByteSpan], bytes] = {}

            async def one(url: str, span: ByteSpan) -> None:
                async with reader.open(Mirror(url), shape, span) as body:
                    got[url, span] = b"".join([piece async for piece in body])

            async with trio.open_nursery() as nursery:
                for url in (nginx.url("m.gguf"), nginx.https_url("m.gguf")):
                    for chunk in shape.chunks:
                        nursery.start_soon(one, url, shape.span_of(chunk))
            assert len(got) == 2 * shape.chunk_count
            assert all(piece == data[span.start : span.stop] for (_, span), piece in got.items())
