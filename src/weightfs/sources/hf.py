"""The Hugging Face Hub: `hf://[datasets/|spaces/]org/name[@revision][/path or glob]`.

A revision is pinned to its commit, and its file list gives every size and digest: SHA-256 for files in LFS, git's name
(SHA-1) for the others. No request is made per file; but chunk lists (`X.meta4` beside `X` in the revision) are fetched,
and compared with the digest that the revision lists for them, before they are judged as everywhere.

Mirrors have no validator: a blob's content is bound by its digest, and the ETags of the CDNs behind the Hub are their
own (S3's depends on how a file was uploaded), so they could only make the right bytes look like another version.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import trio

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.hub import SCHEME, HubName, parse_hub
from weightfs.core.hubtree import HubFile, HubTree, git_oid
from weightfs.core.manifest import Blob, Entry, Manifest, Mirror
from weightfs.core.metalink import MAX_METALINK_BYTES
from weightfs.core.ref import Ref
from weightfs.errors import ChunkListError, FailureKind, IntegrityError, RefError, SourceError
from weightfs.sources import _published, _rules
from weightfs.sources._client import HttpClient
from weightfs.sources._homes import home_of
from weightfs.sources._hub import HubApi
from weightfs.sources._ranged import RangedSource
from weightfs.sources.base import FetchSettings, Source
from weightfs.sources.https import SIGNATURE_SUFFIX, SUFFIX, HttpsSource, is_secure, without_private
from weightfs.sources.minisign import MAX_SIGNATURE_BYTES

SCHEMES = (SCHEME,)
# Chunk lists of one ref: more than the largest models have shards. They are fetched one after the other.
MAX_LISTS = 256
# difflib takes up to a millisecond for two names of that length, and cannot be stopped.
_NEAR_CANDIDATES, _NEAR_CHARS = 2_000, 200
_NEAR_NAMES = 3

logger = logging.getLogger(__name__)


def open_source(settings: FetchSettings) -> Source:
    """The source for hf refs."""
    return HfSource(HttpClient(settings))


@dataclass(frozen=True, slots=True)
class _Commit:
    """A name pinned. `secure`: nobody on the way can have changed the file list."""

    name: HubName
    tree: HubTree
    secure: bool


class HfSource(RangedSource):
    """Resolves hf refs, and reads spans from such mirrors."""

    def __init__(self, client: HttpClient) -> None:
        super().__init__(client)
        self._settings = client.settings
        self._https = HttpsSource(client)
        self._api = HubApi(client)

    async def resolve(self, ref: Ref) -> Manifest:
        """Ask the Hub what `ref` is, now. SourceError, RefError, ChunkListError, SignatureError, IntegrityError."""
        if (home := home_of(ref, self._settings)) is not None:
            self._client.own(home)
        name = parse_hub(ref.text.removeprefix(f"{SCHEME}://"))
        revision = await self._api.revision(name)
        listing = await self._api.tree(name, revision.sha)
        secure = all(
            is_secure(self._settings.hf_endpoint, reply) for reply in (revision.reply, *listing.replies)
        )
        commit = _Commit(name, listing.tree, secure)
        files = await trio.to_thread.run_sync(_select, commit)
        if revision.gated:
            await self._check_access(commit, files)
        documents = await self._documents(commit, files)
        entries = await trio.to_thread.run_sync(self._entries, commit, files, documents)
        raw = await trio.to_thread.run_sync(lambda: commit.tree.raw)
        return Manifest(str(ref), commit.tree.sha, name.tree, entries, raw)

    def _url(self, commit: _Commit, file: HubFile) -> str:
        return self._api.file_url(commit.name, commit.tree.sha, file.path)

    async def _check_access(self, commit: _Commit, files: Sequence[HubFile]) -> None:
        """Gated repositories list their files to everybody: ask for one byte now, not when the first reader waits."""
        largest = max(files, key=lambda file: file.content_size)
        span = ByteSpan(0, min(1, largest.content_size))
        mirror = Mirror(self._url(commit, largest))
        try:
            async with self.open_range(mirror, BlobShape.of(largest.content_size), span):
                pass
        except SourceError as error:
            if error.kind is FailureKind.AUTH:
                raise self._api.gated(commit.name) from error
            logger.info("whether %s may be read is not known yet: %s", commit.name, error)

    async def _documents(
        self, commit: _Commit, files: Sequence[HubFile]
    ) -> Mapping[str, _published.Document]:
        """Chunk lists by what they are for (`HubFile.etag`): the one that the user named, or those of the revision."""
        named = self._settings.chunks
        if named is not None:
            if len(files) != 1:
                raise RefError(
                    f"hf://{commit.name} selects {len(files)} files, and --chunks is the list of one; name that one."
                )
            url = self._url(commit, files[0])
            document = await self._https.named_document(named, Ref("https", url, url))
            return {} if document is None else {files[0].etag: document}
        every = {file.path: file for file in commit.tree.files}
        # The largest files first: should there be too many lists, they matter most there.
        listed = [file for file in files if f"{file.path}{SUFFIX}" in every]
        listed.sort(key=lambda file: (-file.content_size, file.path))
        if len(listed) > MAX_LISTS:
            logger.warning(
                "hf://%s has %d chunk lists; those of the %d largest files are used",
                commit.name,
                len(listed),
                MAX_LISTS,
            )
        documents: dict[str, _published.Document] = {}
        for file in listed[:MAX_LISTS]:
            if file.etag not in documents:
                documents[file.etag] = await self._document(commit, every, file)
        return documents

    async def _document(
        self, commit: _Commit, every: Mapping[str, HubFile], file: HubFile
    ) -> _published.Document:
        listing = every[f"{file.path}{SUFFIX}"]
        data = await self._small_file(commit, listing, MAX_METALINK_BYTES)
        beside = every.get(f"{listing.path}{SIGNATURE_SUFFIX}")
        signature = None
        if beside is not None and self._settings.trusted_keys:
            text = await self._small_file(commit, beside, MAX_SIGNATURE_BYTES)
            signature = text.decode("utf-8", "replace")
        place = _rules.label(self._url(commit, listing))
        return _published.Document(
            data, place, explicit=False, secure=commit.secure, same_origin=True, signature=signature
        )

    async def _small_file(self, commit: _Commit, file: HubFile, limit: int) -> bytes:
        """The bytes of a chunk list or signature, proven by the revision's digest of it."""
        url = self._url(commit, file)
        if file.content_size > limit:
            raise ChunkListError(
                f"{_rules.label(url)} has {file.content_size} bytes; it cannot be what its name says."
            )
        data = (await self._client.fetch(url, limit=max(limit, 1))).body
        if await trio.to_thread.run_sync(_etag_of, data, file) != file.etag:
            raise IntegrityError(f"{_rules.label(url)} is not the file that its revision lists.")
        return data

    def _entries(
        self, commit: _Commit, files: Sequence[HubFile], documents: Mapping[str, _published.Document]
    ) -> tuple[Entry, ...]:
        """The same content is one blob, wherever it is."""
        blobs: dict[str, Blob] = {}
        for file in files:
            if file.etag not in blobs:
                blobs[file.etag] = self._blob(self._url(commit, file), file, documents.get(file.etag))
        return tuple(Entry(file.path, blobs[file.etag]) for file in files)

    def _blob(self, url: str, file: HubFile, document: _published.Document | None) -> Blob:
        in_lfs = bool(file.lfs_sha256)
        blob = _published.make_blob(
            Ref("https", url, url),
            Mirror(url),
            file.content_size,
            published=None if document is None else _published.judge(document, self._settings),
            origin_digest=bytes.fromhex(file.lfs_sha256) if in_lfs else None,
            git_sha1=None if in_lfs else bytes.fromhex(file.blob_id),
            settings=self._settings,
        )
        if document is not None and not document.explicit:
            blob = blob.with_mirrors(without_private(url, blob.mirrors))
        return blob


