"""Naming a path is enough: a lookup below `models/` of what is not pinned asks the origin, and pins it.

Rules. Only a lookup asks, and only of a name that `core.browse` takes for a ref; readdir, getattr and every name that
is known never do. One request for one ref at a time, whoever waits for it; none again within the time to live of its
answer. ENOENT is said only if the origin said that there is no such thing, or if nobody could have it; what went wrong
on the way is another errno, and is tried again after a few seconds. A lookup waits for a bounded time, since it cannot
be killed. Directories on the way to refs are virtual: they have a number as soon as they are looked up, and are in no
listing. All memory is bounded, least recently used first out: who then comes with a forgotten number gets ESTALE, on
which the kernel looks the path up again.
"""

from __future__ import annotations

import errno
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

import trio
from pyfuse3 import FUSEError

from weightfs.core.browse import Between, target_of
from weightfs.core.ref import Ref
from weightfs.errors import FailureKind, SourceError, WeightfsError
from weightfs.logs import redact
from weightfs.mount.errno import errno_of_name
from weightfs.mount.inodes import DirNode, Namespace, empty_directory
from weightfs.mount.ports import MountedEngine

MODELS: Final = "models"  # the layout whose paths can be browsed
BRIEFLY: Final = (
    3.0  # seconds: a loop of `ls` on a dead network makes twenty requests a minute, not thousands
)
DIRECTORIES: Final = 4096  # virtual ones; about 1 MB
ANSWERS: Final = 4096  # remembered; about 1 MB
AT_ONCE: Final = 8  # requests; a walk over guessed names does not take the fetches' place

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the origin said of a ref: an errno, or 0 for that it is pinned. It holds until a time of trio's clock."""

    errno: int
    until: float


@dataclass(slots=True)
class _Request:
    """One that is under way."""

    done: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    errno: int = errno.EIO  # what those who wait are told, until it is known better


class Browser:
    """Looks up what the tree does not have. Belongs to one mount."""

    def __init__(self, engine: MountedEngine, *, ttl: float, timeout: float) -> None:
        self._engine = engine
        self._ttl = ttl
        self._timeout = timeout
        self._directories: OrderedDict[int, DirNode] = OrderedDict()
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._requests: dict[str, _Request] = {}
        self._limit = trio.CapacityLimiter(AT_ONCE)
        self._stopped = False

    def directory(self, ino: int) -> DirNode | None:
        """A virtual directory that was looked up."""
        node = self._directories.get(ino)
        if node is not None:
            self._directories.move_to_end(ino)
        return node

    def stop(self) -> None:
        """The mount is about to go: who waits gets an error at once."""
        self._stopped = True
        for request in self._requests.values():
            request.scope.cancel()

    async def find(self, namespace: Namespace, parent: int, name: str) -> DirNode | None:
        """The virtual directory `name` in `parent`; None if `name` is pinned now, and the tree has it.

        `namespace` has no such name. FUSEError: there is none, or it could not be found out.
        """
        above = namespace.node(parent) or self.directory(parent)
        if above is None:
            raise FUSEError(errno.ESTALE)
        path = f"{above.path}/{name}" if isinstance(above, DirNode) else ""
        target = target_of(path.removeprefix(f"{MODELS}/")) if path.startswith(f"{MODELS}/") else None
        match target:
            case Ref():
                code = await self._resolved(target)
                if code:
                    raise FUSEError(code)
                return None
            case Between():
                return self._virtual(namespace, path, parent)
            case None:
                raise FUSEError(errno.ENOENT)

    def _virtual(self, namespace: Namespace, path: str, parent: int) -> DirNode:
        node = empty_directory(path, parent)
        if namespace.node(node.ino) is not None:
            raise FUSEError(errno.ENOENT)  # something else has its number, once in 2^62
        self._directories[node.ino] = node
        self._directories.move_to_end(node.ino)
        while len(self._directories) > DIRECTORIES:
            self._directories.popitem(last=False)
        return node

    async def _resolved(self, ref: Ref) -> int:
        """0 if the ref is pinned, or was within the time to live; else the errno."""
        known = self._answers.get(ref.text)
        if known is not None and trio.current_time() < known.until:
            self._answers.move_to_end(ref.text)
            return (
                known.errno or errno.ENOENT
            )  # pinned, and removed since: it is not fetched behind one's back
        request = self._requests.get(ref.text)
        if request is not None:
            await request.done.wait()
            return request.errno
        if self._stopped:
            return errno.EIO
        request = self._requests[ref.text] = _Request()
        try:
            request.errno = await self._ask(ref, request)
        finally:
            del self._requests[ref.text]
            request.done.set()
        return request.errno

    async def _ask(self, ref: Ref, request: _Request) -> int:
        error: Exception | None = None
        request.scope.deadline = trio.current_time() + self._timeout
        with request.scope:
            try:
                async with self._limit:
                    await self._engine.browse(ref)
            except WeightfsError as failure:
                error = failure
            except Exception as failure:  # noqa: BLE001 - remembered like any other, or a loop of `ls` would fill the log
                _log.exception("The engine failed to look up %s", redact(ref.text))
                error = failure
        if request.scope.cancelled_caught:
            if self._stopped:
                return errno.EIO
            error = TimeoutError(f"no answer within {self._timeout:g} s")
        return self._remember(ref, error)

    def _remember(self, ref: Ref, error: Exception | None) -> int:
        code = 0 if error is None else errno_of_name(error)
        lasting = isinstance(error, SourceError) and error.kind in (FailureKind.NOT_FOUND, FailureKind.AUTH)
        holds = self._ttl if error is None or lasting else min(BRIEFLY, self._ttl)
        self._answers[ref.text] = _Answer(code, trio.current_time() + holds)
        self._answers.move_to_end(ref.text)
        while len(self._answers) > ANSWERS:
            self._answers.popitem(last=False)
        if error is None:
            _log.info("%s was named, and is pinned", redact(ref.text))
        elif lasting:
            _log.info("%s was named, but cannot be had: %s", redact(ref.text), error)
        else:
            _log.warning("%s was named, but could not be looked up: %s", redact(ref.text), error)
        return code
