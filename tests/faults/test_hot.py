"""Restarts and kills of a supervised daemon under its readers: right bytes and no error, only a wait.

`WEIGHTFS_SOAK=1 python -m pytest -s tests/faults/test_hot.py` makes 50 restarts and 50 kills, and prints the waits.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from weightfs.core.geometry import MIB
from weightfs.mount.mounttable import mounts_at
from weightfs.store.cache import Cache
from weightfs.testing.daemon import Daemon
from weightfs.testing.mounts import can_mount
from weightfs.testing.nginx import Nginx
from weightfs.testing.published import sample
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nginx,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

RIDER = Path(__file__).with_name("rider.py")
SOAK = os.environ.get("WEIGHTFS_SOAK") == "1"
EACH = int(os.environ.get("WEIGHTFS_RESTARTS", "50" if SOAK else "1"))  # restarts, and as many kills
SIZE = (64 if SOAK else 24) * MIB + 4_321


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    root = tmp_path_factory.mktemp("origin")
    (root / "m.bin").write_bytes(sample(SIZE))
    # Slow enough that the first daemons die amid the download.
    with Nginx(root, limit_rate="4m") as server:
        yield server


class Riders:
    """Clients that go on all the while."""

    def __init__(self, daemon: Daemon, ref: str, plain: Path) -> None:
        self._daemon = daemon
        self._progress = {mode: plain.with_name(f"{mode}.progress") for mode in ("stream", "map", "open")}
        for file in self._progress.values():
            file.write_text("0")
        command = [sys.executable, "-I", "-S", str(RIDER)]
        self._clients = {
            mode: daemon.command([*command, mode, str(daemon.path(ref)), str(plain), str(file)])
            for mode, file in self._progress.items()
        }
        self.go_on()

    def go_on(self) -> None:
        """Wait until each has come a step further than it is now, and so waits for nothing that was."""
        before = {mode: self._count(mode) for mode in self._clients}
        until(
            lambda: all(self._count(mode) > count for mode, count in before.items()), "every client goes on"
        )

    def _count(self, mode: str) -> int:
        assert self._clients[mode].poll() is None, (
            f"{mode} has ended: {self._daemon.finish(self._clients[mode])}"
        )
        return int(self._progress[mode].read_text())

    def ended(self) -> dict[str, list[tuple[float, float]]]:
        """Have them end; the waits of each. AssertionError if one met an error or a wrong byte."""
        waits: dict[str, list[tuple[float, float]]] = {}
        for mode, client in self._clients.items():
            self._progress[mode].unlink()
            waits[mode] = [tuple(wait) for wait in json.loads(self._daemon.finish(client))]
        return waits


def serving(daemon: Daemon) -> int:
    """The pid of the daemon that serves now."""
    return int(daemon.ask(lambda client: client.health())["pid"])


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def check(cache: Path) -> None:
    opened = Cache.open(cache, create=False, now=0)
    try:
        assert opened.was_clean
        assert opened.check(deep=True) == []
    finally:
        opened.close()


def report(what: str, waits: dict[str, list[tuple[float, float]]], events: list[tuple[float, float]]) -> str:
    """For each mode: how long the longest operation took that was under way in each of the times from, to."""
    lines = []
    for mode, found in waits.items():
        worst = [
            max((seconds for begin, seconds in found if begin < after and begin + seconds > at), default=0.0)
            for at, after in events
        ]
        lines.append(
            f"{what}, {len(worst)} times, {mode}: median wait {statistics.median(worst):.2f} s, "
            f"longest {max(worst):.2f} s"
        )
    return "\n".join(lines)


def test_a_ref_that_cannot_be_had_does_not_cut_off_who_reads(tmp_path: Path, nginx: Nginx) -> None:
    """At a first start it is exit code 3; a mount that was taken over has its users."""
    ref, plain = nginx.url("m.bin"), nginx.root / "m.bin"
    config = tmp_path / "config.toml"
    config.write_text("")
    options = ["--supervise", "--config", str(config), "--fill", "never", "--workers", "0"]
    with Daemon(tmp_path, ref, options=options) as daemon:
        daemon.start()
        riders = Riders(daemon, ref, plain)
        config.write_text(f'refs = ["{nginx.url("none.bin")}"]\n')
        pid = serving(daemon)
        os.kill(pid, signal.SIGUSR1)
        until(partial(is_gone, pid), "it is gone")
        daemon.ready()
        until(lambda: "the mount, which is in use, goes on without it" in daemon.log, "it says so")
        riders.go_on()
        riders.ended()
        assert daemon.stop() == 0
    check(tmp_path / "cache")


@pytest.mark.parametrize("passthrough", ["--no-passthrough", "--passthrough"])
def test_readers_go_on_through_restarts_and_kills(tmp_path: Path, nginx: Nginx, passthrough: str) -> None:
    ref, plain = nginx.url("m.bin"), nginx.root / "m.bin"
    options = ["--supervise", "--fill", "opened", "--workers", "1", passthrough]
    dice = random.Random(11)
    with Daemon(tmp_path, ref, options=options) as daemon:
        daemon.start()
        device = mounts_at(daemon.mountpoint)[0].device
        riders = Riders(daemon, ref, plain)
        order = [signal.SIGUSR1, signal.SIGKILL] * EACH
        events: dict[int, list[tuple[float, float]]] = {signal.SIGUSR1: [], signal.SIGKILL: []}
        for number in order:
            pid = serving(daemon)
            time.sleep(dice.uniform(0, 0.3))  # amid whatever it does then
            at = time.monotonic()
            os.kill(pid, number)
            until(partial(is_gone, pid), "it is gone")
            daemon.ready()
            assert mounts_at(daemon.mountpoint)[0].device == device, "it is the same mount"
            riders.go_on()
            events[number].append((at, time.monotonic()))
        waits = riders.ended()
        assert len(mounts_at(daemon.mountpoint)) == 1
        daemon.complete(ref)
        assert daemon.stop() == 0
        assert not mounts_at(daemon.mountpoint)
        assert "Traceback" not in daemon.log
    check(tmp_path / "cache")
    print("\n" + passthrough)
    print(report("restarted", waits, events[signal.SIGUSR1]))
    print(report("killed", waits, events[signal.SIGKILL]))
