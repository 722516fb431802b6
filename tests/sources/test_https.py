"""What an https ref resolves to: size, digest, chunk list, trust and mirrors, from honest and from hostile origins."""

from __future__ import annotations

import base64
import hashlib
import random
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from trio.testing import MockClock

from weightfs.core.manifest import Blob, BlobId, Mirror, Policy, Trust
from weightfs.core.metalink import MAX_METALINK_BYTES, Metalink, write_metalink
from weightfs.core.ref import Ref, parse_ref
from weightfs.errors import (
    ChunkListError,
    FailureKind,
    IntegrityError,
    SignatureError,
    SourceError,
    WeightfsError,
)
from weightfs.sources._client import HttpClient
from weightfs.sources._xml import parse_xml
from weightfs.sources.base import FetchSettings, Source
from weightfs.sources.https import HttpsSource, described_by, repr_digest
from weightfs.sources.minisign import sign
from weightfs.sources.publish import describe
from weightfs.testing.nginx import Nginx
from weightfs.testing.origin import Fault, FaultKind, OriginFile, open_origin
from weightfs.testing.sources import Elsewhere, SourceTests
from weightfs.testing.tls import make_tls

K = FaultKind
DATA = random.Random(3).randbytes(2_500_000)
SHA = hashlib.sha256(DATA).digest()
PATH, LIST, SIGNATURE = "/d/m.gguf", "/d/m.gguf.meta4", "/d/m.gguf.meta4.minisig"


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0.05)


def metalink(**changes: object) -> Metalink:
    length = 1 << 20
    digests = b"".join(hashlib.sha256(DATA[at : at + length]).digest() for at in range(0, len(DATA), length))
    return replace(Metalink("m.gguf", len(DATA), SHA, length, digests, ()), **changes)  # type: ignore[arg-type]  # by name


async def blob_of(url: str, **settings: object) -> Blob:
    source = HttpsSource(HttpClient(FetchSettings(**settings)))  # type: ignore[arg-type]  # by name
    async with source:
        manifest = await source.resolve(parse_ref(url))
    assert manifest.tree.startswith(url.partition(":")[0] + "/")
    (entry,) = manifest.entries
    assert entry.path == "m.gguf"
    return entry.blob


class TestConformance(SourceTests):
    @asynccontextmanager
    async def serving(self, data: bytes, tmp_path: Path) -> AsyncIterator[tuple[Source, Ref]]:
        (tmp_path / "m.gguf").write_bytes(data)
        with Nginx(tmp_path) as nginx:
            async with HttpsSource(HttpClient(FetchSettings(ca_file=str(nginx.ca_file)))) as source:
                yield source, parse_ref(nginx.https_url("m.gguf"))


async def test_without_a_digest_the_version_names_the_blob() -> None:
    async with open_origin({PATH: DATA}) as origin:
        blob = await blob_of(origin.url(PATH))
        tag = origin.files[PATH].tag
        assert (blob.size, blob.sha256, blob.initial_trust) == (len(DATA), None, Trust.UNVERIFIABLE)
        assert blob.id == BlobId.of_version(origin.url(PATH), len(DATA), tag)
        assert blob.mirrors == (Mirror(origin.url(PATH), 1, tag),)
        assert origin.requests(PATH)[0].headers["range"] == "bytes=0-0"


async def test_weak_etag_gives_way_to_last_modified() -> None:
    dated = (("Last-Modified", "Sun, 22 Nov 2026 00:00:00 GMT"),)
    async with open_origin({PATH: OriginFile(DATA, headers=dated)}) as origin:
        origin.script(PATH, Fault(K.WEAK_ETAG))
        assert (await blob_of(origin.url(PATH))).mirrors[0].validator == dated[0][1]


