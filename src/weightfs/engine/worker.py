"""What runs inside a fetch worker: network, hash and write, away from the process that answers the kernel.

Rules: a chunk is written only whole, only after its digest was compared with the list where there is one, and from the
very buffer that was hashed (docs/design.md, landing order). A mismatched chunk costs that chunk: the job goes on.
The worker knows nothing of what is present, and dies with its parent. What it hashes again is `hashjob`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import trio

from weightfs.core.geometry import KIB, BlobShape, ChunkSpan
from weightfs.core.manifest import Mirror
from weightfs.engine import wire
from weightfs.engine.causes import one_cause
from weightfs.engine.hashjob import PatientHasher
from weightfs.engine.origins import Origins
from weightfs.errors import FailureKind, SourceError
from weightfs.logs import set_up, traceback_of
from weightfs.sources import open_source, schemes
from weightfs.sources.base import FetchSettings, Source
from weightfs.stacks import tell_on_signal
from weightfs.undumpable import forbid_core_dumps

LANDINGS_PER_JOB = 2  # one chunk is hashed and written while the next one arrives
LANDING_THREADS = 8
# What a paced job receives before it says so and waits: little enough that many jobs together keep a low limit.
PACE_BYTES = 64 * KIB
NICENESS = 5  # of a worker: the process that answers the kernel goes first
PR_SET_PDEATHSIG = 1
# Of opening the data file: nothing is wrong with the cache, and what is missing comes back when others let go.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
CAPABILITY_VERSION_3 = 0x20080522  # <linux/capability.h>

Send = Callable[[wire.FromWorker], Awaitable[None]]

log = logging.getLogger(__name__)


class _Buffers:
    """Chunk buffers, reused; in all at most `limit` bytes, but always at least one buffer."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._free: dict[int, list[bytearray]] = {}
        self._changed = trio.Condition()

    async def take(self, length: int) -> bytearray:
        async with self._changed:
            while self._used and self._used + length > self._limit:
                await self._changed.wait()
            self._used += length
        pool = self._free.get(length)
        return pool.pop() if pool else bytearray(length)

    async def give(self, buffer: bytearray) -> None:
        with trio.CancelScope(shield=True):
            async with self._changed:
                self._used -= len(buffer)
                self._free = {len(buffer): self._free.get(len(buffer), [])}
                if (len(self._free[len(buffer)]) + 1) * len(buffer) <= self._limit:
                    self._free[len(buffer)].append(buffer)
                self._changed.notify_all()


@dataclass(slots=True)
class _Running:
    job: wire.FetchJob
    stop: int
    current: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    stopped: bool = False
    unpaid: int = 0
    go_on: trio.Event = field(default_factory=trio.Event)


async def _open(scheme: str, settings: FetchSettings) -> Source:
    return open_source(scheme, settings)


