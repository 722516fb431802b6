"""Months in half an hour: a daemon under readers, fill, kills, restarts, outages and full disks, and its report.

    python tests/soak/soak.py [--minutes 30] [--models 50] [--readers 4] [--seed N] [--report build/soak]

Runs itself again in namespaces of its own (`weightfs.testing.disks`): the cache is on an ext4 image, so that its disk
can be full. The first half is bad weather: kills and restarts among everything else. The second half is one life of the
daemon, in which it is measured when nothing is in flight: memory, descriptors, threads and tasks have to stay.
Judged: no wrong byte; errors only while the daemon was away or the disk full; a clean end; `check()` with every chunk
hashed; no process left. Exit code 1, and the sentences, if anything else was seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weightfs.core.metalink import write_metalink
from weightfs.mount.mounttable import mounts_at
from weightfs.sources.publish import describe
from weightfs.store.cache import Cache
from weightfs.testing import disks
from weightfs.testing.daemon import Daemon
from weightfs.testing.nginx import Nginx
from weightfs.testing.waiting import until

MIB = 1 << 20
SMALLEST, LARGEST = MIB // 2, 8 * MIB  # bytes of a model
GUESTS = 5  # models that come and go; nobody reads them
CACHED_PART = 0.6  # of all bytes: so that something is evicted all the time
RATE = "8m"  # bytes a second and connection
READ_TIMEOUT = 120  # seconds; far beyond any outage here
AFTER = 2.0  # seconds in which a reader may still meet an error that has passed
MEASURES = 12  # of the second half
WARM_SECONDS = 300  # a shorter run says nothing about growth: pools and caches are still being filled
GROWTH, SLACK = 1.15, 12 * MIB  # of memory: the allocator's own, over some minutes
SPARE = 8  # descriptors and threads that may be in use by chance: idle connections, trio's pool
SCRIPT, READER = Path(__file__), Path(__file__).with_name("reader.py")


@dataclass(frozen=True)
class Measure:
    """Of the daemon (`rss` with its workers, bytes) when nothing is in flight; `at` in seconds of its life."""

    at: float
    rss: int
    descriptors: int
    threads: int
    tasks: int


@dataclass
class Report:
    """What was done and seen. `problems` are sentences; empty if all is well."""

    seconds: float = 0.0
    models: int = 0
    bytes_of_models: int = 0
    weather: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    bytes_compared: int = 0
    longest_seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    fetched_bytes: int = 0
    evicted_bytes: int = 0
    measures: list[Measure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Soak:
    """One run in an empty directory that may become full."""

    def __init__(
        self, place: Path, home: Path, *, seconds: float, models: int, readers: int, seed: int
    ) -> None:
        self.place, self.home, self.seconds = place, home, seconds
        self.chance = random.Random(seed)
        self.report = Report(seconds=seconds, models=models)
        self.models, self.readers = models, readers
        self.plains: dict[str, Path] = {}  # by ref
        self.bad: list[tuple[float, float]] = []  # when errors are due
        self.clients: list[tuple[subprocess.Popen[bytes], Path]] = []
        self.nginx: Nginx
        self.daemon: Daemon
        self.ballast = place / "ballast"

    # ---- the world

    def publish(self, root: Path) -> None:
        """Models of all sizes; every other one with a chunk list, the rest with the digest in the ref."""
        for number in range(self.models + GUESTS):
            path = root / f"m{number}.bin"
            size = self.chance.randrange(SMALLEST, LARGEST)
            path.write_bytes(self.chance.randbytes(size))
            listed = describe(path, [self.nginx.url(path.name)])
            ref = self.nginx.url(path.name)
            if number % 2:
                Path(f"{path}.meta4").write_bytes(write_metalink(listed))
            else:
                ref += f"#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"
            self.plains[ref] = path
            self.report.bytes_of_models += size

    @property
    def refs(self) -> list[str]:
        return list(self.plains)[: self.models]

    @property
    def guests(self) -> list[str]:
        return list(self.plains)[self.models :]

    @contextmanager
    def world(self) -> Iterator[None]:
        """Origin and daemon. Whatever happens, both are gone afterwards."""
        with ExitStack() as stack:
            root = self.home / "origin"
            root.mkdir()
            self.nginx = stack.enter_context(Nginx(root, limit_rate=RATE))
            self.publish(root)
            limit = int(self.report.bytes_of_models * CACHED_PART)
            options = ["--max-size", str(limit), "--min-free", "0", "--read-timeout", str(READ_TIMEOUT)]
            self.daemon = stack.enter_context(
                Daemon(self.place / "w", *self.refs, options=[*options, "--workers", "2"])
            )
            stack.callback(self.end_readers, by_force=True)
            yield

    def begin_readers(self) -> None:
        pairs = [(str(self.daemon.path(ref)), str(self.plains[ref])) for ref in self.refs]
        listed = self.home / "files.json"
        listed.write_text(json.dumps(pairs))
        for number in range(self.readers):
            told = self.home / f"reader{number}.json"
            argv = [
                sys.executable,
                "-I",
                "-S",
                str(READER),
                str(self.chance.random())[2:],
                str(listed),
                str(told),
            ]
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
            self.clients.append((process, told))

    def end_readers(self, *, by_force: bool = False) -> None:
        """Let each end what it does, and count it."""
        clients, self.clients = self.clients, []
        for process, _ in clients:
            process.send_signal(signal.SIGCONT)
            assert process.stdin is not None
            process.stdin.close()
            if by_force:
                process.kill()
        for process, told in clients:
            try:
                process.wait(READ_TIMEOUT + 30)
            except subprocess.TimeoutExpired:
                self.report.problems.append("a reader hangs")
                process.kill()
                continue
            if not by_force:
                self.count(
                    json.loads(told.read_text()) if told.exists() else {"wrong": "a reader was killed"}
                )

    def count(self, told: dict[str, Any]) -> None:
        """Add what one reader tells."""
        report = self.report
        if told["wrong"]:
            report.problems.append(f"WRONG: {told['wrong']}")
        report.bytes_compared += told.get("bytes", 0)
        report.longest_seconds = max(report.longest_seconds, told.get("longest", 0.0))
        for what in ("reads", "streams", "mappings", "listings"):
            report.reads[what] += told.get(what, 0)
        for error in told.get("errors", ()):
            report.errors[error["errno"]] += 1
            if not any(error["began"] < end + AFTER and error["ended"] > start for start, end in self.bad):
                report.problems.append(f"{error['errno']} of {error['path']} with nothing wrong")

    # ---- weather

    @contextmanager
    def errors_are_due(self) -> Iterator[None]:
        """Readers may be refused meanwhile."""
        start = time.time()
        try:
            yield
        finally:
            self.bad.append((start, time.time()))

    def kill(self) -> None:
        """SIGKILL, and the next life."""
        with self.errors_are_due():
            self.note_totals()
            self.daemon.kill()
            self.daemon.start()

    def restart(self) -> None:
        """SIGTERM among readers, and the next life."""
        with self.errors_are_due():
            self.note_totals()
            if (code := self.daemon.stop()) != 0:
                self.report.problems.append(f"the daemon ended with {code}")
            self.daemon.start()

    def outage(self) -> None:
        """Nobody at the other end."""
        self.nginx.pause()
        time.sleep(self.chance.uniform(0.5, 6))
        self.nginx.resume()

    def full_disk(self) -> None:
        """Somebody else takes all that is left."""
        with self.errors_are_due():
            with suppress(OSError), self.ballast.open("wb") as file:
                while True:
                    file.write(bytes(MIB))
                    file.flush()
            time.sleep(self.chance.uniform(1, 4))
            self.ballast.unlink()
            # What is wanted may be more than the limit all the time; but a full disk is no sick one.
            until(lambda: self.daemon.status()["disk"] == "healthy", "the disk is used as before")

    def worker_dies(self) -> None:
        """A fetch worker is killed."""
        pids = self.daemon.status()["worker_pids"]
        if pids:
            with suppress(ProcessLookupError):
                os.kill(self.chance.choice(pids), signal.SIGKILL)

    def guest(self) -> None:
        """A model comes, is fetched, and goes."""
        ref = self.chance.choice(self.guests)
        self.daemon.add(ref)
        self.daemon.cli("pin", ref)
        self.daemon.cli("unpin", ref)
        self.daemon.cli("rm", ref)

    def tidy(self) -> None:
        """What a timer would do."""
        done = self.daemon.cli("verify", self.chance.choice(self.refs))
        if done.returncode not in (0, 3):
            self.report.problems.append(f"verify: {done.stderr.strip()}")
        self.daemon.cli("gc")

    def bad_weather(self, seconds: float, kinds: dict[Callable[[], None], int]) -> None:
        """Some of it every few seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.report.problems:
            (event,) = self.chance.choices(list(kinds), list(kinds.values()))
            self.report.weather[event.__name__] += 1
            event()
            time.sleep(self.chance.uniform(0.2, 3))

    # ---- measuring

    def note_totals(self) -> None:
        """Of a life that ends."""
        status = self.daemon.status()
        self.report.fetched_bytes += status["fetched_bytes"]
        self.report.evicted_bytes += status["evicted_bytes"]

    def measure(self, began: float) -> None:
        """When nothing is in flight."""
        for process, _ in self.clients:
            process.send_signal(signal.SIGSTOP)
        until(lambda: not self.daemon.status()["jobs"], "nothing is in flight")
        status = self.daemon.status()
        tasks = self.daemon.ask(lambda client: client.stacks())["tasks"]
        pids = [status["pid"], *status["worker_pids"]]
        values = [
            dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            for pid in pids
        ]
        self.report.measures.append(
            Measure(
                round(time.monotonic() - began, 1),
                sum(int(one["VmRSS"].split()[0]) * 1024 for one in values),
                sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
                sum(int(one["Threads"]) for one in values),
                sum(stack["count"] for stack in tasks),
            )
        )
        for process, _ in self.clients:
            process.send_signal(signal.SIGCONT)

    def judge_growth(self) -> None:
        """The last third of the measures beside the first one."""
        if self.seconds < WARM_SECONDS:
            return
        third = len(self.report.measures) // 3
        first, last = self.report.measures[:third], self.report.measures[-third:]
        for what, factor, spare in (
            ("rss", GROWTH, SLACK),
            ("descriptors", 1, SPARE),
            ("threads", 1, SPARE),
            ("tasks", 1, SPARE),
        ):
            before, after = (statistics.median(getattr(one, what) for one in part) for part in (first, last))
            if after > before * factor + spare:
                self.report.problems.append(f"{what} grew from {before:.0f} to {after:.0f}")

    # ---- the whole

    def run(self) -> Report:
        """See the module."""
        anywhere = {self.outage: 3, self.full_disk: 1, self.worker_dies: 2, self.guest: 2, self.tidy: 1}
        with self.world():
            self.daemon.start()
            self.begin_readers()
            self.bad_weather(self.seconds / 2, {self.kill: 4, self.restart: 2, **anywhere})
            with self.errors_are_due():
                self.note_totals()
                self.daemon.kill()
                self.daemon.start()
            began = time.monotonic()
            measures = MEASURES if self.seconds >= WARM_SECONDS else 1
            for _ in range(measures):
                self.bad_weather(self.seconds / 2 / measures, anywhere)
                self.measure(began)
            self.judge_growth()
            self.end_readers()
            self.note_totals()
            self.end()
        return self.report

    def end(self) -> None:
        """A clean stop; then index and files agree, and nothing is left of it."""
        status = self.daemon.status()
        pids = [status["pid"], *status["worker_pids"]]
        if (code := self.daemon.stop()) != 0:
            self.report.problems.append(f"the daemon ended with {code}")
        if mounts_at(self.daemon.mountpoint):
            self.report.problems.append("the mount is still there")
        if left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
            self.report.problems.append(f"processes are left: {left}")
        cache = Cache.open(self.daemon.cache, now=int(time.time()))
        try:
            self.report.problems += cache.check(deep=True)
        finally:
            cache.close()
        lines = self.daemon.log.splitlines()
        self.report.problems += [
            line for line in lines if "Traceback" in line or "fault of weightfs" in line
        ][:10]
        if self.report.problems:
            print(*lines[-200:], sep="\n", file=sys.stderr)


