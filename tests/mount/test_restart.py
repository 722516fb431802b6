"""The end of a daemon, of every kind, and its next life on the same cache."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from weightfs.core.metalink import write_metalink
from weightfs.mount.mounttable import mounts_at
from weightfs.sources.publish import describe
from weightfs.store.cache import Cache
from weightfs.testing.daemon import Daemon
from weightfs.testing.mounts import can_mount
from weightfs.testing.nginx import Nginx
from weightfs.testing.origin import Fault, FaultKind, origin_in_thread
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nginx,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

MIB = 1 << 20
SIZE = 80 * MIB + 4_321
LOST = 64 * MIB  # S21: what a crash may cost, for each file
SAME = """
with open(path, 'rb', buffering=0) as ours, open(plain, 'rb', buffering=0) as theirs:
    while piece := ours.read(1 << 20): assert piece == theirs.read(1 << 20)
    assert not theirs.read(1)
"""
DIRECT = """
fd, buffer = os.open(path, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 1 << 20)
for at in range(0, int(sys.argv[3]) << 20, 1 << 20):
    assert os.preadv(fd, [buffer], at) == 1 << 20 and buffer[:] == true(at, at + (1 << 20)), at
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("origin") / "m.bin"
    path.write_bytes(random.Random(5).randbytes(SIZE))
    return path


@pytest.fixture(scope="module")
def nginx(plain: Path) -> Iterator[Nginx]:
    with Nginx(plain.parent, limit_rate="3m") as server:
        url = server.url(plain.name)
        plain.with_name(plain.name + ".meta4").write_bytes(write_metalink(describe(plain, [url])))
        yield server


@contextmanager
def offline(nginx: Nginx) -> Iterator[None]:
    """While the block runs there is no network."""
    nginx.pause()
    try:
        yield
    finally:
        nginx.resume()


def gone(pids: list[int]) -> bool:
    """Whether no such process is alive."""
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_killed_amid_a_fill_then_offline_then_stopped_amid_it_then_whole(
    tmp_path: Path, nginx: Nginx, plain: Path
) -> None:
    ref = nginx.url(plain.name)
    # So slow that a busy machine kills it amid the fill.
    options = ["--fill", "all", "--workers", "1", "--bandwidth", "20MiB"]
    with Daemon(tmp_path, ref, options=options) as daemon:
        daemon.start()
        until(lambda: daemon.file(ref)["sealed_chunks"] >= 8, "the fill is on its way")
        workers = daemon.status()["worker_pids"]
        daemon.kill()
        until(lambda: gone(workers), "no writer outlives the owner of the index")
        assert mounts_at(daemon.mountpoint), "a stale mount is left"
        with offline(nginx):
            before = nginx.bytes_sent(plain.name)
            assert MIB < before < SIZE, "amid the fill"
            daemon.start()
            assert len(mounts_at(daemon.mountpoint)) == 1
            daemon.run(DIRECT, ref, plain, 8)
            kept = daemon.file(ref)["present_bytes"]
            assert kept >= before - LOST
        nginx.forget_requests()
        until(lambda: daemon.file(ref)["present_bytes"] > kept, "the fill goes on")
        assert daemon.stop() == 0

        daemon.start()
        daemon.run(SAME, ref, plain)
        daemon.complete(ref)
        assert before + nginx.bytes_sent(plain.name) <= SIZE + LOST
        with offline(nginx):
            daemon.run(DIRECT, ref, plain, SIZE // MIB)
            assert daemon.stop() == 0
            assert not mounts_at(daemon.mountpoint)
            daemon.start()
            daemon.run(DIRECT, ref, plain, SIZE // MIB)
        assert daemon.file(ref)["trust"] == "verified"
        assert daemon.stop() == 0
        check(daemon)
        assert "Traceback" not in daemon.log


def check(daemon: Daemon) -> None:
    """The cache was closed in order, and every chunk is as recorded."""
    cache = Cache.open(daemon.cache, create=False, now=0)
    try:
        assert cache.was_clean
        assert cache.check(deep=True) == []
    finally:
        cache.close()


def test_two_daemons_cannot_have_one_cache_or_one_mount_point(
    tmp_path: Path, nginx: Nginx, plain: Path
) -> None:
    ref = nginx.url(plain.name)
    lazy = ["--fill", "never", "--workers", "0"]
    with Daemon(tmp_path / "one", ref, options=lazy) as first:
        first.start()
        with Daemon(tmp_path / "two", options=[*lazy, "--cache", str(first.cache)]) as second:
            assert second.begin().ended() == 5
            assert f"is mounted at {first.mountpoint}" in second.log
            assert not mounts_at(second.mountpoint)
        cache = tmp_path / "three" / "cache"
        refused = first.cli("mount", *lazy, str(first.mountpoint), cache=cache)
        assert refused.returncode != 0
        assert "already a live weightfs mount" in refused.stderr
        first.run(DIRECT, ref, plain, 2)
        assert first.stop() == 0


def test_sigterm_while_readers_are_blocked(tmp_path: Path) -> None:
    with origin_in_thread({"/m.bin": bytes(8 * MIB)}) as origin:
        ref = origin.url("m.bin")
        with Daemon(tmp_path, ref, options=["--fill", "never", "--workers", "1"]) as daemon:
            daemon.start()
            origin.always["/m.bin"] = Fault(FaultKind.STALL_BEFORE_BODY)
            read = (
                "fd = os.open(path, os.O_RDONLY | int(sys.argv[3]))\n"
                "try: print(os.preadv(fd, [mmap.mmap(-1, 4096)], 3 << 20))\n"
                "except OSError as error: print(error.errno in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED))"
            )
            readers = [daemon.client(read, ref, "/dev/null", flags) for flags in (0, os.O_DIRECT)]
            until(lambda: daemon.file(ref)["waiting_readers"] >= 2, "both wait")
            workers = daemon.status()["worker_pids"]
            assert daemon.stop() == 0
            assert {daemon.finish(reader) for reader in readers} == {"True"}
            assert not mounts_at(daemon.mountpoint)
            assert gone(workers)
            check(daemon)
            assert "Traceback" not in daemon.log


def test_unmounting_a_busy_mount(tmp_path: Path, nginx: Nginx, plain: Path) -> None:
    ref = nginx.url(plain.name)
    with Daemon(tmp_path, ref, options=["--fill", "never", "--workers", "0"]) as daemon:
        daemon.start()
        user = daemon.client(
            "fd = cold()\nassert os.pread(fd, 100, 0) == true(0, 100)\n"
            "print('open', flush=True)\nsys.stdin.readline()\n"
            "try: os.pread(fd, 4096, 9 << 20)\nexcept OSError as error: print(errno.errorcode[error.errno])",
            ref,
            plain,
            talk=True,
        )
        assert user.stdout is not None
        assert user.stdout.readline() == "open\n"
        refused = daemon.cli("umount", str(daemon.mountpoint))
        assert refused.returncode != 0
        assert "busy" in refused.stderr
        daemon.run(DIRECT, ref, plain, 2)
        assert daemon.cli("umount", "--lazy", str(daemon.mountpoint)).returncode == 0
        assert not mounts_at(daemon.mountpoint)
        # As long as somebody has a file open, it is served; then the daemon ends.
        told = daemon.finish(user, "it is detached\n")
        assert told in ("", "EIO", "ENOTCONN", "ECONNABORTED")
        assert daemon.ended() == 0
        check(daemon)
