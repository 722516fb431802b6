"""Eviction under real readers: what is mapped keeps its bytes, what is open stays; and `weightfs gc` on a mount."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from weightfs.testing.daemon import Daemon
from weightfs.testing.mounts import can_mount
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]
passes_through = pytest.mark.skipif(
    tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2]) < (6, 9), reason="needs Linux 6.9"
)

SIZE = 3_500_000
OPTIONS = ["--fill", "never", "--workers", "0", "--max-size", "5MiB", "--min-free", "0"]
MAPPED = """
end = time.monotonic() + 15
while not os.stat(path).st_ino & 1: assert time.monotonic() < end; time.sleep(0.02)
fd = cold()
view = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
os.close(fd)
assert view[:9] == true(0, 9)
print('open', flush=True)
sys.stdin.readline()
assert view[:] == true(0, len(view)), 'the mapping lost its bytes'
print('same')
"""
SAME = "print(open(path, 'rb').read() == true(0, 3_500_000))"
OPENED = (
    "fd = cold(); assert os.pread(fd, 9, 0) == true(0, 9); print('open', flush=True); sys.stdin.readline()"
)


@pytest.fixture
def plains(tmp_path: Path) -> list[Path]:
    made = []
    for name in ("one", "two"):
        file = tmp_path / "origin" / f"{name}.bin"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(hashlib.shake_128(name.encode()).digest(SIZE))
        made.append(file)
    return made


def heard(client: object) -> None:
    assert client.stdout.readline() == "open\n"  # type: ignore[attr-defined]


def data_file(daemon: Daemon, ref: str) -> Path:
    return daemon.cache / "blobs" / str(daemon.file(ref)["blob"])


@passes_through
def test_a_mapping_that_outlives_the_daemon_keeps_its_bytes_when_the_file_is_evicted(
    tmp_path: Path, plains: list[Path]
) -> None:
    """The next daemon does not know of it: what it evicts is the name, never the bytes."""
    one, two = (f"file://{plain}" for plain in plains)
    with Daemon(tmp_path / "daemon", one, two, options=OPTIONS) as daemon:
        daemon.start().complete(one)
        user = daemon.client(MAPPED, one, plains[0], talk=True)
        heard(user)
        daemon.kill()
        daemon.start()
        before = data_file(daemon, one).stat().st_ino
        daemon.complete(two)
        assert daemon.file(one)["present_bytes"] == 0
        assert data_file(daemon, one).stat().st_ino != before
        assert f"evicted 3.3 MiB of {one}" in daemon.log
        assert daemon.finish(user, say="\n") == "same"
        assert daemon.run("print(os.stat(path).st_size)", one) == str(SIZE)  # listed as before
        assert daemon.run(SAME, one, plains[0]) == "True"  # and fetched again
        assert daemon.status()["evicted_bytes"] >= SIZE
        assert daemon.stop() == 0


def test_what_is_open_stays_and_who_reads_more_than_fits_gets_it_past_the_cache(
    tmp_path: Path, plains: list[Path]
) -> None:
    one, two = (f"file://{plain}" for plain in plains)
    with Daemon(tmp_path / "daemon", one, two, options=OPTIONS) as daemon:
        daemon.start().complete(one)
        user = daemon.client(OPENED, one, plains[0], talk=True)
        heard(user)
        assert daemon.run(SAME, two, plains[1]) == "True"  # past the cache
        assert daemon.status()["uncached_bytes"] > 0
        assert daemon.file(one)["present_bytes"] == SIZE
        assert "max-size" in daemon.status()["trouble"]
        assert "pinned or in use" in daemon.log
        refused = daemon.cli("pull", two)
        assert refused.returncode == 5
        assert "max-size" in refused.stderr
        assert daemon.run(SAME, one, plains[0]) == "True"
        assert daemon.finish(user, say="\n") == ""
        assert daemon.run(SAME, two, plains[1]) == "True"
        until(lambda: daemon.status()["trouble"] == "", "there is room")
        assert daemon.stop() == 0


def test_gc_asks_the_daemon_which_has_its_own_limits(tmp_path: Path, plains: list[Path]) -> None:
    one, two = (f"file://{plain}" for plain in plains)
    with Daemon(tmp_path / "daemon", one, two, options=[*OPTIONS[:-4], "--max-age", "1h"]) as daemon:
        daemon.start().complete(one)
        report = json.loads(daemon.cli("gc", "--json").stdout)
        assert report == {
            "dry_run": False,
            "evicted": [],
            "freed_bytes": 0,
            "missing_bytes": 0,
            "held_bytes": SIZE,
            "limit_bytes": report["limit_bytes"],
        }
        told = daemon.cli("gc", "--max-size", "1GiB")
        assert told.returncode == 2
        assert "--max-size would be ignored" in told.stderr
        assert daemon.stop() == 0
