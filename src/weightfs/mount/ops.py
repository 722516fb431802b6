"""A thin pyfuse3 skin: kernel requests in, the namespace's and the engine's answers out.

Rules: nothing but FUSEError and Answered leaves a handler (anything else would end pyfuse3's loop and with it the
mount). Only `read` waits, and `lookup` where browsing is on; and who waits does so in `requests.Shelter`, so that the
watchdog can answer for him. `open` never fails for reasons of data. A handle's number
is its inode's, so that it can be told again after a restart; `handles` knows what is open. Inodes never change content:
`keep_cache`. A blob whose file the kernel may read itself is shown under its other inode number (see `passthrough`);
whoever has it open by the first goes on with that. What is left out (flush, fsync, poll …) pyfuse3 answers ENOSYS,
once: the kernel then does without it for good.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FlagT, FUSEError, InodeT, ModeT, StatvfsData

from weightfs.core.geometry import ByteSpan
from weightfs.errors import ReadError
from weightfs.logs import about
from weightfs.mount.attributes import PAGE, Attributes, extended
from weightfs.mount.browsing import Browser
from weightfs.mount.errno import errno_of
from weightfs.mount.handles import Handles
from weightfs.mount.inodes import (
    DIRECT,
    ROOT,
    BlobNode,
    DirNode,
    FileNode,
    InlineNode,
    LinkNode,
    Namespace,
    Node,
    SliceNode,
)
from weightfs.mount.ledger import Ledger
from weightfs.mount.passthrough import Answered, Passthrough
from weightfs.mount.penance import Penance, Sentence
from weightfs.mount.ports import MountedEngine, Status
from weightfs.mount.requests import OverdueError
from weightfs.mount.stats import MountStats

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger(__name__)


def _text(name: bytes) -> str:
    """Names are UTF-8 whatever the locale is; others are none of ours and are simply not found."""
    return name.decode(errors="surrogateescape")


def _raw(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


def _guarded(
    method: Callable[Concatenate[WeightOperations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[WeightOperations, P], Coroutine[Any, Any, R]]:
    """Register the request while it is handled; turn whatever the handler raises into FUSEError, and log it."""
    name = method.__name__

    async def handler(self: WeightOperations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        request = self._requests.begin(name, args)
        try:
            return await method(self, *args, **kwargs)
        except (FUSEError, Answered):
            raise
        except OverdueError:  # the watchdog has told of it; what a read makes of it never comes here
            raise FUSEError(errno.ETIMEDOUT) from None
        except Exception:  # noqa: BLE001 - the loop must live; the request is answered and the error is told
            self.stats.internal_errors += 1
            _log.exception("The handler %s failed; the caller gets EIO", name)
            raise FUSEError(errno.EIO) from None
        finally:
            self._requests.end(request)

    functools.update_wrapper(handler, method)
    return handler


class WeightOperations(pyfuse3.Operations):
    """The handlers. `on_init` runs inside pyfuse3's `init` operation (the descriptor changes hands there).

    `fresh`: the kernel has no pages yet; else an earlier daemon served this mount, and they may be of any blob.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        engine: MountedEngine,
        namespace: Namespace,
        stats: MountStats,
        on_init: Callable[[], None],
        passthrough: Passthrough | None = None,
        browser: Browser | None = None,
        *,
        settled: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
        ledger: Ledger | None = None,
        fresh: bool = True,
    ) -> None:
        super().__init__()
        self._settled = settled  # returns when the tree is as new as what is pinned
        self.stats = stats
        self._requests = stats.requests
        self._engine = engine
        self._namespace = namespace
        self._on_init = on_init
        self._passthrough = passthrough or Passthrough()
        self._handles = Handles(
            engine, namespace, stats, self._passthrough, Ledger() if ledger is None else ledger, fresh=fresh
        )
        self._browser = browser
        self._penance = Penance()
        self._stopping = trio.Event()
        self._about = Attributes()

    def show(self, namespace: Namespace, now: int) -> None:
        """Replace the tree of names, as of `now` (seconds since 1970, the directories' mtime)."""
        self._namespace = namespace
        self._about.changed_at = now
        self._handles.show(namespace)

    def stop_holding(self) -> None:
        """From now on failing reads are answered at once: the mount is about to go."""
        self._stopping.set()
        if self._browser is not None:
            self._browser.stop()

    def init(self) -> None:
        """Called by libfuse when its half of the handshake is done."""
        self._on_init()

    # --- names

    @_guarded
    async def lookup(
        self, parent_inode: InodeT, name: bytes, _ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        """ENOENT for what is not there; never cached, for a ref may be added at any time."""
        private = self._passthrough.private
        if private is not None and parent_inode == ROOT and _text(name) == private.name:
            return self._about.private(private)
        node = await self._look_up(parent_inode, _text(name))
        if node is None and self._browser is not None:
            browser = self._browser
            find = functools.partial(browser.find, self._namespace, parent_inode, _text(name))
            node = await self._requests.wait(find)
            node = node or await self._look_up(parent_inode, _text(name))  # it is pinned now
        if node is None:
            raise FUSEError(errno.ENOENT)
        return self._attributes(node, self._shown(node))

    async def _look_up(self, parent: int, name: str) -> Node | None:
        """The node, of the tree at hand or of the one that is being made."""
        node = self._namespace.lookup(parent, name)
        if node is None:
            await self._requests.wait(self._settled)
            node = self._namespace.lookup(parent, name)
        return node

    @_guarded
    async def getattr(self, inode: InodeT, _ctx: pyfuse3.RequestContext) -> EntryAttributes:
        """Attributes from memory, also of an open file whose name is gone."""
        return self._attributes(self._node(inode), inode)

    @_guarded
    async def readlink(self, inode: InodeT, _ctx: pyfuse3.RequestContext) -> bytes:
        """The target of a link of the layout."""
        node = self._node(inode)
        if not isinstance(node, LinkNode):
            raise FUSEError(errno.EINVAL)
        return _raw(node.target)

    @_guarded
    async def access(self, inode: InodeT, mode: ModeT, _ctx: pyfuse3.RequestContext) -> bool:
        """The kernel checks the rest (default_permissions)."""
        self._node(inode)
        if mode & os.W_OK:
            raise FUSEError(errno.EROFS)
        return True

    @_guarded
    async def opendir(self, inode: InodeT, _ctx: pyfuse3.RequestContext) -> FileHandleT:
        """The handle is the inode. A listing begins with the newest tree."""
        await self._requests.wait(self._settled)
        if not isinstance(self._node(inode), DirNode):
            raise FUSEError(errno.ENOTDIR)
        return FileHandleT(inode)

    @_guarded
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Names with their attributes (READDIRPLUS), from the newest tree that has the directory."""
        node = self._namespace.node(fh)
        if node is None and self._browser is not None:
            node = self._browser.directory(fh)
        if not isinstance(node, DirNode):
            return  # the directory is gone: it has no more entries
        for offset, name, child in self._namespace.listing(node, start_id):
            if not pyfuse3.readdir_reply(
                token, _raw(name), self._attributes(child, self._shown(child)), offset
            ):
                return

    @_guarded
    async def releasedir(self, fh: FileHandleT) -> None:
        """Nothing is kept for a directory."""

    # --- bytes

    @_guarded
    async def open(self, inode: InodeT, flags: FlagT, ctx: pyfuse3.RequestContext) -> FileInfo:
        """Never waits or fails for reasons of data: safetensors takes any error for a missing file."""
        private = self._passthrough.private
        if private is not None and inode == private.ino:
            self._passthrough.open_private(private, ctx)
        node = self._node(inode)
        if isinstance(node, DirNode):
            raise FUSEError(errno.EISDIR)
        if isinstance(node, LinkNode):
            raise FUSEError(errno.ELOOP)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise FUSEError(errno.EROFS)
        kept = await self._handles.open(inode, node)
        return FileInfo(fh=FileHandleT(inode), keep_cache=kept)

    @_guarded
    async def release(self, fh: FileHandleT) -> None:
        """The last handle's release forgets the node."""
        self._handles.release(fh)

    @_guarded
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Bytes [off, off + size), clipped at the end; a failing answer is held back (see `penance`)."""
        node = self._node(fh)
        if isinstance(node, DirNode | LinkNode):
            raise FUSEError(errno.EISDIR)
        span = ByteSpan(off, off + size).clamp(node.size)
        if not len(span):
            return b""
        if isinstance(node, InlineNode):
            return self._counted(node.data[span.start : span.stop])
        at = node.span.start
        return await self._read_blob(node, ByteSpan(at + span.start, at + span.stop))

    async def _read_blob(self, node: BlobNode, span: ByteSpan) -> bytes:
        """Bytes of the blob; `span` is within the node's."""
        asked = trio.current_time()
        request = self._requests.mine()
        request.blob, request.span = node.blob.id, span
        patience = self._penance.recall(node.ino, span, asked)
        if patience is not None:
            self.stats.delayed_reads += 1
            await self._hold(patience)
        try:
            data = self._engine.read_nowait(node.blob.id, span)
            if data is None:
                data = await self._requests.wait(functools.partial(self._engine.read, node.blob.id, span))
            if len(data) != len(span):  # never zeros or stale bytes for a short answer
                raise ValueError(f"the engine gave {len(data)} bytes for {len(span)}")
        except Exception as error:  # noqa: BLE001 - every kind of failure is held back alike
            sentence = self._failure(node, span, error, asked, waited=patience is not None)
            await self._hold(sentence.until)
            self.stats.failed_reads += 1
            raise FUSEError(sentence.errno) from None
        self._penance.forgive(node.ino, span)
        return self._counted(data)

    def _counted(self, data: bytes) -> bytes:
        self.stats.reads += 1
        self.stats.read_bytes += len(data)
        return data

    def _failure(
        self, node: BlobNode, span: ByteSpan, error: Exception, asked: float, *, waited: bool
    ) -> Sentence:
        whole = False
        if isinstance(error, ReadError):
            if 0 <= error.chunk < node.blob.shape.chunk_count:
                span, whole = node.blob.shape.span_of(error.chunk), True
        elif not isinstance(error, OverdueError):
            self.stats.internal_errors += 1
        now = trio.current_time()
        sentence = self._penance.failed(
            node.ino, span, errno_of(error), asked, now, waited=waited, whole=whole
        )
        where = f"bytes [{span.start}, {span.stop}) of blob {node.blob.id}"
        subject = about(blob=node.blob.id, errno=sentence.errno)  # the rest is the error's to say
        if not isinstance(error, ReadError | OverdueError):
            _log.error("A read of %s met an unforeseen error", where, exc_info=error, extra=subject)
        elif sentence.news and not self._stopping.is_set():
            _log.warning(
                "A read of %s failed (%d in a row): %s", where, sentence.failures, error, extra=subject
            )
        return sentence

    async def _hold(self, until: float) -> None:
        """Wait for a time, or for the end of the mount."""
        self.stats.held += 1
        request = self._requests.mine()
        request.held = True
        try:
            with trio.move_on_at(until):
                await self._stopping.wait()
        finally:
            self.stats.held -= 1
            request.held = False

    # --- the rest

    @_guarded
    async def statfs(self, _ctx: pyfuse3.RequestContext) -> StatvfsData:
        """Room of the cache, from memory; also the probe of a mount's health."""
        space = self._engine.statfs()
        data = StatvfsData()
        data.f_bsize = data.f_frsize = PAGE
        data.f_blocks = space.total_bytes // PAGE
        data.f_bfree = data.f_bavail = space.free_bytes // PAGE
        data.f_files = len(self._namespace)
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data

    @_guarded
    async def getxattr(self, inode: InodeT, name: bytes, _ctx: pyfuse3.RequestContext) -> bytes:
        """`user.weightfs.{state,digest,cached,source,faults}` of what has a blob."""
        node = self._node(inode)
        value = extended(node, self._status(node)).get(_text(name))
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value.encode(errors="surrogateescape")

    @_guarded
    async def listxattr(self, inode: InodeT, _ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """Those that the file has."""
        node = self._node(inode)
        return [name.encode() for name in extended(node, self._status(node))]

    # --- helpers

    def _node(self, inode: int) -> Node:
        node = self._namespace.node(inode)
        if node is None and self._browser is not None:
            node = self._browser.directory(inode)
        if node is None:
            node = self._handles.node(inode)
        if node is None:
            raise FUSEError(errno.ESTALE)
        return node

    def _status(self, node: Node) -> Status | None:
        """Of its blob; None if it has none, or not any more."""
        if not isinstance(node, FileNode | SliceNode):
            return None
        try:
            return self._engine.blob_status(node.blob.id)
        except KeyError:  # removed while it is open
            return None

    def _shown(self, node: Node) -> int:
        """The inode number under which a name is shown now."""
        if self._passthrough.on and isinstance(node, FileNode) and self._engine.backing(node.blob.id):
            return node.ino | DIRECT
        return node.ino

    def _attributes(self, node: Node, ino: int) -> EntryAttributes:
        return self._about.of(node, ino, self._status(node))


async def _refuse_write(_self: WeightOperations, *_args: object) -> NoReturn:
    """Refuse to change anything. On a read-only mount the kernel mostly does so before we are asked."""
    raise FUSEError(errno.EROFS)


for _name in (
    *("create", "link", "mkdir", "mknod", "removexattr", "rename", "rmdir", "setattr", "setxattr", "symlink"),
    *("unlink", "write"),
):
    setattr(WeightOperations, _name, _refuse_write)
