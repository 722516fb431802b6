"""The real `weightfs mount` in a subprocess, and clients of its mount in others; whatever happens, it is cleaned up.

Rule: this process never touches the mount. A read that hangs in the kernel survives SIGKILL until its server is gone;
so clients are processes, `close` kills the daemon by its pid first, and takes the mount away after it. Waiting is
polling against a deadline far beyond any sound wait: a hang becomes a failure with the daemon's log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import trio

from weightfs.app import registry
from weightfs.control.client import ControlClient, find_daemon
from weightfs.core.ref import parse_ref, tree_of
from weightfs.errors import DaemonError
from weightfs.mount.mounttable import mounts_at
from weightfs.testing.mounts import AS_NOBODY, NOBODY, clear
from weightfs.testing.waiting import until

DEADLINE = 60.0  # seconds
END_SECONDS = 30.0

_PRELUDE = """
import ctypes, errno, hashlib, json, mmap, os, random, signal, sys, threading, time
path, plain = sys.argv[1:3]
def cold(): return os.open(path, os.O_RDONLY)
def true(start, stop):
    with open(plain, 'rb') as file:
        return os.pread(file.fileno(), stop - start, start)
"""


class Daemon:
    """A cache and a mount point below `root`, and the daemon that serves them, one life after another.

    Args:
        root: An empty directory; it gets `cache` and `mnt`.
        refs: What `weightfs mount` is told to pin.
        options: More of its command line.
        sabotage: Python that the daemon, not its workers, runs before it begins.
        env: More of its environment.
        ordinary_user: Run it as nobody, who gets `root`. Its mount is in a namespace of its own: `begin` it, and `ask`.
    """

    def __init__(
        self,
        root: Path,
        *refs: str,
        options: Sequence[str] = (),
        sabotage: str = "",
        env: Mapping[str, str] | None = None,
        ordinary_user: bool = False,
    ) -> None:
        self.mountpoint = root.resolve() / "mnt"
        self.cache = root.resolve() / "cache"
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        self._refs = refs
        self._options = tuple(options)
        self._program = ["-m", "weightfs"]
        if sabotage:
            self._program = ["-c", f"{sabotage}\nfrom weightfs.cli import main; main()"]
        self._env = dict(env or {})
        self._python = AS_NOBODY if ordinary_user else (sys.executable,)
        self._clients: list[subprocess.Popen[str]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._home = tempfile.TemporaryDirectory(prefix="weightfs-daemon-")
        self._log = (Path(self._home.name) / "log").open("a+b")
        if ordinary_user:
            for place in (root, self.mountpoint, Path(self._home.name)):
                os.chown(place, NOBODY, NOBODY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # --- its life

    def begin(self) -> Self:
        """Start the daemon, and do not wait for it."""
        assert self._process is None, "it runs already"
        command = ["mount", "--cache", str(self.cache), *self._options, str(self.mountpoint), *self._refs]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
            [*self._python, *self._program, *command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=self._environment(),
        )
        return self

    def start(self) -> Self:
        """Start the daemon, and wait until the mount is there and shows every ref. AssertionError with its log."""
        return self.begin().ready()

    def ready(self) -> Self:
        """Wait until the mount is there and shows every ref."""
        wanted = {str(parse_ref(ref)) for ref in self._refs}
        until(lambda: self._shows(wanted), f"the mount serves\n{self.log}")
        return self

    def _shows(self, refs: set[str]) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the daemon ended with {self._process.returncode}\n{self.log}"
        try:
            status = self.ask(lambda client: client.status())
        except DaemonError:
            return False  # it does not listen yet
        shown = {ref["ref"] for ref in status["refs"]}
        # What is mounted there may still be the dead mount of an earlier life: who serves it registers himself.
        serves = registry.daemon_of(self.mountpoint, self._environment()) == status["pid"]
        return serves and bool(mounts_at(self.mountpoint)) and refs <= shown

    def stop(self) -> int:
        """SIGTERM, and the exit code. AssertionError if the daemon does not end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> int:
        """Wait for the daemon to end; its exit code."""
        assert self._process is not None
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon does not end\n{self.log}") from None
        self._process = None
        return code

    def kill(self) -> None:
        """SIGKILL: the mount is stale from now on. Its workers die with it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(END_SECONDS)
            self._process = None

    @property
    def pid(self) -> int:
        """Of the process that serves."""
        assert self._process is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        """Send the daemon a signal: SIGSTOP, SIGCONT."""
        assert self._process is not None
        self._process.send_signal(number)

    def close(self) -> None:
        """Kill whatever is left, and free the mount point. Safe at any time, and more than once."""
        for client in self._clients:
            client.kill()
        self.kill()
        for client in self._clients:
            client.wait(END_SECONDS)  # free now, wherever it hung
            for stream in (client.stdin, client.stdout, client.stderr):
                if stream is not None:
                    stream.close()
        self._clients.clear()
        clear(self.mountpoint)
        self._log.close()
        self._home.cleanup()

    def _environment(self) -> dict[str, str]:
        """Nothing of this machine's configuration, proxies and runtime directory."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith(("WEIGHTFS_", "XDG_", "NOTIFY_"))
            and not name.upper().endswith("_PROXY")
        }
        self.config.touch()
        return {
            **kept, "XDG_RUNTIME_DIR": self._home.name, "WEIGHTFS_CONFIG": str(self.config), **self._env,
        }  # fmt: skip

    @property
    def config(self) -> Path:
        """Its configuration file, and the other commands'; empty unless somebody writes to it."""
        return Path(self._home.name) / "config.toml"

    # --- asking it

    @property
    def log(self) -> str:
        """What it logged so far, in all its lives."""
        return Path(self._log.name).read_text(errors="replace")

    def cli(self, *arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run another command of weightfs, on the same cache unless another one is given."""
        return subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, "-m", "weightfs", *arguments, "--cache", str(cache or self.cache)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self._environment(),
            timeout=DEADLINE,
            check=False,
        )

    def ask(self, question: Callable[[ControlClient], Any]) -> Any:
        """Await one of the control client's methods. DaemonError if nobody answers."""

        async def main() -> Any:
            async with find_daemon(self.cache) as client:
                if client is None:
                    raise DaemonError("nobody listens")
                return await question(client)

        return trio.run(main)

    def add(self, *refs: str) -> None:
        """Pin refs."""

        async def main(client: ControlClient) -> None:
            async with trio.open_nursery() as nursery:
                for ref in refs:
                    nursery.start_soon(client.add, ref)

        self.ask(main)

    def status(self) -> dict[str, Any]:
        """As `weightfs status --json`."""
        status: dict[str, Any] = self.ask(lambda client: client.status())
        return status

    def file(self, ref: str) -> dict[str, Any]:
        """The status of a ref's only file."""
        name = str(parse_ref(ref))
        files: list[dict[str, Any]] = next(
            one["files"] for one in self.status()["refs"] if one["ref"] == name
        )
        assert len(files) == 1
        return files[0]

    def quiet(self, ref: str) -> None:
        """Wait until no fetch of a ref's file is in flight."""
        blob = self.file(ref)["blob"]
        until(lambda: all(job["blob"] != blob for job in self.status()["jobs"]), "nothing is in flight")

    def complete(self, ref: str) -> None:
        """Fetch all of a ref and wait until it is sealed, as `weightfs pull` does."""

        async def main(client: ControlClient) -> dict[str, Any]:
            job = await client.start_fill(str(parse_ref(ref)))
            while job["state"] == "running":  # each answer comes when the job ends, or after five seconds
                job = await client.job(job["job"], wait=5)
            return job

        job = self.ask(main)
        assert job["state"] == "done", f"{job}\n{self.log}"

    def path(self, ref: str) -> Path:
        """Where the file of a ref appears."""
        tree, name = tree_of(parse_ref(ref))
        return self.mountpoint / "models" / tree / name

    # --- clients

    def client(
        self, code: str, ref: str, plain: Path | str = "/dev/null", *arguments: object, talk: bool = False
    ) -> subprocess.Popen[str]:
        """Start Python code that has `path` (the ref's file), `plain` (the same bytes elsewhere), `cold()`, `true()`.

        With `talk` its standard input is a pipe.
        """
        argv = [str(self.path(ref)), str(plain), *map(str, arguments)]
        return self.command([sys.executable, "-I", "-S", "-c", _PRELUDE + code, *argv], talk=talk)

    def command(self, argv: Sequence[str], *, talk: bool = False) -> subprocess.Popen[str]:
        """Start any program; `close` will kill it if it still runs."""
        client = subprocess.Popen(  # noqa: S603 - the test's own
            argv,
            stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._clients.append(client)
        return client

    def finish(self, client: subprocess.Popen[str], say: str | None = None) -> str:
        """Wait for a client, `say` something to it first; what it printed. AssertionError if it fails or hangs."""
        try:
            out, err = client.communicate(say, timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a client hangs\n{self.log}") from None
        assert client.returncode == 0, f"exit {client.returncode}: {err}\n{self.log}"
        return out.strip()

    def run(self, code: str, ref: str, plain: Path | str = "/dev/null", *arguments: object) -> str:
        """Start a client and finish it."""
        return self.finish(self.client(code, ref, plain, *arguments))

    def tell(self, code: str, ref: str, plain: Path | str = "/dev/null", *arguments: object) -> Any:
        """Run a client; the JSON that it printed."""
        return json.loads(self.run(code, ref, plain, *arguments))
