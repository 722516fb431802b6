"""How long the loop of a mount stands still while a ref of very many files is added, looked at, followed and removed.

    python tests/bench/stalls.py --files 99000

A Hub on loopback has a repository of that many small files in directories of a thousand. An engine with its control
socket and its mount runs in this process as `weightfs mount` runs it, beside a task that wakes every few milliseconds:
the most by which it was late is the gap in which no reader was answered. Every client is another process. One line a
step: seconds, longest gap, and with `--who` the steps of tasks that held the loop, by the processor's time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import trio

from weightfs.app.daemon import LAYOUTS
from weightfs.app.local import take_over
from weightfs.app.measuring import mount_measures
from weightfs.app.memory import give_back_buffers, keep_looks_short
from weightfs.control.operations import ProcessInfo
from weightfs.core.ref import parse_ref
from weightfs.engine.engine import Engine
from weightfs.engine.settings import EngineSettings
from weightfs.mount.serve import Mounted, serve
from weightfs.mount.stats import MountStats
from weightfs.sources.base import FetchSettings
from weightfs.testing.hub import Hub

TICK = 0.005  # seconds
PER_DIRECTORY = 1000
REF = "hf://big/files@main"
OTHER = "hf://small/files@main"
SHOWN = 0.05  # seconds of a task's step that `--who` names


class Ticker(trio.abc.Instrument):
    """The longest time by which a task was woken late, since `take` was called last; and who held the loop."""

    def __init__(self, *, who: bool) -> None:
        self._worst = 0.0
        self._who = who
        self._began = 0.0
        self._held: list[tuple[float, str]] = []
        self._collected = 0.0
        self._collecting = 0.0
        gc.callbacks.append(self._note_collection)

    async def run(self) -> None:
        """Until cancelled."""
        if self._who:
            trio.lowlevel.add_instrument(self)
        while True:
            due = time.monotonic() + TICK
            await trio.sleep(TICK)
            self._worst = max(self._worst, time.monotonic() - due)

    def take(self) -> str:
        """What there was since the last call."""
        held = ", ".join(f"{name} {seconds:.2f}" for seconds, name in sorted(self._held, reverse=True)[:6])
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
        text = f"gap {self._worst:6.3f} s   collector {self._collected:5.3f} s   {memory} MiB   {held}"
        self._worst, self._held, self._collected = 0.0, [], 0.0
        return text

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        seconds = time.thread_time() - self._began
        if seconds > SHOWN:
            self._held.append((seconds, task.name.removeprefix("weightfs.")))

    def _note_collection(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._collecting = time.perf_counter()
        else:
            self._collected = max(self._collected, time.perf_counter() - self._collecting)


def run_hub(files: int) -> None:
    """In a process of its own: a line on standard input is a commit that changes ten files."""
    names = {f"data/{k // PER_DIRECTORY:03}/{k:06}.json": b'{"n":%d}' % k for k in range(files)}
    with Hub() as hub:
        repo = hub.repo("big/files")
        repo.commit(names)
        hub.repo("small/files").commit({"config.json": b"{}"})
        print(hub.endpoint, flush=True)
        for number, _ in enumerate(sys.stdin):
            names |= dict.fromkeys(list(names)[:10], b"%d" % number)
            repo.commit(names)
            print("committed", flush=True)


@contextlib.contextmanager
def hub(files: int) -> Iterator[subprocess.Popen[str]]:
    """The process of `run_hub`."""
    command = [sys.executable, __file__, "--files", str(files), "--hub"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def mounted(home: Path, settings: EngineSettings) -> AsyncIterator[Engine]:
    """As `weightfs mount` does it, without a manager."""
    stats = MountStats()
    measures = partial(mount_measures, stats)
    info = ProcessInfo("mount", home / "cache", home / "mnt", int(time.time()), mount_measures=measures)
    async with take_over(info, settings) as (engine, operations), trio.open_nursery() as nursery:
        up: Mounted = await nursery.start(partial(serve, home / "mnt", engine, LAYOUTS, stats=stats))
        operations.requests = up.stats.requests
        try:
            yield engine
        finally:
            nursery.cancel_scope.cancel()


async def measure(home: Path, process: subprocess.Popen[str], ticker: Ticker, endpoint: str) -> None:
    """Every step, in its order."""
    fetch = FetchSettings(hf_endpoint=endpoint)
    settings = EngineSettings(fetch=fetch, workers=1, headers_first=True)

    @contextlib.asynccontextmanager
    async def step(name: str) -> AsyncIterator[None]:
        await trio.sleep(10 * TICK)
        ticker.take()
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        await trio.sleep(10 * TICK)
        print(f"{name:34} {seconds:7.2f} s   {ticker.take()}", flush=True)

    async def client(name: str, *command: str) -> None:
        async with step(name):
            done = await trio.run_process(command, capture_stdout=True, check=False)
            assert done.returncode == 0, command

    async def ask(name: str, path: str) -> None:
        socket = str(home / "cache" / "control.sock")
        await client(
            name, "curl", "-sSf", "-o", "/dev/null", "--unix-socket", socket, f"http://localhost{path}"
        )

    async def other(engine: Engine) -> None:
        async with step("add and remove another ref"):
            await engine.add(parse_ref(OTHER))
            await client_of(home / "mnt/models/hf/small/files/main")
            await engine.remove(OTHER)

    async def client_of(path: Path) -> None:
        await trio.run_process(["ls", str(path)], capture_stdout=True)

    async with mounted(home, settings) as engine:
        async with step("add"):
            await engine.add(parse_ref(REF))
        async with step("its first listing"):
            await client_of(home / "mnt/models/hf/big/files/main/data/000")
        async with step("headers"):
            await engine.headers_ready(REF, within=600)
        await client("find", "find", str(home / "mnt/models"), "-type", "f", "-size", "+1000k")
        await ask("status", "/v1/status")
        await ask("refs", "/v1/refs")
        await ask("health", "/v1/health")
        await ask("metrics", "/metrics")
        await ask("details", f"/v1/details?ref={REF}")
        await ask("chunks", f"/v1/chunks?ref={REF}")
        async with step("add once more"):
            await engine.add(parse_ref(REF))
        async with step("update, unchanged"):
            await engine.update(REF)
        await client_of(home / "mnt/models")
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        await trio.to_thread.run_sync(process.stdout.readline)
        async with step("update, ten files changed"):
            await engine.update(REF)
        async with step("its first listing"):
            await client_of(home / "mnt/models/hf/big/files/main/data/000")
        await other(engine)
        for pinned in (True, False):
            async with step(f"pin {pinned}"):
                await engine.pin(REF, pinned=pinned)
        for paused in (True, False):
            async with step(f"pause {paused}"):
                await engine.pause(REF, paused=paused)
        async with step("gc"):
            await engine.gc()
        async with step("quiet for 3 s"):
            await trio.sleep(3)
    gc.unfreeze()  # a daemon has one life in its process, and would not count these of the one before
    gc.collect()
    async with step("start and stop"):
        began = time.monotonic()
        async with mounted(home, settings) as engine:
            print(f"{'start':34} {time.monotonic() - began:7.2f} s", flush=True)
    gc.unfreeze()
    gc.collect()
    async with mounted(home, settings) as engine:
        async with step("update after a start"):
            await engine.update(REF)
        async with step("remove"):
            await engine.remove(REF)
        async with step("a listing"):
            await client_of(home / "mnt/models")


async def run(home: Path, files: int, *, who: bool) -> None:
    """The measurement beside its ticker."""
    (home / "mnt").mkdir()
    with hub(files) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        ticker = Ticker(who=who)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ticker.run)
            await measure(home, process, ticker, endpoint)
            nursery.cancel_scope.cancel()


def main() -> None:
    """Measure once, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--files", type=int, default=99_000, help="the bound of a Hub's list counts directories too"
    )
    parser.add_argument("--who", action="store_true", help="which tasks held the loop")
    parser.add_argument("--hub", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hub:
        run_hub(options.files)
        return
    home = Path(tempfile.mkdtemp(prefix="weightfs-stalls-"))
    give_back_buffers()
    keep_looks_short()
    print(f"{options.files} files, load {os.getloadavg()[0]:.1f}, {sys.version.split()[0]}")
    try:
        trio.run(partial(run, home, options.files, who=options.who))
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
