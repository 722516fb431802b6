"""What `stat` and extended attributes say of a node, made of what is in memory.

Rules: a size is exact, always. Nothing is invented: what is not known cheaply is left out, or said as the least that is
sure. A file that is not empty never has 0 blocks: `tar -S` would archive zeros without reading it.
"""

from __future__ import annotations

import os
import stat

from pyfuse3 import EntryAttributes, InodeT, ModeT

from weightfs.mount.inodes import BlobNode, DirNode, FileNode, InlineNode, LinkNode, Node, SliceNode
from weightfs.mount.passthrough import Private
from weightfs.mount.ports import Status

ENTRY_TIMEOUT = 1.0  # seconds: a name may go, or lead to a newer blob; the kernel is never told so
INCOMPLETE_TIMEOUT = 1.0  # st_blocks grows
COMPLETE_TIMEOUT = 60.0  # st_blocks shrinks only if the blob is evicted
XATTR_PREFIX = "user.weightfs."
BLOCK = 512  # of st_blocks
PAGE = 4096


class Attributes:
    """Makes them, for the user who mounts. `changed_at` (seconds since 1970) is when the tree became what it is."""

    def __init__(self) -> None:
        self.changed_at = 0
        self._uid = os.geteuid()
        self._gid = os.getegid()

    def of(self, node: Node, ino: int, status: Status | None) -> EntryAttributes:
        """Of a node that is shown as `ino`; `status` is its blob's, None if it has no blob or not any more."""
        entry = self._blank(ino)
        entry.entry_timeout = ENTRY_TIMEOUT
        entry.attr_timeout = INCOMPLETE_TIMEOUT
        entry.st_blksize = PAGE
        changed = self.changed_at
        match node:
            case FileNode() | SliceNode():
                _file(entry, node.size, node.links, _cached(node, status) or 0)
                if status is not None:
                    changed = status.mtime
                    if status.complete:
                        entry.attr_timeout = COMPLETE_TIMEOUT
            case InlineNode():
                _file(entry, node.size, node.links, node.size)
            case LinkNode(target=target):
                entry.st_mode = ModeT(stat.S_IFLNK | 0o777)
                entry.st_size = len(target.encode(errors="surrogateescape"))
            case DirNode(subdirectories=subdirectories):
                entry.st_mode = ModeT(stat.S_IFDIR | 0o555)
                entry.st_nlink = 2 + subdirectories
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = changed * 1_000_000_000
        return entry

    def private(self, private: Private) -> EntryAttributes:
        """Of the file of passthrough's self-test."""
        entry = self._blank(private.ino)
        entry.st_mode = ModeT(stat.S_IFREG | 0o400)
        entry.st_size = len(private.content)
        entry.entry_timeout = 0.0
        entry.attr_timeout = COMPLETE_TIMEOUT
        return entry

    def _blank(self, ino: int) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(ino)
        entry.st_uid, entry.st_gid = self._uid, self._gid
        return entry


def extended(node: Node, status: Status | None) -> dict[str, str]:
    """`user.weightfs.{state,digest,cached,source,faults}` of what has a blob; those whose value is known and not empty.

    The digest is the blob's, so a slice has none.
    """
    if status is None or not isinstance(node, FileNode | SliceNode):
        return {}
    cached = _cached(node, status)
    values = {
        "state": str(status.trust),
        "digest": node.blob.digest if isinstance(node, FileNode) else "",
        "cached": "" if cached is None else str(cached),
        "source": "\n".join(status.sources),
        "faults": status.faults,
    }
    return {XATTR_PREFIX + name: value for name, value in values.items() if value}


def _file(entry: EntryAttributes, size: int, links: int, present: int) -> None:
    entry.st_mode = ModeT(stat.S_IFREG | 0o444)
    entry.st_nlink = links
    entry.st_size = size
    entry.st_blocks = max(1 if size else 0, -(-present // PAGE)) * (PAGE // BLOCK)


def _cached(node: BlobNode, status: Status | None) -> int | None:
    """Bytes of the node that are cached. None: unknown, for of a blob it is told how many there are, not which."""
    if status is None:
        return None
    if isinstance(node, FileNode):
        return min(status.present_bytes, node.size)
    if status.complete:
        return node.size
    return None if status.present_bytes else 0
