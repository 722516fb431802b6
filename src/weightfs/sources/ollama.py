"""Models in Ollama registries: `ollama://[host/][namespace/]model[:tag]`; `ollama://hf.co/user/repo:quant` likewise.

The SHA-256 of the manifest's bytes is the model's id: the bytes are kept. A chunk list that the registry may offer
(`chunksums`) is a hint: used when it is there and regular, never missed.
"""

from __future__ import annotations

import logging
import re

import trio

from weightfs.core.artifact import DOCKER_MANIFEST, Artifact, Descriptor
from weightfs.core.artifact_paths import ollama_files
from weightfs.core.geometry import MIB
from weightfs.core.manifest import Entry, Manifest, Policy
from weightfs.core.metalink import MAX_METALINK_BYTES, MAX_PIECES, Metalink
from weightfs.core.ollama import SCHEME, parse_ollama
from weightfs.core.ref import Ref
from weightfs.errors import IntegrityError, WeightfsError
from weightfs.sources import _rules
from weightfs.sources._client import HttpClient, parse_url
from weightfs.sources._homes import home_of, is_loopback
from weightfs.sources._published import Published
from weightfs.sources._ranged import RangedSource
from weightfs.sources._registry import Blobs, Repository
from weightfs.sources.base import FetchSettings, Source

CHUNKSUMS_FROM_BYTES = 64 * MIB  # a smaller layer is sealed before a list would help
CHUNKSUMS_SECONDS = 10.0  # nobody waits longer for a hint

logger = logging.getLogger(__name__)

_CHUNKSUM = re.compile(rb"sha256:([0-9a-f]{64})[ \t]+([0-9]{1,16})-([0-9]{1,16})")


def open_source(settings: FetchSettings) -> Source:
    """The source for ollama refs."""
    return OllamaSource(HttpClient(settings))


class OllamaSource(RangedSource):
    """Resolves ollama refs, and reads spans of their layers."""

    async def resolve(self, ref: Ref) -> Manifest:
        """Ask the registry what `ref` is, now. SourceError, IntegrityError, SignatureError."""
        name = parse_ollama(ref.url.removeprefix(f"{SCHEME}://"))
        if home := home_of(ref, self._client.settings):
            self._client.own(home)
        repository = Repository(self._client, name.host, f"{name.namespace}/{name.model}")
        document = await repository.manifest(name.tag, (DOCKER_MANIFEST,))
        if not isinstance(document.content, Artifact):
            raise IntegrityError(
                f"{ref} is an index, not a model of Ollama; try oci:// in place of ollama://."
            )
        # In threads: tens of thousands of layers take longer than readers should wait for the loop.
        files = await trio.to_thread.run_sync(ollama_files, document.content, str(ref))
        blobs = Blobs(ref, repository, self._client.settings)
        for layer in {file.layer.digest: file.layer for file in files}.values():
            if layer.size > CHUNKSUMS_FROM_BYTES:
                published = await self._chunksums(repository, layer)
                blobs.of(layer, published)
                if published is None:
                    break  # who has none for one layer has none: a model of tensors has a thousand big ones

        def entries() -> tuple[Entry, ...]:
            return tuple(Entry(file.path, blobs.of(file.layer)) for file in files if file.path is not None)

        found = await trio.to_thread.run_sync(entries)
        return Manifest(str(ref), document.revision, name.tree, found, document.raw)

    async def _chunksums(self, repository: Repository, layer: Descriptor) -> Published | None:
        """The registry's own chunk list of a big layer, if it has one that can be used."""
        url = repository.side_url("chunksums", layer.digest)
        reply = None
        try:
            with trio.move_on_after(CHUNKSUMS_SECONDS):
                reply = await self._client.fetch(url, limit=MAX_METALINK_BYTES)
            found = (
                None if reply is None else await trio.to_thread.run_sync(read_chunksums, reply.body, layer)
            )
        except WeightfsError as error:
            logger.debug("no chunk list of %s: %s", _rules.label(url), error)
            return None
        if reply is None or found is None:
            logger.debug("no regular chunk list of %s", _rules.label(url))
            return None
        asked = parse_url(url)
        private = asked.scheme == "https" or is_loopback(_rules.host_of(asked))
        trusted = private and _rules.origin_of(reply.url) == _rules.origin_of(asked)
        if not trusted and self._client.settings.policy is Policy.STRICT:
            return None  # it would be refused, where no list at all is not
        return Published(found, trusted)


def read_chunksums(data: bytes, layer: Descriptor) -> Metalink | None:
    """Lines `sha256:<hex> <start>-<end>` as a chunk list; None unless they are equal pieces of a power of two, and all.

    The end is inclusive. The order may be any. ChunkListError if it exceeds the bounds of chunk lists.
    """
    lines = data.split(b"\n", MAX_PIECES + 1)
    found = [_CHUNKSUM.fullmatch(line.rstrip(b"\r")) for line in lines if line.strip()]
    pieces = sorted((int(one[2]), int(one[3]) + 1, one[1]) for one in found if one is not None)
    if not pieces or len(pieces) != len(found):
        return None
    length = pieces[0][1]
    for number, (start, stop, _) in enumerate(pieces):
        if (start, stop) != (number * length, min((number + 1) * length, layer.size)):
            return None
    if pieces[-1][1] != layer.size or len(pieces) == 1:
        return None
    digests = bytes.fromhex(b"".join(piece[2] for piece in pieces).decode())
    return Metalink("blob", layer.size, layer.digest, length, digests, ())
