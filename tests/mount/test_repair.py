"""`weightfs repair` on a running mount and on an idle cache; a damaged index under a daemon that is started again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from weightfs.testing.daemon import Daemon
from weightfs.testing.mounts import can_mount
from weightfs.testing.published import sample

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

SIZE = 3_500_000
OPTIONS = ["--fill", "never", "--workers", "0"]
FAULTS = """
try: print(os.getxattr(path, 'user.weightfs.faults').decode())
except OSError as error: assert error.errno == errno.ENODATA; print('none')
"""
SAME = "print(open(path, 'rb').read() == true(0, 3_500_000))"


def spoil(daemon: Daemon, ref: str, at: int) -> None:
    path = daemon.cache / "blobs" / daemon.file(ref)["blob"]
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.pwrite(descriptor, bytes([os.pread(descriptor, 1, at)[0] ^ 1]), at)
    finally:
        os.close(descriptor)


def test_what_the_disk_spoilt_is_repaired_under_a_mount_and_told_everywhere(tmp_path: Path) -> None:
    plain = tmp_path / "m.bin"
    plain.write_bytes(sample(SIZE))
    ref = f"file://{plain}#sha256={hashlib.sha256(plain.read_bytes()).hexdigest()}"
    with Daemon(tmp_path, ref, options=OPTIONS).start() as daemon:
        daemon.complete(ref)
        assert daemon.run(FAULTS, ref).strip() == "none"
        spoil(daemon, ref, 2**20 + 9)
        done = daemon.cli("repair", "--json", ref)
        assert done.returncode == 0, done.stderr
        (report,) = json.loads(done.stdout)["reports"]
        assert (report["ok"], report["repaired"], report["mended"]) == (True, 1, [])
        assert [chunk for _, chunk in report["bad"]] == [1]
        assert list(report["wrong"].values()) == [{"wire": 0, "disk": 1, "origin": 0}]
        assert daemon.run(FAULTS, ref).strip() == "wire=0 disk=1 origin=0"
        assert daemon.run(SAME, ref, plain).strip() == "True"
        assert "wrong chunks: 1 by the disk" in daemon.cli("status").stdout
        assert daemon.stop() == 0
        # On an idle cache, with nothing wrong; and with an origin that has other bytes, where something is.
        done = daemon.cli("repair")
        assert done.returncode == 0, done.stderr
        assert ": ok, 4 chunks" in done.stdout


@pytest.mark.parametrize("passthrough", [True, False])
@pytest.mark.parametrize("repair", [True, False])
def test_what_verify_finds_rotten_is_not_read_any_more(
    tmp_path: Path, passthrough: bool, repair: bool
) -> None:
    """Regression: without --repair it was read as it was; with it, the kernel kept what had been read before."""
    plain = tmp_path / "m.bin"
    plain.write_bytes(sample(SIZE))
    ref = f"file://{plain}#sha256={hashlib.sha256(plain.read_bytes()).hexdigest()}"
    way = "--passthrough" if passthrough else "--no-passthrough"
    with Daemon(tmp_path, ref, options=[*OPTIONS, way]).start() as daemon:
        daemon.complete(ref)
        spoil(daemon, ref, 2**20 + 9)
        assert daemon.run(SAME, ref, plain).strip() == "False"  # nobody knows yet
        done = daemon.cli("verify", *(["--repair"] if repair else []), ref)
        assert done.returncode == (0 if repair else 4), done.stderr
        assert "chunk 1 is damaged" in done.stdout
        assert daemon.run(SAME, ref, plain).strip() == "True"
        done = daemon.cli("verify", ref)
        assert done.returncode == 0, done.stdout
        assert ": ok, 4 chunks" in done.stdout
        assert daemon.stop() == 0


def test_a_daemon_goes_on_from_the_copy_of_a_damaged_index(tmp_path: Path) -> None:
    plain = tmp_path / "m.bin"
    plain.write_bytes(sample(SIZE))
    ref = f"file://{plain}#sha256={hashlib.sha256(plain.read_bytes()).hexdigest()}"
    with Daemon(tmp_path, options=OPTIONS).start() as daemon:
        daemon.add(ref)
        daemon.complete(ref)
        daemon.kill()
        data = daemon.cache / "index" / "data.mdb"
        os.truncate(data, data.stat().st_size // 2)
        daemon.start()
        assert "its copy takes its place" in daemon.log
        assert daemon.run(SAME, ref, plain).strip() == "True"
        assert daemon.stop() == 0
