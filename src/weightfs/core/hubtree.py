"""The file list of one revision on the Hugging Face Hub: read strictly from the API's pages, kept as JSON. Pure.

Rules: a `HubTree` that exists is valid (every path is safe and there once, no file is a directory too, one digest has
one size), however it was made; `read_raw(tree.raw) == tree`, and equal trees have equal bytes. What is not exactly of
the form below is a ValueError, whose text is one clause. What the API adds (last commits, scan results) is ignored.

A page is an array of `{type, path, size, oid, lfs: {oid, size}?, xetHash?}`, `type` being "file" or "directory"
(anything else, such as a git submodule, has no bytes on the Hub, and is left out).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from weightfs.core.geometry import MAX_BLOB_SIZE, MIB
from weightfs.core.manifest import check_path

# The Hub asks repositories to stay below 100,000 files ("Repository limitations and recommendations"). Directories
# count here too: what bounds time and memory is what is parsed.
MAX_ENTRIES: Final = 100_000
MAX_PAGES: Final = 1_000  # the Hub gives 1,000 entries a page; a mirror may give as few as 100
# A page of 1,000 entries has 300 KB, or 1.5 MB if every path is as long as can be.
MAX_PAGE_BYTES: Final = 4 * MIB
MAX_PAGE_VALUES: Final = 200_000  # 1,000 entries have 15,000; a value takes up to 100 bytes of memory
MAX_TREE_BYTES: Final = 64 * MIB  # all pages; MAX_ENTRIES of the usual 350 bytes are 35 MB
_SHOWN_CHARS: Final = 100

_GIT_OID = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class TooManyFilesError(ValueError):
    """The revision is larger than `MAX_ENTRIES`."""

    def __init__(self, what: str) -> None:
        super().__init__(f"it has more than {MAX_ENTRIES} {what}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file, as the API describes it. Digests are lower-case hex, sizes are bytes.

    `blob_id` is git's object name: of the content, or, if `lfs_sha256` is not empty, of the pointer to it. `xet_hash`
    is empty where the file is not in Xet's store; no range of bytes can be proven against it.
    """

    path: str
    size: int
    blob_id: str
    lfs_sha256: str = ""
    lfs_size: int = 0
    xet_hash: str = ""

    @property
    def etag(self) -> str:
        """What names the content in the Hub's own cache: its SHA-256 in LFS, else its git object name."""
        return self.lfs_sha256 or self.blob_id

    @property
    def content_size(self) -> int:
        """Length of the content in bytes."""
        return self.lfs_size if self.lfs_sha256 else self.size


@dataclass(frozen=True, slots=True)
class HubTree:
    """Every file of the commit `sha` (40 hex digits), in the order of their paths. ValueError if they contradict."""

    sha: str
    files: tuple[HubFile, ...]

    def __post_init__(self) -> None:
        if not is_commit(self.sha):
            raise ValueError(f"{_shown(self.sha)} is not the name of a commit")
        if len(self.files) > MAX_ENTRIES:
            raise TooManyFilesError("files")
        paths = {file.path for file in self.files}
        sizes: dict[str, int] = {}
        before = ""
        for file in self.files:
            _check_path(file.path)
            if file.path <= before:
                raise ValueError(f"the path {_shown(file.path)} is there twice, or not in order")
            before = file.path
            for parent in _parents(file.path):
                if parent in paths:
                    raise ValueError(f"{_shown(parent)} is a file and a directory")
            if sizes.setdefault(file.etag, file.content_size) != file.content_size:
                raise ValueError(f"the content {file.etag} has two sizes")

    @property
    def raw(self) -> bytes:
        """Canonical JSON, for `Manifest.raw`: `{"sha": …, "files": {path: {"size", "blob_id", …}}}`.

        Without white space, in UTF-8, sorted by path. The fields of a file are those of the tree cache of the Hub's own
        client: `size`, `blob_id`, then `lfs_sha256` and `lfs_size` if it is in LFS, and `xet_hash` if it is in Xet's
        store.
        """
        # File by file: the encoder holds the interpreter's lock as long as it works, 0.3 s for all of 100,000.
        files = (f"{_json(file.path)}:{_json(_fields_of(file))}" for file in self.files)
        return f'{{"sha":{_json(self.sha)},"files":{{{",".join(files)}}}}}'.encode()