async def test_digest_of_the_fragment_and_of_repr_digest() -> None:
    header = (("Repr-Digest", f"sha-512=:AAAA:, sha-256=:{base64.b64encode(SHA).decode()}:"),)
    async with open_origin({PATH: DATA, "/d/with/m.gguf": OriginFile(DATA, headers=header)}) as origin:
        blob = await blob_of(f"{origin.url(PATH)}#sha256={SHA.hex()}")
        assert (blob.sha256, blob.id, blob.initial_trust) == (SHA, BlobId.of_digest(SHA), Trust.PROVISIONAL)
        assert (await blob_of(origin.url("/d/with/m.gguf"))).sha256 == SHA
        with pytest.raises(IntegrityError, match="another SHA-256"):
            await blob_of(f"{origin.url('/d/with/m.gguf')}#sha256={'0' * 64}")


@pytest.mark.parametrize("kind", [K.NO_RANGES, K.HONEST])
async def test_size_with_and_without_ranges(kind: FaultKind) -> None:
    async with open_origin({PATH: DATA}) as origin:
        origin.always[PATH] = Fault(kind)
        assert (await blob_of(origin.url(PATH))).size == len(DATA)


async def test_origin_that_never_tells_the_size_is_refused(autojump_clock: MockClock) -> None:
    async with open_origin({PATH: DATA}) as origin:
        origin.always[PATH] = Fault(K.HTML_206)
        assert (await blob_of(origin.url(PATH))).size == len(DATA)  # the total is in Content-Range
        origin.always[PATH] = Fault(K.NO_CONTENT_RANGE)
        with pytest.raises(SourceError) as caught:
            await blob_of(origin.url(PATH), retry=1)
        assert caught.value.kind is FailureKind.PROTOCOL


async def test_list_beside_the_file_on_loopback_is_trusted() -> None:
    async with open_origin({PATH: DATA, LIST: write_metalink(metalink())}) as origin:
        blob = await blob_of(origin.url(PATH))
        assert blob.initial_trust is Trust.ATTESTED
        assert blob.chunk_list is not None
        assert blob.chunk_list.digest_of(1) == hashlib.sha256(DATA[1 << 20 : 2 << 20]).digest()
        assert blob.sha256 == SHA


@pytest.mark.parametrize(
    ("tls", "same", "trust"),
    [
        (False, True, Trust.PROVISIONAL),  # anyone on the way can have written it
        (True, True, Trust.ATTESTED),
        (True, False, Trust.PROVISIONAL),  # well protected, but another origin's word
    ],
)
async def test_trust_of_an_unsigned_list(tmp_path: Path, tls: bool, same: bool, trust: Trust) -> None:
    files = make_tls(tmp_path, ("public.test", "list.test"))
    link = '<{}>; rel=describedby; type="application/metalink4+xml"'
    async with open_origin(
        {PATH: DATA, LIST: write_metalink(metalink())}, tls=files if tls else None
    ) as origin:
        if not same:
            header = (("Link", link.format(origin.url(LIST, "list.test"))),)
            origin.files[PATH] = OriginFile(DATA, headers=header)
        client = HttpClient(FetchSettings(ca_file=str(files.ca)), backend=Elsewhere())
        async with HttpsSource(client) as source:
            blob = (await source.resolve(parse_ref(origin.url(PATH, "public.test")))).entries[0].blob
        assert blob.initial_trust is trust
        assert blob.chunk_list is not None
        strict = replace(client.settings, policy=Policy.STRICT)
        async with HttpsSource(HttpClient(strict, backend=Elsewhere())) as source:
            if trust is Trust.ATTESTED:
                await source.resolve(parse_ref(origin.url(PATH, "public.test")))
            else:
                with pytest.raises(SignatureError, match="trusted_keys"):
                    await source.resolve(parse_ref(origin.url(PATH, "public.test")))


