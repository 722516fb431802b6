"""SIGKILL of a real engine with real workers: no wrong byte afterwards, and little is fetched twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.manifest import Trust
from weightfs.core.metalink import write_metalink
from weightfs.core.plan import Limits
from weightfs.core.ref import parse_ref
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import CacheBusyError
from weightfs.sources.publish import describe
from weightfs.store.cache import Cache
from weightfs.testing.engines import running_engine
from weightfs.testing.nginx import Nginx
from weightfs.testing.published import sample
from weightfs.testing.waiting import until

pytestmark = pytest.mark.nginx

DRIVER = Path(__file__).with_name("driver.py")
SIZE = 24 * MIB + 321
UNSETTLED = 8 * MIB  # as the driver has it: 64 MiB, scaled to a small blob
DROPPED = 3 * MIB  # by the driver, when it has everything
LAZY = EngineSettings(workers=0, fill=FillMode.NEVER)
SECONDS = 60.0
SOAK = os.environ.get("WEIGHTFS_SOAK") == "1"
# With the 20 at named steps, shares and again and again: 1,000 in `make soak`, 50 in every run.
KILLS = int(os.environ.get("WEIGHTFS_KILLS", "980" if SOAK else "30"))
# Each of the driver's steps, and the passing of it at which the first test kills.
AT = {
    "file made": 1,
    "written, not told": 9,
    "told, not queued": 7,
    "queued": 7,
    "before the sync": 2,
    "synced": 2,
    "in the index": 4,
    "committed": 3,
    "believed durable": 3,
    "judged": 1,
    "verdict queued": 1,
    "to be dropped": 1,
    "dropped": 1,
    "closing": 1,
}
STEPS = list(AT)


@pytest.fixture(scope="module")
def content() -> bytes:
    return sample(SIZE)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Iterator[Nginx]:
    root = tmp_path_factory.mktemp("origin")
    (root / "m.bin").write_bytes(content)
    with Nginx(root) as nginx:
        (root / "m.bin.meta4").write_bytes(write_metalink(describe(root / "m.bin", [nginx.url("m.bin")])))
        yield nginx


@pytest.fixture
def origin(served: Nginx) -> Nginx:
    served.forget_requests()
    return served


@dataclass
class Driver:
    """The process, as long as the context lasts."""

    process: subprocess.Popen[str]
    workers: list[int]


@contextlib.contextmanager
def driving(cache: Path, url: str, step: str = "never", count: int = 1, *more: str) -> Iterator[Driver]:
    argv = [sys.executable, str(DRIVER), str(cache), url, step, str(count), *more]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL) as process:
        workers: list[int] = []
        try:
            assert process.stdout is not None
            if first := process.stdout.readline():
                workers = json.loads(first)["workers"]
            yield Driver(process, workers)
        finally:
            process.kill()
            process.wait(SECONDS)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def open_files(pid: int) -> list[str]:
    """A process that ends closes its files, and with them the lock, a moment before it counts as dead."""
    found: list[str] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it goes on working, and closes some
                found.append(os.readlink(entry))
    return found


async def come_back(cache: Path, origin: Nginx, content: bytes, *, extra: int = 0) -> None:
    """The second life: everything is right, and both lives together took at most the file and the bound."""
    async with running_engine(cache, LAZY) as engine:
        with trio.fail_after(SECONDS):
            ref = parse_ref(origin.url("m.bin"))
            blob = (await engine.add(ref)).entries[0].blob
            for start in range(0, SIZE, 5 * MIB):
                span = ByteSpan(start, start + 5 * MIB).clamp(SIZE)
                assert await engine.read(blob.id, span) == content[span.start : span.stop]
            await engine.complete(str(ref))
            assert engine.blob_status(blob.id).trust == Trust.VERIFIED
            assert engine.status().disk_faults == 0  # a killed process loses nothing that was written
    assert origin.bytes_sent("m.bin") <= SIZE + UNSETTLED + extra


@pytest.mark.parametrize(("step", "count"), AT.items())
async def test_killed_between_two_steps(
    tmp_path: Path, origin: Nginx, content: bytes, step: str, count: int
) -> None:
    with driving(tmp_path / "cache", origin.url("m.bin"), step, count) as driver:
        assert await trio.to_thread.run_sync(driver.process.wait, SECONDS) == -signal.SIGKILL
        until(lambda: not any(lives(pid) for pid in driver.workers))
    dropping = step in ("to be dropped", "dropped", "closing")
    await come_back(tmp_path / "cache", origin, content, extra=DROPPED if dropping else 0)


@pytest.mark.parametrize("share", [0.05, 0.4, 0.8])
async def test_killed_at_any_time(tmp_path: Path, origin: Nginx, content: bytes, share: float) -> None:
    with driving(tmp_path / "cache", origin.url("m.bin")) as driver:
        blobs = tmp_path / "cache" / "blobs"
        until(lambda: sum(path.stat().st_blocks * 512 for path in blobs.glob("*")) >= share * SIZE)
        driver.process.kill()
    await come_back(tmp_path / "cache", origin, content)


async def test_killed_again_and_again(tmp_path: Path, origin: Nginx, content: bytes) -> None:
    for _ in range(3):
        with driving(tmp_path / "cache", origin.url("m.bin"), "committed", 2) as driver:
            await trio.to_thread.run_sync(driver.process.wait, SECONDS)
    await come_back(tmp_path / "cache", origin, content, extra=2 * UNSETTLED)


async def test_what_the_disk_lost_in_a_power_cut_is_fetched_again(
    tmp_path: Path, origin: Nginx, content: bytes
) -> None:
    """The index may be ahead of a disk that lied about a sync: the first touch tells."""
    with driving(tmp_path / "cache", origin.url("m.bin"), "committed", 5) as driver:
        await trio.to_thread.run_sync(driver.process.wait, SECONDS)
    (path,) = (tmp_path / "cache" / "blobs").iterdir()
    with path.open("r+b") as file:
        for chunk in (0, 2):
            file.seek(chunk * MIB)
            file.write(bytes(MIB))
    async with running_engine(tmp_path / "cache", LAZY) as engine:
        with trio.fail_after(SECONDS):
            blob = (await engine.add(parse_ref(origin.url("m.bin")))).entries[0].blob
            assert await engine.read(blob.id, ByteSpan(0, SIZE)) == content
            assert engine.status().disk_faults <= 2


def test_orphaned_workers_die_and_the_lock_waits_for_them(tmp_path: Path, origin: Nginx) -> None:
    """A worker writes data files: nobody may own the cache while one of a dead owner lives."""
    with driving(tmp_path / "cache", origin.url("m.bin")) as driver:
        with pytest.raises(CacheBusyError) as caught:
            Cache.open(tmp_path / "cache", now=0)
        assert caught.value.pid == driver.process.pid
        lock = str(tmp_path / "cache" / "lock")
        for pid in driver.workers:
            held = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
            assert lock in held
        driver.process.kill()
        driver.process.wait(SECONDS)
        Cache.open(tmp_path / "cache", now=0).close()
        assert not any(open_files(pid) for pid in driver.workers)


def test_the_lock_is_held_by_a_worker_that_outlives_its_owner(tmp_path: Path) -> None:
    """A stand-in for a worker that cannot die yet (in an uninterruptible write) holds the inherited descriptor."""
    script = (
        "import os, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from weightfs.store.cache import Cache\n"
        "cache = Cache.open(Path(sys.argv[1]), now=0)\n"
        "child = subprocess.Popen(['sleep', '1000'], pass_fds=[cache.lock_fd],\n"
        "    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    argv = [sys.executable, "-c", script, str(tmp_path / "cache")]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=SECONDS)
    worker = int(done.stdout)
    try:
        with pytest.raises(CacheBusyError):
            Cache.open(tmp_path / "cache", now=0)
    finally:
        os.kill(worker, signal.SIGKILL)
    Cache.open(tmp_path / "cache", now=0).close()


async def test_a_worker_killed_amid_a_pull_costs_nothing_but_its_jobs(tmp_path: Path, content: bytes) -> None:
    root = tmp_path / "slow"
    root.mkdir()
    (root / "m.bin").write_bytes(content)
    settings = EngineSettings(workers=2, fill=FillMode.NEVER, limits=Limits(backoff_base=0.05))
    with Nginx(root, limit_rate="4m") as nginx:
        (root / "m.bin.meta4").write_bytes(write_metalink(describe(root / "m.bin", [nginx.url("m.bin")])))
        async with running_engine(tmp_path / "cache", settings) as engine:
            ref = parse_ref(nginx.url("m.bin"))
            blob = (await engine.add(ref)).entries[0].blob.id
            with trio.fail_after(SECONDS):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(engine.complete, str(ref))
                    for share in (0.1, 0.3):
                        while engine.blob_status(blob).present_bytes < share * SIZE:
                            await trio.sleep(0.005)
                        for pid in engine.status().worker_pids:
                            os.kill(pid, signal.SIGKILL)
                assert await engine.read(blob, ByteSpan(0, SIZE)) == content


@pytest.mark.timeout(0 if SOAK else 180)
async def test_killed_under_readers_and_fill(tmp_path: Path, served: Nginx, content: bytes) -> None:
    """Each kill at another step or moment, on the cache that the lives before it left; a reader compares every byte."""
    truth, tally, cache = served.root / "m.bin", tmp_path / "tally", tmp_path / "cache"
    chance = random.Random(4)
    refetched: list[int] = []
    lives = 0
    served.forget_requests()
    while len(refetched) < KILLS:
        tally.write_bytes(bytes(8))
        step = chance.choice(STEPS) if chance.random() < 0.5 else "never"
        share = chance.random() * SIZE
        options = ["--tally", str(tally), "--readers", str(truth)]
        with driving(cache, served.url("m.bin"), step, chance.randint(1, 4), *options) as driver:
            process = driver.process
            if step == "never":
                until(lambda: process.poll() is not None or landed(tally) >= share)  # noqa: B023
                process.kill()
            assert await trio.to_thread.run_sync(process.wait, SECONDS) in (0, -signal.SIGKILL)
        lives += 1
        whole, kept = await trio.to_thread.run_sync(what_is_left, cache)
        if process.returncode:
            refetched.append(max(0, landed(tally) - kept))
            assert refetched[-1] <= UNSETTLED, (step, refetched)
            if len(refetched) % 100 == 0:
                print(f"{len(refetched)} of {KILLS} kills", flush=True)
        if whole or lives == 6:
            await come_back(cache, served, content, extra=lives * (UNSETTLED + DROPPED))
            shutil.rmtree(cache)
            served.forget_requests()
            lives = 0
    figures = {"kills": KILLS, "refetched bytes, median": statistics.median(refetched), "max": max(refetched)}
    print(json.dumps(figures))


def landed(tally: Path) -> int:
    """The bytes that the driver had when it last told."""
    return int.from_bytes(tally.read_bytes(), "little")


def what_is_left(root: Path) -> tuple[bool, int]:
    """Whether all is recorded, and the bytes that are. Every recorded chunk is in the file."""
    cache = Cache.open(root, now=0)
    try:
        assert cache.check(deep=True) == []
        kept = 0
        for stored in cache.refs():
            blob = stored.manifest.entries[0].blob
            kept += sum(len(blob.shape.span_of(chunk)) for chunk in cache.progress(blob.id).present)
        return kept == SIZE, kept
    finally:
        cache.close()