class TreeReader:
    """Takes the pages of one revision, in order; `tree` is what they are together. ValueError."""

    def __init__(self, sha: str) -> None:
        self._sha = sha
        self._files: list[HubFile] = []
        self._entries = 0
        self._pages = 0
        self._bytes = 0

    def add(self, page: bytes) -> None:
        """Read one page. ValueError if it is none, or one too many."""
        self._pages += 1
        self._bytes += len(page)
        if self._pages > MAX_PAGES or self._bytes > MAX_TREE_BYTES:
            raise ValueError(f"it has more than {MAX_PAGES} pages or {MAX_TREE_BYTES} bytes")
        if len(page) > MAX_PAGE_BYTES:
            raise ValueError(f"a page has more than {MAX_PAGE_BYTES} bytes")
        entries = _array(load_json(page, MAX_PAGE_VALUES))
        self._entries += len(entries)
        if self._entries > MAX_ENTRIES:
            raise TooManyFilesError("files and directories")
        self._files += [_file_of(fields) for fields in map(_object, entries) if fields.get("type") == "file"]

    def tree(self) -> HubTree:
        """What was read. ValueError if the pages contradict one another."""
        return HubTree(self._sha, tuple(sorted(self._files, key=lambda file: file.path)))


def read_raw(data: bytes) -> HubTree:
    """The inverse of `HubTree.raw`. ValueError."""
    document = _object(load_json(data))
    files = []
    for path, value in _object(document.get("files")).items():
        fields = _object(value)
        sha256 = _digest(fields, "lfs_sha256", _SHA256, optional=True)
        files.append(
            HubFile(
                path,
                _size(fields, "size"),
                _digest(fields, "blob_id", _GIT_OID),
                sha256,
                _size(fields, "lfs_size") if sha256 else 0,
                _digest(fields, "xet_hash", _SHA256, optional=True),
            )
        )
    return HubTree(_text(document, "sha"), tuple(files))


def load_json(data: bytes, max_values: int | None = None) -> object:
    """Any JSON value. ValueError if it is none, nested too deep to be read, or of more than `max_values` values.

    These are not counted exactly: each but the first has a comma or a bracket before it, and so may a text inside it.
    """
    if max_values is not None and sum(data.count(sign) for sign in (b",", b"[", b"{")) > max_values:
        raise ValueError(f"it has more than {max_values} values")
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise ValueError("it is not JSON") from None
    return value


def is_commit(text: object) -> bool:
    """Whether this is the full name of a commit: 40 lower-case hex digits."""
    return isinstance(text, str) and _GIT_OID.fullmatch(text) is not None


def git_oid(data: bytes) -> str:
    """Git's object name of a file's bytes, in hex (Pro Git, "Git Objects")."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _file_of(fields: dict[str, object]) -> HubFile:
    path = _text(fields, "path")
    oid = _digest(fields, "oid", _GIT_OID)
    xet_hash = _digest(fields, "xetHash", _SHA256, optional=True)
    if fields.get("lfs") is None:
        return HubFile(path, _size(fields, "size"), oid, xet_hash=xet_hash)
    lfs = _object(fields["lfs"])
    return HubFile(
        path, _size(fields, "size"), oid, _digest(lfs, "oid", _SHA256), _size(lfs, "size"), xet_hash
    )


def _fields_of(file: HubFile) -> dict[str, str | int]:
    fields: dict[str, str | int] = {"size": file.size, "blob_id": file.blob_id}
    if file.lfs_sha256:
        fields |= {"lfs_sha256": file.lfs_sha256, "lfs_size": file.lfs_size}
    if file.xet_hash:
        fields["xet_hash"] = file.xet_hash
    return fields


def _object(value: object) -> dict[str, object]:
    match value:
        case dict():
            return value
        case _:
            raise ValueError("it holds something else where an object belongs")


def _array(value: object) -> list[object]:
    match value:
        case list():
            return value
        case _:
            raise ValueError("a page is not an array")


def _text(fields: dict[str, object], key: str) -> str:
    match fields.get(key):
        case str(text):
            return text
        case _:
            raise ValueError(f"{key} is missing, or no text")


def _size(fields: dict[str, object], key: str) -> int:
    value = fields.get(key)
    # Not isinstance: True is an int.
    if type(value) is not int or not 0 <= value <= MAX_BLOB_SIZE:
        raise ValueError(f"a file's {key} is not a number from 0 to {MAX_BLOB_SIZE}")
    return value


def _digest(fields: dict[str, object], key: str, form: re.Pattern[str], *, optional: bool = False) -> str:
    value = fields.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ValueError(f"a file's {key} is not lower-case hex of the right length")
    return value


def _check_path(path: str) -> None:
    try:
        check_path(path)
    except ValueError as error:
        raise ValueError(f"{_shown(path)} cannot be a file: {error}") from None


def _parents(path: str) -> Iterable[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _shown(text: str) -> str:
    return ascii(text[:_SHOWN_CHARS])
