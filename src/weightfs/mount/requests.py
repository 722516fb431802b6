"""The kernel's requests that are in flight in one mount: each from its begin to its answer.

Rules. Registering costs a read next to nothing: a small object, and its place in a dict; what people want to know is
worked out when they ask. A task handles one request at a time. What may wait goes through `Shelter.run`, which runs it
in a task of its own, so that the request can be answered although the work goes on: in a thread that hangs on a sick
disk, which nobody can cancel. Only reads get there. At most `LEFT_AT_MOST` are left behind; with so many, a read that
would wait fails at once. Whatever else waits can be cancelled, and goes on as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar, cast

import trio

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId
from weightfs.core.overdue import Bound

T = TypeVar("T")

# The engine's disk threads are fewer, and whoever waits for one of them can be cancelled; one more per blob may hang.
LEFT_AT_MOST: Final = 256
NAME_LENGTH: Final = 255  # characters of a name that is looked up: NAME_MAX
DRAIN_SECONDS: Final = 5.0  # until the log says what the end waits for

_log = logging.getLogger(__name__)


class OverdueError(Exception):
    """The watchdog ended the wait, or too many works are left behind."""


@dataclass(slots=True, eq=False)
class Wait:
    """Work in a task of its own. `since`: trio's clock. `left`: its request is answered, or has gone."""

    since: float
    task: trio.lowlevel.Task | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    result: object = None
    error: Exception | None = None
    left: bool = False
    ended: bool = False


@dataclass(slots=True, eq=False)
class Request:
    """One request. `args` are those of its handler. A read of a blob says which `span` of it."""

    number: int
    op: str
    args: tuple[object, ...]
    since: float
    task: trio.lowlevel.Task
    blob: BlobId | None = None
    span: ByteSpan | None = None
    wait: Wait | None = None
    held: bool = False  # its answer is: see `penance`
    bound: Bound | None = None  # the watchdog's
    told: bool = False  # by the watchdog

    @property
    def inode(self) -> int:
        """The inode, or the directory of what is looked up; 0 if it has none."""
        return self.args[0] if self.args and isinstance(self.args[0], int) else 0

    @property
    def pid(self) -> int | None:
        """Of the caller. The kernel says nothing of it for reads and what else has a handle only."""
        pid = getattr(self.args[-1], "pid", None) if self.args else None
        return pid if isinstance(pid, int) else None

    @property
    def name(self) -> str:
        """What is looked up, or the extended attribute that is asked for."""
        names = [arg for arg in self.args if isinstance(arg, bytes)]
        return names[0].decode(errors="replace")[:NAME_LENGTH] if names else ""

    @property
    def offset_and_size(self) -> tuple[int, int] | tuple[None, None]:
        """Of a read."""
        if self.op != "read":
            return None, None
        return cast("tuple[int, int]", self.args[1:3])


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """One request, for people. `age` and `waits` (for its work) in seconds; `blob` and `span` of a read."""

    number: int
    op: str
    age: float
    waits: float | None
    inode: int
    name: str
    pid: int | None
    offset: int | None
    size: int | None
    blob: BlobId | None
    span: ByteSpan | None
    held: bool
    overdue: bool


class Requests:
    """Those of one mount, oldest first. Belongs to one trio run."""

    def __init__(self) -> None:
        self._running: dict[trio.lowlevel.Task, Request] = {}
        self._next = 0
        self.overdue = 0  # since the start: what the watchdog told of
        self.shelter = Shelter()

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._running.values()))

    def __len__(self) -> int:
        return len(self._running)

    @property
    def left_behind(self) -> int:
        """Works that have not ended, while their requests have been answered or have gone."""
        return len(self.shelter.left_behind)

    def begin(self, op: str, args: tuple[object, ...]) -> Request:
        """The current task handles a request from now on, until `end`."""
        task = trio.lowlevel.current_task()
        self._next += 1
        request = self._running[task] = Request(self._next, op, args, trio.current_time(), task)
        return request

    def end(self, request: Request) -> None:
        """It has its answer."""
        del self._running[request.task]

    def mine(self) -> Request:
        """The one that the current task handles."""
        return self._running[trio.lowlevel.current_task()]

    async def wait(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of `work`, for which the current task's request waits. OverdueError; what `work` raises."""
        return await self.shelter.run(self.mine(), work)

    def status(self, at_most: int) -> list[RequestStatus]:
        """The oldest of them."""
        now = trio.current_time()
        return [_describe(request, now) for request in list(self._running.values())[:at_most]]


class Shelter:
    """Runs work for requests in trio's system tasks, which outlive the request; `drained` waits for them."""

    def __init__(self) -> None:
        self._left: set[Wait] = set()
        self._ended = trio.Event()

    @property
    def left_behind(self) -> tuple[Wait, ...]:
        """Works that have not ended, while their requests have been answered or have gone."""
        return tuple(self._left)

    async def run(self, request: Request, work: Callable[[], Awaitable[T]]) -> T:
        """See `Requests.wait`."""
        if request.op == "read" and len(self._left) >= LEFT_AT_MOST:
            raise OverdueError(f"{LEFT_AT_MOST} earlier reads hang: `weightfs debug stacks` shows where")
        wait = request.wait = Wait(trio.current_time())
        name = f"{request.op} request {request.number}"
        wait.task = trio.lowlevel.spawn_system_task(self._work, wait, work, name=name)
        try:
            await wait.done.wait()
        finally:
            request.wait = None
            self._leave(wait)  # if it has not ended, the mount is about to
        if wait.error is not None:
            raise wait.error
        return cast("T", wait.result)

    def give_up(self, wait: Wait, reason: str) -> None:
        """The request gets OverdueError now; the work is cancelled, and ends when it can."""
        if not wait.ended:
            wait.error = OverdueError(reason)
            self._leave(wait)
            wait.done.set()

    def _leave(self, wait: Wait) -> None:
        if not wait.ended and not wait.left:
            wait.left = True
            self._left.add(wait)
            wait.scope.cancel()

    async def _work(self, wait: Wait, work: Callable[[], Awaitable[object]]) -> None:
        result, error = None, None
        try:
            with wait.scope:
                result = await work()
        except Exception as failure:  # noqa: BLE001 - raised where the request is handled
            error = failure
        finally:
            if not wait.left:
                wait.result, wait.error = result, error
            wait.ended = True
            self._left.discard(wait)
            self._ended.set()
            wait.done.set()

    async def drained(self) -> None:
        """Return when nothing is left behind. Without a bound: a thread may be in the index, which is closed next."""
        with trio.move_on_after(DRAIN_SECONDS):
            await self._until_none_is_left()
        if self._left:
            _log.error("The end waits for %d threads that hang on the cache's disk", len(self._left))
        await self._until_none_is_left()

    async def _until_none_is_left(self) -> None:
        while self._left:
            self._ended = trio.Event()
            await self._ended.wait()


def _describe(request: Request, now: float) -> RequestStatus:
    offset, size = request.offset_and_size
    return RequestStatus(
        number=request.number,
        op=request.op,
        age=now - request.since,
        waits=None if request.wait is None else now - request.wait.since,
        inode=request.inode,
        name=request.name,
        pid=request.pid,
        offset=offset,
        size=size,
        blob=request.blob,
        span=request.span,
        held=request.held,
        overdue=request.told,
    )