async def test_explicit_lists(tmp_path: Path) -> None:
    local = tmp_path / "list.meta4"
    local.write_bytes(write_metalink(metalink()))
    async with open_origin({PATH: DATA}) as origin, open_origin({"/l": write_metalink(metalink())}) as other:
        for chunks in (str(local), local.as_uri(), other.url("/l")):
            assert (await blob_of(origin.url(PATH), chunks=chunks)).initial_trust is Trust.ATTESTED
        with pytest.raises(ChunkListError, match="cannot be read"):
            await blob_of(origin.url(PATH), chunks=str(tmp_path / "none"))
        with pytest.raises(SourceError):
            await blob_of(origin.url(PATH), chunks=other.url("/none"))
        other.files["/l"] = OriginFile(b"<html>hello</html>")
        with pytest.raises(ChunkListError, match="not a Metalink"):
            await blob_of(origin.url(PATH), chunks=other.url("/l"))


@pytest.mark.parametrize(
    "answer",
    [
        Fault(K.HTML_200),
        Fault(K.STATUS, status=403),
        Fault(K.STATUS, status=405),
        Fault(K.REDIRECT, location="ftp://h/x"),
    ],
)
async def test_sibling_that_is_no_list_is_ignored(autojump_clock: MockClock, answer: Fault) -> None:
    async with open_origin({PATH: DATA}) as origin:
        origin.always[LIST] = answer
        assert (await blob_of(origin.url(PATH))).chunk_list is None


async def test_sibling_of_a_troubled_origin_is_not_taken_for_none(autojump_clock: MockClock) -> None:
    async with open_origin({PATH: DATA, LIST: write_metalink(metalink())}) as origin:
        origin.always[LIST] = Fault(K.STATUS, status=503)
        with pytest.raises(SourceError) as caught:
            await blob_of(origin.url(PATH), retry=2)
        assert caught.value.kind is FailureKind.BUSY
        assert len(origin.requests(LIST)) == 3


