"""What the demo needs around it, and everything gone at the end, however it ends.

Files, two origins behind one slow link, weightfs through its command line, and programs that read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from weightfs.testing.link import Link
from weightfs.testing.nginx import Nginx

HERE = Path(__file__).parent
WEIGHTFS = Path(sys.executable).with_name("weightfs")
COMMAND_SECONDS = 60.0
PROGRAM_SECONDS = 180.0
POLL_SECONDS = 0.05
LAST_LINES = 30

GGUF = "tiny-llama.gguf"
SAFETENSORS = "tiny-llama.safetensors"


class DemoError(Exception):
    """Something around the demo went wrong: a command, a program, a time limit."""


class Program:
    """A `runtimes.py` process that has done its imports and waits for a path."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "runtimes.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("ab"),
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise DemoError(f"{arguments[0]} did not start: {self._last_words()}")

    def run(self, path: Path) -> dict[str, Any]:
        """Let it act on `path`, once; what it found, with `seconds`. DemoError after `PROGRAM_SECONDS`."""
        try:
            answer, _ = self._process.communicate(f"{path}\n", PROGRAM_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise DemoError(f"reading {path} took over {PROGRAM_SECONDS:.0f} s") from None
        if not answer:
            raise DemoError(f"reading {path} failed: {self._last_words()}")
        found = json.loads(answer)
        assert isinstance(found, dict)
        return found

    def stop(self) -> None:
        """End it, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return " | ".join(lines[-3:]) or "it said nothing"


class Stage:
    """A temporary directory with origins, a link of `rate` bytes per second, a mount point and a cache."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._ends = contextlib.ExitStack()
        self._programs: list[Program] = []
        self._pids: set[int] = set()

    def __enter__(self) -> Self:
        with self._ends:
            self.home = Path(self._ends.enter_context(tempfile.TemporaryDirectory(prefix="weightfs-demo-")))
            self.files, root_a, root_b = (self.home / name for name in ("files", "mirror-a", "mirror-b"))
            self.mountpoint, self.cache, self.log = (
                self.home / name for name in ("mnt", "cache", "daemon.log")
            )
            for directory in (self.files, root_a, root_b, self.mountpoint):
                directory.mkdir()
            self.mirror_a = self._ends.enter_context(Nginx(root_a))
            self.mirror_b = self._ends.enter_context(Nginx(root_b))
            self.link = self._ends.enter_context(Link(self.mirror_a.port, self.mirror_b.port, rate=self.rate))
            self._ends.callback(self._end_daemon)
            self._ends.callback(self._end_programs)
            self._ends = self._ends.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A second Ctrl-C must not leave a mount behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if kind is not None and issubclass(kind, Exception) and self.log.exists():
            lines = self.log.read_text(errors="replace").splitlines()
            print("the daemon's log ends:", *lines[-LAST_LINES:], sep="\n  ", file=sys.stderr)
        self._ends.close()

    def url(self, mirror: int, name: str) -> str:
        """Where mirror 0 or 1 has a file, through the link."""
        return f"http://127.0.0.1:{self.link.ports[mirror]}/{name}"

    def publish(self, name: str, flip_at: int | None = None) -> str:
        """Put a file and its .meta4 on both mirrors; the first's copy has one bit flipped at `flip_at`."""
        command = ["publish", str(self.files / name), "--url", self.url(0, name), "--url", self.url(1, name)]
        output = self.weightfs(*command)
        for mirror in (self.mirror_a, self.mirror_b):
            for published in (name, f"{name}.meta4"):
                os.link(self.files / published, mirror.root / published)
        if flip_at is not None:
            damaged = self.mirror_a.root / name
            damaged.unlink()
            shutil.copyfile(self.files / name, damaged)
            with damaged.open("r+b") as file:
                file.seek(flip_at)
                byte = file.read(1)[0]
                file.seek(flip_at)
                file.write(bytes([byte ^ 1]))
        return output

    def sent(self, name: str) -> tuple[int, int]:
        """Body bytes that mirrors A and B sent of a file, by their access logs."""
        return self.mirror_a.bytes_sent(name), self.mirror_b.bytes_sent(name)

    def quiet(self) -> None:
        """Wait until no fetch is in flight and both access logs have been written."""
        self.wait("the fetches in flight to end", lambda: not self.status()["jobs"])
        before: list[int] = []
        after = [-1]
        while before != after:
            before = after
            time.sleep(0.3)
            after = [mirror.bytes_sent() for mirror in (self.mirror_a, self.mirror_b)]

    def weightfs(self, *arguments: str) -> str:
        """Run the command line; its output. DemoError if it fails."""
        result = subprocess.run(
            [WEIGHTFS, *arguments], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
        if result.returncode:
            said = (result.stderr or result.stdout).strip()
            raise DemoError(f"weightfs {arguments[0]} ended with {result.returncode}: {said}")
        return result.stdout

    def mount(self, fill: str, names: Sequence[str] = (GGUF, SAFETENSORS)) -> float:
        """Mount the files, detached; the seconds until the command came back."""
        started = time.monotonic()
        self.weightfs("mount", *self.mount_arguments(fill, names))
        seconds = time.monotonic() - started
        self._pids.add(int(self.status()["pid"]))
        # A new ref is there once its origin has answered, which need not be when the command comes back.
        return seconds + self.wait(
            "the files on the mount", lambda: all(self.path(n).is_file() for n in names)
        )

    def mount_arguments(self, fill: str, names: Sequence[str] = (GGUF, SAFETENSORS)) -> list[str]:
        """What follows `weightfs mount`."""
        refs = [self.url(0, name) for name in names]
        options = ["--cache", str(self.cache), "--log-file", str(self.log), "--fill", fill, "--detach"]
        if fill == "never":  # somebody who wants few bytes fetched
            options += ["--readahead", "4MiB"]
        return [str(self.mountpoint), *refs, *options]

    def umount(self) -> None:
        """Unmount, as a user does."""
        self.weightfs("umount", str(self.mountpoint))

    def status(self) -> dict[str, Any]:
        """`weightfs status --json` of the daemon."""
        status = json.loads(self.weightfs("status", "--json", "--cache", str(self.cache)))
        assert isinstance(status, dict)
        return status

    def file_status(self, name: str) -> dict[str, Any]:
        """The part of `status` that tells of one file."""
        files = (file for ref in self.status()["refs"] for file in ref["files"])
        return next(file for file in files if file["path"].endswith(f"/{name}"))

    def path(self, name: str) -> Path:
        """Where a file is on the mount."""
        return self.mountpoint / "models" / "http" / f"127.0.0.1:{self.link.ports[0]}" / name

    def kill_daemon(self) -> int:
        """SIGKILL to the process that `status` names; its pid."""
        pid = int(self.status()["pid"])
        os.kill(pid, signal.SIGKILL)
        self._pids.discard(pid)
        return pid

    def program(self, *arguments: str) -> Program:
        """Start a program that reads."""
        program = Program(self.home / "programs.log", *arguments)
        self._programs.append(program)
        return program

    def wait(self, what: str, done: Callable[[], bool], seconds: float = PROGRAM_SECONDS) -> float:
        """Poll until `done()`; the seconds it took. DemoError after `seconds`."""
        started = time.monotonic()
        while not done():
            if time.monotonic() - started > seconds:
                raise DemoError(f"waited {seconds:.0f} s for {what}")
            time.sleep(POLL_SECONDS)
        return time.monotonic() - started

    def _end_programs(self) -> None:
        for program in self._programs:
            program.stop()

    def _end_daemon(self) -> None:
        """Unmount; if that fails, detach the mount and end the daemon by its pid."""
        if _is_mounted(self.mountpoint):
            with contextlib.suppress(DemoError, OSError, subprocess.TimeoutExpired):
                self.umount()
        for pid in self._pids:
            with contextlib.suppress(OSError):
                if b"weightfs" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        while _is_mounted(self.mountpoint):
            detach = ["fusermount3", "-u", "-z", str(self.mountpoint)]
            if subprocess.run(detach, capture_output=True, timeout=COMMAND_SECONDS, check=False).returncode:
                break


def _is_mounted(mountpoint: Path) -> bool:
    """By the kernel's table, which cannot block."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(mountpoint) for line in mounts)
