"""Tokens, credentials, signed URLs and TLS, with real registries and servers; and challenges that set traps."""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import json
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from weightfs.core.artifact import DOCKER_MANIFEST
from weightfs.core.geometry import MIB, BlobShape, ByteSpan
from weightfs.core.manifest import Manifest, Mirror
from weightfs.core.ref import parse_ref
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import FailureKind, SourceError
from weightfs.sources import _tokens
from weightfs.sources._challenges import Challenge, parse_challenges
from weightfs.sources._client import HttpClient
from weightfs.sources._homes import base_url
from weightfs.sources._stream import Address, BulkBackend, Resolver
from weightfs.sources.base import FetchSettings, Source
from weightfs.sources.https import HttpsSource
from weightfs.sources.oci import OciSource
from weightfs.sources.ollama import OllamaSource
from weightfs.testing.blob_front import BlobFront
from weightfs.testing.engines import running_engine
from weightfs.testing.origin import Fault, FaultKind, Origin, OriginFile, open_origin
from weightfs.testing.registry import (
    BASIC_PASSWORD,
    BASIC_USER,
    Auth,
    DockerRegistry,
    push_ollama,
    write_docker_config,
)
from weightfs.testing.sources import Elsewhere, opened, read_entry
from weightfs.testing.tls import make_tls
from weightfs.testing.token_server import reply, serve, stop_server
from weightfs.testing.waiting import until

GGUF = b"GGUF" + random.Random(5).randbytes(3 * MIB)
PARTS = {"model": GGUF, "template": b"{{ .Prompt }}"}
NAME = "library/x:latest"
BLOB, REALM = "/v2/library/x/blobs/sha256:00", "/token"
DATA = random.Random(8).randbytes(100_000)


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0.05)


@pytest.fixture
def guarded() -> Iterator[DockerRegistry]:
    """A registry with a token server, and a model in it."""
    with DockerRegistry(auth=Auth.TOKEN, accounts={"ann": "secret"}) as registry:
        push_ollama(registry, NAME, PARTS)
        yield registry


async def resolve(registry: DockerRegistry, **settings: Any) -> Manifest:
    async with opened(OllamaSource, **settings) as source:
        return await source.resolve(parse_ref(f"ollama://{registry.host}/{NAME}"))


def status_of(url: str, headers: dict[str, str] | None = None) -> int:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    try:
        connection.request(
            "GET", f"{parts.path}?{parts.query}", headers={"Range": "bytes=0-0", **(headers or {})}
        )
        return connection.getresponse().status
    finally:
        connection.close()


# ---- tokens


async def test_public_models_need_a_token_but_no_credentials(guarded: DockerRegistry) -> None:
    async with opened(OllamaSource) as source:
        found = await source.resolve(parse_ref(f"ollama://{guarded.host}/{NAME}"))
        assert await read_entry(source, found.entries[0]) == GGUF
    assert guarded.tokens.seen == [("", ("repository:library/x:pull",))]
    assert len([line for line in guarded.requests() if line.endswith(" 401")]) == 1


async def test_a_private_model_with_credentials(guarded: DockerRegistry, tmp_path: Path) -> None:
    guarded.tokens.public = False
    guarded.tokens.field = "access_token"
    config = write_docker_config(tmp_path / "config.json", guarded.host, "ann", "secret")
    found = await resolve(guarded, docker_config=str(config))
    assert found.entries
    assert guarded.tokens.seen == [("ann", ("repository:library/x:pull",))]


async def test_a_private_model_without_credentials_says_to_log_in(guarded: DockerRegistry) -> None:
    guarded.tokens.public = False
    with pytest.raises(
        SourceError, match=f"without credentials: .* run docker login {guarded.host}"
    ) as caught:
        await resolve(guarded)
    assert caught.value.kind is FailureKind.AUTH


async def test_wrong_credentials_are_told_from_none(
    guarded: DockerRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_docker_config(tmp_path / "config.json", guarded.host, "ann", "hunter2-wrong")
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(SourceError, match=r"log in again; .* `weightfs reload`") as caught,
    ):
        await resolve(guarded, docker_config=str(config))
    assert caught.value.kind is FailureKind.AUTH
    secret = base64.b64encode(b"ann:hunter2-wrong").decode()
    assert not any(word in f"{caught.value!r}{caplog.text}" for word in ("hunter2", secret))
    assert len(guarded.tokens.seen) == 1


