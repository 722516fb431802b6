"""Files on web servers: `https://…/m.gguf[#sha256=<hex>]`, and http likewise.

The size comes from a one-byte range (from Content-Length where the origin has no ranges), a digest from
the ref, the chunk list or `Repr-Digest` (RFC 9530), chunk lists from `--chunks`, a `Link` header (RFC
6249) or the file's sibling `.meta4`.
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import httpx
import trio

from weightfs.core.geometry import MAX_BLOB_SIZE
from weightfs.core.manifest import Entry, Manifest, Mirror
from weightfs.core.metalink import MAX_METALINK_BYTES
from weightfs.core.ref import Ref, tree_of
from weightfs.errors import ChunkListError, FailureKind, SourceError
from weightfs.sources import _published, _rules
from weightfs.sources._client import Answer, HttpClient, Reply, TooLongError, parse_url
from weightfs.sources._homes import is_loopback
from weightfs.sources._ranged import RangedSource
from weightfs.sources._stream import is_private, literal_address
from weightfs.sources.base import FetchSettings, Source
from weightfs.sources.minisign import MAX_SIGNATURE_BYTES

SCHEMES = ("https", "http")
SUFFIX, SIGNATURE_SUFFIX = ".meta4", ".minisig"

logger = logging.getLogger(__name__)

_FIRST_BYTE = re.compile(r"bytes 0-0/(\d{1,18})")
_EMPTY = re.compile(r"bytes \*/0")
_REPR_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):\s*(?:[,;]|$)")
_LINK = re.compile(r"<([^<>]{1,4096})>((?:\s*;\s*[\w*-]+\s*=\s*(?:\"[^\"]{0,500}\"|[^\s;,\"]{1,500}))*)")
_MAX_HEADER = 64 * 1024


@dataclass(frozen=True, slots=True)
class _Probe:
    """What one request tells about a file: its size, and headers that may pin or describe it."""

    size: int
    headers: httpx.Headers


def open_source(settings: FetchSettings) -> Source:
    """The source for https and http."""
    return HttpsSource(HttpClient(settings))


class HttpsSource(RangedSource):
    """Resolves https and http refs, and reads spans from such mirrors."""

    def __init__(self, client: HttpClient) -> None:
        super().__init__(client)
        self._settings = client.settings

    async def resolve(self, ref: Ref) -> Manifest:
        """Ask the origin what `ref` is, now. SourceError, ChunkListError, SignatureError, IntegrityError."""
        self._client.own(ref.url)
        probe = await self._probe(ref.url)
        document = await self._find_document(ref, probe)
        published = None if document is None else _published.judge(document, self._settings)
        own = Mirror(ref.url, validator=_rules.validator_of(probe.headers))
        blob = _published.make_blob(
            ref,
            own,
            probe.size,
            published=published,
            origin_digest=repr_digest(probe.headers),
            settings=self._settings,
        )
        if document is not None and not document.explicit:
            blob = blob.with_mirrors(without_private(ref.url, blob.mirrors))
        tree, name = tree_of(ref)
        return Manifest(str(ref), _published.revision_of(blob), tree, (Entry(name, blob),))

    async def named_document(self, named: str, ref: Ref) -> _published.Document | None:
        """The chunk list that the user named by `--chunks FILE|URL` for `ref`. SourceError, ChunkListError."""
        if re.match(r"https?://", named):
            return await self._fetch_document(named, ref, explicit=True)
        return await read_document(Path(named.removeprefix("file://")), explicit=True)

    async def _probe(self, url: str) -> _Probe:
        attempt = 0
        while True:
            try:
                return await self._probe_once(parse_url(url))
            except SourceError as error:
                await self._client.back_off(attempt, error)
            attempt += 1

    async def _probe_once(self, url: httpx.URL) -> _Probe:
        client = self._client
        headers = [("Range", "bytes=0-0"), ("Want-Repr-Digest", "sha-256=10")]
        answer = await client.chase("GET", url, headers, client.secrets_for(url))
        await client.discard(answer.response)
        error = _rules.status_failure(answer.status, answer.headers, answer.url, client.now())
        if error is not None:
            raise error
        _rules.check_coding(answer.headers, answer.url)
        size = _size_of(answer)
        if size is None:
            head = await client.fetch(str(url), limit=0, method="HEAD")
            size = _rules.content_length(head.headers, head.url)
        if size is None:
            raise _rules.failure(
                FailureKind.PROTOCOL, url, "has no ranges and does not tell the file's length"
            )
        if size > MAX_BLOB_SIZE:
            raise _rules.failure(FailureKind.PROTOCOL, url, f"claims that the file has {size} bytes")
        return _Probe(size, answer.headers)

    async def _find_document(self, ref: Ref, probe: _Probe) -> _published.Document | None:
        if self._settings.chunks is not None:
            return await self.named_document(self._settings.chunks, ref)
        url = described_by(ref.url, probe.headers) or _sibling(ref.url, SUFFIX)
        return await self._fetch_document(url, ref, explicit=False)

    async def _fetch_document(self, url: str, ref: Ref, *, explicit: bool) -> _published.Document | None:
        try:
            reply = await self._client.fetch(url, limit=MAX_METALINK_BYTES)
        except TooLongError as error:
            raise ChunkListError(f"{error} It cannot be a chunk list.") from error
        except SourceError as error:
            if explicit or not _means_none(error):
                raise
            logger.info("no chunk list: %s", error)
            return None
        data, label = reply.body, _rules.label(url)
        same_origin = _rules.origin_of(url) == _rules.origin_of(ref.url)
        signature = None
        if self._settings.trusted_keys and _published.looks_like_metalink(data):
            signature = await self._fetch_signature(_sibling(url, SIGNATURE_SUFFIX))
        return _published.Document(data, label, explicit, is_secure(url, reply), same_origin, signature)

    async def _fetch_signature(self, url: str) -> str | None:
        try:
            reply = await self._client.fetch(url, limit=MAX_SIGNATURE_BYTES)
        except TooLongError:
            return None
        except SourceError as error:
            if not _means_none(error):
                raise
            return None
        text = reply.body.decode("utf-8", "replace")
        # An error page sent with 200 is no signature.
        return text if text.startswith("untrusted comment:") else None


async def read_document(path: Path, *, explicit: bool) -> _published.Document | None:
    """A chunk list in a local file, with the signature beside it; None if there is none. ChunkListError."""

    def read(file: Path, limit: int) -> bytes:
        with file.open("rb") as stream:
            return stream.read(limit + 1)

    try:
        data = await trio.to_thread.run_sync(read, path, MAX_METALINK_BYTES)
    except OSError as error:
        if explicit or not isinstance(error, FileNotFoundError):
            raise ChunkListError(f"The chunk list {path} cannot be read: {error.strerror}.") from error
        return None
    signature = None
    try:
        beside = path.with_name(path.name + SIGNATURE_SUFFIX)
        signature = (await trio.to_thread.run_sync(read, beside, MAX_SIGNATURE_BYTES)).decode(
            "utf-8", "replace"
        )
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ChunkListError(f"The signature of {path} cannot be read: {error.strerror}.") from error
    return _published.Document(data, str(path), explicit, secure=True, same_origin=True, signature=signature)


def repr_digest(headers: httpx.Headers) -> bytes | None:
    """The sha-256 of `Repr-Digest` (RFC 9530 section 3), or None."""
    found = _REPR_DIGEST.search(headers.get("repr-digest", "")[:_MAX_HEADER])
    if found is None:
        return None
    try:
        return base64.b64decode(found[1], validate=True)
    except (ValueError, binascii.Error):
        return None


def described_by(url: str, headers: httpx.Headers) -> str | None:
    """The Metalink that `Link: <…>; rel=describedby; type="application/metalink4+xml"` names (RFC 6249)."""
    for found in _LINK.finditer(headers.get("link", "")[:_MAX_HEADER]):
        parameters = found[2].lower().replace('"', "").replace(" ", "")
        relations = re.search(r";\s*rel\s*=([^;]*)", found[2].lower().replace('"', ""))
        if relations is None or "describedby" not in relations[1].split():
            continue
        if ";type=application/metalink4+xml" in parameters:
            try:
                target = httpx.URL(url).join(found[1]).copy_with(fragment=None)
            except (httpx.InvalidURL, ValueError):
                continue
            downgrade = url.startswith("https:") and target.scheme != "https"
            if target.scheme in SCHEMES and not target.userinfo and not downgrade:
                return str(target)
    return None


def _size_of(answer: Answer) -> int | None:
    text = _rules.single(answer.headers, "content-range", answer.url) or ""
    if answer.status == 206 and (found := _FIRST_BYTE.fullmatch(text)):
        return int(found[1])
    if answer.status == 416 and _EMPTY.fullmatch(text):
        return 0
    if answer.status == 200:
        return _rules.content_length(answer.headers, answer.url)
    raise _rules.failure(
        FailureKind.PROTOCOL,
        answer.url,
        f"answered a request for the first byte with status {answer.status} and no valid Content-Range",
        status=answer.status,
    )


def _sibling(url: str, suffix: str) -> str:
    path, mark, query = url.partition("?")
    return f"{path}{suffix}{mark}{query}"


def _means_none(error: SourceError) -> bool:
    """Whether a failed look for an optional file says that there is none: not so while the origin is troubled."""
    return error.kind in (
        FailureKind.NOT_FOUND,
        FailureKind.AUTH,  # S3 answers 403 for what does not exist
        FailureKind.REDIRECT,
        FailureKind.PROTOCOL,
    )


def is_secure(url: str, reply: Reply) -> bool:
    """Whether nobody between the origin and here can have changed the reply."""
    asked = httpx.URL(url)
    return all(place.scheme == "https" or is_loopback(_rules.host_of(place)) for place in (asked, reply.url))


def without_private(own: str, mirrors: tuple[Mirror, ...]) -> tuple[Mirror, ...]:
    """A list found at a public host may not send readers to this machine or its network by address."""

    def private(url: str) -> bool:
        host = _rules.host_of(url)
        literal = literal_address(host)
        return is_loopback(host) or (literal is not None and is_private(literal))

    if private(own):
        return mirrors
    return tuple(mirror for mirror in mirrors if mirror.url == own or not private(mirror.url))