GOOD = write_metalink(metalink()).decode()
HOSTILE = {
    "dtd": GOOD.replace("<metalink", "<!DOCTYPE metalink []><metalink", 1),
    "bomb": GOOD.replace(
        "<metalink", '<!DOCTYPE m [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><metalink', 1
    ).replace("m.gguf", "&b;"),
    "truncated": GOOD[: len(GOOD) // 2],
    "two files": GOOD.replace("</file>", "</file><file name='x'><size>1</size></file>"),
    "other size": write_metalink(metalink(size=len(DATA) - 1)).decode(),
    "wrong count": GOOD.replace(f"<hash>{hashlib.sha256(DATA[: 1 << 20]).hexdigest()}</hash>", ""),
    "path as name": GOOD.replace('name="m.gguf"', 'name="../m.gguf"'),
    "file url": GOOD.replace("</file>", "<url>file:///etc/passwd</url></file>"),
    "too long": GOOD + " " * MAX_METALINK_BYTES,
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_list_is_an_error(name: str) -> None:
    async with open_origin({PATH: DATA, LIST: HOSTILE[name].encode()}) as origin:
        with pytest.raises(ChunkListError):
            await blob_of(origin.url(PATH))


def test_a_list_is_not_parsed_beyond_its_bound() -> None:
    with pytest.raises(ChunkListError, match="over 16777216 bytes"):
        parse_xml((GOOD + " " * MAX_METALINK_BYTES).encode())


async def test_list_for_another_digest_is_an_error() -> None:
    async with open_origin({PATH: DATA, LIST: write_metalink(metalink())}) as origin:
        with pytest.raises(ChunkListError, match="another SHA-256"):
            await blob_of(f"{origin.url(PATH)}#sha256={'1' * 64}")


async def test_mirrors_and_their_order() -> None:
    async with open_origin({PATH: DATA}) as origin:
        own = origin.url(PATH)

        async def order(*mirrors: Mirror) -> list[str]:
            origin.files[LIST] = OriginFile(write_metalink(metalink(mirrors=mirrors)))
            blob = await blob_of(own)
            assert [bool(m.validator) for m in blob.mirrors] == [m.url == own for m in blob.mirrors]
            return [mirror.url for mirror in blob.mirrors]

        a, b = "https://a.test/m", "http://b.test/m"
        assert await order(Mirror(a), Mirror(b)) == [own, a, b]
        assert await order(Mirror(b, 2), Mirror(a, 1)) == [a, b, own]
        assert await order(Mirror(a, 3), Mirror(own, 2), Mirror(b, 1)) == [b, own, a]


async def test_list_found_at_a_public_host_may_not_name_private_addresses() -> None:
    listed = (Mirror("http://127.0.0.1:1/m"), Mirror("http://10.0.0.1/m"), Mirror("https://a.test/m"))
    async with open_origin({PATH: DATA, LIST: write_metalink(metalink(mirrors=listed))}) as origin:
        async with HttpsSource(HttpClient(FetchSettings(), backend=Elsewhere())) as source:
            own = origin.url(PATH, "public.test")
            blob = (await source.resolve(parse_ref(own))).entries[0].blob
        assert [mirror.url for mirror in blob.mirrors] == [own, "https://a.test/m"]


async def test_a_host_in_its_xn_form_is_asked_and_one_that_means_nothing_is_an_error() -> None:
    async with (
        open_origin({"/m": b"bytes"}) as origin,
        HttpsSource(HttpClient(FetchSettings(retry=0), backend=Elsewhere())) as source,
    ):
        found = await source.resolve(parse_ref(origin.url("/m", "xn--bcher-kva.example")))
        assert found.entries[0].blob.size == 5
        with pytest.raises(SourceError):
            await source.resolve(parse_ref(origin.url("/m", "xn--zz.example")))


async def test_retries_are_bounded_and_end_at_the_first_good_answer(autojump_clock: MockClock) -> None:
    async with open_origin({PATH: DATA}) as origin:
        broken = (Fault(K.STATUS, status=503), Fault(K.RESET_BEFORE_HEAD), Fault(K.STATUS, status=429))
        origin.script(PATH, *broken)
        assert (await blob_of(origin.url(PATH), retry=3)).size == len(DATA)
        origin.script(PATH, *broken)
        with pytest.raises(SourceError):
            await blob_of(origin.url(PATH), retry=1)
        origin.always[PATH] = Fault(K.STATUS, status=404)
        origin._scripts.clear()
        seen = len(origin.requests(PATH))
        with pytest.raises(SourceError) as caught:
            await blob_of(origin.url(PATH))
        assert (caught.value.kind, len(origin.requests(PATH)) - seen) == (FailureKind.NOT_FOUND, 1)


async def test_signatures(keys: dict[str, tuple[str, str]]) -> None:
    document = write_metalink(metalink())
    by_publisher = sign(document, keys["publisher"][1], None).encode()
    by_stranger = sign(document, keys["stranger"][1], None).encode()
    wrong = sign(document + b" ", keys["publisher"][1], None).encode()
    trusted = {"trusted_keys": (keys["publisher"][0],)}
    strict = {**trusted, "policy": Policy.STRICT}
    async with open_origin({PATH: DATA, LIST: document}) as origin:

        async def chunk_list(signature: bytes, **settings: object) -> tuple[bool, str]:
            origin.files[SIGNATURE] = OriginFile(signature)
            blob = await blob_of(origin.url(PATH), **settings)
            assert blob.chunk_list is not None
            return blob.chunk_list.trusted, blob.chunk_list.signer

        ok, signer = await chunk_list(by_publisher, **strict)
        assert ok
        assert len(signer) == 16
        assert await chunk_list(by_stranger, **trusted) == (False, "")
        assert await chunk_list(b"<html>not found</html>", **trusted) == (True, "")  # loopback vouches
        for bad in (wrong, by_publisher.replace(b"timestamp", b"timestomp"), by_publisher[:80]):
            with pytest.raises(SignatureError):
                await chunk_list(bad, **trusted)
        with pytest.raises(SignatureError, match="trusted_keys"):
            await chunk_list(by_stranger, **strict)


async def test_strict_without_anything_to_trust_says_what_to_do() -> None:
    async with open_origin({PATH: DATA}) as origin:
        with pytest.raises(SignatureError, match="--chunks"):
            await blob_of(origin.url(PATH), policy=Policy.STRICT)
        digest = await blob_of(f"{origin.url(PATH)}#sha256={SHA.hex()}", policy=Policy.STRICT)
        assert digest.policy is Policy.STRICT


async def test_no_secret_in_any_error(autojump_clock: MockClock) -> None:
    async with open_origin({PATH: DATA}) as origin:
        texts = []
        for kind in FaultKind:
            origin.always[PATH] = Fault(kind, location="http://127.0.0.1:1/?sig=sesame")
            try:
                await blob_of(origin.url(PATH) + "?sig=sesame", retry=0, headers=(("X-Key", "sesame"),))
            except WeightfsError as error:
                texts.append(f"{error} {vars(error)}")
        assert len(texts) > 10
        assert not any("sesame" in text for text in texts)


async def test_an_origin_that_gives_our_headers_back_does_not_get_them_into_an_error(
    autojump_clock: MockClock,
) -> None:
    """Regression: the line that is no header was quoted, whatever its length."""
    secret = SHA.hex()  # not in the source, which a traceback shows
    async with open_origin({PATH: DATA}) as origin:
        origin.always[PATH] = Fault(K.STATUS, status=200, headers=(("You sent", secret),))
        with pytest.raises(SourceError, match="illegal header line") as caught:
            await blob_of(origin.url(PATH), retry=0, headers=(("X-Key", secret),))
        assert secret not in "".join(traceback.format_exception(caught.value))


async def test_users_headers_go_to_the_refs_origin() -> None:
    async with open_origin({PATH: DATA}) as origin, open_origin({PATH: DATA}) as other:
        origin.always["/d/r/m.gguf"] = Fault(K.REDIRECT, location=other.url(PATH))
        await blob_of(origin.url("/d/r/m.gguf"), headers=(("X-Key", "sesame"),))
        assert all(seen.headers.get("x-key") == "sesame" for seen in origin.seen)
        assert not any("x-key" in seen.headers for seen in other.seen)


def test_link_headers() -> None:
    def found(value: str, url: str = "https://h/d/m") -> str | None:
        return described_by(url, httpx.Headers({"Link": value}))

    kind = 'type="application/metalink4+xml"'
    assert found(f"<m.meta4>; rel=describedby; {kind}") == "https://h/d/m.meta4"
    assert found(f'<a>; rel=next, <https://x/y>; rel="foo describedby"; {kind}') == "https://x/y"
    assert found(f"<http://h/y>; rel=describedby; {kind}") is None  # a downgrade
    assert found("<m.asc>; rel=describedby; type=application/pgp-signature") is None
    assert found(f"<m.meta4>; rel=duplicate; {kind}") is None
    assert found(f"<file:///etc/passwd>; rel=describedby; {kind}") is None
    assert found("<" * 100_000) is None


def test_repr_digest_syntax() -> None:
    text = base64.b64encode(SHA).decode()
    assert repr_digest(httpx.Headers({"Repr-Digest": f"sha-256=:{text}:"})) == SHA
    for bad in ("", f"sha-256={text}", "sha-256=:AAAA:", f"xsha-256=:{text}:"):
        assert repr_digest(httpx.Headers({"Repr-Digest": bad})) is None


@pytest.mark.nginx
async def test_published_file_on_a_real_server(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(DATA)
    with Nginx(tmp_path) as nginx:
        url = nginx.https_url("m.gguf")
        (tmp_path / "m.gguf.meta4").write_bytes(write_metalink(describe(tmp_path / "m.gguf", [url])))
        blob = await blob_of(url, ca_file=str(nginx.ca_file))
        assert (blob.initial_trust, blob.sha256) == (Trust.ATTESTED, SHA)