async def test_a_token_that_the_registry_does_not_take(guarded: DockerRegistry, tmp_path: Path) -> None:
    guarded.tokens.lifetime = -3600
    with pytest.raises(SourceError, match=r"is private or does not exist.*\(UNAUTHORIZED\)") as caught:
        await resolve(guarded)
    assert caught.value.kind is FailureKind.AUTH
    config = write_docker_config(tmp_path / "config.json", guarded.host, "ann", "secret")
    with pytest.raises(SourceError, match="does not let the user of docker's configuration read"):
        await resolve(guarded, docker_config=str(config))


async def test_a_token_that_ends_amid_a_download_costs_no_retry(guarded: DockerRegistry) -> None:
    # docker-registry takes a token for a minute after its end: this one for two seconds from now.
    tokens = guarded.tokens
    tokens.lifetime, tokens.said_lifetime = -58, 3600
    async with opened(OllamaSource) as source:
        found = await source.resolve(parse_ref(f"ollama://{guarded.host}/{NAME}"))
        model = found.entries[0]
        assert await read_entry(source, model, 0, 10) == GGUF[:10]
        old = {"Authorization": f"Bearer {tokens.issue(['repository:library/x:pull'])}"}
        await trio.to_thread.run_sync(until, lambda: status_of(model.blob.mirrors[0].url, old) == 401)
        tokens.lifetime = 300
        asked = len(tokens.seen)
        got: dict[int, bytes] = {}

        async def one(start: int) -> None:
            got[start] = await read_entry(source, model, start, start + 1000)

        async with trio.open_nursery() as nursery:
            for start in range(0, 20_000, 1000):
                nursery.start_soon(one, start)
        assert b"".join(got[start] for start in sorted(got)) == GGUF[:20_000]
        assert len(tokens.seen) == asked + 1


async def test_basic(tmp_path: Path) -> None:
    with DockerRegistry(auth=Auth.BASIC) as registry:
        push_ollama(registry, NAME, PARTS)
        config = write_docker_config(tmp_path / "config.json", registry.host, BASIC_USER, BASIC_PASSWORD)
        async with opened(OllamaSource, docker_config=str(config)) as source:
            found = await source.resolve(parse_ref(f"ollama://{registry.host}/{NAME}"))
            assert await read_entry(source, found.entries[0]) == GGUF
        assert len([line for line in registry.requests() if line.endswith(" 401")]) == 1
        with pytest.raises(SourceError, match="is private or does not exist") as caught:
            await resolve(registry)
        assert caught.value.kind is FailureKind.AUTH
        write_docker_config(config, registry.host, BASIC_USER, "wrong")
        with pytest.raises(SourceError, match="does not let the user of docker's configuration read"):
            await resolve(registry, docker_config=str(config))


# ---- blobs elsewhere


async def test_signed_urls_that_end_are_renewed_once_for_all(guarded: DockerRegistry) -> None:
    with BlobFront(guarded) as front:
        async with opened(OllamaSource) as source:
            found = await source.resolve(parse_ref(f"ollama://{front.host}/{NAME}"))
            model = found.entries[0]
            front.lifetime = 1
            url = front.signed_url(model.blob.digest)
            assert await read_entry(source, model, 0, 10) == GGUF[:10]
            assert front.signed == 1
            await trio.to_thread.run_sync(until, lambda: status_of(url) == 410)
            front.lifetime = 3600
            got: dict[int, bytes] = {}

            async def one(start: int) -> None:
                got[start] = await read_entry(source, model, start, start + 1000)

            async with trio.open_nursery() as nursery:
                for start in range(0, 20_000, 1000):
                    nursery.start_soon(one, start)
            assert b"".join(got[start] for start in sorted(got)) == GGUF[:20_000]
            assert front.signed == 2
        served = {request.status for request in front.nginx.requests() if request.path.startswith("/signed/")}
        assert served <= {206, 410}, "400: credentials were sent on; 403: a wrong signature"


