"""Models in OCI registries: `oci://host/repository[:tag|@sha256:<hex>]`.

Docker Model Runner's artifacts, CNCF ModelPack's, and files that oras pushed. Of an index the one manifest that is a
model is taken: platforms mean nothing to weights. Files in plain tars are shown by their place in the tar; what is
compressed is refused, for no part of it can be read by itself.
"""

from __future__ import annotations

import logging

import trio

from weightfs.core.artifact import (
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Artifact,
    Descriptor,
    Index,
    choose,
    is_model_type,
)
from weightfs.core.artifact_paths import LayerFile, Paths, oci_files
from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import Blob, Entry, Manifest
from weightfs.core.oci import SCHEME, parse_oci
from weightfs.core.ref import Ref
from weightfs.core.tar import MAX_MEMBERS, TarFiles, walk_tar
from weightfs.errors import IntegrityError, SourceError
from weightfs.sources._client import HttpClient
from weightfs.sources._homes import home_of
from weightfs.sources._ranged import RangedSource
from weightfs.sources._registry import Blobs, Document, Repository
from weightfs.sources.base import FetchSettings, Source

# Manifests of an index that are read to see whether they are models, where their descriptors do not say it. Images have
# one per platform, and as many again with their provenance.
MAX_LOOKED_AT = 32
MAX_TARS = 256  # of one artifact; each costs requests before the ref can be shown

logger = logging.getLogger(__name__)

_MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
_ALL = (*_MANIFESTS, OCI_INDEX, DOCKER_INDEX)


def open_source(settings: FetchSettings) -> Source:
    """The source for oci refs."""
    return OciSource(HttpClient(settings))


class OciSource(RangedSource):
    """Resolves oci refs, and reads spans of their layers."""

    async def resolve(self, ref: Ref) -> Manifest:
        """Ask the registry what `ref` is, now. SourceError, IntegrityError, SignatureError.

        The revision, and the raw bytes, are of the manifest that has the layers.
        """
        name = parse_oci(ref.url.removeprefix(f"{SCHEME}://"))
        if home := home_of(ref, self._client.settings):
            self._client.own(home)
        repository = Repository(self._client, name.host, name.repository)
        document = await repository.manifest(name.reference, _ALL)
        if isinstance(document.content, Index):
            document = await self._choose(repository, document.content, str(ref))
        artifact = document.content
        if not isinstance(artifact, Artifact):
            raise IntegrityError(f"{ref} is an index of indexes; name a manifest in it by its digest.")
        files = await trio.to_thread.run_sync(oci_files, artifact, str(ref))
        entries = await self._entries(ref, repository, files)
        if not entries:
            raise IntegrityError(f"{ref} is an artifact without files.")
        return Manifest(str(ref), document.revision, name.tree, entries, document.raw)

    async def _choose(self, repository: Repository, index: Index, what: str) -> Document:
        """The one model of an index."""
        seen: dict[bytes, Document] = {}
        models = []
        for item in {item.digest: item for item in index.manifests}.values():
            if is_model_type(item.artifact_type):
                models.append(item)
            elif len(seen) < MAX_LOOKED_AT and not item.artifact_type:
                document = seen[item.digest] = await self._manifest(repository, item)
                if isinstance(document.content, Artifact) and document.content.is_model:
                    models.append(item)
        chosen = choose(models, what)
        return seen.get(chosen.digest) or await self._manifest(repository, chosen)

    async def _manifest(self, repository: Repository, item: Descriptor) -> Document:
        return await repository.manifest(item.digest_text, _MANIFESTS)

    async def _entries(
        self, ref: Ref, repository: Repository, files: tuple[LayerFile, ...]
    ) -> tuple[Entry, ...]:
        blobs = Blobs(ref, repository, self._client.settings)
        tars: dict[bytes, TarFiles] = {}
        for file in files:
            if file.path is None and file.layer.digest not in tars:
                if len(tars) == MAX_TARS or sum(len(tar.members) for tar in tars.values()) > MAX_MEMBERS:
                    raise IntegrityError(
                        f"{ref} has over {MAX_TARS} tars, or over {MAX_MEMBERS} files in them; no model needs so many."
                    )
                what = f"Layer {file.layer.digest_text} of {ref}"
                tar = tars[file.layer.digest] = await self._walk(blobs.of(file.layer), what)
                if tar.skipped:
                    logger.warning("%s: %d links or sparse files in it are not shown", what, tar.skipped)

        def entries() -> tuple[Entry, ...]:
            paths, found = Paths(str(ref)), []
            for file in files:
                blob = blobs.of(file.layer)
                if file.path is not None:
                    found.append(Entry(paths.take(file.path), blob))
                else:
                    members = tars[file.layer.digest].members
                    found += [Entry(paths.take(member.path), blob, member.span) for member in members]
            return tuple(found)

        # In a thread: tens of thousands of files take longer than readers should wait for the loop.
        return await trio.to_thread.run_sync(entries)

    async def _walk(self, blob: Blob, what: str) -> TarFiles:
        """Read a tar's headers, some KiB at a time."""
        walk = walk_tar(blob.size, what)
        try:
            wanted = next(walk)
            while True:
                wanted = walk.send(await self._read(blob, wanted))
        except StopIteration as done:
            files: TarFiles = done.value
            return files

    async def _read(self, blob: Blob, span: ByteSpan) -> bytes:
        attempt = 0
        while True:
            try:
                async with self.open_range(blob.mirrors[0], blob.shape, span) as body:
                    return b"".join([piece async for piece in body])
            except SourceError as error:
                await self._client.back_off(attempt, error)
            attempt += 1
