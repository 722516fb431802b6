"""The tree of names, and its inode numbers. Pure.

Numbers follow from content: a file's from its blob's id (so that one blob has one inode, and the kernel one
copy of its pages, wherever it appears), a slice's from that and its span, an inline file's from its bytes, a
directory's from its path. They are the same after a restart. All are even but the root's, which is 1: a whole blob has
a second number, one higher, under which it is passed through (see `passthrough`); slices and inline files have not, so
they never are. A tree never changes: a new one is built, or joined from parts, and what is open stays with its own
nodes.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import Blob, check_path
from weightfs.layouts.base import Dir, File, Inline, Item, Link

ROOT = 1
DIRECT = 1  # the bit by which a file's second inode number differs
_BITS = (1 << 62) - 1  # inode numbers and directory offsets stay positive in signed 64-bit fields everywhere
_DOTS = 2  # offsets 1 and 2 are `.` and `..`


@dataclass(frozen=True, slots=True)
class FileNode:
    """A whole blob; `links` names lead to it."""

    ino: int
    blob: Blob
    links: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.blob.size

    @property
    def span(self) -> ByteSpan:
        """Where its bytes are in the blob."""
        return ByteSpan(0, self.blob.size)


@dataclass(frozen=True, slots=True)
class SliceNode:
    """Some bytes of a blob as a file of their own; `links` names lead to it."""

    ino: int
    blob: Blob
    span: ByteSpan
    links: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.span)


@dataclass(frozen=True, slots=True)
class InlineNode:
    """A file whose bytes are in memory; `links` names lead to it."""

    ino: int
    data: bytes = field(repr=False)
    links: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class LinkNode:
    """A symbolic link."""

    ino: int
    target: str


@dataclass(frozen=True, slots=True)
class DirNode:
    """A directory. `cookies[i]` is the offset of `names[i]`, ascending; it depends on the name alone.

    `path` is below the mount's root, and empty for that.
    """

    ino: int
    parent: int
    path: str
    subdirectories: int
    children: dict[str, int] = field(repr=False)
    cookies: tuple[int, ...] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)


BlobNode = FileNode | SliceNode
RegularNode = BlobNode | InlineNode
Node = RegularNode | LinkNode | DirNode


def empty_directory(path: str, parent: int) -> DirNode:
    """A directory that no layout knows, under the number that it will have once one does."""
    return DirNode(number_of(_key(path, Dir()), 0) & ~DIRECT, parent, path, 0, {}, (), ())


def number_of(key: bytes, attempt: int) -> int:
    """A 62-bit number for `key`; the next `attempt` gives another one."""
    return int.from_bytes(hashlib.sha256(attempt.to_bytes(4, "big") + key).digest()[:8], "big") & _BITS


class Namespace:
    """All nodes by inode number. `conflicts`: a sentence for each path that is not as a layout wanted it."""

    def __init__(self, nodes: dict[int, Node], conflicts: tuple[str, ...]) -> None:
        self._nodes = nodes
        self.conflicts = conflicts

    @classmethod
    def build(
        cls,
        entries: Iterable[tuple[str, Item]],
        *,
        number: Callable[[bytes, int], int] = number_of,
    ) -> Namespace:
        """Make the tree. Never fails: what cannot be placed is left out or renamed, and in `conflicts`."""
        placed, conflicts = _place(entries)
        return cls(_link_up(placed, number), tuple(conflicts))

    @classmethod
    def join(
        cls, parts: Iterable[Namespace], *, number: Callable[[bytes, int], int] = number_of
    ) -> Namespace | None:
        """The tree that all entries of all `parts` would make; None where parts are in one another's way.

        Costs little beside making them: nodes are shared, and only those that several parts have are made anew.
        """
        nodes: dict[int, Node] = {}
        several: dict[int, list[Node]] = {}
        for part in sorted(parts, key=len, reverse=True):
            if part.conflicts:
                return None
            for ino in part._nodes.keys() & nodes.keys():
                several.setdefault(ino, [nodes[ino]]).append(part._nodes[ino])
            nodes.update(part._nodes)
        again: dict[int, int] = {}  # names of an inode that several parts have, without the first
        if not all(_merge_names(same, again) for same in several.values()):
            return None
        for ino, same in several.items():
            merged = _merged(same, again.get(ino, 0), nodes, number)
            if merged is None:
                return None
            nodes[ino] = merged
        return cls(nodes, ())

    def __len__(self) -> int:
        return len(self._nodes)

    def node(self, ino: int) -> Node | None:
        """The node with this number; a whole blob's by either of its two."""
        node = self._nodes.get(ino)
        if node is None and ino & DIRECT:
            node = self._nodes.get(ino ^ DIRECT)
            return node if isinstance(node, FileNode) else None
        return node

    def lookup(self, parent: int, name: str) -> Node | None:
        """The child `name` of a directory; `.` and `..` too."""
        directory = self._nodes.get(parent)
        if not isinstance(directory, DirNode):
            return None
        match name:
            case ".":
                return directory
            case "..":
                return self._nodes[directory.parent]
            case _:
                ino = directory.children.get(name)
                return None if ino is None else self._nodes[ino]

    def listing(self, directory: DirNode, after: int) -> Iterator[tuple[int, str, Node]]:
        """Yield (offset, name, node) of everything past the offset `after`; 0 is the start.

        A listing that goes on in a newer tree neither repeats nor skips a name that is in both.
        """
        if after < 1:
            yield 1, ".", directory
        if after < _DOTS:
            yield _DOTS, "..", self._nodes.get(directory.parent, directory)
        for index in range(bisect_right(directory.cookies, after), len(directory.cookies)):
            name = directory.names[index]
            node = self._nodes.get(directory.children[name])
            if node is not None:  # gone since the directory was opened
                yield directory.cookies[index], name, node


