"""The rows of the bench. Each is a function from `Bench` to one or more measures; `ROWS` lists them.

Rule: contenders take turns within every round, the first one rotating; what one left behind (dirty pages, files) is
gone before the next begins. Throughput is in MB/s of file content.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from contenders import (
    CLIENTS,
    MIB,
    WEIGHTFS,
    BenchError,
    RcloneMount,
    WeightfsMount,
    aria2,
    cat,
    client,
    curl,
    empty,
    pss,
    run,
    timed,
    wait,
    warm,
    weightfs_pull,
)
from report import OURS, Aim, Measure

from weightfs.testing.link import Link
from weightfs.testing.nginx import Nginx

MB = 1_000_000
NAME = "model.gguf"
TLS = "tls"
BIG = "big.gguf"
BIG_SIZE = 20 * 10**9
BIG_SECONDS = 15.0  # of filling, per round
READERS = 64
FAULTS = 256
FAULT_THREADS = 16
LINK_RATE = 100 * MB
LINK_LATENCY = 0.05
LATENCY_SECONDS = 6.0
RECORDS = 1_000_000


@dataclass(slots=True)
class Bench:
    """The origin, and where to work: `work` on the disk, `shm` in memory."""

    work: Path
    shm: Path
    rounds: int
    size: int
    ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    origin: Nginx = field(init=False)

    def __enter__(self) -> Self:
        with self.ends:
            root = empty(self.shm / "origin")
            self.origin = self.ends.enter_context(Nginx(root, workers=2, server_config="autoindex on;"))
            write_random(root / NAME, self.size)
            run(WEIGHTFS, "publish", root / NAME, "--url", self.origin.url(NAME))
            # A .meta4 names mirrors: what is fetched over https is published apart, so that all of it is.
            (root / TLS).mkdir()
            os.link(root / NAME, root / TLS / NAME)
            run(WEIGHTFS, "publish", root / TLS / NAME, "--url", self.origin.https_url(f"{TLS}/{NAME}"))
            self.ends = self.ends.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.ends.close()

    def turns(self, measure: Measure, contenders: dict[str, Callable[[], float]]) -> Measure:
        """Let them take turns, `rounds` times."""
        names = list(contenders)
        for name in names:
            measure.rounds[name] = []
        for number in range(self.rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                os.sync()
                measure.add(name, contenders[name]())
        return measure

    def speed(self, seconds: float) -> float:
        """MB/s of one file read in `seconds`."""
        return self.size / seconds / MB

    def weightfs(self, where: Path | None = None) -> WeightfsMount:
        """A mount with an empty cache."""
        base = where or self.work
        return WeightfsMount(base / "weightfs-mnt", empty(base / "weightfs-cache"))

    def rclone(self, url: str | None = None) -> RcloneMount:
        """A mount with an empty cache."""
        return RcloneMount(
            self.work / "rclone-mnt", empty(self.work / "rclone-cache"), url or self.origin.url("")
        )


def write_random(path: Path, size: int) -> None:
    """Bytes that nothing compresses and no two chunks share."""
    with path.open("wb") as file:
        for _ in range(0, size, 16 * MIB):
            file.write(os.urandom(min(16 * MIB, size - file.tell())))


def fill_row(key: str, scheme: str, on_disk: bool) -> Callable[[Bench], Measure]:
    """Download, verify and make durable, against curl and aria2c, which make durable only."""

    def row(bench: Bench) -> Measure:
        place = bench.work if on_disk else bench.shm
        url = bench.origin.https_url(f"{TLS}/{NAME}") if scheme == "https" else bench.origin.url(NAME)
        ca_file = bench.origin.ca_file

        def fetched_by(fetch: Callable[[str, Path, Path], float]) -> Callable[[], float]:
            def measured() -> float:
                target = empty(place / "fetched")
                seconds = fetch(url, target if fetch is weightfs_pull else target / NAME, ca_file)
                empty(target)
                return bench.speed(seconds)

            return measured

        where = "disk" if on_disk else "memory (/dev/shm)"
        return bench.turns(
            Measure(
                key,
                f"fill over {scheme}, to {where}",
                "MB/s",
                higher=True,
                aims=(Aim(">= 1.0 x the better of curl, aria2c", 1.0, peers=("curl", "aria2c -x16")),),
                note="whole commands: weightfs pull with its start-up, SHA-256 of every chunk and of the whole, and "
                "its commits; curl and aria2c with a sync of the file, and without verifying.",
            ),
            {OURS: fetched_by(weightfs_pull), "curl": fetched_by(curl), "aria2c -x16": fetched_by(aria2)},
        )

    return row


def pull_start(bench: Bench) -> Measure:
    """What of the fill rows is the start of a process: a pull of what is there already."""
    cache = empty(bench.work / "weightfs-cache")
    url = bench.origin.url(NAME)
    run(WEIGHTFS, "pull", url, "--cache", cache)
    return bench.turns(
        Measure("pull-start", "weightfs pull of a complete file", "s", higher=False),
        {OURS: lambda: timed(WEIGHTFS, "pull", url, "--cache", cache)},
    )


def cold_read(bench: Bench) -> Measure:
    """The first sequential read, through the mount, with nothing cached."""

    def ours() -> float:
        with bench.weightfs().mounted(bench.origin.url(NAME)) as mount:
            return bench.speed(cat(mount.path(NAME)))

    def rclone() -> float:
        with bench.rclone().mounted() as mount:
            return bench.speed(cat(mount.path(NAME)))

    return bench.turns(
        Measure(
            "cold-read",
            "cold sequential read through the mount",
            "MB/s",
            higher=True,
            aims=(Aim(">= 3 x rclone", 3.0, peers=("rclone mount",)),),
        ),
        {OURS: ours, "rclone mount": rclone},
    )


def cached_read(bench: Bench) -> list[Measure]:
    """Complete files: after a new mount (nothing in its page cache), and once more (everything in it)."""
    url = bench.origin.url(NAME)
    raw = bench.origin.root / NAME
    fresh = Measure(
        "cached-read",
        "cached, not in the mount's page cache",
        "MB/s",
        higher=True,
        aims=(
            Aim(">= 3 x rclone", 3.0, peers=("rclone mount",)),
            Aim(">= 0.5 x cat of the raw file", 0.5, peers=("raw, hot",)),
        ),
        note="the cache's own file is in the page cache of its filesystem, for both mounts; the raw file is on tmpfs.",
    )
    hot = Measure(
        "hot-read",
        "in the mount's page cache",
        "MB/s",
        higher=True,
        aims=(Aim(">= 0.95 x raw", 0.95, peers=("raw, hot",)),),
    )
    ours = bench.weightfs()
    with ours.mounted(url, fill="all"):
        wait("the fill", lambda: ours.cached(NAME) == bench.size, 600)
    theirs = bench.rclone()
    with theirs.mounted():
        cat(theirs.path(NAME))
        wait("rclone to write its cache", lambda: stored(theirs.cache) >= bench.size, 120)

    def both(
        name: str, mounted: Callable[[], contextlib.AbstractContextManager[object]], path: Callable[[], Path]
    ) -> float:
        with mounted():
            cold = bench.speed(cat(path()))
            hot.add(name, bench.speed(cat(path())))
            return cold

    def weightfs() -> float:
        warm(ours.cache)
        return both(OURS, lambda: ours.mounted(url), lambda: ours.path(NAME))

    def rclone() -> float:
        warm(theirs.cache)
        return both("rclone mount", theirs.mounted, lambda: theirs.path(NAME))

    def plain() -> float:
        hot.add("raw, hot", bench.speed(cat(raw)))
        return bench.speed(cat(raw))

    bench.turns(fresh, {OURS: weightfs, "rclone mount": rclone, "raw, hot": plain})
    return [fresh, hot]


def stored(directory: Path) -> int:
    """Bytes that the files below occupy."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def scattered(bench: Bench) -> list[Measure]:
    """256 page faults all over a cold file, from 16 threads: seconds, and what was fetched for them."""
    seconds = Measure(
        "scattered-seconds",
        f"{FAULTS} scattered faults, {FAULT_THREADS} threads",
        "s",
        higher=False,
        aims=(Aim("<= 0.5 x rclone", 0.5, at_least=False, peers=("rclone mount",)),),
        note="weightfs with fill = never.",
    )
    fetched = Measure(
        "scattered-fetched",
        f"{FAULTS} scattered faults: fetched",
        "MB",
        higher=False,
        note="weightfs beside the chunks of 1 MiB that were touched; it also fetches head and tail of the file.",
    )

    def ours() -> float:
        with bench.weightfs().mounted(bench.origin.url(NAME), fill="never") as mount:
            bench.origin.forget_requests()
            found = client("faults", mount.path(NAME), str(FAULTS), str(FAULT_THREADS), "1")
            wait("the fetches in flight", lambda: not mount.status()["jobs"])
        fetched.add(OURS, bench.origin.bytes_sent(NAME) / MB)
        touched = {offset // MIB for offset in found["offsets"]}
        fetched.add("chunks touched", len(touched) * MIB / MB)
        return float(found["seconds"])

    def rclone() -> float:
        with bench.rclone().mounted() as mount:
            bench.origin.forget_requests()
            found = client("faults", mount.path(NAME), str(FAULTS), str(FAULT_THREADS), "1")
        fetched.add("rclone mount", bench.origin.bytes_sent(NAME) / MB)
        return float(found["seconds"])

    bench.turns(seconds, {OURS: ours, "rclone mount": rclone})
    head_and_tail = 2 * MIB / MB
    limit = 1 + head_and_tail / fetched.median("chunks touched")
    fetched.aims = (
        Aim("<= one chunk per chunk touched, + 2", limit + 0.001, at_least=False, peers=("chunks touched",)),
    )
    return [seconds, fetched]


def slow_link(bench: Bench) -> Measure:
    """A cold sequential read over 100 MB/s and 50 ms, against curl over the same."""
    root = bench.origin.root
    measure = Measure(
        "slow-link",
        "cold read, origin of 100 MB/s and 50 ms",
        "MB/s",
        higher=True,
        aims=(
            Aim(">= 95 MB/s, 0.95 of the limit", 0.95 * LINK_RATE / MB),
            Aim(">= 0.95 of what the link gives to curl", 0.95, peers=("curl to /dev/null",)),
        ),
        note="the link is a relay in user space with one rate for all connections (this is not netem: no loss, no "
        "TCP slow start).",
    )
    with Link(bench.origin.port, rate=LINK_RATE, latency=LINK_LATENCY) as link:
        base = f"http://127.0.0.1:{link.ports[0]}/"
        slow = empty(root / "slow")
        os.link(root / NAME, slow / NAME)
        run(WEIGHTFS, "publish", slow / NAME, "--url", f"{base}slow/{NAME}")

        def ours() -> float:
            with bench.weightfs().mounted(f"{base}slow/{NAME}") as mount:
                return bench.speed(cat(mount.path(NAME)))

        def rclone() -> float:
            with bench.rclone(f"{base}slow/").mounted() as mount:
                return bench.speed(cat(mount.path(NAME)))

        def plain() -> float:
            return bench.speed(timed("curl", "-sS", "--fail", "-o", "/dev/null", f"{base}slow/{NAME}"))

        return bench.turns(measure, {OURS: ours, "rclone mount": rclone, "curl to /dev/null": plain})


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


def sparse(path: Path, size: int) -> None:
    """A file of zeros that takes no room."""
    with path.open("wb") as file:
        file.truncate(size)


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


ROWS: dict[str, Callable[[Bench], Measure | list[Measure]]] = {
    "fill-http-disk": fill_row("fill-http-disk", "http", on_disk=True),
    "fill-http-tmpfs": fill_row("fill-http-tmpfs", "http", on_disk=False),
    "fill-https-disk": fill_row("fill-https-disk", "https", on_disk=True),
    "fill-https-tmpfs": fill_row("fill-https-tmpfs", "https", on_disk=False),
    "pull-start": pull_start,
    "cold-read": cold_read,
    "cached-read": cached_read,
    "scattered": scattered,
    "slow-link": slow_link,
    "latency": latency_under_fill,
    "memory": memory,
    "start": start,
}
