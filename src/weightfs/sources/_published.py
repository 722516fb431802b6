"""What a publisher says of a blob (a chunk list, its signature, a digest), and how far that is believed.

Rules:

- A list counts as trusted if a key in `trusted_keys` signed it; or, unsigned, if it came from a place
  that nobody on the way can have changed (https, a local file, loopback) and from the blob's own origin
  or by the user's `--chunks`. Every other list guards against damage, and proves nothing.
- A wrong signature by a trusted key is an error, never a reason to go on without.
- Size and digest must be the same wherever they are said.
- A document that is no Metalink at all (an error page sent with 200) is ignored, unless the user named it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from weightfs.core.geometry import BlobShape
from weightfs.core.manifest import MAX_MIRRORS, Blob, BlobId, ChunkList, Mirror, Policy
from weightfs.core.metalink import MAX_PRIORITY, Metalink, read_metalink
from weightfs.core.ref import Ref, without_secrets
from weightfs.errors import ChunkListError, IntegrityError, SignatureError
from weightfs.sources._xml import parse_xml
from weightfs.sources.base import FetchSettings
from weightfs.sources.minisign import UnknownKeyError, verify

logger = logging.getLogger(__name__)

_NAMESPACE = b"urn:ietf:params:xml:ns:metalink"


@dataclass(frozen=True, slots=True)
class Document:
    """A fetched `.meta4`.

    `explicit`: the user named it. `secure`: nobody on the way can have changed it. `same_origin`: as the
    blob. `signature`: the text of the `.minisig` beside it, if there is one.
    """

    data: bytes
    place: str
    explicit: bool
    secure: bool
    same_origin: bool
    signature: str | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """A valid list and how far it is believed."""

    metalink: Metalink
    trusted: bool
    signer: str = ""

    @property
    def chunk_list(self) -> ChunkList | None:
        """The chunk digests, if the list has any."""
        link = self.metalink
        if link.chunk_length is None or not link.digests:
            return None
        return ChunkList(link.chunk_length, link.digests, self.trusted, self.signer)


def looks_like_metalink(data: bytes) -> bool:
    """Whether a document means to be a Metalink: only then are its faults worth an error."""
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return not head.startswith((b"<!doctype html", b"<html")) and (_NAMESPACE in data or b"<metalink" in data)


def judge(document: Document, settings: FetchSettings) -> Published | None:
    """Read a list and decide how far to believe it; None if it is none. ChunkListError, SignatureError."""
    if not looks_like_metalink(document.data):
        if document.explicit:
            raise ChunkListError(f"{document.place} is not a Metalink document; give --chunks a .meta4 file.")
        logger.info("%s is not a Metalink document and is ignored", document.place)
        return None
    try:
        metalink = read_metalink(parse_xml(document.data))
    except ChunkListError as error:
        raise ChunkListError(f"{document.place} cannot be used: {error}") from error
    trusted = document.secure and (document.same_origin or document.explicit)
    signer = ""
    if document.signature is not None and settings.trusted_keys:
        try:
            signer = verify(document.data, document.signature, settings.trusted_keys)
            trusted = True
        except UnknownKeyError as error:
            # Keys were pinned, and somebody else signed: no place makes up for that.
            logger.warning("%s: %s", document.place, error)
            trusted = False
        except SignatureError as error:
            raise SignatureError(f"{document.place}: {error}") from error
    return Published(metalink, trusted, signer)


def make_blob(
    ref: Ref,
    own: Mirror,
    size: int,
    *,
    published: Published | None,
    origin_digest: bytes | None,
    settings: FetchSettings,
    version_url: str | None = None,
    git_sha1: bytes | None = None,
) -> Blob:
    """The blob of a ref, from everything that is said about it. IntegrityError where that disagrees.

    Args:
        ref: what was asked for; its own digest counts most.
        own: the ref's own URL, with the validator seen there.
        size: as the origin says.
        published: the list, if there is one.
        origin_digest: the SHA-256 that the origin's headers say, if they do.
        settings: `policy` may demand trust.
        version_url: names a blob without a digest, together with size and validator; by default `ref.url`.
        git_sha1: git's name of the content, which counts where nobody gives a SHA-256.
    """
    label = without_secrets(ref.url)
    digest = ref.sha256
    chunk_list = None
    if published is not None:
        link = published.metalink
        chunk_list = published.chunk_list
        if link.size != size:
            raise ChunkListError(f"The chunk list of {label} is for {link.size} bytes, the file has {size}.")
        if digest is not None and link.sha256 not in (None, digest):
            raise ChunkListError(f"The chunk list of {label} is for a file of another SHA-256 than the ref.")
        # A SHA-256 that nobody vouches for does not take the place of git's name, which the origin gave.
        if git_sha1 is None or published.trusted:
            digest = digest or link.sha256
    if digest is not None and origin_digest not in (None, digest):
        raise IntegrityError(f"{label} has another SHA-256 at its origin than was asked for or published.")
    digest = digest or origin_digest
    _check_policy(label, published, digest or git_sha1, settings.policy)
    shape = BlobShape.of(size) if chunk_list is None else BlobShape(size, chunk_list.chunk_length)
    if digest is not None:
        blob_id, git_sha1 = BlobId.of_digest(digest), None
    elif git_sha1 is not None:
        blob_id = BlobId.of_git(git_sha1, size)
    else:
        if not own.validator:
            logger.warning("%s gives no digest, ETag or date: only its size tells versions apart", label)
        blob_id = BlobId.of_version(version_url or ref.url, size, own.validator)
    mirrors = _order(own, published.metalink.mirrors if published else ())
    return Blob(blob_id, shape, digest, mirrors, chunk_list, settings.policy, git_sha1)


def revision_of(blob: Blob) -> str:
    """What pins a manifest of one blob: the digest, else the validator, else the size."""
    if blob.sha256 is not None:
        return f"sha256:{blob.sha256.hex()}"
    validator = next((mirror.validator for mirror in blob.mirrors if mirror.validator), "")
    return validator or f"size:{blob.size}"


def _check_policy(label: str, published: Published | None, digest: bytes | None, policy: Policy) -> None:
    if policy is not Policy.STRICT or (published is not None and published.trusted):
        return
    if published is not None:
        raise SignatureError(
            f"The chunk list of {label} is neither signed by a trusted key nor from a trustworthy place; "
            "add the publisher's key to trusted_keys, or use another policy than strict."
        )
    if digest is None:
        raise SignatureError(
            f"Nothing vouches for {label}, so policy strict could never serve it; name its digest "
            "(#sha256=…), give a chunk list (--chunks), or use another policy."
        )


def _order(own: Mirror, listed: Sequence[Mirror]) -> tuple[Mirror, ...]:
    """The ref's own URL first, unless the publisher gave priorities; without doubles, at most MAX_MIRRORS.

    A local file stays first in any case.
    """
    ranked = not own.url.startswith("file:") and any(mirror.priority < MAX_PRIORITY for mirror in listed)
    priority = next((mirror.priority for mirror in listed if mirror.url == own.url), MAX_PRIORITY)
    mine = replace(own, priority=priority if ranked else 1)
    others = [mirror for mirror in listed if mirror.url != own.url][: MAX_MIRRORS - 1]
    return tuple(sorted((mine, *others), key=lambda mirror: mirror.priority))
