"""Rows about weightfs at work: latency while it fills, memory, and the start with many records."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from contenders import (
    CLIENTS,
    MIB,
    BenchError,
    WeightfsMount,
    client,
    empty,
    pss,
    timed,
    wait,
    warm,
)
from ground import MB, NAME, Bench, sparse
from report import OURS, Aim, Measure

BIG = "big.gguf"
BIG_SIZE = 20 * 10**9
BIG_SECONDS = 15.0  # of filling, per round
READERS = 64
LATENCY_SECONDS = 6.0
RECORDS = 1_000_000


def latency_under_fill(bench: Bench) -> list[Measure]:
    """The 99th percentiles of stat and of a cached 1 MiB read, while another file fills at full speed, and idle."""
    stat = Measure(
        "stat-p99",
        "p99 of stat",
        "ms",
        higher=False,
        aims=(Aim("<= 5 ms while filling", 5.0, at_least=False),),
        note="statx with AT_STATX_FORCE_SYNC, so that every one asks the daemon.",
    )
    read = Measure(
        "read-p99",
        "p99 of a cached 1 MiB read",
        "ms",
        higher=False,
        aims=(Aim("<= 10 ms while filling", 10.0, at_least=False),),
        note="its pages are dropped from the mount's page cache before each.",
    )
    big = bench.origin.root / BIG
    sparse(big, BIG_SIZE)
    try:
        for _ in range(bench.rounds):
            _latencies(bench, stat, read)
    finally:
        big.unlink()
    return [stat, read]


def _latencies(bench: Bench, stat: Measure, read: Measure) -> None:
    """One round: idle first, then with a big file being filled."""
    idle = "weightfs, idle"
    mount = bench.weightfs()
    with mount.mounted(bench.origin.url(NAME), fill="all"):
        wait("the first file", lambda: mount.cached(NAME) == bench.size, 600)
        warm(mount.cache)
        quiet = client("latency", mount.path(NAME), mount.path(NAME), str(LATENCY_SECONDS))
    with mount.mounted(bench.origin.url(NAME), bench.origin.url(BIG), fill="all"):
        wait("the fill to be under way", lambda: mount.cached(BIG) > 256 * MIB, 120)
        before, started = mount.cached(BIG), time.monotonic()
        busy = client("latency", mount.path(BIG), mount.path(NAME), str(LATENCY_SECONDS))
        filled = mount.cached(BIG) - before
        if not filled or mount.cached(BIG) == BIG_SIZE:
            raise BenchError("nothing was being filled while latency was measured")
        stat.note += f" Filling went on at {filled / (time.monotonic() - started) / MB:.0f} MB/s."
    for contender, found in ((OURS, busy), (idle, quiet)):
        stat.add(contender, found["stat_p99"])
        read.add(contender, found["read_p99"])
    empty(mount.cache)


@contextlib.contextmanager
def sampled(pids: Callable[[], list[int]]) -> Iterator[list[int]]:
    """The PSS of processes in bytes, every 0.25 s, while the context lasts."""
    samples: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.25):
            samples.append(pss(pids()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def memory(bench: Bench) -> Measure:
    """The highest PSS of all processes while a file of 20 GB fills and 64 readers read it at different places."""
    measure = Measure(
        "memory",
        f"memory while filling 20 GB, {READERS} readers",
        "MB",
        higher=False,
        aims=(Aim("<= 250 MB", 250.0, at_least=False),),
        note=f"the highest sum of PSS over all processes in {BIG_SECONDS:.0f} s of filling per round.",
    )
    big = bench.origin.root / BIG
    sparse(big, BIG_SIZE)

    def under_readers(path: Path, pids: Callable[[], list[int]]) -> float:
        with sampled(pids) as samples:
            command = [sys.executable, str(CLIENTS), "readers", str(path), str(READERS)]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as readers:
                time.sleep(BIG_SECONDS)
                try:
                    readers.communicate("", 60)
                finally:
                    readers.kill()
        return max(samples) / MB

    def ours() -> float:
        with bench.weightfs().mounted(bench.origin.url(BIG), fill="all") as mount:
            peak = under_readers(mount.path(BIG), mount.pids)
        empty(mount.cache)
        return peak

    def rclone() -> float:
        with bench.rclone().mounted() as mount:
            peak = under_readers(mount.path(BIG), mount.pids)
        empty(mount.cache)
        return peak

    try:
        return bench.turns(measure, {OURS: ours, "rclone mount": rclone})
    finally:
        big.unlink()


def start(bench: Bench) -> Measure:
    """From the command to a mount that answers, with a million chunk records, and with none."""
    from records import fill_cache

    full = empty(bench.work / "records")
    none = empty(bench.work / "no-records")
    refs = fill_cache(full, RECORDS)
    name = refs[0].rsplit("/", 1)[1]

    def started(
        cache: Path, options: list[str], serves: Callable[[WeightfsMount], bool]
    ) -> Callable[[], float]:
        def measured() -> float:
            mount = WeightfsMount(bench.work / "weightfs-mnt", cache)
            before = time.monotonic()
            with mount.mounted(*options, fill="never"):
                if not serves(mount):
                    raise BenchError("the mount does not serve what the cache holds")
            return mount.mounted_at - before

        return measured

    try:
        return bench.turns(
            Measure(
                "start",
                f"start with {RECORDS:,} chunk records",
                "s",
                higher=False,
                aims=(Aim("<= 1 s", 1.0, at_least=False),),
                note="from `weightfs mount --detach` to its return, which is when the mount answers.",
            ),
            {
                OURS: started(full, [], lambda mount: mount.cached(name) > 0),
                "weightfs, empty cache": started(none, [], lambda _: True),
                "python -c 'import trio, httpx'": lambda: timed(sys.executable, "-c", "import trio, httpx"),
            },
        )
    finally:
        empty(full)
