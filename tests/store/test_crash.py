"""Killed between any two steps of landing, the records never say more than the data files hold."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from weightfs.core.geometry import ChunkSpan
from weightfs.core.manifest import BlobId
from weightfs.errors import CacheError, DiskFault
from weightfs.store import disk, ledger, sparse
from weightfs.store.cache import Cache, ChunkState, Landing
from weightfs.store.index import Index, Txn
from weightfs.store.landing import SYNCS_AT_ONCE
from weightfs.store.sparse import SparseFiles
from weightfs.testing.caches import Sample

K = 4096

# What runs in the process that is killed. `die_at` is the step before which it ends itself.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from weightfs.core.geometry import ChunkSpan
from weightfs.store import ledger
from weightfs.store.cache import Cache
from weightfs.store.index import Index
from weightfs.store.sparse import SparseFiles
from weightfs.testing.caches import Sample

root, die_at = Path(sys.argv[1]), sys.argv[2]

def before(step, function):
    def wrapped(*args, **kwargs):
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

def after(step, function):
    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

sample = Sample.random(8 * 4096)
cache = Cache.open(root, now=1)
cache.put_ref(sample.manifest(), now=1)
sample.land(cache, [0, 1])
os.fdatasync = after("synced", before("before sync", os.fdatasync))
Index.write = after("recorded", before("before records", Index.write))
ledger.put_chunk = before("amid records", ledger.put_chunk)
ledger.put_bits = after("before the index commit", ledger.put_bits)
SparseFiles.punch = after("punched", before("before punch", SparseFiles.punch))
SparseFiles.remove = after("removed", before("before removal", SparseFiles.remove))
match sys.argv[3]:
    case "land":
        sample.land(cache, [2, 3, 4])
    case "drop":
        cache.drop(sample.id, ChunkSpan(0, 1))
    case "delete":
        cache.remove_ref(sample.manifest().ref)
        cache.delete_blob(sample.id)
print("survived")
"""

LANDING = {
    "before sync": [0, 1],
    "synced": [0, 1],
    "before records": [0, 1],
    "amid records": [0, 1],
    "before the index commit": [0, 1],
    "recorded": [0, 1, 2, 3, 4],
}
DROPPING = {
    "before records": [0, 1],
    "amid records": [0, 1],
    "recorded": [1],
    "before punch": [1],
    "punched": [1],
}


def kill_at(root: Path, step: str, what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, root, step, what],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("what", "step", "left"),
    [("land", *item) for item in LANDING.items()] + [("drop", *item) for item in DROPPING.items()],
)
def test_killed_between_two_steps(tmp_path: Path, what: str, step: str, left: list[int]) -> None:
    kill_at(tmp_path / "cache", step, what)
    sample = Sample.random(8 * K)
    cache = Cache.open(tmp_path / "cache", now=1)
    progress = cache.progress(sample.id)
    assert list(progress.present) == list(progress.suspect) == left
    assert not cache.was_clean
    assert cache.check(deep=True) == []
    cache.close()


@pytest.mark.parametrize("step", ["before records", "before removal", "removed"])
def test_killed_amid_a_deletion(tmp_path: Path, step: str) -> None:
    kill_at(tmp_path / "cache", step, "delete")
    sample = Sample.random(8 * K)
    cache = Cache.open(tmp_path / "cache", now=1)
    gone = cache.blob(sample.id) is None
    assert gone is (step != "before records")
    assert cache.path(sample.id).exists() is not gone
    assert cache.check(deep=True) == []
    cache.close()


# The order, judged by what a power cut would leave


class Power:
    """Follows writes, syncs and commits; after any of them the power may fail: only synced bytes are left."""

    def __init__(self) -> None:
        self.written: set[int] = set()
        self.durable: set[int] = set()
        self.broken: list[str] = []

    def synced(self) -> None:
        self.durable |= self.written

    def committed(self, present: Sequence[int]) -> None:
        if missing := set(present) - self.durable:
            self.broken.append(f"chunks {sorted(missing)} are recorded, but were not on the disk")


def watch(monkeypatch: pytest.MonkeyPatch, cache: Cache, blob: BlobId) -> Power:
    power = Power()
    sync, write = os.fdatasync, Index.write

    def watched_sync(descriptor: int) -> None:
        sync(descriptor)
        power.synced()

    def watched_write(self: Index, job: Callable[[Txn], Any]) -> Any:
        result = write(self, job)
        with self.read() as txn:
            if ledger.blob_record(txn, blob) is not None:
                power.committed(list(cache.progress(blob).present))
        return result

    monkeypatch.setattr(os, "fdatasync", watched_sync)
    monkeypatch.setattr(Index, "write", watched_write)
    return power