def _open_file(path: str, file: list[int]) -> int:
    """The data file, if it is still the one that readers have open. OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    found = os.fstat(fd)
    if file and [found.st_dev, found.st_ino] != file:
        os.close(fd)
        raise OSError(errno.ESTALE, "the file was replaced")
    return fd


def _pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


def _land(fd: int, data: memoryview, offset: int, expected: bytes, size: int) -> tuple[bool, bytes]:
    """Hash; compare; write the same buffer. In a thread. (whether it was written, the digest).

    A file that was cut to less than `size` is not written to: it would grow again, and what was cut off would read as
    zeros.
    """
    digest = hashlib.sha256(data).digest()
    if expected and digest != expected:
        return False, digest
    if os.fstat(fd).st_size < size:
        raise OSError(errno.ESTALE, "the file is shorter than it was made")
    _pwrite_all(fd, data, offset)
    return True, digest


def _disk_failure(job: int, error: OSError) -> wire.JobFailed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text = "the cache's filesystem is full; free some space or use --cache on a larger one"
        return wire.JobFailed(job, FailureKind.NO_SPACE, text)
    if error.errno in _PASSING:
        reason = os.strerror(error.errno)
        text = f"the cache file cannot be opened: {reason}; raise the limit of open files (LimitNOFILE)"
        return wire.JobFailed(job, FailureKind.WORKER, text)
    return wire.JobFailed(
        job, FailureKind.DISK, f"the cache cannot be written: {os.strerror(error.errno or errno.EIO)}"
    )


def _memory_failure(job: int, error: OSError) -> wire.JobFailed:
    reason = os.strerror(error.errno or errno.ENOMEM)
    return wire.JobFailed(
        job, FailureKind.NO_SPACE, f"the cache cannot take it, and memory cannot either: {reason}"
    )


class Worker:
    """Carries out jobs as they come; every job is answered by exactly one JobDone, JobFailed or Hashed.

    `memory`: the descriptor of the memory file, for what is not to be written to the disk.
    """

    def __init__(self, fetch: FetchSettings, buffer_bytes: int, send: Send, memory: int = -1) -> None:
        self._origins = Origins(fetch, _open)
        self._send = send
        self._memory = memory
        self._buffers = _Buffers(buffer_bytes)
        self._jobs: dict[int, _Running] = {}
        self._threads = trio.CapacityLimiter(LANDING_THREADS)
        self._hasher = PatientHasher()

    async def run(self, messages: AsyncIterator[wire.Message]) -> None:
        """Until `messages` ends; then all jobs are dropped."""
        try:
            async with trio.open_nursery() as nursery:
                async for message in messages:
                    await self._dispatch(message, nursery)
                nursery.cancel_scope.cancel()
        finally:
            self._hasher.close()
            await self._origins.aclose()

    async def _dispatch(self, message: wire.Message, nursery: trio.Nursery) -> None:
        match message:
            case wire.Settings(fetch):
                await self._origins.change(wire.fetch_settings_from_wire(fetch))
            case wire.FetchJob():
                self._jobs[message.job] = _Running(message, message.stop, message.start)
                nursery.start_soon(self._fetch, self._jobs[message.job])
            case wire.TrimJob(job, at):
                if running := self._jobs.get(job):
                    running.stop = min(running.stop, max(at, running.current + 1))
                    await self._send(wire.JobTrimmed(job, running.stop))
            case wire.GoOn(job):
                if running := self._jobs.get(job):
                    running.go_on.set()
            case wire.StopJob(job):
                if running := self._jobs.get(job):
                    running.stopped = True
                    running.scope.cancel()
            case wire.HashJob():
                nursery.start_soon(self._hash, message)
            case _:
                raise ValueError(f"a worker was sent {type(message).__name__}")

    async def _fetch(self, running: _Running) -> None:
        job = running.job
        answer: wire.FromWorker = wire.JobFailed(job.job, FailureKind.CANCELLED, "stopped")
        try:
            with running.scope:
                await self._transfer(running)
                answer = wire.JobDone(job.job)
        except SourceError as error:
            answer = wire.JobFailed(
                job.job, error.kind, str(error), error.mirror, error.retry_after, running.current
            )
        except OSError as error:
            answer = (_disk_failure if job.memory is None else _memory_failure)(job.job, error)
        finally:
            self._jobs.pop(job.job, None)
        await self._send(answer)

    async def _transfer(self, running: _Running) -> None:
        job = running.job
        shape = BlobShape(job.size, job.chunk_length)
        if job.memory is None:
            fd = await trio.to_thread.run_sync(_open_file, job.path, job.file)
        else:
            fd = os.dup(self._memory)
        try:
            span = shape.bytes_of(ChunkSpan(job.start, job.stop))
            mirror = Mirror(job.url, validator=job.validator)
            async with self._origins.using(urlsplit(job.url).scheme) as source:
                opened = source.open_range(mirror, shape, span, whole=job.whole)
                # A full disk and a broken stream at once: the disk's word counts.
                async with one_cause(OSError, SourceError), opened as pieces, trio.open_nursery() as landings:
                    await self._assemble(running, shape, pieces, fd, landings)
        finally:
            os.close(fd)

    async def _assemble(
        self,
        running: _Running,
        shape: BlobShape,
        pieces: AsyncIterator[bytes],
        fd: int,
        landings: trio.Nursery,
    ) -> None:
        """Cut the stream into chunks; start the landing of each when it is whole. Ends early where it was trimmed."""
        job = running.job
        wanted = frozenset(job.wanted) if job.whole else None
        slots = trio.Semaphore(LANDINGS_PER_JOB)
        chunk, filled = job.start, 0
        length = len(shape.span_of(chunk))
        buffer: bytearray | None = None
        try:
            async for piece in pieces:
                if job.paced:
                    await self._pay(running, len(piece))
                view = memoryview(piece)
                while view:
                    if filled == 0 and (wanted is None or chunk in wanted):
                        buffer = await self._buffers.take(shape.chunk_length)
                    count = min(length - filled, len(view))
                    if buffer is not None:
                        buffer[filled : filled + count] = view[:count]
                    filled += count
                    view = view[count:]
                    if filled < length:
                        continue
                    if buffer is not None:
                        await slots.acquire()
                        full, buffer = buffer, None
                        landings.start_soon(self._land_chunk, job, shape, chunk, full, fd, slots)
                    chunk, filled = chunk + 1, 0
                    if chunk >= running.stop:
                        return
                    running.current = chunk
                    length = len(shape.span_of(chunk))
        finally:
            if buffer is not None:
                await self._buffers.give(buffer)

    async def _pay(self, running: _Running, nbytes: int) -> None:
        """Take the next bytes off the line only when the engine says so; the origin is slowed down by TCP."""
        running.unpaid += nbytes
        if running.unpaid >= PACE_BYTES:
            running.go_on = trio.Event()
            await self._send(wire.Received(running.job.job, running.unpaid))
            running.unpaid = 0
            await running.go_on.wait()

    async def _land_chunk(
        self,
        job: wire.FetchJob,
        shape: BlobShape,
        chunk: int,
        buffer: bytearray,
        fd: int,
        slots: trio.Semaphore,
    ) -> None:
        span = shape.span_of(chunk)
        index = (chunk - job.start) * 64
        expected = bytes.fromhex(job.digests[index : index + 64].strip(wire.UNKNOWN))
        try:
            # A thread that writes is never abandoned, so a stopped job writes nothing afterwards.
            data = memoryview(buffer)[: len(span)]
            offset, size = (span.start, job.size) if job.memory is None else (job.memory + span.start, 0)
            landed, digest = await trio.to_thread.run_sync(
                _land, fd, data, offset, expected, size, limiter=self._threads
            )
        finally:
            await self._buffers.give(buffer)
        kind = wire.ChunkLanded if landed else wire.ChunkMismatched
        with trio.CancelScope(
            shield=True
        ):  # it is written: that must be known even if the connection broke just now
            await self._send(kind(job.job, chunk, digest.hex()))
        slots.release()

    async def _hash(self, job: wire.HashJob) -> None:
        await self._send(await self._hasher.carry_out(job))


# ---- the process


async def serve(stream: trio.SocketStream, memory: int) -> None:
    """Speak with the engine over `stream` until it closes. `memory`: the memory file's descriptor."""
    send_channel, outgoing = trio.open_memory_channel[wire.FromWorker](256)
    messages = wire.read_messages(stream)
    hello = await anext(messages)
    if not isinstance(hello, wire.Hello):
        raise TypeError("the engine did not say hello first")
    worker = Worker(wire.fetch_settings_from_wire(hello.fetch), hello.buffer_bytes, send_channel.send, memory)

    async def write() -> None:
        async for message in outgoing:
            await stream.send_all(wire.encode(message))

    async def beat() -> None:
        while True:
            await send_channel.send(wire.Alive())
            await trio.sleep(hello.beat_seconds)

    async with one_cause(), trio.open_nursery() as nursery:
        nursery.start_soon(write)
        nursery.start_soon(beat)
        await worker.run(messages)
        nursery.cancel_scope.cancel()