async def test_a_pull_by_workers_outlives_its_signed_urls(guarded: DockerRegistry, tmp_path: Path) -> None:
    with BlobFront(guarded) as front:
        front.lifetime = 0  # each ends with the second in which it was made
        settings = EngineSettings(
            workers=1, fill=FillMode.NEVER, fetch=FetchSettings(retry=3, retry_delay=0.05)
        )
        async with running_engine(tmp_path / "cache", settings) as engine:
            ref = parse_ref(f"ollama://{front.host}/{NAME}")
            await engine.add(ref)
            front.lifetime = 3600
            await engine.complete(str(ref))


async def test_tls_with_a_private_ca() -> None:
    with DockerRegistry(tls=True) as registry:
        push_ollama(registry, NAME, PARTS)
        async with opened(
            OllamaSource, endpoints=registry.endpoints, ca_file=str(registry.ca_file)
        ) as source:
            found = await source.resolve(parse_ref(f"ollama://{registry.host}/{NAME}"))
            assert found.entries[0].blob.mirrors[0].url.startswith("https://")
            assert await read_entry(source, found.entries[0]) == GGUF
        with pytest.raises(SourceError, match="was not trusted") as caught:
            await resolve(registry, endpoints=registry.endpoints)
        assert caught.value.kind is FailureKind.TLS


def test_where_registries_are() -> None:
    settings = FetchSettings(endpoints=(("quay.io", "https://cache.lan/"),))
    for host, base in {
        "docker.io": "https://registry-1.docker.io",
        "ghcr.io": "https://ghcr.io",
        "quay.io": "https://cache.lan",
        "localhost:5000": "http://localhost:5000",
        "127.0.0.1:5000": "http://127.0.0.1:5000",
        "[::1]:5000": "http://[::1]:5000",
        "192.168.1.7:5000": "https://192.168.1.7:5000",
    }.items():
        assert base_url(host, settings) == base


# ---- challenges that set traps. The mirror is read as a fetch worker does: by its URL alone.


def challenge(realm: str, **more: str) -> Fault:
    parameters = ", ".join(f'{name}="{value}"' for name, value in {"realm": realm, **more}.items())
    return Fault(FaultKind.STATUS, status=401, headers=(("WWW-Authenticate", f"Bearer {parameters}"),))


class PublicOrPrivate(Resolver):
    """Names that begin with `public` are public, others private."""

    async def look_up(self, host: str) -> tuple[Address, ...]:
        return (ipaddress.ip_address("93.184.215.14" if host.startswith("public") else "192.168.1.7"),)


async def read_blob(url: str, backend: BulkBackend | None = None, **settings: Any) -> bytes:
    client = HttpClient(FetchSettings(**{"retry": 0, **settings}), backend=backend)
    async with HttpsSource(client) as source:
        span = ByteSpan(100, 5000)
        async with source.open_range(Mirror(url), BlobShape.of(len(DATA)), span) as body:
            return b"".join([piece async for piece in body])


@asynccontextmanager
async def blob_origin(token: bytes = b'{"token":"t0"}') -> AsyncIterator[Origin]:
    async with open_origin({BLOB: DATA, REALM: OriginFile(token)}) as origin:
        yield origin


@pytest.mark.parametrize(("scheme", "source_of"), [("ollama", OllamaSource), ("oci", OciSource)])
async def test_the_users_headers_go_to_the_registry_that_a_ref_names(
    scheme: str, source_of: Callable[[HttpClient], Source]
) -> None:
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'ab' * 32}", "size": 9}
    document = {"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": layer, "layers": [layer]}
    path = "/v2/library/x/manifests/latest"
    async with open_origin({path: json.dumps(document).encode()}) as origin:
        host = urlsplit(origin.url(path)).netloc
        source = source_of(HttpClient(FetchSettings(retry=0, headers=(("X-Tenant", "blue"),))))
        async with contextlib.aclosing(source):
            await source.resolve(parse_ref(f"{scheme}://{host}/library/x"))
        (asked,) = origin.requests(path)
        assert asked.headers["x-tenant"] == "blue"


