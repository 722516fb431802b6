"""A disk that fails when it is told to, for real: a filesystem on a loop device on a file whose server refuses.

The kernel gives its users what it gives them of a failing drive: EIO from `write`, `fdatasync`, `read` and page faults,
as it comes through page cache, filesystem and block layer. Only what is below the block layer is ours: the device's
backing file is in a FUSE mount, whose server (this module, as a process) answers with EIO.

Rule: the server is a process of its own and touches nothing that lies on the disk, so it never waits for itself.
"""

# ruff: noqa: ARG002 - the arguments are pyfuse3's
from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import trio

from weightfs.engine.worker import die_with_parent
from weightfs.testing import disks

IMAGE = pyfuse3.InodeT(pyfuse3.ROOT_INODE + 1)
NAME = b"image"
SECONDS = 30.0


class SickDisk:
    """A mounted filesystem. `refuse` says what its device refuses from now on."""

    def __init__(self, directory: Path, mode: Path) -> None:
        self.directory = directory
        self._mode = mode

    def refuse(self, *, writes: bool = False, reads: bool = False) -> None:
        """From the next request on; without arguments, the device is well again."""
        self._mode.write_text("w" * writes + "r" * reads)


@contextlib.contextmanager
def sick_disk(place: Path, *, size: int = 128 << 20, options: str = "errors=continue") -> Iterator[SickDisk]:
    """An ext4 without a journal (an aborted one would stay read-only for ever) below `place`. RuntimeError."""
    backing, mode, fuse = place / "backing", place / "mode", place / "fuse"
    mode.write_text("")
    fuse.mkdir()
    with backing.open("xb") as file:
        file.truncate(size)
    disks.run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0", str(backing))
    command = [sys.executable, "-m", "weightfs.testing.sick_disk"]
    argv = [*command, str(backing), str(mode), str(fuse), str(os.getpid())]
    server = subprocess.Popen(argv, stdout=subprocess.PIPE)  # noqa: S603 - our own module
    try:
        assert server.stdout is not None
        if server.stdout.readline() != b"ready\n":
            raise RuntimeError("the server of the sick disk did not start")
        with disks.mounted(fuse / os.fsdecode(NAME), "ext4", options=options) as directory:
            yield SickDisk(directory, mode)
            mode.write_text("")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(SECONDS)
        disks.run("umount", "--lazy", str(fuse))
        assert server.stdout is not None
        server.stdout.close()
        backing.unlink()


class _Server(pyfuse3.Operations):
    """One file."""

    def __init__(self, backing: int, mode: Path) -> None:
        super().__init__()
        self._backing = backing
        self._mode = mode

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        found = pyfuse3.EntryAttributes()
        found.st_ino = inode
        if inode == IMAGE:
            found.st_mode = stat.S_IFREG | 0o600
            found.st_size = os.fstat(self._backing).st_size
        else:
            found.st_mode = stat.S_IFDIR | 0o700
        return found

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(IMAGE)

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        # Past the page cache of this mount: the device's requests are to be refused, not its cache's.
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), direct_io=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        self._refuse("r")
        return os.pread(self._backing, size, off)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        self._refuse("w")
        return os.pwrite(self._backing, buf, off)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        self._refuse("w")

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        return

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        return

    def _refuse(self, what: str) -> None:
        if what in self._mode.read_text():
            raise pyfuse3.FUSEError(errno.EIO)


def _main(backing: str, mode: str, mountpoint: str, parent: str) -> None:
    die_with_parent(int(parent))
    descriptor = os.open(backing, os.O_RDWR)
    pyfuse3.init(_Server(descriptor, Path(mode)), mountpoint, {"fsname=weightfs-sick-disk"})
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    trio.run(pyfuse3.main)


if __name__ == "__main__":
    _main(*sys.argv[1:])
