"""What a ref resolves to: a manifest of paths, each naming an immutable blob.

A blob never changes under a reader: it is named by its SHA-256, or, where an origin publishes none, by URL, size and
validator together, so that a new version at the same URL is another blob.
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from weightfs.core.geometry import BlobShape, ByteSpan

MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255  # NAME_MAX of Linux
MAX_MIRRORS = 64

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Trust(enum.StrEnum):
    """What is known about a blob's bytes; docs/semantics.md says what each lets a reader rely on."""

    ATTESTED = "attested"
    PROVISIONAL = "provisional"
    VERIFIED = "verified"
    UNVERIFIABLE = "unverifiable"
    QUARANTINED = "quarantined"


_WEAKEST_FIRST = (Trust.QUARANTINED, Trust.UNVERIFIABLE, Trust.PROVISIONAL, Trust.ATTESTED, Trust.VERIFIED)


def weakest(trusts: Iterable[Trust]) -> Trust:
    """What can be said of all of them together; VERIFIED if there are none."""
    return min(trusts, key=_WEAKEST_FIRST.index, default=Trust.VERIFIED)


class Policy(enum.StrEnum):
    """Which states may be read: `strict` attested or verified; `provisional` all but quarantined; `hold` verified."""

    STRICT = "strict"
    PROVISIONAL = "provisional"
    HOLD = "hold"

    def allows(self, trust: Trust) -> bool:
        """Whether bytes of a blob in this state may be given to a reader (chunk by chunk, once landed)."""
        match self:
            case Policy.STRICT:
                return trust in (Trust.ATTESTED, Trust.VERIFIED)
            case Policy.HOLD:
                return trust is Trust.VERIFIED
            case Policy.PROVISIONAL:  # pragma: no branch - the match is exhaustive
                return trust is not Trust.QUARANTINED


@dataclass(frozen=True, slots=True, order=True)
class BlobId:
    """Sixteen bytes that name a blob in the index, in file names and in inode numbers; printed as 32 hex digits."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != 16:
            raise ValueError("a blob id has 16 bytes")

    def __str__(self) -> str:
        return self.raw.hex()

    @classmethod
    def from_hex(cls, text: str) -> BlobId:
        """The inverse of `str()`. ValueError if it is not 32 hex digits."""
        return cls(bytes.fromhex(text))

    @classmethod
    def of_digest(cls, sha256: bytes) -> BlobId:
        """The id of content with a known SHA-256: its first 16 bytes."""
        return cls(sha256[:16])

    @classmethod
    def of_git(cls, sha1: bytes, size: int) -> BlobId:
        """The id of content with a known git object name."""
        return cls(hashlib.sha256(b"weightfs git\n%s\n%d" % (sha1.hex().encode(), size)).digest()[:16])

    @classmethod
    def of_version(cls, url: str, size: int, validator: str) -> BlobId:
        """The id of one version of a URL whose origin gives no digest."""
        text = f"weightfs version\n{url}\n{size}\n{validator}"
        return cls(hashlib.sha256(text.encode()).digest()[:16])


@dataclass(frozen=True, slots=True)
class Mirror:
    """One place for a blob's bytes. Lower `priority` is asked first (RFC 5854 section 4.2.16.1: 1 to 999999)."""

    url: str
    priority: int = 999_999
    # Strong ETag or Last-Modified as seen at resolve time, from this very mirror; sent as If-Range where strong.
    validator: str = ""


@dataclass(frozen=True, slots=True)
class ChunkList:
    """Published chunk digests: `digests` holds 32 bytes per chunk, in order.

    `trusted`: signed by a pinned key (`signer` is its key id, hex), or from the same authenticated origin as the
    whole digest. An untrusted list still guards against damage on the way, but proves nothing.
    """

    chunk_length: int
    digests: bytes
    trusted: bool
    signer: str = ""

    def __len__(self) -> int:
        return len(self.digests) // 32

    def digest_of(self, chunk: int) -> bytes:
        """The 32 bytes for one chunk. IndexError if there is no such chunk."""
        if not 0 <= chunk < len(self):
            raise IndexError(f"chunk {chunk} of {len(self)}")
        return self.digests[chunk * 32 : chunk * 32 + 32]


@dataclass(frozen=True, slots=True)
class Blob:
    """Immutable content and where to get it. `sha256` is 32 bytes, or None where no origin publishes it.

    `git_sha1` is 20 bytes, git's object name of the content: SHA-1 over `blob <size>`, NUL and the bytes. It is given
    where it is all that an origin publishes (Hugging Face's small files), and never beside a SHA-256.
    """

    id: BlobId
    shape: BlobShape
    sha256: bytes | None
    mirrors: tuple[Mirror, ...]
    chunk_list: ChunkList | None = None
    policy: Policy = Policy.PROVISIONAL
    git_sha1: bytes | None = None

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.shape.size

    @property
    def digest(self) -> str:
        """`sha256:<hex>`, `git-sha1:<hex>`, or empty if no origin publishes a digest of the whole."""
        if self.sha256 is not None:
            return f"sha256:{self.sha256.hex()}"
        return "" if self.git_sha1 is None else f"git-sha1:{self.git_sha1.hex()}"

    @property
    def initial_trust(self) -> Trust:
        """The state before the whole digest was compared."""
        if self.chunk_list is not None and self.chunk_list.trusted:
            return Trust.ATTESTED
        return Trust.PROVISIONAL if self.digest else Trust.UNVERIFIABLE

    def with_mirrors(self, mirrors: tuple[Mirror, ...]) -> Blob:
        """The same content from other places."""
        return replace(self, mirrors=mirrors)


@dataclass(frozen=True, slots=True)
class Entry:
    """A path inside a manifest, relative, checked by `check_path`.

    `span`: the bytes of the blob that are the file's, where it is not the whole blob but a member of a plain tar.
    """

    path: str
    blob: Blob
    span: ByteSpan | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A ref resolved and pinned. `tree`: the directory below `models/` of the entries, e.g. `https/host/dir`.

    `raw` is what the origin said, byte for byte, where a layout has to say it again: the manifest of a registry, whose
    SHA-256 is the model's id; the file list of a Hugging Face revision. Empty for other sources.
    """

    ref: str
    revision: str
    tree: str
    entries: tuple[Entry, ...]
    raw: bytes = field(default=b"", repr=False)  # it may have many MiB


def check_path(path: str) -> str:
    """Return `path` if it is a safe relative path, else raise ValueError with one clause that says why not.

    Refused: empty, absolute, `.` or `..` or empty components, NUL or other control characters, surrogates,
    a component over 255 bytes, over 1,024 bytes in all.
    """
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise ValueError("the path is not valid UTF-8") from None
    if not path:
        raise ValueError("the path is empty")
    if len(encoded) > MAX_PATH_BYTES:
        raise ValueError(f"the path has {len(encoded)} bytes; {MAX_PATH_BYTES} are allowed")
    if _CONTROL.search(path):
        raise ValueError("the path holds a control character")
    for name in path.split("/"):
        if name in ("", ".", ".."):
            raise ValueError(f"the path has the component {name!r}")
    if len(encoded) > MAX_NAME_BYTES and max(map(len, encoded.split(b"/"))) > MAX_NAME_BYTES:
        raise ValueError(f"a name in the path has over {MAX_NAME_BYTES} bytes")
    return path
