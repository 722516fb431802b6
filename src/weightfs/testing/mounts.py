"""A real mount over the fake engine in a process of its own, and clients in others; whatever happens, it is cleaned up.

A process that both serves a mount and reads from it waits for itself, and a client that hangs in the kernel may survive
SIGKILL until its server is gone. So `FakeMount` runs `serve` in a subprocess and commands it by lines of JSON; its
`close` kills that process first (the kernel then ends every request), and takes the mount away after it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from weightfs.mount import mounttable
from weightfs.testing.fake_engine import PERIOD, TREE, pattern

DEADLINE = 15.0  # seconds; a hang becomes a failure, nothing is measured
NOBODY = 65534

# As root in a mount namespace of its own: a /dev/fuse that anybody may open, as distributions have it. Then as nobody.
_AS_NOBODY = f"""
import ctypes, os, stat, sys, tempfile
libc = ctypes.CDLL(None, use_errno=True)
def mount(source, target, kind, flags):
    if libc.mount(source, target.encode(), kind, ctypes.c_ulong(flags), None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)
place = tempfile.mkdtemp()
mount(b"tmpfs", place, b"tmpfs", 0)
node = os.path.join(place, "fuse")
os.mknod(node, 0o600 | stat.S_IFCHR, os.makedev(10, 229))
os.chmod(node, 0o666)
mount(node.encode(), "/dev/fuse", None, 4096)
libc.umount2(place.encode(), 2)
# A Python below a closed directory (/root) is brought into the open.
base = os.path.realpath(sys.base_prefix)
parts = base.split("/")
for depth in range(2, len(parts)):
    closed = "/".join(parts[:depth])
    if not os.stat(closed).st_mode & 0o001:
        mount(base.encode(), place, None, 4096)
        mount(b"tmpfs", closed, b"tmpfs", 0)
        os.chmod(closed, 0o755)
        os.makedirs(base)
        mount(place.encode(), base, None, 4096)
        libc.umount2(place.encode(), 2)
        break
os.rmdir(place)
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""

_PRELUDE = "\n".join(
    (
        "import ctypes, errno, hashlib, json, mmap, os, signal, sys, threading, time",
        f"PERIOD = {PERIOD}",
        inspect.getsource(pattern),
        "root = sys.argv[1]",
        f"def at(name): return os.path.join(root, 'models', {TREE!r}, name)",
        "",
    )
)


# Before the arguments of a Python: it runs as nobody, in a mount namespace with a /dev/fuse for everybody.
AS_NOBODY = (
    "unshare",
    "--mount",
    "--propagation",
    "private",
    "--",
    sys.executable,
    "-I",
    "-S",
    "-c",
    _AS_NOBODY,
)


def can_mount() -> bool:
    """Whether this machine and this user let the tests mount."""
    return Path("/dev/fuse").exists() and mounttable.has_mount_privilege()


