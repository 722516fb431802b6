"""Power cuts under a working engine, on a filesystem of its own: for test_power.py, and to print the figures.

    python tests/faults/power.py ext4 --cuts 100 [--seed 1] [--swapped]

Runs itself again in namespaces of its own (`weightfs.testing.disks`). The process of driver.py pulls a file into a
cache on a fresh image, with two workers, background fill and readers; at random moments, and at named steps of
landing, the image is cloned as a power cut would leave it. Then each clone is mounted, and its cache judged (`judge`).
One JSON line for every cut, and one with the sums.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import trio
from driver import STEPS, UNSETTLED

from weightfs.core.geometry import MIB, ByteSpan, ChunkSpan
from weightfs.core.manifest import Trust
from weightfs.core.metalink import write_metalink
from weightfs.core.ref import parse_ref
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import WeightfsError
from weightfs.sources.publish import describe
from weightfs.store.cache import Cache
from weightfs.testing import disks
from weightfs.testing.engines import running_engine
from weightfs.testing.nginx import Nginx
from weightfs.testing.published import sample

DRIVER = Path(__file__).with_name("driver.py")
SIZE = 24 * MIB + 321
RATE = "16m"  # bytes a second and connection: a pull takes a second or two
PROBE = 1  # the byte by which a new ref is asked whether it has ranges
ROUND = 10  # cuts of one run of the driver
LIFE_SECONDS = 2.0  # about what the driver lives for after it has made the cache
SECONDS = 60.0
OFTEN = {"written, not told": 20, "told, not queued": 20, "queued": 20, "in the index": 8}
SOMETIMES = {"before the sync": 6, "synced": 6, "committed": 6, "believed durable": 6}
LAZY = EngineSettings(workers=0, fill=FillMode.NEVER)


@dataclass
class Cut:
    """One power cut. `landed`, `kept` and `refetched` are bytes; `lost` are recorded chunks that the disk has not."""

    filesystem: str
    at: str
    landed: int
    kept: int = 0
    lost: int = 0
    refetched: int = 0
    problems: list[str] = field(default_factory=list)


class Tally:
    """The bytes that the driver has present, in memory shared with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 8)

    @property
    def bytes(self) -> int:
        return int.from_bytes(self._shared[:], "little")


class Bench:
    """A shelf for images, an origin and the chance: cuts are made of images of one filesystem."""

    def __init__(
        self, place: Path, shelf: Path, origin: Nginx, content: bytes, given: argparse.Namespace
    ) -> None:
        self.place, self.shelf, self.origin, self.content = place, shelf, origin, content
        self.filesystem: str = given.filesystem
        self.swapped: bool = given.swapped
        self.chance = random.Random(given.seed)
        self._tally = Tally(place / "tally")
        self._disk = shelf / "disk.img"
        self._made: list[tuple[Path, Cut]] = []

    def round(self, count: int, *, asked: bool) -> Iterator[Cut]:
        """One life of the driver, and what became of its cuts."""
        self._tally.path.write_bytes(bytes(8))
        self._made = []
        disks.make_disk(self._disk, self.filesystem)
        try:
            with disks.mounted(self._disk, self.filesystem, direct=True) as directory:
                os.sync()  # the filesystem itself is older than the cut
                with self._driving(directory / "cache", asked=asked) as driver:
                    if asked:
                        self._at_steps(driver, count)
                    else:
                        self._at_times(driver, directory / "cache", count)
            for image, made in self._made:
                with disks.mounted(image, self.filesystem) as directory:
                    judge(directory / "cache", made, self.origin, self.content)
                image.unlink()
                yield made
        finally:
            self._disk.unlink()
            for image, _ in self._made:
                image.unlink(missing_ok=True)

    @contextmanager
    def _driving(self, cache: Path, *, asked: bool) -> Iterator[subprocess.Popen[str]]:
        options = ["--tally", str(self._tally.path), "--readers", str(self.origin.root / "m.bin")]
        options += ["--ask"] * asked + ["--swapped"] * self.swapped
        argv = [sys.executable, str(DRIVER), str(cache), self.origin.url("m.bin"), "never", "1", *options]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, bufsize=1) as driver:
            try:
                yield driver
                if driver.poll() not in (None, 0):
                    raise RuntimeError(f"the driver ended with status {driver.returncode}")
            finally:
                driver.kill()
                driver.wait(SECONDS)
                # Its workers hold the lock, and files of the image, a moment longer.
                Cache.open(cache, now=0).close()

    def _cut(self, at: str) -> None:
        before = self._tally.bytes
        image = self.shelf / f"cut-{len(self._made)}.img"
        disks.cut(self._disk, image)
        self._made.append((image, Cut(self.filesystem, at, min(before, self._tally.bytes))))

    def _at_steps(self, driver: subprocess.Popen[str], count: int) -> None:
        most = OFTEN | SOMETIMES
        steps = ["in the index"] if self.swapped else list(STEPS)
        steps = self.chance.choices(steps, k=count)
        wanted = {(step, self.chance.randint(1, most.get(step, 1))) for step in steps}
        passed = dict.fromkeys(STEPS, 0)
        assert driver.stdin is not None
        assert driver.stdout is not None
        for line in driver.stdout:
            said = json.loads(line)
            if "wrong" in said:
                raise RuntimeError(f"a reader got a wrong byte in {said['wrong']}")
            if "step" not in said:
                continue
            passed[said["step"]] += 1
            if (said["step"], passed[said["step"]]) in wanted:
                self._cut(f"{said['step']} {passed[said['step']]}")
            driver.stdin.write("\n")

    def _at_times(self, driver: subprocess.Popen[str], cache: Path, count: int) -> None:
        deadline = time.monotonic() + SECONDS
        while not cache.exists() and driver.poll() is None:
            if time.monotonic() > deadline:
                raise RuntimeError("the driver made no cache")
            time.sleep(0.001)
        start = time.monotonic()
        for moment in sorted(
            self.chance.triangular(0, LIFE_SECONDS, 0.7 * LIFE_SECONDS) for _ in range(count)
        ):
            # The one honest use of the clock: a cut comes when it comes. Nothing is expected to have happened by then.
            time.sleep(max(0.0, start + moment - time.monotonic()))
            ended = driver.poll() is not None
            self._cut("after the end" if ended else f"{moment:.3f} s")
            if ended:
                return