async def test_a_worker_answers_a_challenge_knowing_only_the_url() -> None:
    async with blob_origin() as origin:
        origin.script(BLOB, challenge(origin.url(REALM + "?account=x"), service='a \\"b\\"', scope="s:1 s:2"))
        assert await read_blob(origin.url(BLOB)) == DATA[100:5000]
        first, second = origin.requests(BLOB)
        assert "authorization" not in first.headers
        assert second.headers["authorization"] == "Bearer t0"
        (asked,) = origin.requests(REALM)
        assert httpx.URL(asked.target).params.multi_items() == [
            ("account", "x"), ("service", 'a "b"'), ("scope", "s:1"), ("scope", "s:2"),
        ]  # fmt: skip


async def test_without_a_scope_it_is_that_of_a_pull() -> None:
    async with blob_origin() as origin:
        origin.script(BLOB, challenge(origin.url(REALM)))
        await read_blob(origin.url(BLOB))
        assert origin.requests(REALM)[0].target.endswith("scope=repository%3Alibrary%2Fx%3Apull")


async def test_challenges_count_only_below_v2() -> None:
    async with open_origin({"/m.gguf": DATA, REALM: b'{"token":"t0"}'}) as origin:
        origin.always["/m.gguf"] = challenge(origin.url(REALM))
        with pytest.raises(SourceError) as caught:
            await read_blob(origin.url("/m.gguf"))
        assert caught.value.kind is FailureKind.AUTH
        assert not origin.requests(REALM)


async def test_another_origin_is_given_no_token() -> None:
    async with blob_origin() as home, blob_origin() as away:
        home.always[BLOB] = Fault(FaultKind.REDIRECT, status=307, location=away.url(BLOB, "localhost"))
        away.always[BLOB] = challenge(away.url(REALM))
        with pytest.raises(SourceError) as caught:
            await read_blob(home.url(BLOB))
        assert caught.value.kind is FailureKind.AUTH
        assert not away.requests(REALM)


async def test_a_realm_that_challenges_in_its_turn_is_not_answered() -> None:
    async with blob_origin() as origin:
        origin.always[BLOB] = challenge(origin.url(BLOB))
        with trio.fail_after(20), pytest.raises(SourceError) as caught:
            await read_blob(origin.url(BLOB))
        assert caught.value.kind is FailureKind.AUTH
        assert len(origin.requests(BLOB)) == 2


async def test_a_public_registry_may_not_send_to_a_private_token_server(tmp_path: Path) -> None:
    async with blob_origin() as origin:
        for realm in (f"http://private:{origin.port}{REALM}", origin.url(REALM)):
            origin.script(BLOB, challenge(realm))
            with pytest.raises(SourceError, match="private address") as caught:
                await read_blob(f"http://public:{origin.port}{BLOB}", Elsewhere(PublicOrPrivate()))
            assert caught.value.kind is FailureKind.REDIRECT
        origin.script(REALM, Fault(FaultKind.REDIRECT, location=f"http://private:{origin.port}/"))
        origin.script(BLOB, challenge(f"http://public-too:{origin.port}{REALM}"))
        with pytest.raises(SourceError, match="private address"):
            await read_blob(f"http://public:{origin.port}{BLOB}", Elsewhere(PublicOrPrivate()))
        assert not [seen for seen in origin.seen if seen.headers["host"].startswith("private")]


async def test_credentials_are_not_sent_where_somebody_could_read_or_ask_for_them(tmp_path: Path) -> None:
    async with blob_origin() as origin:
        hosts = (f"public:{origin.port}", f"127.0.0.1:{origin.port}")
        auths = {host: {"auth": base64.b64encode(b"ann:secret").decode()} for host in hosts}
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"auths": auths}))
        settings: dict[str, Any] = {"docker_config": str(config), "backend": Elsewhere(PublicOrPrivate())}
        # The registry is on plain http: who asks may be anybody on the way.
        origin.script(BLOB, challenge(f"http://public:{origin.port}{REALM}"))
        assert await read_blob(f"http://public:{origin.port}{BLOB}", **settings)
        # The registry is this machine, its token server a stranger on plain http.
        origin.script(BLOB, challenge(f"http://public:{origin.port}{REALM}"))
        assert await read_blob(origin.url(BLOB), **settings)
        assert not [seen for seen in origin.requests(REALM) if "authorization" in seen.headers]
        origin.script(BLOB, challenge(origin.url(REALM)))
        assert await read_blob(origin.url(BLOB), **settings)
        assert origin.requests(REALM)[-1].headers["authorization"].startswith("Basic ")
        # Basic is not answered on plain http.
        origin.script(
            BLOB, Fault(FaultKind.STATUS, status=401, headers=(("WWW-Authenticate", "Basic realm=x"),))
        )
        with pytest.raises(SourceError, match="check the credentials"):
            await read_blob(f"http://public:{origin.port}{BLOB}", **settings)