def land_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Power:
    sample = Sample.random(8 * K)
    cache = Cache.open(tmp_path / "cache", now=1)
    cache.put_ref(sample.manifest(), now=1)
    power = watch(monkeypatch, cache, sample.id)
    for chunks in ([0, 3], [1], [7, 2]):
        landings = sample.write(cache, chunks)
        power.written |= set(chunks)
        cache.commit(landings, now=2)
    cache.drop(sample.id, ChunkSpan(0, 2))
    power.written -= {0, 1}
    power.durable -= {0, 1}
    landings = sample.write(cache, [0])
    power.written.add(0)
    cache.commit(landings, now=3)
    cache.close()
    return power


def test_records_never_say_more_than_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert land_some(tmp_path, monkeypatch).broken == []


def test_and_this_test_notices_the_other_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SparseFiles.sync
    late: list[tuple[SparseFiles, BlobId]] = []
    write = Cache.commit

    def swapped(self: Cache, landings: Sequence[Landing], **rest: Any) -> None:
        write(self, landings, **rest)
        for files, blob in late:
            real(files, blob)
        late.clear()

    monkeypatch.setattr(SparseFiles, "sync", lambda self, blob: late.append((self, blob)))
    monkeypatch.setattr(Cache, "commit", swapped)
    assert land_some(tmp_path, monkeypatch).broken


def test_names_are_on_the_disk_before_records_and_once_for_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [Sample.random(2 * K, seed=seed) for seed in range(40)]
    cache = Cache.open(tmp_path / "cache", now=1)
    for number, sample in enumerate(samples):
        cache.put_ref(sample.manifest(ref=f"https://host/{number}"), now=1)
    steps: list[str] = []
    sync, write = disk.sync_directory, Index.write

    def watched_sync(path: Path) -> None:
        sync(path)
        steps.append("names")

    def watched_write(self: Index, job: Callable[[Txn], Any]) -> Any:
        steps.append("records")
        return write(self, job)

    monkeypatch.setattr(sparse, "sync_directory", watched_sync)
    monkeypatch.setattr(Index, "write", watched_write)
    first = [landing for sample in samples for landing in sample.write(cache, [0])]
    assert steps == []
    cache.commit(first, now=2)
    assert steps[-1] == "records"
    assert set(steps[:-1]) == {"names"}
    assert len(steps) <= SYNCS_AT_ONCE + 1
    steps.clear()
    cache.commit([landing for sample in samples for landing in sample.write(cache, [1])], now=2)
    assert steps == ["records"]
    assert cache.check(deep=True) == []
    cache.close()


def test_a_name_that_does_not_reach_the_disk_records_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [Sample.random(2 * K, seed=seed) for seed in range(3)]
    cache = Cache.open(tmp_path / "cache", now=1)
    for number, sample in enumerate(samples):
        cache.put_ref(sample.manifest(ref=f"https://host/{number}"), now=1)

    def failing(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    landings = [landing for sample in samples for landing in sample.write(cache, [0])]
    with monkeypatch.context() as patch:
        patch.setattr(sparse, "sync_directory", failing)
        with pytest.raises(DiskFault):
            cache.commit(landings, now=2)
    for sample in samples:
        assert len(cache.progress(sample.id).present) == 0
        cache.drop(sample.id, ChunkSpan(0, 2))
        sample.land(cache, [0])
        assert list(cache.progress(sample.id).present) == [0]
    assert cache.check(deep=True) == []
    cache.close()


def test_records_of_a_drop_go_before_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample.random(4 * K)
    cache = Cache.open(tmp_path / "cache", now=1)
    cache.put_ref(sample.manifest(), now=1)
    sample.land(cache, range(4))
    seen: list[Mapping[str, object]] = []
    real = SparseFiles.punch

    def watched(self: SparseFiles, blob: BlobId, spans: list[Any]) -> bool:
        seen.append({"present": list(cache.progress(blob).present), "spans": spans})
        return real(self, blob, spans)

    monkeypatch.setattr(SparseFiles, "punch", watched)
    cache.drop(sample.id, ChunkSpan(1, 3))
    assert [record["present"] for record in seen] == [[0, 3]]
    cache.close()


def test_a_commit_whose_index_fails_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample.random(4 * K)
    cache = Cache.open(tmp_path / "cache", now=1)
    cache.put_ref(sample.manifest(), now=1)

    def failing(*_: object) -> None:
        raise CacheError("the index cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "put_bits", failing)
        with pytest.raises(CacheError):
            sample.land(cache, [0, 1])
    assert len(cache.progress(sample.id).present) == 0
    assert cache.digests(sample.id, ChunkSpan(0, 4)) == {}
    digest = hashlib.sha256(sample.chunk(0)).digest()
    cache.commit([Landing(sample.id, 0, digest, ChunkState.LANDED, 0)], now=3)
    assert cache.check(deep=True) == []
    cache.close()
