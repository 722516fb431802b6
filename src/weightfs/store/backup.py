"""The copy of the index beside it, and how it takes the place of a damaged one.

Rules that hold here:

- A copy is named by its own SHA-256: `<cache>/index.copy/<hex>.mdb`. One that is not what its name says is not used.
- A copy is of an index in use, never of one that was closed cleanly. So whoever goes on from it raises the epoch, and
  hashes every chunk before its first use: what was dropped, evicted or landed anew since then fails, and is a hole.
- Whoever goes on from a copy counts every blob as one that was whole once: it may be mapped, and is not punched.
- A damaged index is renamed to `<cache>/index.damaged`, never deleted, until another one is damaged.
- A damaged index is not copied: the last good copy stays.
- An index that has not changed since its copy was made is not copied again. A clean close notes which copy that is, and
  the next start takes the note away; an older weightfs leaves the note, and removes the copy that it names.
- A copy that cannot be made is a warning: the cache works without.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from pathlib import Path

from weightfs.errors import CacheError
from weightfs.store.disk import disk_errors, sync_directory
from weightfs.store.index import Index, Txn

log = logging.getLogger(__name__)

COPIES, ASIDE = "index.copy", "index.damaged"
_RESTORED = "restored"  # beside data.mdb, until the first transaction on a copy was committed
_COPIED = b"copied"  # in the table meta
_NAME = re.compile(r"[0-9a-f]{64}\.mdb")
# After a copy no other is made for so many times as long as it took: copying takes a tenth of the time at most.
_REST = 9.0


class Copier:
    """Makes copies of one open index.

    Args:
        copied: The name of the copy that has all that the index has, as the last close noted it; None: there is none.
    """

    def __init__(self, root: Path, index: Index, copied: str | None) -> None:
        self._directory = root / COPIES
        self._index = index
        self._copied = copied
        self._copied_at = index.writes
        self._not_before = 0.0

    def changed(self) -> None:
        """Refs have changed: copy the index, if the last copy was long enough ago for what it cost. Blocks."""
        if time.monotonic() >= self._not_before:
            self.copy()

    def finish(self) -> str | None:
        """Copy the index, unless there is a copy that has all of it. The name of that copy; None: it failed. Blocks."""
        if (
            self._copied is None
            or self._copied_at != self._index.writes
            or not (self._directory / self._copied).is_file()
        ):
            self.copy()
        return self._copied

    def copy(self) -> None:
        """Copy the index. Blocks; never fails."""
        began = time.monotonic()
        self._copied, self._copied_at = None, self._index.writes
        try:
            with disk_errors(f"write to {self._directory}"):
                self._copied = self._copy()
        except CacheError as error:
            log.warning("no copy of the index was made: %s", error)
        ended = time.monotonic()
        self._not_before = ended + _REST * (ended - began)

    def _copy(self) -> str:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        fresh = self._directory / "new"
        fresh.unlink(missing_ok=True)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            with os.fdopen(os.open(fresh, flags, 0o600), "r+b") as file:
                self._index.copy_to(file.fileno())
                os.fsync(file.fileno())
                file.seek(0)
                name = f"{hashlib.file_digest(file, 'sha256').hexdigest()}.mdb"
            fresh.rename(self._directory / name)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        sync_directory(self._directory)
        for path in self._directory.iterdir():
            if path.name != name:
                path.unlink()
        return name


def take_note(txn: Txn) -> str | None:
    """What the last close noted, and no longer: from now on the index may differ."""
    note = txn.get("meta", _COPIED)
    if note is None:
        return None
    txn.delete("meta", _COPIED)
    name = note.decode(errors="replace")
    return name if _NAME.fullmatch(name) else None


def put_note(txn: Txn, copied: str) -> None:
    """This copy has all that the index has but the state, which says nothing of a copy."""
    txn.put("meta", _COPIED, copied.encode())


def set_aside(root: Path) -> Path:
    """Rename the index, and say what it is called now. DiskFault, CacheError."""
    aside = root / ASIDE
    with disk_errors(f"set the damaged index in {root} aside"):
        if aside.exists():
            shutil.rmtree(aside)
        (root / "index").rename(aside)
        (root / "index").mkdir(mode=0o700)
        sync_directory(root)
    return aside


def is_missing(root: Path) -> bool:
    """Whether there is no index, or an empty file in its place."""
    try:
        return (root / "index" / "data.mdb").stat().st_size == 0
    except FileNotFoundError:
        return True


def restore(root: Path) -> bool:
    """Put the newest good copy where there is no index. Whether there was one. DiskFault, NoSpaceError, CacheError."""
    index = root / "index"
    with disk_errors(f"put a copy of the index into {index}"):
        for copy in _copies(root / COPIES):
            if not _is_good(copy):
                log.warning("the copy of the index %s is damaged, and not used", copy)
                continue
            for leftover in index.iterdir():
                leftover.unlink()
            (index / _RESTORED).touch(mode=0o600)
            fresh = index / "data.mdb.new"
            shutil.copyfile(copy, fresh)
            fresh.chmod(0o600)
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
            fresh.rename(index / "data.mdb")
            sync_directory(index)
            return True
    return False


def is_restored(root: Path) -> bool:
    """Whether the index is a copy that nobody has taken into use yet."""
    return (root / "index" / _RESTORED).exists()


def settled(root: Path) -> None:
    """It was taken into use."""
    with disk_errors(f"write to {root / 'index'}"):
        (root / "index" / _RESTORED).unlink(missing_ok=True)


def _copies(directory: Path) -> list[Path]:
    """By age, the newest first."""
    try:
        named = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    regular = [path for path in named if path.is_file() and not path.is_symlink()]
    return sorted(regular, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _is_good(copy: Path) -> bool:
    with copy.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == copy.stem