def plain(report: Report) -> dict[str, Any]:
    """For JSON."""
    counters = {name: dict(getattr(report, name)) for name in ("weather", "reads", "errors")}
    return {**vars(report), **counters, "measures": [asdict(one) for one in report.measures]}


def text_of(report: Report) -> str:
    """For people."""
    lines = [
        f"{report.seconds / 60:.1f} minutes, {report.models} models of {report.bytes_of_models / MIB:.0f} MiB",
        "weather: " + ", ".join(f"{count} {name}" for name, count in sorted(report.weather.items())),
        "readers: " + ", ".join(f"{count} {name}" for name, count in sorted(report.reads.items())),
        f"{report.bytes_compared / MIB:.0f} MiB compared; the longest operation took {report.longest_seconds:.1f} s",
        f"{report.fetched_bytes / MIB:.0f} MiB fetched, {report.evicted_bytes / MIB:.0f} MiB evicted",
        "errors while they were due: "
        + (", ".join(f"{n} {e}" for e, n in sorted(report.errors.items())) or "none"),
        *(
            f"after {one.at:5.0f} s: {one.rss / MIB:.0f} MiB, {one.descriptors} descriptors, {one.threads} threads, "
            f"{one.tasks} tasks"
            for one in report.measures
        ),
        *(f"PROBLEM: {problem}" for problem in report.problems[:50]),
        "PROBLEMS" if report.problems else "all is well",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        if lacking := disks.missing("ext4"):
            sys.exit(f"soak: {lacking}")
        again = [sys.executable, str(SCRIPT), *sys.argv[1:], "--seed", str(options.seed), "--inside"]
        sys.exit(subprocess.run([*disks.ISOLATED, *again], check=False).returncode)
    with tempfile.TemporaryDirectory(prefix="weightfs-soak-") as directory:
        home = Path(directory)
        disks.make_disk(home / "disk.img", "ext4")
        with disks.mounted(home / "disk.img", "ext4") as place:
            soak = Soak(
                place, home, seconds=options.minutes * 60, models=options.models, readers=options.readers,
                seed=options.seed,
            )  # fmt: skip
            report = soak.run()
    print(f"seed {options.seed}", text_of(report), sep="\n", end="")
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.with_suffix(".txt").write_text(text_of(report))
        options.report.with_suffix(".json").write_text(
            json.dumps({**plain(report), "seed": options.seed}, indent=1)
        )
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()
