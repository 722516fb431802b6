"""Filesystems on loop devices, and what a power cut would leave of them.

The model: the backing file of a loop device with direct I/O gets a block when the filesystem issues that write, and not
before: what only the page cache of the filesystem holds is not in it. The backing file lies on a filesystem that can
clone files (FICLONE, XFS or btrfs), and a clone is of one moment: it waits for the writes that are being done, and
keeps out later ones. So a clone is what is on the medium when the power fails at that moment, and mounting the clone
replays the journal as the boot after it would. A copy made block by block is of many moments: no cut leaves that.

Not modelled: a drive that tells of a write as done, loses it with the power, and is still within its rights since no
flush came after it; and a drive that lies about flushes.

Whoever uses this runs in a mount and process namespace of its own (`ISOLATED`): however it ends, the kernel then
unmounts everything, and loop devices go with their last user (autoclear).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

FILESYSTEMS = ("ext4", "xfs", "btrfs")
ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
IMAGE_BYTES = 512 << 20  # sparse; XFS asks for 300 MiB, btrfs for 109
SHELF_BYTES = 16 << 30  # sparse
SECONDS = 60.0
_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_SBIN = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def missing(filesystem: str) -> str | None:
    """Why this filesystem cannot be tried here, or None."""
    if os.geteuid() != 0:
        return "only root may mount images"
    for program in ("unshare", "losetup", "mount"):
        if shutil.which(program, path=_SBIN) is None:
            return f"{program} is not installed"
    for trial in ((*ISOLATED, "true"), ("losetup", "--find")):
        try:
            run(*trial)
        except RuntimeError as error:
            return f"not permitted here: {error}"
    if cloning() is None:
        return "neither XFS nor btrfs is here, so no image can be cloned at one moment"
    return _lacks(filesystem)


def cloning() -> str | None:
    """A filesystem of this machine that can clone files, for the shelf; None if there is none."""
    return next((name for name in ("xfs", "btrfs") if _lacks(name) is None), None)


def _lacks(filesystem: str) -> str | None:
    if shutil.which(f"mkfs.{filesystem}", path=_SBIN) is None:
        return f"mkfs.{filesystem} is not installed"
    if shutil.which("modprobe", path=_SBIN) is not None:  # a module that nobody has asked for yet
        with contextlib.suppress(RuntimeError):
            run("modprobe", "-q", filesystem)
    known = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
    return None if filesystem in known else f"this kernel has no {filesystem}"


@contextlib.contextmanager
def shelf(place: Path) -> Iterator[Path]:
    """A directory below `place` on a filesystem that can clone files."""
    kind = cloning()
    assert kind is not None, "neither XFS nor btrfs is here"
    image = place / "shelf.img"
    _make(image, kind, SHELF_BYTES)
    with mounted(image, kind) as directory:
        yield directory
    image.unlink()


def make_disk(image: Path, filesystem: str, *, size: int = IMAGE_BYTES) -> None:
    """An empty filesystem in a new image."""
    _make(image, filesystem, size)


@contextlib.contextmanager
def mounted(image: Path, filesystem: str, *, direct: bool = False, options: str = "") -> Iterator[Path]:
    """The image, mounted. With `direct`, it gets writes only when the filesystem issues them. RuntimeError."""
    directory = Path(tempfile.mkdtemp(prefix="weightfs-disk-"))
    try:
        how = ["--direct-io=on"] if direct else []
        device = run("losetup", "--find", "--show", *how, str(image)).strip()
        try:
            if direct and run("losetup", "--noheadings", "--output", "DIO", device).strip() != "1":
                raise RuntimeError(f"{image} cannot be written with direct I/O: no honest picture of a cut")
            more = ["-o", options] if options else []
            more += (
                ["-o", "nouuid"] if filesystem == "xfs" else []
            )  # a clone has the identity of its original
            run("mount", "-t", filesystem, *more, device, str(directory))
        finally:
            run("losetup", "--detach", device)  # mounted: autoclear, gone with the mount
        try:
            yield directory
        finally:
            _unmount(directory)
    finally:
        directory.rmdir()


def cut(image: Path, target: Path) -> None:
    """What a power cut at this moment would leave of a mounted image, as another image. OSError."""
    with image.open("rb") as source, target.open("xb") as copy:
        fcntl.ioctl(copy, _FICLONE, source.fileno())


def _make(image: Path, filesystem: str, size: int) -> None:
    with image.open("xb") as file:
        file.truncate(size)
    run(f"mkfs.{filesystem}", "-q", str(image))


def _unmount(directory: Path) -> None:
    try:
        run("umount", str(directory))
    except RuntimeError:
        run("umount", "--lazy", str(directory))
        raise


def run(*command: str) -> str:
    """What a program of the machine prints. RuntimeError if it fails."""
    done = subprocess.run(  # noqa: S603 - fixed commands, no shell
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PATH": _SBIN, "LC_ALL": "C"},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
