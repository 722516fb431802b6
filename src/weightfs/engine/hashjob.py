"""What a fetch worker hashes again, from the disk: for sealing and scrubbing, in a thread that yields to all others.

Rules: a chunk is fed to the running hash only after it was compared, if it is to be; and what cannot be read is bad,
never zeros.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import trio

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.engine import wire
from weightfs.engine.running import SAVABLE, GitSha1, RunningSha256
from weightfs.errors import FailureKind

PATIENT_NICENESS = 15  # of the thread


class PatientHasher:
    """One thread that yields the processor to everybody else: what is hashed again can wait, readers and fetches not.

    A thread of its own, because Linux keeps niceness per thread and an ordinary user cannot take it back.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "hash", initializer=self._yield)

    @staticmethod
    def _yield() -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PATIENT_NICENESS)

    async def carry_out(self, job: wire.HashJob) -> wire.Hashed | wire.JobFailed:
        """The job's answer. A cancelled job is taken back if it has not begun, and is left to end if it has."""
        token, done = trio.lowlevel.current_trio_token(), trio.Event()
        future = self._pool.submit(hash_chunks, job)
        future.add_done_callback(lambda _: _tell(token, done))
        try:
            await done.wait()
        finally:
            future.cancel()
        try:
            return future.result()
        except OSError as error:
            text = f"the cache cannot be read: {os.strerror(error.errno or errno.EIO)}"
            return wire.JobFailed(job.job, FailureKind.DISK, text)

    def close(self) -> None:
        """Take no more jobs; does not wait."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _tell(token: trio.lowlevel.TrioToken, done: trio.Event) -> None:
    with contextlib.suppress(trio.RunFinishedError):
        token.run_sync_soon(done.set)


def _read_span(fd: int, span: ByteSpan) -> bytes:
    """All of `span`, or OSError: a short read is a fault, never zeros."""
    data = os.pread(fd, len(span), span.start)
    while len(data) < len(span):
        more = os.pread(fd, len(span) - len(data), span.start + len(data))
        if not more:
            raise OSError(errno.EIO, "short read of the cache file")
        data += more
    return data


def hash_chunks(job: wire.HashJob) -> wire.Hashed:
    """Carry out a HashJob, in a thread. A chunk is fed to the running hash only after it was compared, if it is."""
    shape = BlobShape(job.size, job.chunk_length)
    running = _hash_of_whole(job) if job.running else None
    bad: list[int] = []
    chunk = job.start
    fd = os.open(job.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for chunk in range(job.start, job.stop):
            index = (chunk - job.start) * 64
            try:
                data = _read_span(fd, shape.span_of(chunk))
            except OSError:
                data = b""
            unlike = job.digests and hashlib.sha256(data).hexdigest() != job.digests[index : index + 64]
            if unlike or not data:
                bad.append(chunk)
                if running:
                    break
            elif running:
                running.update(data)
        else:
            chunk = job.stop
    finally:
        os.close(fd)
    if running is None:
        return wire.Hashed(job.job, job.stop, bad)
    if chunk == shape.chunk_count:
        return wire.Hashed(job.job, chunk, bad, "", running.digest().hex())
    state = running.state().hex() if isinstance(running, RunningSha256) and SAVABLE and chunk else ""
    return wire.Hashed(job.job, chunk, bad, state)


def _hash_of_whole(job: wire.HashJob) -> RunningSha256 | GitSha1:
    if job.git:
        return GitSha1(job.size)
    return RunningSha256(bytes.fromhex(job.state) or None, job.start * job.chunk_length)
