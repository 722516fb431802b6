"""Metalink 4 (RFC 5854) as a chunk list: one file, its size, its SHA-256, that of each piece, and mirrors.

Rule: a `Metalink` that exists is valid; reader and writer share its checks. The reader is strict where a
lenient one could be led to take other bytes (one file, the exact number of pieces, no white space, http(s)
only), and ignores only what the RFC lets a processor ignore: other hash types, metaurls, descriptions,
foreign elements of `file`.

The XML is parsed elsewhere (`sources`, with defusedxml: no DTD, no entities, at most MAX_METALINK_BYTES).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from weightfs.core.geometry import KIB, MAX_BLOB_SIZE, MAX_CHUNKS, MIB
from weightfs.core.manifest import MAX_MIRRORS, Mirror, check_path
from weightfs.core.ref import canonical_url
from weightfs.errors import ChunkListError, RefError

MAX_METALINK_BYTES = 16 * MIB
MIN_PIECE_LENGTH = 64 * KIB
MAX_PIECE_LENGTH = 64 * MIB
# Four times what weightfs itself makes of a blob, for publishers who cut finer (8 GiB in 64 KiB pieces):
# 4 MiB of digests in memory, and at 81 bytes of XML a piece still within MAX_METALINK_BYTES.
MAX_PIECES = 4 * MAX_CHUNKS
MAX_PRIORITY = 999_999  # RFC 5854 section 4.2.16.1; also what an absent priority means

_NAMESPACE = "urn:ietf:params:xml:ns:metalink"
_NUMBER = re.compile(r"[0-9]{1,19}")
_HASH = re.compile(r"[0-9A-Fa-f]{64}")
_NOT_XML = re.compile("[\ufffe\uffff]")  # valid in a file name, not in XML 1.0


@dataclass(frozen=True, slots=True)
class Metalink:
    """What a `.meta4` says.

    `digests` holds 32 bytes per piece, in order; `chunk_length` is None if no pieces are listed. Raises
    ChunkListError when it is made of values that contradict one another or exceed a bound.
    """

    name: str
    size: int
    sha256: bytes | None
    chunk_length: int | None
    digests: bytes
    mirrors: tuple[Mirror, ...]

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not 0 <= self.size <= MAX_BLOB_SIZE:
            raise ChunkListError(
                f"The chunk list gives a size of {self.size} bytes; 0 to {MAX_BLOB_SIZE} can be."
            )
        if self.sha256 is None and self.chunk_length is None:
            raise ChunkListError(
                "The chunk list has no sha-256, neither of the file nor of pieces: it proves nothing."
            )
        if self.sha256 is not None and len(self.sha256) != 32:
            raise ChunkListError("The whole hash of the chunk list is not a SHA-256.")
        _check_pieces(self.size, self.chunk_length, self.digests)
        if len(self.mirrors) > MAX_MIRRORS:
            raise ChunkListError(
                f"The chunk list names {len(self.mirrors)} mirrors; {MAX_MIRRORS} are allowed."
            )
        for mirror in self.mirrors:
            _checked_url(mirror.url)
            if not 1 <= mirror.priority <= MAX_PRIORITY:
                raise ChunkListError(
                    f"The chunk list has a priority of {mirror.priority}; 1 to {MAX_PRIORITY} exist."
                )


def read_metalink(root: Element) -> Metalink:
    """Read a parsed Metalink 4 document. Raises ChunkListError, which says what is wrong with it."""
    if root.tag != _tag("metalink"):
        raise ChunkListError(f"The chunk list is no Metalink 4 document: its root is {_shown(root.tag)}.")
    file = _one(root.findall(_tag("file")), "file")
    size = _number(_text(_one(file.findall(_tag("size")), "size")), "size")
    hashes = _sha256_only(file.findall(_tag("hash")))
    whole = _digest(_one(hashes, "hash of type sha-256")) if hashes else None
    pieces = _sha256_only(file.findall(_tag("pieces")))
    length, digests = _read_pieces(_one(pieces, "pieces of type sha-256")) if pieces else (None, b"")
    mirrors = _read_mirrors(file.findall(_tag("url")))
    return Metalink(file.get("name", ""), size, whole, length, digests, mirrors)


def write_metalink(m: Metalink) -> bytes:
    """The document, UTF-8, the same bytes for the same input. `read_metalink` gives an equal Metalink back.

    The validators of mirrors are not written: they are an origin's answer to us, not the publisher's word.
    """
    # Not ElementTree's default_namespace, which refuses plain attributes, nor register_namespace: global.
    root = Element("metalink", {"xmlns": _NAMESPACE})
    file = SubElement(root, "file", {"name": m.name})
    SubElement(file, "size").text = str(m.size)
    if m.sha256 is not None:
        SubElement(file, "hash", {"type": "sha-256"}).text = m.sha256.hex()
    if m.chunk_length is not None:
        pieces = SubElement(file, "pieces", {"length": str(m.chunk_length), "type": "sha-256"})
        for at in range(0, len(m.digests), 32):
            SubElement(pieces, "hash").text = m.digests[at : at + 32].hex()
    for mirror in m.mirrors:
        SubElement(file, "url", {"priority": str(mirror.priority)}).text = mirror.url
    indent(root, " ")
    document: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _tag(name: str) -> str:
    return f"{{{_NAMESPACE}}}{name}"


def _shown(value: str) -> str:
    return repr(value if len(value) <= 80 else value[:80] + "…")


def _one(elements: list[Element], what: str) -> Element:
    if len(elements) != 1:
        raise ChunkListError(f"The chunk list has {len(elements)} {what} elements where exactly one belongs.")
    return elements[0]


def _text(element: Element) -> str:
    if len(element):
        raise ChunkListError(f"The chunk list has elements inside {_shown(element.tag)}, where text belongs.")
    return element.text or ""


def _number(text: str, what: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ChunkListError(f"The chunk list has the {what} {_shown(text)}, which is not a number.")
    return int(text)


def _digest(element: Element) -> bytes:
    text = _text(element)
    if not _HASH.fullmatch(text):
        raise ChunkListError(f"The chunk list has the hash {_shown(text)}; a sha-256 is 64 hex digits.")
    return bytes.fromhex(text)


def _sha256_only(elements: Iterable[Element]) -> list[Element]:
    return [element for element in elements if element.get("type", "").lower() == "sha-256"]


def _read_pieces(pieces: Element) -> tuple[int, bytes]:
    if len(pieces) > MAX_PIECES:  # before any is looked at
        raise ChunkListError(f"The chunk list has {len(pieces)} pieces; {MAX_PIECES} are allowed.")
    if any(piece.tag != _tag("hash") for piece in pieces):
        raise ChunkListError("The chunk list has something else than hashes among its pieces.")
    return _number(pieces.get("length", ""), "piece length"), b"".join(map(_digest, pieces))


def _read_mirrors(elements: list[Element]) -> tuple[Mirror, ...]:
    if len(elements) > MAX_MIRRORS:
        raise ChunkListError(f"The chunk list names {len(elements)} mirrors; {MAX_MIRRORS} are allowed.")
    best: dict[str, int] = {}
    for element in elements:
        url = _checked_url(_text(element))
        priority = _number(element.get("priority", str(MAX_PRIORITY)), "priority")
        best[url] = min(priority, best.get(url, priority))
    return tuple(Mirror(url, priority) for url, priority in best.items())


def _check_name(name: str) -> None:
    try:
        check_path(name)
    except ValueError as error:
        raise ChunkListError(f"The chunk list's file name is refused: {error}.") from None
    if "/" in name or "\\" in name or _NOT_XML.search(name):
        raise ChunkListError(
            f"The chunk list's file name {_shown(name)} is not a plain name; paths are refused."
        )


def _check_pieces(size: int, length: int | None, digests: bytes) -> None:
    if length is None:
        count = 0
    elif MIN_PIECE_LENGTH <= length <= MAX_PIECE_LENGTH and not length & (length - 1):
        count = -(-size // length)
    else:
        raise ChunkListError(
            f"The chunk list has pieces of {length} bytes; a power of two "
            f"from {MIN_PIECE_LENGTH} to {MAX_PIECE_LENGTH} is needed."
        )
    if count > MAX_PIECES:
        raise ChunkListError(
            f"The chunk list cuts {size} bytes into {count} pieces; {MAX_PIECES} are allowed."
        )
    if len(digests) != 32 * count:
        raise ChunkListError(f"The chunk list has {len(digests) // 32} piece hashes where {count} belong.")


def _checked_url(url: str) -> str:
    if re.search(r"\s", url):  # no IRI has any; urlsplit would drop some of it silently
        raise ChunkListError("The chunk list has a URL with white space in it.")
    try:
        return canonical_url(url)
    except RefError as error:
        raise ChunkListError(f"A mirror of the chunk list is refused: {error}") from None