async def test_credentials_stay_with_the_token_server_that_was_named(tmp_path: Path) -> None:
    async with blob_origin() as origin, blob_origin() as away:
        config = write_docker_config(tmp_path / "c.json", f"127.0.0.1:{origin.port}", "ann", "secret")
        origin.script(BLOB, challenge(origin.url(REALM)))
        origin.script(REALM, Fault(FaultKind.REDIRECT, location=away.url(REALM, "localhost")))
        assert await read_blob(origin.url(BLOB), docker_config=str(config))
        assert "authorization" in origin.requests(REALM)[0].headers
        assert "authorization" not in away.requests(REALM)[0].headers


async def test_an_https_registry_may_not_name_a_token_server_on_http(tmp_path: Path) -> None:
    tls = make_tls(tmp_path)
    async with open_origin({BLOB: DATA}, tls=tls) as origin, blob_origin() as tokens:
        origin.always[BLOB] = challenge(tokens.url(REALM))
        with pytest.raises(SourceError, match="is https and names a token server that is not") as caught:
            await read_blob(origin.url(BLOB), ca_file=str(tls.ca))
        assert caught.value.kind is FailureKind.REDIRECT
        assert not tokens.seen


async def test_tokens_of_docker_login(tmp_path: Path) -> None:
    async with blob_origin() as origin:
        config = tmp_path / "config.json"
        entry = {"identitytoken": "it"}
        config.write_text(json.dumps({"auths": {f"127.0.0.1:{origin.port}": entry}}))
        origin.script(BLOB, challenge(origin.url(REALM)))
        await read_blob(origin.url(BLOB), docker_config=str(config))
        login = base64.b64encode(b"00000000-0000-0000-0000-000000000000:it").decode()
        assert origin.requests(REALM)[0].headers["authorization"] == f"Basic {login}"
        entry["registrytoken"] = "rt"
        config.write_text(json.dumps({"auths": {f"127.0.0.1:{origin.port}": entry}}))
        origin.script(BLOB, challenge(origin.url(REALM)))
        await read_blob(origin.url(BLOB), docker_config=str(config))
        assert origin.requests(BLOB)[-1].headers["authorization"] == "Bearer rt"
        assert len(origin.requests(REALM)) == 1
        # Neither is a password, which Basic wants.
        basic = Fault(FaultKind.STATUS, status=401, headers=(("WWW-Authenticate", "Basic realm=x"),))
        origin.script(BLOB, basic)
        with pytest.raises(SourceError, match="check the credentials"):
            await read_blob(origin.url(BLOB), docker_config=str(config))


async def test_a_header_of_the_user_goes_before_tokens() -> None:
    async with blob_origin() as origin:
        origin.always[BLOB] = challenge(origin.url(REALM))
        mine: dict[str, Any] = {
            "headers": (("Authorization", "Bearer mine"),),
            "header_origins": (origin.url(BLOB),),
        }
        with pytest.raises(SourceError, match="check the credentials"):
            await read_blob(origin.url(BLOB), **mine)
        assert [seen.headers["authorization"] for seen in origin.seen] == ["Bearer mine"]


async def test_how_many_tokens_are_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tokens, "MAX_TOKENS", 2)
    names = [BLOB.replace("/x/", f"/x{number}/") for number in range(3)]
    async with open_origin({**dict.fromkeys(names, DATA), REALM: b'{"token":"t0"}'}) as origin:
        client = HttpClient(FetchSettings(retry=0))
        for name in names:
            origin.script(name, challenge(origin.url(REALM)))
            await client.fetch(origin.url(name), limit=1 << 20)
        known = [await client.tokens.known(httpx.URL(origin.url(name))) for name in names]
        assert [bool(headers) for headers in known] == [False, True, True]
        assert not await client.tokens.known(httpx.URL(origin.url("/v2/" + "x" * 2000 + "/blobs/y")))
        await client.aclose()