def _place(
    entries: Iterable[tuple[str, Item]],
) -> tuple[dict[str, Item], list[str]]:
    """Give each path one entry, and each entry's ancestors a directory."""
    wanted: list[tuple[str, Item]] = []
    conflicts: list[str] = []
    directories: set[str] = set()
    for path, entry in entries:
        try:
            check_path(path)
        except ValueError as error:
            conflicts.append(f"A layout's path {path[:200]!r} is left out: {error}.")
            continue
        if isinstance(entry, File) and entry.span is not None and entry.span.stop > entry.blob.size:
            conflicts.append(f"A layout's path {path!r} is left out: it ends beyond its blob.")
            continue
        wanted.append((path, entry))
        parent = path.rpartition("/")[0]
        while parent and parent not in directories:
            directories.add(parent)
            parent = parent.rpartition("/")[0]
        if isinstance(entry, Dir):
            directories.add(path)
    placed: dict[str, Item] = {path: Dir() for path in directories}
    for path, entry in wanted:
        if isinstance(entry, Dir) or placed.setdefault(path, entry) is entry or _same(placed[path], entry):
            continue
        other = f"{path}~{_suffix(entry)}" if isinstance(entry, File) else None
        if (
            other is None
            or len(other.rsplit("/", 1)[-1].encode()) > 255
            or not _same(placed.setdefault(other, entry), entry)
        ):
            conflicts.append(f"The path {path!r} is taken twice; one of the two is left out.")
        else:
            conflicts.append(f"The path {path!r} is taken twice; one of the two is at {other!r}.")
    return placed, conflicts


def _suffix(file: File) -> str:
    """Tells it from other files that want the same path."""
    span = _part(file)
    return str(file.blob.id)[:8] + ("" if span is None else f"-{span.start}-{span.stop}")


def _same(one: Item, other: Item) -> bool:
    if isinstance(one, File) and isinstance(other, File):
        return one.blob.id == other.blob.id and _part(one) == _part(other)
    return one == other


def _part(file: File) -> ByteSpan | None:
    """The span, or None if it is the whole blob: that has one inode, however it is said."""
    span = file.span
    return None if span is None or (span.start, span.stop) == (0, file.blob.size) else span


def _key(path: str, entry: Item) -> bytes:
    match entry:
        case File(blob):
            span = _part(entry)
            if span is None:
                return b"file\0" + blob.id.raw
            return b"slice\0%s\0%d\0%d" % (blob.id.raw, span.start, span.stop)
        case Inline(data):
            return b"inline\0" + hashlib.sha256(data).digest()
        case Link(target):
            return f"link\0{path}\0{target}".encode()
        case Dir():
            return f"dir\0{path}".encode()


def _numbers(keys: Iterable[bytes], number: Callable[[bytes, int], int]) -> dict[bytes, int]:
    """A number for each key. Who gives way in a collision depends on the keys alone, not on the entries' order.

    There may be 300,000, which are not sorted for it: nothing else would run meanwhile.
    """
    owners: dict[int, bytes] = {0: b""}
    late: list[bytes] = []
    for key in set(keys):
        ino = number(key, 0) & ~DIRECT
        other = owners.setdefault(ino, key)
        if other is not key:
            owners[ino] = min(other, key)
            late.append(max(other, key))
    for key in sorted(late):
        attempt = 1
        while (ino := number(key, attempt) & ~DIRECT) in owners:
            attempt += 1
        owners[ino] = key
    del owners[0]
    return {key: ino for ino, key in owners.items()}