class FakeMount:
    """A served mount. Files are given as `{name: size}`; see `FakeEngine`. Use as a context manager.

    `sabotage` is Python that the server runs before it serves. With `every_layout` there are the trees of all three
    layouts, else `models` alone.
    """

    def __init__(
        self,
        mountpoint: Path,
        files: dict[str, int],
        *,
        present: float = 0.0,
        cache: Path | None = None,
        sabotage: str = "",
        ordinary_user: bool = False,
        options: dict[str, object] | None = None,
        rounds: int = 1,
        every_layout: bool = False,
    ) -> None:
        self.mountpoint = mountpoint
        self._clients: list[subprocess.Popen[str]] = []
        self._ordinary = ordinary_user
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        config = json.dumps(
            {
                "mountpoint": str(mountpoint),
                "files": files,
                "present": present,
                "cache": None if cache is None else str(cache),
                "sabotage": sabotage,
                "options": options or {},
                "rounds": rounds,
                "every_layout": every_layout,
            }
        )
        command = ["-m", "weightfs.testing.fake_server", config]
        if ordinary_user:
            os.chown(mountpoint, NOBODY, NOBODY)
            command = [*AS_NOBODY, *command]
        else:
            command = [sys.executable, *command]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1
        )
        self._pending = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the server."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server logged so far."""
        self._log.seek(0)
        return self._log.read()

    def path(self, name: str) -> Path:
        """Where a file appears."""
        return self.mountpoint / "models" / TREE / name

    def ready(self) -> FakeMount:
        """Wait until the mount answers. AssertionError with the server's log if it does not come."""
        first = self._receive()
        assert first.get("ready"), f"{first}\n{self.log}"
        self.device = str(first["device"])
        return self

    def call(self, do: str, **arguments: object) -> dict[str, Any]:
        """Send a command (`fake_server.Server.command`) and wait for its answer. The way is not through the mount."""
        self.tell(do, **arguments)
        answer = self._receive()
        assert "failed" not in answer, f"{answer}\n{self.log}"
        return answer

    def tell(self, do: str, **arguments: object) -> None:
        """Send a command that has no answer of its own: `stop`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def ended(self) -> dict[str, Any]:
        """Wait for `serve` to end: `{"ended": true}` or `{"error": …}`."""
        while True:
            answer = self._receive()
            if "ended" in answer or "error" in answer:
                self._process.wait(DEADLINE)
                return answer

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline = time.monotonic() + DEADLINE
        while b"\n" not in self._pending:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the server does not answer\n{self.log}"
            piece = os.read(fd, 1 << 16)
            assert piece, f"the server is gone\n{self.log}"
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    # --- clients

    def start(self, code: str, *arguments: object, talk: bool = False) -> subprocess.Popen[str]:
        """Start a client: Python code with `root`, `at(name)`, `pattern` and the usual modules at hand.

        With `talk` its standard input is a pipe.
        """
        prefix: list[str] = []
        if self._ordinary:
            prefix = ["nsenter", "-t", str(self.pid), "-m", "--"]
            prefix += ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
        command = [
            *prefix,
            sys.executable,
            "-I",
            "-S",
            "-c",
            _PRELUDE + code,
            str(self.mountpoint),
            *map(str, arguments),
        ]
        return self.command(command, talk=talk)

    def command(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, talk: bool = False
    ) -> subprocess.Popen[str]:
        """Start any program; `close` will kill it if it still runs."""
        client = subprocess.Popen(  # noqa: S603 - the test's own
            argv,
            stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        self._clients.append(client)
        return client

    def finish(
        self, client: subprocess.Popen[str], say: str | None = None, *, deadline: float = DEADLINE
    ) -> str:
        """Wait for a client, `say` something to it first; what it printed. AssertionError if it fails or hangs."""
        try:
            out, err = client.communicate(say, timeout=deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a client hangs\n{self.log}") from None
        assert client.returncode == 0, f"exit {client.returncode}: {err}\n{self.log}"
        return out.strip()

    def run(self, code: str, *arguments: object) -> str:
        """Start a client and finish it."""
        return self.finish(self.start(code, *arguments))

    # --- the end

    def kill(self) -> None:
        """SIGKILL the server: the mount is stale from now on."""
        self._process.kill()
        self._process.wait(DEADLINE)

    def close(self) -> None:
        """Kill whatever is left, free the mount point. Safe at any time, and more than once."""
        for client in self._clients:
            if client.poll() is None:
                client.send_signal(signal.SIGKILL)
        self._process.kill()
        self._process.wait(DEADLINE)
        for client in self._clients:
            client.wait(DEADLINE)  # free now, wherever it hung
            for stream in (client.stdin, client.stdout, client.stderr):
                if stream is not None:
                    stream.close()
        self._clients.clear()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._log.close()
        clear(self.mountpoint)


def clear(mountpoint: Path) -> None:
    """Detach whatever FUSE mounts are stacked at `mountpoint`; their servers must be dead."""
    while mounttable.mounts_at(mountpoint)[-1:]:
        mounttable.take_away(mountpoint, lazy=True)


@contextlib.contextmanager
def fusectl() -> Iterator[Path]:
    """The kernel's directory of FUSE connections (`N/abort`, `N/waiting`), mounted for the while at a private place."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["mount", "-t", "fusectl", "none", place], check=True)  # noqa: S603, S607 - util-linux
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True)  # noqa: S603, S607 - util-linux
