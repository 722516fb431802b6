"""The pool of worker processes: deaths, silence, strange words; every job answered once, after its writer is gone."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from weightfs.core.geometry import MIB
from weightfs.engine import wire
from weightfs.engine.settings import EngineSettings
from weightfs.engine.workers import WorkerPool
from weightfs.errors import FailureKind
from weightfs.testing.origin import Fault, FaultKind, Origin, open_origin
from weightfs.testing.waiting import eventually

SETTINGS = EngineSettings(workers=1)
SECONDS = 60  # bounds for what a busy machine does with real processes


class Heard:
    """What the pool's owner was told."""

    def __init__(self) -> None:
        self.messages: list[wire.FromWorker] = []

    def handle(self, message: wire.FromWorker) -> None:
        self.messages.append(message)

    async def answer(self, job: int) -> wire.FromWorker:
        await eventually(lambda: self.answers(job))
        return self.answers(job)[0]

    def answers(self, job: int) -> list[wire.FromWorker]:
        ends = (wire.JobDone, wire.JobFailed, wire.Hashed)
        return [message for message in self.messages if isinstance(message, ends) and message.job == job]


@asynccontextmanager
async def running_pool(
    settings: EngineSettings = SETTINGS, *, keep_fds: tuple[int, ...] = ()
) -> AsyncIterator[tuple[WorkerPool, Heard]]:
    heard = Heard()
    pool = WorkerPool(settings, heard.handle, keep_fds=keep_fds)
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        yield pool, heard
        nursery.cancel_scope.cancel()


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def fetch_job(number: int, origin: Origin, path: Path, size: int, **more: object) -> wire.FetchJob:
    job = wire.FetchJob(number, str(path), size, MIB, 0, -(-size // MIB), origin.url("m"), "")
    return replace(job, **more)  # type: ignore[arg-type]  # fields of the job


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_a_killed_worker_is_replaced_and_its_jobs_are_answered_after_it_is_gone(tmp_path: Path) -> None:
    async with open_origin({"/m": bytes(3 * MIB)}) as origin, running_pool() as (pool, heard):
        origin.always["/m"] = Fault(FaultKind.STALL_MID_BODY, after=MIB)
        pool.submit(fetch_job(1, origin, sparse(tmp_path / "m", 3 * MIB), 3 * MIB))
        await eventually(lambda: any(isinstance(message, wire.ChunkLanded) for message in heard.messages))
        (first,) = pool.pids
        os.kill(first, signal.SIGKILL)
        answer = await heard.answer(1)
        assert isinstance(answer, wire.JobFailed)
        assert answer.kind == FailureKind.WORKER
        assert gone(first)
        origin.always.clear()
        pool.submit(fetch_job(2, origin, tmp_path / "m", 3 * MIB))
        assert await heard.answer(2) == wire.JobDone(2)
        assert pool.pids
        assert pool.pids != (first,)
        assert len(heard.answers(1)) == 1


async def test_a_worker_that_dies_while_it_is_written_to_does_not_end_the_engine(tmp_path: Path) -> None:
    """Regression: the broken pipe of the writing task came as a group, which nobody caught."""
    async with open_origin({"/m": bytes(MIB)}) as origin, running_pool() as (pool, heard):
        await eventually(lambda: pool.pids)
        path = sparse(tmp_path / "m", MIB)
        for number in range(1, 40):
            pool.submit(fetch_job(number, origin, path, MIB, digests="ab" * 32))
            if number == 20:
                os.kill(pool.pids[0], signal.SIGKILL)
        for number in range(1, 40):
            await heard.answer(number)
        assert pool.jobs == 0


async def test_a_stopped_worker_is_replaced_after_its_silence_bound(tmp_path: Path) -> None:
    settings = replace(SETTINGS, worker_silence_seconds=1.0)
    async with open_origin({"/m": bytes(MIB)}) as origin, running_pool(settings) as (pool, heard):
        pool.submit(fetch_job(1, origin, sparse(tmp_path / "m", MIB), MIB))
        assert await heard.answer(1) == wire.JobDone(1)
        (first,) = pool.pids
        os.kill(first, signal.SIGSTOP)
        pool.submit(fetch_job(2, origin, tmp_path / "m", MIB))
        answer = await heard.answer(2)
        assert isinstance(answer, wire.JobFailed)
        assert answer.kind == FailureKind.WORKER
        assert gone(first)
        pool.submit(fetch_job(3, origin, tmp_path / "m", MIB))
        assert await heard.answer(3) == wire.JobDone(3)


async def test_workers_are_started_from_the_thread_that_lives_as_long_as_the_engine() -> None:
    """Regression: they were forked in a thread of trio's pool, and PR_SET_PDEATHSIG killed them when that one ended."""
    async with running_pool() as (pool, _):
        await eventually(lambda: pool.pids)
        task = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        assert str(pool.pids[0]) in task


async def test_strange_words_of_a_worker_cost_it_its_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: what is no message came as a group, and ended the engine."""
    async with running_pool() as (pool, heard):
        await eventually(
            lambda: any(isinstance(message, wire.Alive) for message in heard.messages) or pool.pids
        )
        (first,) = pool.pids
        broken = iter([wire.BadMessageError("not a worker message")])
        decode = wire.decode

        def strange(line: bytes) -> wire.Message:
            for error in broken:
                raise error
            return decode(line)

        monkeypatch.setattr(wire, "decode", strange)
        job = wire.HashJob(-1, "/nonexistent", MIB, MIB, 0, 1, "ab" * 32)
        pool.submit(job)
        answer = await heard.answer(-1)
        assert isinstance(answer, wire.JobFailed)
        await eventually(lambda: pool.pids and pool.pids != (first,))
        assert gone(first)


async def test_a_worker_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Regression: EMFILE or EAGAIN at a restart ended the engine."""
    failures = iter([OSError(24, "Too many open files")])
    popen = subprocess.Popen

    def start(*args: object, **kwargs: object) -> object:
        for error in failures:
            raise error
        return popen(*args, **kwargs)  # type: ignore[call-overload]  # passed on as it came

    monkeypatch.setattr(subprocess, "Popen", start)
    async with open_origin({"/m": bytes(MIB)}) as origin, running_pool() as (pool, heard):
        pool.submit(fetch_job(1, origin, sparse(tmp_path / "m", MIB), MIB))
        assert await heard.answer(1) == wire.JobDone(1)


async def test_a_job_that_waits_for_a_worker_can_be_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start(*args: object, **kwargs: object) -> object:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", start)
    async with running_pool() as (pool, heard):
        pool.submit(wire.FetchJob(1, str(tmp_path / "m"), MIB, MIB, 0, 1, "http://127.0.0.1:1/m", ""))
        assert pool.jobs == 1
        pool.tell(wire.StopJob(1))
        answer = await heard.answer(1)
        assert isinstance(answer, wire.JobFailed)
        assert answer.kind == FailureKind.CANCELLED
        assert pool.jobs == 0


async def test_a_file_that_was_cut_is_not_written_to(tmp_path: Path) -> None:
    """It would grow again, and what was cut off of it would read as zeros."""
    async with open_origin({"/m": b"x" * (3 * MIB)}) as origin, running_pool() as (pool, heard):
        path = sparse(tmp_path / "m", MIB + 1)
        pool.submit(fetch_job(1, origin, path, 3 * MIB))
        answer = await heard.answer(1)
        assert isinstance(answer, wire.JobFailed)
        assert answer.kind == FailureKind.DISK
        assert path.read_bytes() == bytes(MIB + 1)


async def test_a_file_that_was_replaced_is_not_written_to(tmp_path: Path) -> None:
    async with open_origin({"/m": b"x" * MIB}) as origin, running_pool() as (pool, heard):
        path = sparse(tmp_path / "m", MIB)
        meant = sparse(tmp_path / "other", MIB).stat()
        pool.submit(fetch_job(1, origin, path, MIB, file=[meant.st_dev, meant.st_ino]))
        answer = await heard.answer(1)
        assert isinstance(answer, wire.JobFailed)
        assert answer.kind == FailureKind.DISK
        assert path.read_bytes() == bytes(MIB)


async def test_workers_hold_the_descriptors_that_they_are_given(tmp_path: Path) -> None:
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        async with running_pool(replace(SETTINGS, workers=2), keep_fds=(lock,)) as (pool, _):
            await eventually(lambda: len(pool.pids) == 2)
            for pid in pool.pids:
                assert os.readlink(f"/proc/{pid}/fd/{lock}") == str(tmp_path / "lock")
            pids = pool.pids
        assert all(gone(pid) for pid in pids)
    finally:
        os.close(lock)


def test_a_worker_whose_parent_is_another_process_ends_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "weightfs.engine.worker", "0", "1"],
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=SECONDS,
    )
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        # A setting that this version does not know, as an engine of another one might send it.
        (
            b'["Hello", {"fetch": {"http://me:sesame@proxy/": 1}, "buffer_bytes": 1}]\n',
            "KeyError: 'headers'",
        ),
        (b'["Alive", {"token": "sesame"}]\n', "BadMessageError"),
        (b'["Settings", {"fetch": {"x": "sesame"}}]\n', "TypeError"),
    ],
)
def test_a_worker_that_fails_says_so_on_one_line_without_secrets(said: bytes, heard: str) -> None:
    """Regression: its last word was the interpreter's traceback, as it was."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(said)
        argv = [
            sys.executable,
            "-m",
            "weightfs.engine.worker",
            str(theirs.fileno()),
            str(os.getpid()),
            "-1",
        ]
        done = subprocess.run(
            argv,
            check=False,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=SECONDS,
        )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, heard in line, "sesame" in line) == (1, True, False), line


async def test_hashing_in_a_worker(tmp_path: Path) -> None:
    data = os.urandom(2 * MIB + 5)
    (tmp_path / "m").write_bytes(data)
    digests = [hashlib.sha256(data[at : at + MIB]).hexdigest() for at in range(0, len(data), MIB)]
    async with running_pool() as (pool, heard):
        pool.submit(wire.HashJob(-1, str(tmp_path / "m"), len(data), MIB, 0, 3, "".join(digests), True))
        digests[1] = wire.UNKNOWN * 64
        pool.submit(wire.HashJob(-2, str(tmp_path / "m"), len(data), MIB, 0, 3, "".join(digests)))
        pool.submit(wire.HashJob(-3, str(tmp_path / "gone"), len(data), MIB, 0, 3, "".join(digests)))
        assert await heard.answer(-1) == wire.Hashed(-1, 3, [], "", hashlib.sha256(data).hexdigest())
        assert await heard.answer(-2) == wire.Hashed(-2, 3, [1])
        answer = await heard.answer(-3)
        assert isinstance(answer, wire.JobFailed)
        assert answer.kind == FailureKind.DISK