def judge(root: Path, cut: Cut, origin: Nginx, content: bytes) -> None:
    """Open what the cut left, compare records and data, and let an engine read everything."""
    try:
        _records(root, cut, content)
        trio.run(_second_life, root, cut, origin, content)
    except (WeightfsError, AssertionError) as error:
        cut.problems.append(f"{type(error).__name__}: {error}")


def _records(root: Path, cut: Cut, content: bytes) -> None:
    cache = Cache.open(root, now=int(time.time()))
    try:
        findings = cache.check(deep=True)
        refs = cache.refs()
        if cut.landed and not refs:
            cut.problems.append("chunks had landed, and the ref is not recorded")
        for stored in refs:
            blob = stored.manifest.entries[0].blob
            progress = cache.progress(blob.id)
            digests = cache.digests(blob.id, ChunkSpan(0, blob.shape.chunk_count))
            for chunk in progress.present:
                span = blob.shape.span_of(chunk)
                right = digests[chunk] == hashlib.sha256(content[span.start : span.stop]).digest()
                if not right:
                    cut.problems.append(f"chunk {chunk} is recorded with a digest that is not its own")
                if cache.read(blob.id, span) == content[span.start : span.stop]:
                    cut.kept += len(span)
                else:
                    cut.lost += 1
        if not cut.lost:  # else they say the same
            cut.problems += findings
        cut.refetched = max(0, cut.landed - cut.kept)
    finally:
        cache.close()


async def _second_life(root: Path, cut: Cut, origin: Nginx, content: bytes) -> None:
    origin.forget_requests()
    async with running_engine(root, LAZY) as engine:
        with trio.fail_after(SECONDS):
            ref = parse_ref(origin.url("m.bin"))
            blob = (await engine.add(ref)).entries[0].blob
            for start in range(0, SIZE, 5 * MIB):
                span = ByteSpan(start, start + 5 * MIB).clamp(SIZE)
                if await engine.read(blob.id, span) != content[span.start : span.stop]:
                    cut.problems.append(f"a wrong byte was served in {span}")
            await engine.complete(str(ref))
            assert engine.blob_status(blob.id).trust == Trust.VERIFIED
            assert engine.status().disk_faults == cut.lost
    sent = origin.bytes_sent("m.bin")
    if sent > SIZE - cut.kept + PROBE:
        cut.problems.append(f"{sent} bytes were fetched where {SIZE - cut.kept} were missing")
    if cut.refetched > UNSETTLED and not cut.lost:
        cut.problems.append(f"{cut.refetched} bytes were fetched twice, more than {UNSETTLED}")


def summary(cuts: list[Cut]) -> dict[str, object]:
    """The figures of docs/reliability.md."""
    refetched = [cut.refetched for cut in cuts] or [0]
    return {
        "cuts": len(cuts),
        "chunks recorded and not there": sum(cut.lost for cut in cuts),
        "refetched bytes, median": int(statistics.median(refetched)),
        "refetched bytes, max": max(refetched),
        "bad cuts": sum(bool(cut.problems) for cut in cuts),
    }


def main(given: argparse.Namespace) -> int:
    content = sample(SIZE)
    cuts: list[Cut] = []
    with tempfile.TemporaryDirectory(prefix="weightfs-power-", dir=given.place) as name:
        place = Path(name)
        (place / "origin").mkdir()
        (place / "origin" / "m.bin").write_bytes(content)
        with disks.shelf(place) as shelf, Nginx(place / "origin", limit_rate=RATE) as origin:
            described = describe(place / "origin" / "m.bin", [origin.url("m.bin")])
            (place / "origin" / "m.bin.meta4").write_bytes(write_metalink(described))
            bench = Bench(place, shelf, origin, content, given)
            asked, tried = True, 0
            while (
                tried < given.cuts
            ):  # a round may make fewer: its process has ended, or passed a step less often
                count = min(ROUND, -(-given.cuts // (1 if given.swapped else 2)), given.cuts - tried)
                tried += count
                for cut in bench.round(count, asked=asked):
                    cuts.append(cut)
                    print(json.dumps(asdict(cut)), flush=True)
                asked = given.swapped or not asked
    print(json.dumps({"filesystem": given.filesystem, "seed": given.seed, **summary(cuts)}), flush=True)
    return any(cut.problems for cut in cuts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Power cuts; see the docstring.")
    parser.add_argument("filesystem", choices=disks.FILESYSTEMS)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--place", type=Path)
    parser.add_argument("--swapped", action="store_true")
    parser.add_argument("--isolated", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.isolated:
        if (why := disks.missing(options.filesystem)) is not None:
            print(json.dumps({"filesystem": options.filesystem, "skipped": why}))
            sys.exit()
        os.execvp(disks.ISOLATED[0], [*disks.ISOLATED, sys.executable, *sys.argv, "--isolated"])
    sys.exit(main(options))
