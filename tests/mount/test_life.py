"""How mounts come and go: in order, from outside, killed, stacked, busy, and as an ordinary user."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from weightfs.errors import MountError
from weightfs.mount import mounttable, session
from weightfs.mount.mounttable import Health, mounts_at, probe, unmount
from weightfs.mount.session import MountOptions, connect
from weightfs.testing.fake_engine import pattern
from weightfs.testing.mounts import FakeMount, can_mount, fusectl
from weightfs.testing.waiting import until

pytestmark = pytest.mark.mount

Start = Callable[..., FakeMount]
WELL = {"ended": True, "leaked_fds": 0}
READS = "assert open(at('a'), 'rb').read() == pattern('a', 0, 70_000)"
A = {"a": 70_000}


def stop(server: FakeMount) -> dict[str, object]:
    server.tell("stop")
    return server.ended()


def test_a_stopped_mount_leaves_nothing(start: Start, place: Path) -> None:
    server = start(A)
    server.run(READS)
    assert stop(server) == WELL
    assert not mounts_at(place)
    assert "WARNING" not in server.log
    assert "ERROR" not in server.log


def test_blocked_readers_get_an_answer_when_the_mount_stops(start: Start, place: Path) -> None:
    server = start({"held": 1 << 30})
    server.call("hold", name="held")
    reader = server.start(
        "fd = os.open(at('held'), os.O_RDONLY | os.O_DIRECT)\n"
        "try: os.preadv(fd, [mmap.mmap(-1, 4096)], 0)\n"
        "except OSError as error: print(error.errno in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED))"
    )
    until(lambda: server.call("stats")["waiting"], "the read blocks")
    assert stop(server) == WELL
    assert server.finish(reader) == "True"
    assert not mounts_at(place)


def test_a_busy_mount_is_detached_at_the_end_and_its_users_get_errors(start: Start, place: Path) -> None:
    server = start({"a": 8 << 20}, options={"unmount_timeout": 0.3})
    user = server.start(
        "fd = os.open(at('a'), os.O_RDONLY)\nprint('open', flush=True)\nsys.stdin.readline()\n"
        "try: print(os.pread(fd, 4096, 4 << 20))\nexcept OSError as error: print('failed')",
        talk=True,
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "open\n"
    assert stop(server) == WELL
    assert not mounts_at(place)
    assert server.finish(user, say="go\n") == "failed"


@pytest.mark.parametrize("lazy", [False, True])
def test_unmounted_from_outside_it_ends_well(start: Start, place: Path, lazy: bool) -> None:
    server = start(A)
    unmount(place, lazy=lazy)
    assert server.ended() == WELL
    assert not mounts_at(place)
    with pytest.raises(MountError, match="is not a weightfs mount"):
        unmount(place)


def test_unmounting_a_busy_mount_says_so_and_changes_nothing(start: Start, place: Path) -> None:
    server = start(A)
    user = server.start("os.chdir(root)\nprint('in', flush=True)\nsys.stdin.readline()", talk=True)
    assert user.stdout is not None
    assert user.stdout.readline() == "in\n"
    with pytest.raises(MountError, match=r"busy.*fuser.*--lazy"):
        unmount(place)
    server.run(READS)
    unmount(place, lazy=True)
    assert not mounts_at(place)
    server.finish(user, say="go\n")
    assert server.ended() == WELL


def test_a_connection_that_is_aborted_ends_the_mount_well(start: Start, place: Path) -> None:
    server = start({"held": 1 << 30})
    server.call("hold", name="held")
    reader = server.start("try: open(at('held'), 'rb', buffering=0).read(9)\nexcept OSError: print('failed')")
    until(lambda: server.call("stats")["waiting"], "the read blocks")
    with fusectl() as connections:
        (connections / server.device.partition(":")[2] / "abort").write_text("1")
    assert server.finish(reader) == "failed"
    assert server.ended() == WELL
    assert not mounts_at(place)


def test_after_a_kill_the_place_can_be_used_again_however_many_dead_mounts_are_there(place: Path) -> None:
    if not can_mount():
        pytest.skip("needs /dev/fuse and CAP_SYS_ADMIN")
    with FakeMount(place, A) as first:
        first.ready().kill()
        assert probe(place) is Health.STALE
        for _ in range(2):  # stacked upon it
            os.close(session._mount_directly(place, MountOptions()))
        assert len(mounts_at(place)) == 3
        with FakeMount(place, A) as second:
            second.ready().run(READS)
            assert len(mounts_at(place)) == 1
            assert "Detaching a stale" in second.log


def test_a_live_mount_is_not_mounted_over(start: Start, place: Path) -> None:
    server = start(A)
    with pytest.raises(MountError, match="already a live weightfs mount"):
        connect(place, MountOptions())
    os.kill(server.pid, signal.SIGSTOP)
    assert probe(place, timeout=0.3) is Health.SILENT
    os.kill(server.pid, signal.SIGCONT)
    until(lambda: probe(place) is Health.ALIVE, "it lives again")
    server.run(READS)


def test_an_ordinary_user_mounts_by_fusermount3(start: Start) -> None:
    server = start({**A, "held": 8 << 30}, ordinary_user=True)
    server.run(READS)
    assert server.run("s = os.stat(root); print(s.st_uid, s.st_gid, os.getuid())") == "65534 65534 65534"
    server.call("hold", name="held")
    readers = [
        server.start(
            "fd = os.open(at('held'), os.O_RDONLY)\n"
            "work = [threading.Thread(target=os.pread, args=(fd, 4096, n * (4 << 20))) for n in range(60)]\n"
            "for one in work: one.start()\nfor one in work: one.join()"
        )
    ]
    until(lambda: server.call("stats")["waiting"] >= 60, "sixty reads wait: max_background is ours here too")
    server.run(READS)
    server.call("let_go", name="held")
    for reader in readers:
        server.finish(reader)
    assert stop(server) == WELL


def test_an_ordinary_user_is_told_what_allow_other_needs(place: Path) -> None:
    if not can_mount():
        pytest.skip("needs /dev/fuse and CAP_SYS_ADMIN")
    with FakeMount(place, A, ordinary_user=True, options={"allow_other": True}) as server:
        assert "user_allow_other" in str(server.ended()["error"])


@pytest.mark.parametrize("allowed", [False, True])
def test_other_users_are_let_in_by_allow_other_alone(start: Start, allowed: bool) -> None:
    server = start(A, options={"allow_other": allowed})
    other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", str(server.path("a"))]
    told = subprocess.run(other, capture_output=True, timeout=60, check=False)
    assert told.stdout == (pattern("a", 0, 70_000) if allowed else b"")
    assert (b"Permission denied" in told.stderr) is not allowed


def test_two_mounts_one_after_the_other_in_one_process(start: Start, place: Path) -> None:
    server = start(A, rounds=2)
    server.run(READS)
    server.tell("stop")
    server.ready().run(READS)
    assert stop(server) == WELL


# --- what is refused before anything is mounted


def test_a_mount_point_must_be_an_empty_directory(place: Path) -> None:
    with pytest.raises(MountError, match="does not exist; make it with"):
        connect(place / "nowhere", MountOptions())
    (place / "file").write_text("x")
    with pytest.raises(MountError, match="is not a directory"):
        connect(place / "file", MountOptions())
    with pytest.raises(MountError, match="is not empty"):
        connect(place, MountOptions())
    assert not mounts_at(place)


def test_without_dev_fuse(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_DEVICE", str(place.parent / "no-such-device"))
    monkeypatch.setattr(mounttable, "has_mount_privilege", lambda: True)
    with pytest.raises(MountError, match="modprobe fuse"):
        connect(place, MountOptions())


def test_without_fusermount3(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounttable, "has_mount_privilege", lambda: False)
    monkeypatch.setenv("PATH", str(place))
    with pytest.raises(MountError, match="install the package fuse3"):
        connect(place, MountOptions())


def test_without_permission(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounttable, "has_mount_privilege", lambda: False)
    helper = place.parent / "fusermount3"
    helper.write_text("#!/bin/sh\necho 'fusermount3: user has no write access to mountpoint' >&2\nexit 1\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place.parent}:/bin")
    with pytest.raises(MountError, match="no permission to mount at"):
        connect(place, MountOptions())