@pytest.mark.parametrize(
    "realm",
    [
        "ftp://127.0.0.1/t",
        "//",
        "",
        "http://u:p@127.0.0.1/t",
        "http://exa mple/",
        "http://[::1",
        "http://127.0.0.1:99999/t",
        "x" * 40_000,
    ],
)
async def test_realms_that_are_no_urls(realm: str) -> None:
    async with blob_origin() as origin:
        origin.script(BLOB, challenge(realm))
        with pytest.raises(SourceError) as caught:
            await read_blob(origin.url(BLOB))
        assert caught.value.kind in (FailureKind.REDIRECT, FailureKind.AUTH, FailureKind.PROTOCOL)
        assert "u:p" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [b"", b"[]", b"{}", b'{"token":7}', b'{"token":"a b"}', b'{"token":"a\\r\\nX: y"}', b"<html>", b"[" * 10_000,
     b'{"token":"%s"}' % (b"x" * 20_000), b"x" * 100_000],
)  # fmt: skip
async def test_answers_that_are_no_tokens(answer: bytes) -> None:
    async with blob_origin(answer) as origin:
        origin.script(BLOB, challenge(origin.url(REALM)))
        with pytest.raises(SourceError) as caught:
            await read_blob(origin.url(BLOB))
        assert caught.value.kind is FailureKind.PROTOCOL


async def test_a_busy_token_server_is_a_fault_that_passes(
    guarded: DockerRegistry, autojump_clock: MockClock
) -> None:
    guarded.tokens.status = 503
    with pytest.raises(SourceError) as caught:
        await resolve(guarded)
    assert caught.value.kind is FailureKind.BUSY


ANSWERS = {
    b'{"token":"t0"}': 60,
    b'{"token":"t0","expires_in":1000}': 1000,
    b'{"token":"t0","expires_in":-1}': 60,
    b'{"token":"t0","expires_in":1e99}': 86_400,
}


async def test_tokens_are_renewed_before_they_end(autojump_clock: MockClock) -> None:
    for answer, seconds in ANSWERS.items():
        async with blob_origin(answer) as origin:
            client = HttpClient(FetchSettings(retry=0))
            url = httpx.URL(origin.url(BLOB))
            origin.script(BLOB, challenge(origin.url(REALM)))
            assert (await client.fetch(str(url), limit=1 << 20)).body == DATA
            autojump_clock.jump(seconds - min(10, seconds / 10) - 1)
            assert await client.tokens.known(url) == (("Authorization", "Bearer t0"),)
            assert len(origin.requests(REALM)) == 1
            autojump_clock.jump(2)
            origin.files[REALM] = OriginFile(b'{"token":"t1"}')
            assert await client.tokens.known(url) == (("Authorization", "Bearer t1"),)
            assert len(origin.requests(REALM)) == 2
            await client.aclose()


async def test_a_token_is_asked_for_once_and_a_refusal_too() -> None:
    async with blob_origin() as origin:
        client = HttpClient(FetchSettings(retry=0))
        origin.always[BLOB] = challenge(origin.url(REALM))
        origin.always[REALM] = Fault(FaultKind.STATUS, status=403)
        failures = []

        async def one() -> None:
            try:
                await client.fetch(origin.url(BLOB), limit=1 << 20)
            except SourceError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one)
        assert {error.kind for error in failures} == {FailureKind.AUTH}
        assert len(failures) == 10
        assert len({id(error) for error in failures}) == 10
        assert len(origin.requests(REALM)) < 10
        await client.aclose()