def _etag_of(data: bytes, file: HubFile) -> str:
    return hashlib.sha256(data).hexdigest() if file.lfs_sha256 else git_oid(data)


def _near(name: HubName, paths: Sequence[str]) -> list[str]:
    """What may have been meant: the same in other case, a file of that name elsewhere, a similar name."""
    lower = replace(name, path=name.path.lower())
    alike = [path for path in paths if lower.selects(path.lower())]
    below = [path for path in paths if path.endswith(f"/{name.path}")]
    near = alike or below
    if not near and len(name.path) <= _NEAR_CHARS:
        short = [path for path in paths if len(path) <= _NEAR_CHARS][:_NEAR_CANDIDATES]
        near = difflib.get_close_matches(name.path, short, _NEAR_NAMES, cutoff=0.5)
    return near[:_NEAR_NAMES]


def _select(commit: _Commit) -> tuple[HubFile, ...]:
    """The files that a ref means. SourceError (NOT_FOUND), with near names, if there are none."""
    name, files = commit.name, commit.tree.files
    selected = tuple(file for file in files if name.selects(file.path))
    if selected:
        return selected
    paths = [file.path for file in files]
    if near := _near(name, paths):
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = f"it has {', '.join(paths[:_NEAR_NAMES])}." if paths else "it has none at all."
    raise SourceError(
        f"hf://{name} selects no file of commit {commit.tree.sha[:12]}: {hint}", kind=FailureKind.NOT_FOUND
    )