def drop_capabilities() -> None:
    """Give up what a service was given to mount with (CAP_SYS_ADMIN): this process talks to the network.

    Before there are threads: capset(2) is about one of them. Root keeps what it is: a file:// origin may be anybody's.
    """
    if os.geteuid() != 0:
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)  # version, this process
        none = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice 32 bits each
        ctypes.CDLL(None, use_errno=True).capset(header, none)


def die_with_parent(parent: int) -> None:
    """SIGKILL when the engine's process ends, however it ends: no writer may outlive the owner of the index."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """`python -m weightfs.engine.worker FD PARENT_PID MEMORY_FD`."""
    fd, parent, memory = map(int, sys.argv[1:4])
    forbid_core_dumps()
    drop_capabilities()
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the engine decides
    tell_on_signal()  # else it would end of what is meant for the daemon, as `systemctl kill` sends it
    sys.setswitchinterval(0.001)  # hashing threads and the network share the interpreter
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    schemes()  # imports every source: else the first reader would wait for that, 0.3 s of CPU

    async def run() -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
        try:
            await serve(stream, memory)
        except* trio.BrokenResourceError:
            pass  # the engine is gone, and so are we

    set_up("warning")  # on stderr, which is the daemon's
    try:
        trio.run(run)
    except Exception as error:  # noqa: BLE001  # the process ends here
        log.critical("The fetch worker failed: %s", traceback_of(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