def _merge_names(same: list[Node], again: dict[int, int]) -> bool:
    """Count the names that several of these directories have; False if one means different things."""
    if not isinstance(same[0], DirNode):
        return True
    names: dict[str, int] = {}
    for node in same:
        if not isinstance(node, DirNode) or node.path != same[0].path:
            return False
        for name in node.children.keys() & names.keys():
            if names[name] != node.children[name]:
                return False
            again[names[name]] = again.get(names[name], 0) + 1
        names.update(node.children)
    return True


def _merged(
    same: list[Node], again: int, nodes: dict[int, Node], number: Callable[[bytes, int], int]
) -> Node | None:
    """One node for what several parts have; `again` names of it are in more than one. None if it differs."""
    first = same[0]
    match first:
        case DirNode():
            return _merged_directory(same, nodes, number)
        case LinkNode():  # of one path, or these are two with one number
            return first if all(node == first for node in same) and again == len(same) - 1 else None
        case FileNode() | SliceNode() | InlineNode():
            if any(_content(node) != _content(first) for node in same):
                return None
            return replace(first, links=sum(_links(node) for node in same) - again)


def _merged_directory(
    same: list[Node], nodes: dict[int, Node], number: Callable[[bytes, int], int]
) -> DirNode:
    children: dict[str, int] = {}
    for node in same:
        assert isinstance(node, DirNode)
        children.update(node.children)
    first = same[0]
    assert isinstance(first, DirNode)
    if len(children) == len(first.children):
        return first
    order = _offsets(children, number)
    below = sum(isinstance(nodes[ino], DirNode) for ino in children.values())
    return DirNode(first.ino, first.parent, first.path, below, children, tuple(order), tuple(order.values()))


def _content(node: Node) -> object:
    match node:
        case FileNode(blob=blob):
            return blob.id
        case SliceNode(blob=blob, span=span):
            return blob.id, span.start, span.stop
        case InlineNode(data=data):
            return data
        case _:
            return node


def _links(node: Node) -> int:
    return 1 if isinstance(node, DirNode | LinkNode) else node.links


def _link_up(placed: dict[str, Item], number: Callable[[bytes, int], int]) -> dict[int, Node]:
    keys = {path: _key(path, entry) for path, entry in placed.items()}
    numbers = _numbers(keys.values(), number)
    inos = {path: numbers[key] for path, key in keys.items()} | {"": ROOT}
    children: dict[str, dict[str, int]] = {"": {}}
    links: dict[int, int] = {}
    for path, entry in placed.items():
        parent, _, name = path.rpartition("/")
        children.setdefault(parent, {})[name] = inos[path]
        links[inos[path]] = links.get(inos[path], 0) + 1
        if isinstance(entry, Dir):
            children.setdefault(path, {})
    nodes: dict[int, Node] = {}
    for path, entry in placed.items():
        if not isinstance(entry, Dir):
            nodes[inos[path]] = _leaf(inos[path], entry, links[inos[path]])
    subdirectories: dict[str, int] = {}
    for path in children:
        if path:
            parent = path.rpartition("/")[0]
            subdirectories[parent] = subdirectories.get(parent, 0) + 1
    for path, names in children.items():
        order = _offsets(names, number)
        parent = path.rpartition("/")[0]
        nodes[inos[path]] = DirNode(
            inos[path],
            inos[parent],
            path,
            subdirectories.get(path, 0),
            names,
            tuple(order),
            tuple(order.values()),
        )
    return nodes


def _leaf(ino: int, entry: File | Inline | Link, links: int) -> Node:
    match entry:
        case File(blob):
            span = _part(entry)
            return FileNode(ino, blob, links) if span is None else SliceNode(ino, blob, span, links)
        case Inline(data):
            return InlineNode(ino, data, links)
        case Link(target):
            return LinkNode(ino, target)


def _offsets(names: Iterable[str], number: Callable[[bytes, int], int]) -> dict[int, str]:
    """Directory offset → name, ascending by offset."""
    offsets: dict[int, str] = {}
    for name in sorted(names):
        key = b"name\0" + name.encode()
        attempt = 0
        while (offset := number(key, attempt)) <= _DOTS or offset in offsets:
            attempt += 1
        offsets[offset] = name
    return dict(sorted(offsets.items()))
