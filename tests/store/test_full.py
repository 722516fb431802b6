"""A filesystem without a byte left, under an index that is read and written: errors, and never a signal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from weightfs.testing import disks

# In a process of its own: what it is about is a SIGBUS.
PROGRAM = """
import contextlib, os, pathlib, sys, threading
from weightfs.errors import NoSpaceError
from weightfs.store.index import Index

place = pathlib.Path(sys.argv[1])
index = Index.open(place)
index.write(lambda txn: txn.put("meta", b"x", b"y"))
os.sync()
for step in (1 << 20, 1 << 12):
    with contextlib.suppress(OSError), open(place / f"ballast{step}", "wb", buffering=0) as file:
        while True:
            file.write(os.urandom(step))
    os.sync()
together = threading.Barrier(100)  # more readers than have room in the first page of LMDB's table


def read():
    with index.read() as txn:
        together.wait()
        assert txn.get("meta", b"x") == b"y"


readers = [threading.Thread(target=read) for _ in range(100)]
for one in readers: one.start()
for one in readers: one.join()
for _ in range(40):
    with contextlib.suppress(NoSpaceError):
        index.write(lambda txn: txn.put("meta", b"x", b"y"))
    with index.read() as txn:
        assert txn.get("meta", b"x") == b"y"
    os.sync()
print("alive")
"""


@pytest.mark.parametrize(("filesystem", "limit"), [("ext4", ""), ("btrfs", ""), ("btrfs", "16M")])
def test_no_signal_ends_who_uses_an_index_on_a_full_disk(tmp_path: Path, filesystem: str, limit: str) -> None:
    """Regression: the lock file of LMDB was there, too, and is written through a mapping.

    Nor does it count as sick, whichever of the pages had no room.
    """
    if (why := disks.missing(filesystem)) is not None:
        pytest.skip(why)
    image = tmp_path / "image"
    disks.make_disk(image, filesystem, size=160 << 20)
    with disks.mounted(image, filesystem) as directory:
        if limit:
            disks.run("btrfs", "quota", "enable", str(directory))
            disks.run("btrfs", "qgroup", "limit", limit, str(directory))
        (directory / "index").mkdir()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(directory / "index")],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    image.unlink()
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-2000:]
