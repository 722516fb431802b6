"""The pool of fetch workers: processes (or, with `workers = 0`, this one) that carry out jobs.

Rules: every submitted job is answered exactly once to `handle`, also when its worker dies (JobFailed, kind WORKER), and
only after that process is gone, so that nobody writes what somebody else may be given. A worker that is silent for
`EngineSettings.worker_silence_seconds` is killed. Queues are bounded by the planner's job limit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import trio

from weightfs.engine import wire
from weightfs.engine.causes import one_cause
from weightfs.engine.settings import EngineSettings
from weightfs.engine.worker import Worker
from weightfs.errors import FailureKind
from weightfs.sources.base import FetchSettings

log = logging.getLogger(__name__)

BEATS_PER_SILENCE = 6
START_SECONDS = 30.0  # until the first sign of life: imports, on a busy machine
QUEUE = 4096  # messages to one worker; the planner has far fewer jobs
RESTART_DELAYS = (0.0, 0.5, 2.0, 10.0)  # after quick deaths in a row
QUICK_DEATH_SECONDS = 10.0

Handle = Callable[[wire.FromWorker], None]


@dataclass(slots=True)
class _Slot:
    number: int
    jobs: set[int] = field(default_factory=set)
    outgoing: trio.MemorySendChannel[wire.ToWorker] | None = None
    pid: int = 0


class WorkerPool:
    """Give `handle` to it, `run` it in a nursery, then `submit`. `handle` is called in the trio thread."""

    def __init__(self, settings: EngineSettings, handle: Handle, *, keep_fds: tuple[int, ...] = ()) -> None:
        self._settings = settings
        self._fetch = settings.fetch
        self._handle = handle
        # Open in every worker: the cache's lock outlives the engine for as long as one of its writers lives.
        self._keep_fds = keep_fds
        self._slots = [_Slot(number) for number in range(max(1, settings.workers))]
        self._where: dict[int, _Slot] = {}
        self._waiting: list[
            wire.FetchJob | wire.HashJob
        ] = []  # while no worker is up; bounded by the planner

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the living workers; empty with `workers = 0`."""
        return tuple(slot.pid for slot in self._slots if slot.pid)

    @property
    def jobs(self) -> int:
        """How many jobs are not answered yet."""
        return len(self._where) + len(self._waiting)

    def submit(self, job: wire.FetchJob | wire.HashJob) -> None:
        """Give the job to the least loaded worker."""
        ready = [slot for slot in self._slots if slot.outgoing is not None]
        if not ready:
            self._waiting.append(job)
            return
        slot = min(ready, key=lambda slot: len(slot.jobs))
        slot.jobs.add(job.job)
        self._where[job.job] = slot
        self._send(slot, job)

    def tell(self, message: wire.TrimJob | wire.StopJob | wire.GoOn) -> None:
        """Pass it to the worker that has the job, if one has."""
        slot = self._where.get(message.job)
        if slot is not None:
            self._send(slot, message)
            return
        for job in [job for job in self._waiting if job.job == message.job]:
            self._waiting.remove(job)
            self._handle(wire.JobFailed(job.job, FailureKind.CANCELLED, "stopped"))

    def own(self, url: str) -> None:
        """The user's headers may go to this URL's origin too: it is a ref's."""
        if self._fetch.headers and url not in self._fetch.header_origins:
            self.change(replace(self._fetch, header_origins=(*self._fetch.header_origins, url)))

    def change(self, fetch: FetchSettings) -> None:
        """How to fetch from now on; the origins that `own` has named keep the user's headers."""
        origins = tuple(dict.fromkeys((*fetch.header_origins, *self._fetch.header_origins)))
        self._fetch = replace(fetch, header_origins=origins)
        for slot in self._slots:
            self._send(slot, wire.Settings(wire.fetch_settings_to_wire(self._fetch)))

    def _send(self, slot: _Slot, message: wire.ToWorker) -> None:
        if slot.outgoing is not None:
            # A dead worker's channel is closed (its jobs are about to be answered); a full one cannot be: QUEUE.
            with contextlib.suppress(trio.BrokenResourceError):
                slot.outgoing.send_nowait(message)

    def _answered(self, message: wire.FromWorker) -> None:
        match message:
            case wire.Alive():
                return
            case wire.JobDone(job) | wire.JobFailed(job) | wire.Hashed(job):
                slot = self._where.pop(job, None)
                if slot is not None:
                    slot.jobs.discard(job)
        self._handle(message)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the workers alive until cancelled."""
        async with trio.open_nursery() as nursery:
            for slot in self._slots:
                nursery.start_soon(self._keep, slot)
            task_status.started()

    async def _keep(self, slot: _Slot) -> None:
        deaths = 0
        once = self._in_process if self._settings.workers == 0 else self._process
        while True:
            born = trio.current_time()
            try:
                await once(slot)
            finally:
                slot.outgoing, slot.pid = None, 0
                self._bury(slot)
            deaths = deaths + 1 if trio.current_time() - born < QUICK_DEATH_SECONDS else 1
            log.warning("fetch worker %d ended; starting another", slot.number)
            await trio.sleep(RESTART_DELAYS[min(deaths - 1, len(RESTART_DELAYS) - 1)])

    def _bury(self, slot: _Slot) -> None:
        for job in sorted(slot.jobs):
            self._where.pop(job, None)
        jobs, slot.jobs = sorted(slot.jobs), set()
        for job in jobs:
            self._handle(wire.JobFailed(job, FailureKind.WORKER, "the fetch worker ended"))

    def _open(self, slot: _Slot) -> trio.MemoryReceiveChannel[wire.ToWorker]:
        send, receive = trio.open_memory_channel[wire.ToWorker](QUEUE)
        slot.outgoing = send
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            self.submit(job)
        return receive

    async def _in_process(self, slot: _Slot) -> None:
        async def send(message: wire.FromWorker) -> None:
            self._answered(message)
            await trio.lowlevel.checkpoint()

        worker = Worker(self._fetch, self._settings.worker_buffer_bytes, send)
        receive = self._open(slot)

        async def messages() -> AsyncIterator[wire.Message]:
            async for message in receive:
                yield message

        await worker.run(messages())

    async def _process(self, slot: _Slot) -> None:
        """One life of one worker process."""
        try:
            process, ours = self._spawn()
        except (
            OSError
        ) as error:  # out of descriptors, processes or memory: it passes, or the log says why not
            log.error("cannot start fetch worker %d: %s", slot.number, error.strerror)
            return
        slot.pid = process.pid
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        try:
            await self._converse(slot, stream)
        except (trio.BrokenResourceError, wire.BadMessageError) as error:
            log.warning("fetch worker %d (pid %d): %s", slot.number, process.pid, error)
        finally:
            slot.outgoing = None
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)
                # Not asked to end: what it has not reported is not recorded, so nothing is lost, and one that is
                # still starting would be waited for.
                process.kill()
                await _ended(process)

    def _spawn(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start a process; our end of the socket pair to it. OSError.

        In this thread, not in one of trio's pool as trio.open_process has it: PR_SET_PDEATHSIG is about the *thread*
        that forked (prctl(2)), and a pool thread ends after ten idle seconds. vfork and exec take about a millisecond.
        """
        ours, theirs = socket.socketpair()
        argv = [sys.executable, "-m", "weightfs.engine.worker", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            try:
                process = subprocess.Popen(  # noqa: S603 - our own module, no shell
                    argv, pass_fds=[theirs.fileno(), *self._keep_fds], stdin=subprocess.DEVNULL
                )
            except BaseException:
                ours.close()
                raise
        return process, ours

    async def _converse(self, slot: _Slot, stream: trio.SocketStream) -> None:
        bound = self._settings.worker_silence_seconds
        fetch = self._fetch
        hello = wire.Hello(
            wire.fetch_settings_to_wire(fetch),
            self._settings.worker_buffer_bytes,
            bound / BEATS_PER_SILENCE,
        )
        silence = trio.CancelScope(deadline=trio.current_time() + max(bound, START_SECONDS))
        receive: trio.MemoryReceiveChannel[wire.ToWorker]

        async def write() -> None:
            async for message in receive:
                await stream.send_all(wire.encode(message))

        async with one_cause(), trio.open_nursery() as nursery:
            with silence:
                await stream.send_all(wire.encode(hello))
                while (
                    fetch is not self._fetch
                ):  # they changed meanwhile, and `change` could not tell this one
                    fetch = self._fetch
                    await stream.send_all(wire.encode(wire.Settings(wire.fetch_settings_to_wire(fetch))))
                receive = self._open(slot)
                nursery.start_soon(write)
                async for message in wire.read_messages(stream):
                    silence.deadline = trio.current_time() + bound
                    self._answered(message)  # type: ignore[arg-type]  # a worker sends nothing but FromWorker
            if silence.cancelled_caught:
                log.warning(
                    "fetch worker %d was silent for %d s; replacing it", slot.number, math.ceil(bound)
                )
                os.kill(slot.pid, signal.SIGKILL)  # not waited for yet: the number is still its own
            nursery.cancel_scope.cancel()


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Wait for the process to end, and collect it."""
    if process.poll() is not None:
        return  # collected before: its number may be somebody else's by now
    descriptor = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)
    process.wait()