async def test_who_asks_for_the_others_may_be_cancelled() -> None:
    async with blob_origin() as origin:
        client = HttpClient(FetchSettings(retry=0))
        origin.script(BLOB, challenge(origin.url(REALM)), challenge(origin.url(REALM)))
        origin.script(REALM, Fault(FaultKind.STALL_BEFORE_HEAD))
        bodies = []

        async def one(scope: trio.CancelScope) -> None:
            with scope:
                bodies.append((await client.fetch(origin.url(BLOB), limit=1 << 20)).body)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                first = trio.CancelScope()
                nursery.start_soon(one, first)
                while not origin.requests(REALM):
                    await trio.sleep(0.01)
                nursery.start_soon(one, trio.CancelScope())
                while len(origin.requests(BLOB)) < 2:
                    await trio.sleep(0.01)
                first.cancel()
        assert bodies == [DATA]
        await client.aclose()


# ---- what error documents mean


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (
            404,
            b'{"errors":[{"code":"NAME_UNKNOWN"}]}',
            "not_found",
            r"has no repository library/x.*\(NAME_UNKNOWN\)",
        ),
        (404, b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}', "not_found", "has no tag latest of library/x"),
        (404, b"<html>", "not_found", r"has no tag latest of library/x.*\(status 404\)"),
        (403, b'{"errors":[{"code":"DENIED"}]}', "auth", r"is private or does not exist.*\(DENIED\)"),
        (
            401,
            b'{"errors":[1,{"code":7},{"code":"<b>"}]}',
            "auth",
            r"is private or does not exist.*\(status 401\)",
        ),
        (401, b"[" * 10_000, "auth", "docker login"),
        (400, b'{"errors":"x"}', "protocol", "refuses the request"),
        (429, b'{"errors":[{"code":"TOOMANYREQUESTS"}]}', "busy", "log in with docker login"),
    ],
)
async def test_what_error_documents_mean(status: int, body: bytes, kind: str, words: str) -> None:
    server = serve(lambda request: reply(request, status, body))
    try:
        async with opened(OllamaSource) as source:
            with pytest.raises(SourceError, match=words) as caught:
                await source.resolve(parse_ref(f"ollama://127.0.0.1:{server.server_port}/{NAME}"))
        assert (caught.value.kind, caught.value.status) == (FailureKind(kind), status)
    finally:
        stop_server(server)


async def test_credentials_over_plain_http_are_not_missed_silently(guarded: DockerRegistry) -> None:
    guarded.tokens.lifetime = -3600
    endpoints = (("public.lan", f"http://public.lan:{guarded.port}"),)
    client = HttpClient(
        FetchSettings(retry=0, endpoints=endpoints, private_hosts=("127.0.0.1",)),
        backend=Elsewhere(PublicOrPrivate()),
    )
    async with OllamaSource(client) as source:
        with pytest.raises(SourceError, match="which are not sent over plain http"):
            await source.resolve(parse_ref(f"ollama://public.lan/{NAME}"))


# ---- WWW-Authenticate


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('Bearer realm="https://a/t",service="s",scope="r:x:pull,push"',
         [("bearer", {"realm": "https://a/t", "service": "s", "scope": "r:x:pull,push"})]),
        ("Basic", [("basic", {})]),
        ("Negotiate abc==, Basic realm=x , Bearer Realm = \"q\\\"\\\\\"",
         [("negotiate", {}), ("basic", {"realm": "x"}), ("bearer", {"realm": 'q"\\'})]),
        ("Negotiate, Bearer realm=x", [("negotiate", {}), ("bearer", {"realm": "x"})]),
        ('Bearer realm="a, Basic realm=b"', [("bearer", {"realm": "a, Basic realm=b"})]),
        ('Bearer realm="unended', [("bearer", {})]),
        ("Bearer realm=a, realm=b", [("bearer", {"realm": "a"})]),
        ("", []),
        ("=", []),
    ],
)  # fmt: skip
def test_challenges_are_read(header: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(header) == tuple(Challenge(scheme, values) for scheme, values in expected)


@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from(["Bearer", " ", ",", "realm", "=", '"', "\\", "x"])).map("".join)
)
def test_any_header_is_read(header: str) -> None:
    for found in parse_challenges(header):
        assert found.scheme == found.scheme.lower()


def test_a_long_header_is_read_in_bounded_time() -> None:
    for part in ('"\\', "a=", "x ,", 'Bearer a="\\\\'):
        parse_challenges(part * 50_000)
