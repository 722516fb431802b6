"""What the kernel has open: its handles, how each inode is read, and which of its pages are right.

Rules. An inode is read either way, through us or passed through, for as long as it has handles: the first one decides,
every later one follows. A handle is entered in the ledger before its OPEN is answered, and struck off after its
RELEASE was, so that the next daemon knows of it. What is open stays readable when its name is gone. Pages stay in the
kernel from one open to the next unless they may be wrong.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
from dataclasses import dataclass

import trio
from pyfuse3 import FUSEError

from weightfs.core.manifest import Blob, BlobId
from weightfs.mount.inodes import DIRECT, FileNode, InlineNode, Namespace, RegularNode
from weightfs.mount.ledger import Entry, Ledger
from weightfs.mount.passthrough import Answered, Passthrough
from weightfs.mount.ports import MountedEngine
from weightfs.mount.requests import OverdueError
from weightfs.mount.stats import MountStats

MAX_STALE = 100_000  # inodes; with more, what was not opened since is dropped at its next open

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Open:
    """An inode with handles. The first one decides how it is read: by itself if `backing` is a number, else by us.

    `node` is None if its name went while no daemon was there.
    """

    node: RegularNode | None
    handles: int = 0
    decided: trio.Event | None = None
    backing: int | None = None


class Handles:
    """Those of one mount. What `ledger` has is open already: an earlier daemon answered it.

    `fresh`: the kernel has no pages yet; else an earlier daemon served this mount, and they may be of any blob.
    """

    def __init__(
        self,
        engine: MountedEngine,
        namespace: Namespace,
        stats: MountStats,
        passthrough: Passthrough,
        ledger: Ledger,
        *,
        fresh: bool,
    ) -> None:
        self._engine = engine
        self._stats = stats
        self._passthrough = passthrough
        self._ledger = ledger
        self._open: dict[int, _Open] = {}
        self._fresh = fresh
        # Inodes whose pages in the kernel are of the blob as it is pinned now, and how often it had been refuted then.
        self._kept: dict[int, int] = {}
        self._stale: set[int] = set()  # those that may be of a blob that was removed, and is pinned again
        for entry in ledger.entries():
            self._inherit(entry, namespace)

    def _inherit(self, entry: Entry, namespace: Namespace) -> None:
        """The kernel has this open since an earlier daemon's time."""
        node = namespace.node(entry.ino)
        decided = trio.Event()
        decided.set()
        held = _Open(node if isinstance(node, RegularNode) else None, entry.handles, decided)
        self._kept[entry.ino] = 0  # somebody has had it open all the time
        if entry.backing:
            held.backing = entry.backing
            self._passthrough.lent += 1
            self._stats.passed_files += 1
        self._open[entry.ino] = held
        if held.node is not None:
            for _ in range(entry.handles):
                self._note_opened(held.node)

    def show(self, namespace: Namespace) -> None:
        """The tree of names was replaced: pages of what is not in it are not believed when it comes back."""
        gone = [inode for inode in self._kept if namespace.node(inode) is None]
        for inode in gone:
            del self._kept[inode]
        self._stale.update(gone)
        if len(self._stale) > MAX_STALE:
            self._fresh = False
            self._stale.clear()

    def node(self, inode: int) -> RegularNode | None:
        """What is open under this number, whether it has a name or not."""
        held = self._open.get(inode)
        return None if held is None else held.node

    async def open(self, inode: int, node: RegularNode) -> bool:
        """One handle more; whether the kernel may keep the pages that it has.

        Answered, if it is passed through. FUSEError (ESTALE), if it cannot be read as those who have it open do: the
        kernel looks the name up again, and opens what it leads to now.
        """
        held = self._open.setdefault(inode, _Open(node))
        if held.node is None:  # its name had gone, and came back
            held.node = node
            for _ in range(held.handles):
                self._note_opened(node)
        held.handles += 1
        self._ledger.opened(inode)
        self._note_opened(node)
        if inode & DIRECT and isinstance(node, FileNode):
            try:
                await self._pass_through(inode, node.blob, held)
            except BaseException as outcome:
                if isinstance(outcome, Answered) and outcome.delivered:
                    self._stats.passed_opens += 1
                else:  # the kernel has no handle that it would release
                    self._forgotten(inode, self._released(inode))
                raise
        return isinstance(node, InlineNode) or self._has_right_pages(inode, node.blob.id)

    def release(self, inode: int) -> None:
        """One handle less; the last one's release forgets the node. To be called as the RELEASE's last act."""
        backing = self._released(inode)
        # Not before the answer, which comes without a pause: an unanswered RELEASE is sent again to the next daemon.
        trio.lowlevel.current_trio_token().run_sync_soon(self._forgotten, inode, backing)

    def _has_right_pages(self, inode: int, blob: BlobId) -> bool:
        """Whether what the kernel may have of it is right as far as is known; else this open drops it.

        A blob that was quarantined since, or removed and pinned again, may have been wrong. Where nothing can be wrong,
        nothing is dropped: who drops pages waits, and cannot be killed, while somebody reads one that is not there yet.
        """
        refuted = self._engine.refuted(blob)
        unseen = 0 if self._fresh and inode not in self._stale else None
        right = self._kept.get(inode, unseen) == refuted
        self._kept[inode] = refuted
        self._stale.discard(inode)
        return right

    def _note_opened(self, node: RegularNode) -> None:
        if isinstance(node, InlineNode):
            return
        try:
            self._engine.opened(node.blob.id)
        except Exception:  # noqa: BLE001 - the rule of `open` is stronger than any contract
            self._stats.internal_errors += 1
            _log.exception("The engine failed to note that blob %s was opened", node.blob.id)

    async def _pass_through(self, inode: int, blob: Blob, held: _Open) -> None:
        """Answer the open, raising Answered, if this inode is passed through; return if it is not."""
        if held.decided is None:
            held.decided = trio.Event()
            try:
                path = self._engine.backing(blob.id) if self._passthrough.on else None
                if path is not None:
                    lend = functools.partial(self._passthrough.lend, path, blob.size)
                    with contextlib.suppress(OverdueError):  # then through us: `open` does not fail
                        held.backing = await self._stats.requests.wait(lend)
                if held.backing is not None:
                    self._stats.passed_files += 1
                    self._ledger.lent(inode, held.backing)
            finally:
                held.decided.set()
        await held.decided.wait()
        if held.backing is None:
            return
        if self._engine.backing(blob.id) is None or not self._passthrough.able:
            # A chunk turned out to be bad, or the name is gone, while others have the inode open in a way that this
            # handle would have to follow; or the self-test of a daemon that took them over is not done.
            raise FUSEError(errno.ESTALE)
        self._passthrough.answer(inode, held.backing)

    def _released(self, inode: int) -> int | None:
        """One handle less; the backing file that nobody needs any more."""
        held = self._open.get(inode)
        if held is None:
            return None
        if held.node is not None and not isinstance(held.node, InlineNode):
            self._engine.released(held.node.blob.id)
        held.handles -= 1
        if held.handles:
            return None
        del self._open[inode]
        return held.backing

    def _forgotten(self, inode: int, backing: int | None) -> None:
        """What `_released` says holds for the next daemon, too."""
        self._ledger.released(inode)
        if backing is not None:
            self._stats.passed_files -= 1
            self._passthrough.take_back(backing)
