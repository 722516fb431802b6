"""After the disk refused writes: what is written again, and told to be there, is there when its pages are gone.

The regression: ext4 reads zeros where the pages of a failed write were written again (Linux 6.18).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest

from weightfs.core.geometry import ChunkSpan
from weightfs.errors import DiskFault
from weightfs.store.cache import Cache
from weightfs.store.index import Index, Txn
from weightfs.testing import disks
from weightfs.testing.caches import Sample
from weightfs.testing.sick_disk import SickDisk, sick_disk

CHUNK = 64 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SickDisk]:
    if (why := disks.missing("ext4")) is not None or not Path("/dev/fuse").exists():
        pytest.skip(f"no disk can be made sick here: {why or 'no /dev/fuse'}")
    with sick_disk(tmp_path) as made:
        yield made


def forget(path: Path) -> None:
    """The kernel drops what it holds of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


@contextmanager
def sick_then_renewed(disk: SickDisk, *, whole: bool) -> Iterator[tuple[Cache, Sample]]:
    """A cache with the first two chunks of eight, on a disk that refuses writes meanwhile; then it takes all again."""
    sample = Sample.random(8 * CHUNK, chunk_length=CHUNK)
    cache = Cache.open(disk.directory / "cache", now=0)
    try:
        cache.put_ref(sample.manifest(), now=0)
        sample.land(cache, range(8) if whole else range(2))
        if whole:
            cache.drop(sample.id, ChunkSpan(2, 8), punch=False)
        disk.refuse(writes=True)
        yield cache, sample
        disk.refuse()
        doubt = cache.doubt(sample.id)
        assert doubt is not None
        cache.renew(sample.id)
        cache.forgive(sample.id, doubt)
        sample.land(cache, range(2, 8))
        forget(cache.path(sample.id))
        assert cache.check(deep=True) == []
        assert list(cache.progress(sample.id).present) == list(range(8))
    finally:
        cache.close()


@pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole once"])
def test_a_chunk_that_is_written_again_after_a_failed_sync_is_on_the_disk(
    disk: SickDisk, whole: bool
) -> None:
    with sick_then_renewed(disk, whole=whole) as (cache, sample):
        landings = sample.write(cache, range(2, 8))
        with pytest.raises(DiskFault):
            cache.commit(landings, now=1)


@pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole once"])
def test_what_was_lost_before_a_renewal_is_no_fault_of_what_lands_after_it(
    disk: SickDisk, whole: bool
) -> None:
    """Regression: the kernel told of old pages at the first sync after it, on a disk that was well again."""
    with sick_then_renewed(disk, whole=whole) as (cache, sample):
        with pytest.raises(DiskFault):
            cache.commit(sample.write(cache, range(2, 4)), now=1)
        sample.write(cache, range(4, 8))  # a fetch that was under way
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            write_back(cache.path(sample.id))


def write_back(path: Path) -> None:
    """As the kernel does it by itself after a while: whoever has the file open is told at his next sync."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def fill(txn: Txn, value: bytes) -> None:
    for number in range(500):
        txn.put("raw", b"%d" % number, value)


def test_an_index_whose_write_failed_is_on_the_disk_after_the_next(disk: SickDisk) -> None:
    directory = disk.directory / "index"
    directory.mkdir()
    index = Index.open(directory)
    try:
        index.write(lambda txn: txn.put("ref", b"first", b"1"))
        disk.refuse(writes=True)
        for _ in range(3):
            with pytest.raises(DiskFault):
                index.write(lambda txn: fill(txn, bytes(2000)))
        disk.refuse()
        index.write(lambda txn: fill(txn, b"x" * 2000))
    finally:
        index.abandon()  # unmaps it
    forget(directory / "data.mdb")
    index = Index.open(directory)
    try:
        with index.read() as txn:
            assert txn.get("ref", b"first") == b"1"
            assert all(txn.get("raw", b"%d" % n) == b"x" * 2000 for n in range(500))
        assert index.verify() == []
    finally:
        index.close()


def test_an_index_that_panicked_is_used_again(tmp_path: Path) -> None:
    """Regression: LMDB refused everything until weightfs was started again."""
    index = Index.open(tmp_path)
    index.write(lambda txn: txn.put("ref", b"first", b"1"))

    def panic(_: object) -> None:
        raise lmdb.PanicError("MDB_PANIC: Update of meta page failed or environment had fatal error")

    with pytest.raises(DiskFault, match="failed to reach the disk"):
        index.write(panic)
    before = index._env
    index.trial()
    assert index._env is not before
    with index.read() as txn:
        assert txn.get("ref", b"first") == b"1"
    index.close()


def test_an_index_that_could_not_be_opened_again_is_a_fault_of_the_disk_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: readers were told that it is closed, which nobody counts as a fault of the disk."""
    index = Index.open(tmp_path)
    index.write(lambda txn: txn.put("ref", b"first", b"1"))

    def refuse(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as sick:
        sick.setattr(index, "_attempt", refuse_writes)
        with pytest.raises(DiskFault, match="the disk refuses"):
            index.trial()
        sick.setattr(os, "read", refuse)
        with pytest.raises(DiskFault, match=r"data\.mdb again"):
            index.trial()
    with pytest.raises(DiskFault, match="could not be read again"), index.read():
        pass
    with pytest.raises(DiskFault, match="could not be read again"):
        index.verify()
    index.trial()
    with index.read() as txn:
        assert txn.get("ref", b"first") == b"1"
    index.close()


def refuse_writes(_job: object) -> None:
    raise DiskFault("the disk refuses")


def test_an_index_whose_last_write_failed_is_not_vouched_for_when_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the next start took the digest of pages that may be in memory only, and did not walk the file."""
    index = Index.open(tmp_path)
    monkeypatch.setattr(index, "_attempt", refuse_writes)
    with pytest.raises(DiskFault):
        index.trial()
    index.close()
    assert not (tmp_path / "closed").exists()
