"""Those who are measured, each driven by its command line as a user would: weightfs, rclone, curl, aria2.

Rule: a contender leaves nothing behind, neither mount nor process nor file, whatever happened in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

WEIGHTFS = Path(sys.executable).with_name("weightfs")
CLIENTS = Path(__file__).with_name("clients.py")
COMMAND_SECONDS = 900.0
MOUNT_SECONDS = 30.0
MIB = 1024 * 1024


class BenchError(Exception):
    """A contender or a client failed; the row is not measured."""


def run(*command: str | Path, stdout: int = subprocess.PIPE) -> str:
    """Run to its end; what it printed. BenchError if it fails or takes too long."""
    try:
        result = subprocess.run(
            command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{command[0]} took over {COMMAND_SECONDS:.0f} s") from None
    if result.returncode:
        raise BenchError(f"{command[0]} ended with {result.returncode}: {result.stderr.strip()[-500:]}")
    return result.stdout or ""


def timed(*command: str | Path) -> float:
    """The seconds that a command takes."""
    started = time.monotonic()
    run(*command, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def client(*arguments: str | Path) -> dict[str, Any]:
    """What one of `clients.py` found."""
    found = json.loads(run(sys.executable, CLIENTS, *arguments))
    assert isinstance(found, dict)
    return found


def wait(what: str, done: Callable[[], bool], seconds: float = MOUNT_SECONDS, every: float = 0.02) -> None:
    """Poll until `done()`. BenchError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise BenchError(f"waited {seconds:.0f} s for {what}")
        time.sleep(every)


def is_mounted(mountpoint: Path) -> bool:
    """By the kernel's table, which cannot block."""
    return any(
        line.split()[4] == str(mountpoint) for line in Path("/proc/self/mountinfo").read_text().splitlines()
    )


def unmount(mountpoint: Path) -> None:
    """Detach whatever is there."""
    while is_mounted(mountpoint):
        run("fusermount3", "-u", "-z", mountpoint)


def cat(path: Path) -> float:
    """The seconds for reading a file whole with cat."""
    return timed("sh", "-c", 'exec cat "$0" >/dev/null', path)


def warm(directory: Path) -> None:
    """Bring every file below into the page cache of its own filesystem."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.stat().st_size >= MIB:
            cat(path)


def empty(directory: Path) -> Path:
    """The directory, made anew."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def pss(pids: Sequence[int]) -> int:
    """The sum of the proportional set sizes of processes, in bytes; those that ended count 0."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def family(pid: int) -> list[int]:
    """A process and everything that it started."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


class WeightfsMount:
    """weightfs on a mount point with a cache, by its command line."""

    def __init__(self, mountpoint: Path, cache: Path) -> None:
        self.mountpoint = mountpoint
        self.cache = cache
        self.pid = 0
        self.mounted_at = 0.0  # monotonic time at which the command had come back

    @contextlib.contextmanager
    def mounted(
        self, *refs: str, fill: str = "opened", options: Sequence[str] = ()
    ) -> Iterator[WeightfsMount]:
        """Mounted and serving, and unmounted at the end."""
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        run(
            WEIGHTFS,
            "mount",
            self.mountpoint,
            *refs,
            "--cache",
            self.cache,
            "--fill",
            fill,
            "--detach",
            *options,
        )
        self.mounted_at = time.monotonic()
        try:
            self.pid = int(self.status()["pid"])
            yield self
        finally:
            with contextlib.suppress(BenchError):
                run(WEIGHTFS, "umount", self.mountpoint)
            unmount(self.mountpoint)
            self._wait_for_end()

    def status(self) -> dict[str, Any]:
        """`weightfs status --json`."""
        found = json.loads(run(WEIGHTFS, "status", "--json", "--cache", self.cache))
        assert isinstance(found, dict)
        return found

    def path(self, name: str) -> Path:
        """Where a file of this name is on the mount; a new ref is there once its origin has answered."""
        found: list[Path] = []

        def appeared() -> bool:
            found[:] = (path for path in (self.mountpoint / "models").rglob(name) if path.is_file())
            return bool(found)

        wait(f"{name} on the mount", appeared)
        if len(found) > 1:
            raise BenchError(f"{len(found)} files named {name} on the mount")
        return found[0]

    def cached(self, name: str) -> int:
        """Bytes of a file that are cached, by its extended attribute."""
        return int(os.getxattr(self.path(name), "user.weightfs.cached"))

    def pids(self) -> list[int]:
        """The daemon and its workers."""
        return family(self.pid)

    def _wait_for_end(self) -> None:
        process = Path(f"/proc/{self.pid}/cmdline")

        def ended() -> bool:
            try:
                return b"weightfs" not in process.read_bytes()
            except OSError:
                return True

        if self.pid:
            try:
                wait("weightfs to end", ended)
            except BenchError:
                os.kill(self.pid, signal.SIGKILL)
                raise
            finally:
                self.pid = 0


class RcloneMount:
    """`rclone mount --vfs-cache-mode full` of an http remote."""

    def __init__(self, mountpoint: Path, cache: Path, url: str) -> None:
        self.mountpoint = mountpoint
        self.cache = cache
        self.url = url
        self.pid = 0

    @contextlib.contextmanager
    def mounted(self) -> Iterator[RcloneMount]:
        """Mounted and serving, and unmounted at the end."""
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        command = [
            "rclone",
            "mount",
            ":http:",
            str(self.mountpoint),
            "--http-url",
            self.url,
            "--config",
            "/dev/null",
        ]
        command += ["--vfs-cache-mode", "full", "--cache-dir", str(self.cache), "--read-only"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            self.pid = process.pid
            try:
                wait("rclone to mount", lambda: process.poll() is None and is_mounted(self.mountpoint))
                yield self
            finally:
                unmount(self.mountpoint)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()

    def path(self, name: str) -> Path:
        """Where a file of this name is on the mount."""
        return self.mountpoint / name

    def pids(self) -> list[int]:
        """rclone."""
        return family(self.pid)


def curl(url: str, target: Path, ca_file: Path) -> float:
    """Download with curl and make it durable; seconds."""
    script = 'curl -sS --fail --cacert "$2" -o "$1" "$0" && sync "$1"'
    return timed("sh", "-c", script, url, target, ca_file)


def aria2(url: str, target: Path, ca_file: Path) -> float:
    """Download over 16 connections with aria2c and make it durable; seconds."""
    options = "-q -x16 -s16 --min-split-size=1M --file-allocation=none --no-conf"
    script = f'aria2c {options} --ca-certificate="$3" -d "$1" -o "$2" "$0" && sync "$1/$2"'
    return timed("sh", "-c", script, url, target.parent, target.name, ca_file)


def weightfs_pull(url: str, cache: Path, ca_file: Path) -> float:
    """Download, verify and make durable with `weightfs pull`; seconds."""
    options: list[str | Path] = ["--ca-file", ca_file] if url.startswith("https:") else []
    return timed(WEIGHTFS, "pull", url, "--cache", cache, *options)
