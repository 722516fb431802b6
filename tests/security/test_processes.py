"""What another user of the machine, and another process of the same user, can learn from a real daemon."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightfs.errors import DaemonError
from weightfs.testing.daemon import Daemon
from weightfs.testing.mounts import NOBODY, can_mount
from weightfs.testing.origin import origin_in_thread
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

DATA = bytes(range(256)) * 64
PATH = "/m.gguf"
SECRET = "canary-in-the-environment"
OTHER = 65533

# Raises the limit as `ulimit -c unlimited` does, then crashes, with or without us.
CRASH = """
import os, resource, signal, sys
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
if sys.argv[1] == "ours":
    from weightfs.undumpable import forbid_core_dumps
    forbid_core_dumps()
os.kill(os.getpid(), signal.SIGABRT)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """Where others may go; pytest's own directories are closed."""
    with tempfile.TemporaryDirectory(prefix="weightfs-security-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def cores() -> Iterator[None]:
    """What we start would leave core files, as far as they are permitted here: where none is, no limit is missed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


@pytest.mark.usefixtures("cores")
def test_a_process_of_an_ordinary_user_cannot_be_looked_into(place: Path) -> None:
    """Regression: both would leave a core with their tokens, and the workers' flag is set again by execve."""
    with (
        origin_in_thread({PATH: DATA}) as origin,
        Daemon(place, options=["--workers", "2"], env={"CANARY": SECRET}, ordinary_user=True) as daemon,
    ):
        daemon.begin()
        until(lambda: _serves(daemon), f"it serves\n{daemon.log}")
        daemon.add(origin.url(PATH))
        daemon.complete(origin.url(PATH))
        assert "is not in memory" not in daemon.log, "it may still use its own descriptors (store/readers.py)"
        status = daemon.status()
        for pid in (status["pid"], *status["worker_pids"]):
            proc = Path(f"/proc/{pid}")
            assert _user_of(proc) == NOBODY
            limit = next(line for line in (proc / "limits").read_text().splitlines() if "core file" in line)
            assert limit.split()[4] == "0"
            assert (proc / "environ").stat().st_uid == 0  # proc(5): root owns what may not be dumped
            for name in ("environ", "mem", "maps"):
                assert not _as(NOBODY, "head", "-c", "100", str(proc / name)).stdout, name
        assert daemon.stop() == 0


def _serves(daemon: Daemon) -> bool:
    try:
        return bool(daemon.status()["worker_pids"])
    except DaemonError:
        return False


def _user_of(proc: Path) -> int:
    line = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("Uid:"))
    return int(line.split()[1])


def _as(user: int, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *argv],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("whose", ["ours", "any"])
def test_a_crash_leaves_no_core(place: Path, whose: str) -> None:
    process = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", f"import os; os.chdir({str(place)!r})\n{CRASH}", whose],
        os.environ,
    )
    _, status = os.waitpid(process, 0)
    if whose == "ours":
        assert not os.WCOREDUMP(status)
        assert not list(place.iterdir())
    elif not os.WCOREDUMP(status):
        pytest.skip("this machine makes no core files at all")


@pytest.fixture
def daemon(place: Path) -> Iterator[Daemon]:
    with origin_in_thread({PATH: DATA}) as origin, Daemon(place, origin.url(PATH)) as one:
        one.start().complete(origin.url(PATH))
        yield one


def test_a_second_user_gets_nothing(daemon: Daemon) -> None:
    """The way to the cache is open to him; cache, socket, mount and processes are not."""
    cache, pid = daemon.cache, daemon.status()["pid"]
    for path in [cache, *cache.rglob("*")]:
        closed = stat.S_IMODE(path.lstat().st_mode)
        assert closed == (0o700 if path.is_dir() else 0o600), path
    assert _as(OTHER, "ls", str(cache.parent)).stdout.split() == ["cache", "mnt"], "he comes so far"
    socket = f"import socket; socket.socket(socket.AF_UNIX).connect({str(cache / 'control.sock')!r})"
    tries = {
        "list the cache": ("ls", str(cache)),
        "read the index": ("cat", str(cache / "index" / "data.mdb")),
        "write the lock": ("sh", "-c", f"echo 1 > {cache}/lock && echo written"),
        "put a link": ("ln", "-s", "/etc/passwd", str(cache / "blobs" / "x")),
        "list the mount": ("ls", str(daemon.mountpoint)),
        "environment": ("cat", f"/proc/{pid}/environ"),
        "connect": ("/usr/bin/python3", "-c", f"{socket}; print('connected')"),
        "end it": ("kill", "-TERM", str(pid)),
    }
    for what, argv in tries.items():
        done = _as(OTHER, *argv)
        assert done.returncode, what
        assert not done.stdout, what
        assert "denied" in done.stderr or "not permitted" in done.stderr, (what, done.stderr)
    assert daemon.status()["pid"] == pid
