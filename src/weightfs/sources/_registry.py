"""The Distribution protocol, as far as pulling needs it: manifests with their digests, and the URLs of blobs.

Rules: HEAD is never used (Ollama's registry answers 405). A manifest counts only if its bytes have the digest that was
asked for, and the one that the registry says. A blob's mirror is a plain URL below `/v2/`, so that rules for mirrors,
and fetch workers, which see nothing else, can use it; `_tokens` answers for it wherever it is read.

Source: OCI distribution specification 1.1, "Pull" and "Error Codes".
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import trio

from weightfs.core.artifact import (
    MAX_MANIFEST_BYTES,
    Artifact,
    Descriptor,
    Index,
    parse_digest,
    parse_manifest,
)
from weightfs.core.manifest import Blob, Mirror
from weightfs.core.ref import Ref
from weightfs.errors import FailureKind, IntegrityError, SourceError
from weightfs.sources import _published, _rules
from weightfs.sources._client import HttpClient, Reply, TooLongError, parse_url
from weightfs.sources._homes import base_url, is_loopback
from weightfs.sources.base import FetchSettings

_ANSWERS = frozenset({200, 400, 401, 403, 404})
_MAX_ERRORS = 8  # of an error document; the first ones say it


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest: its bytes, their SHA-256 (32 bytes), and what they say."""

    raw: bytes
    digest: bytes
    content: Artifact | Index

    @property
    def revision(self) -> str:
        """`sha256:<hex>`: what pins it."""
        return f"sha256:{self.digest.hex()}"


class Repository:
    """One repository of one registry. `host` is as refs name it."""

    def __init__(self, client: HttpClient, host: str, name: str) -> None:
        self._client = client
        self._host = host
        self._name = name
        self._base = f"{base_url(host, client.settings)}/v2/{name}"

    def blob_url(self, digest: bytes) -> str:
        """Where a blob is."""
        return f"{self._base}/blobs/sha256:{digest.hex()}"

    def side_url(self, kind: str, digest: bytes) -> str:
        """Where something else about a blob is."""
        return f"{self._base}/{kind}/sha256:{digest.hex()}"

    async def manifest(self, reference: str, accept: tuple[str, ...]) -> Document:
        """What a tag or digest is, now. SourceError, IntegrityError."""
        url, attempt = f"{self._base}/manifests/{reference}", 0
        while True:
            reply = await self._fetch(url, accept)
            if reply.status != 200:
                raise self._refusal(reply, reference)
            try:
                # In a thread: 16 MiB take longer to hash and to parse than readers should wait for the loop.
                return await trio.to_thread.run_sync(self._read, reply, reference)
            except SourceError as error:  # a captive portal, or a proxy's own page: these pass
                await self._client.back_off(attempt, error)
            attempt += 1

    async def _fetch(self, url: str, accept: tuple[str, ...]) -> Reply:
        try:
            return await self._client.fetch(
                url, limit=MAX_MANIFEST_BYTES, headers=[("Accept", ", ".join(accept))], accept=_ANSWERS
            )
        except TooLongError as error:
            raise IntegrityError(
                f"{_rules.label(url)} is a manifest of over {MAX_MANIFEST_BYTES} bytes, which no model needs."
            ) from error
        except SourceError as error:
            if error.status == 429:
                raise SourceError(
                    f"{error} The registry limits how much it is asked; wait, or log in with docker login.",
                    kind=error.kind,
                    mirror=error.mirror,
                    status=error.status,
                    retry_after=error.retry_after,
                ) from error
            raise

    def _read(self, reply: Reply, reference: str) -> Document:
        kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
        begin = reply.body[:1024].lstrip()[:1]  # whatever it is sent as: Ollama's registry says text/plain
        if begin != b"{":
            page = begin == b"<" or kind == "text/html"
            what = "an HTML page instead of a manifest" if page else "something else than a manifest"
            raise _rules.failure(FailureKind.PROTOCOL, reply.url, f"sent {what}")
        what = f"The manifest of {self._shown(reference)}"
        digest = hashlib.sha256(reply.body).digest()
        said = reply.headers.get("docker-content-digest")
        if said is not None and parse_digest(said.strip(), what) != digest:
            raise IntegrityError(
                f"{what} is not the one that the registry says: its digest differs from the header's."
            )
        if ":" in reference and reference != f"sha256:{digest.hex()}":
            raise IntegrityError(f"{what} has another digest than was asked for: sha256:{digest.hex()}.")
        return Document(reply.body, digest, parse_manifest(reply.body, what, kind))

    def _refusal(self, reply: Reply, reference: str) -> SourceError:
        """What an error answer means, and what can be done about it."""
        codes = _codes(reply.body)
        what = self._shown(reference)
        status = reply.status
        if status == 404 and "NAME_UNKNOWN" in codes:
            kind, text = FailureKind.NOT_FOUND, f"{self._host} has no repository {self._name}; check the name"
        elif status == 404:
            thing = f"manifest {reference}" if ":" in reference else f"tag {reference}"
            kind = FailureKind.NOT_FOUND
            text = f"{self._host} has no {thing} of {self._name}; check name and tag"
        elif status in (401, 403):
            kind, text = FailureKind.AUTH, self._denied(reply, what)
        else:
            kind, text = FailureKind.PROTOCOL, f"{self._host} refuses the request for {what}"
        said = f" ({', '.join(sorted(codes))})" if codes else f" (status {status})"
        return SourceError(f"{text}{said}.", kind=kind, mirror=_rules.label(reply.url), status=status)

    def _denied(self, reply: Reply, what: str) -> str:
        login = f"docker login {self._host}"
        if self._client.tokens.used_credentials(parse_url(self._base + "/manifests/x")):
            return (
                f"{self._host} does not let the user of docker's configuration read {what}; "
                f"ask for access, or log in again with {login}; {_rules.NEW_SECRET}"
            )
        if reply.url.scheme == "http" and not is_loopback(_rules.host_of(reply.url)):
            return f"{self._host} wants credentials for {what}, which are not sent over plain http"
        return f"{what} is private or does not exist, and no credentials were accepted; log in with {login}"

    def _shown(self, reference: str) -> str:
        return f"{self._host}/{self._name}{'@' if ':' in reference else ':'}{reference}"


class Blobs:
    """The blobs of one artifact: one digest is one `Blob`, however many paths have it."""

    def __init__(self, ref: Ref, repository: Repository, settings: FetchSettings) -> None:
        self._ref = ref
        self._repository = repository
        self._settings = settings
        self._known: dict[bytes, Blob] = {}

    def of(self, layer: Descriptor, published: _published.Published | None = None) -> Blob:
        """The blob of a layer; a chunk list counts the first time. IntegrityError, SignatureError."""
        blob = self._known.get(layer.digest)
        if blob is None:
            blob = self._known[layer.digest] = _published.make_blob(
                self._ref,
                Mirror(self._repository.blob_url(layer.digest)),
                layer.size,
                published=published,
                origin_digest=layer.digest,
                settings=self._settings,
            )
        return blob


def _codes(body: bytes) -> set[str]:
    """The codes of an error document; none if it is something else."""
    try:
        document = json.loads(body[:65536])
    except (ValueError, RecursionError):
        return set()
    errors = document.get("errors") if isinstance(document, dict) else None
    listed = errors[:_MAX_ERRORS] if isinstance(errors, list) else []
    codes = (error.get("code") for error in listed if isinstance(error, dict))
    return {
        code for code in codes if isinstance(code, str) and code.isascii() and code.replace("_", "").isalpha()
    }
