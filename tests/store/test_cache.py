from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import ByteSpan, ChunkSpan
from weightfs.core.manifest import BlobId, ChunkList, Entry, Manifest, Trust
from weightfs.errors import CacheError, DiskFault, IntegrityError, NoSpaceError
from weightfs.store.cache import Cache, ChunkState, Landing, RunState
from weightfs.store.records import chunk_key
from weightfs.testing.caches import Sample

K = 4096


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    made = Cache.open(tmp_path / "cache", now=1)
    yield made
    made.close()


@pytest.fixture
def sample(cache: Cache) -> Sample:
    made = Sample.random(5 * K + 100)
    assert cache.put_ref(made.manifest(), now=50) == ()
    return made


def present(cache: Cache, sample: Sample) -> list[int]:
    return list(cache.progress(sample.id).present)


def test_what_lands_is_read_back(cache: Cache, sample: Sample) -> None:
    sample.land(cache, [0, 2, 5])
    assert present(cache, sample) == [0, 2, 5]
    assert cache.read(sample.id, ByteSpan(0, K)) == sample.chunk(0)
    assert cache.read(sample.id, ByteSpan(5 * K + 1, 5 * K + 100)) == sample.chunk(5)[1:]
    assert cache.read_nowait(sample.id, ByteSpan(2 * K, 3 * K)) == sample.chunk(2)
    assert cache.read(sample.id, ByteSpan(7, 7)) == b""
    assert cache.digests(sample.id, ChunkSpan(1, 6)) == {n: sample.landing(n).digest for n in (2, 5)}
    assert cache.usage()[0] == 2 * K + 100
    assert cache.free_bytes() > 0
    assert cache.check(deep=True) == []


def test_read_nowait_before_the_file_is_open(cache: Cache, sample: Sample) -> None:
    sample.write(cache, [0])
    assert cache.read_nowait(sample.id, ByteSpan(0, K)) is None
    assert cache.read(sample.id, ByteSpan(0, K)) == sample.chunk(0)
    assert cache.read_nowait(sample.id, ByteSpan(0, K)) == sample.chunk(0)
    cache.forget_pages(sample.id, ByteSpan(0, K))


def test_read_nowait_is_not_held_up_by_a_sync(
    cache: Cache, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample.land(cache, [0])
    syncing, go_on = threading.Event(), threading.Event()

    def slow(descriptor: int) -> None:
        syncing.set()
        assert go_on.wait(30)

    landings = sample.write(cache, [1])
    monkeypatch.setattr(os, "fdatasync", slow)
    thread = threading.Thread(target=lambda: cache.commit(landings, now=2))
    thread.start()
    assert syncing.wait(30)
    try:
        assert cache.read_nowait(sample.id, ByteSpan(0, K)) == sample.chunk(0)
        assert cache.read(sample.id, ByteSpan(0, K)) == sample.chunk(0)
        assert present(cache, sample) == [0]
    finally:
        go_on.set()
        thread.join()
    assert present(cache, sample) == [0, 1]


def test_drop_keeps_the_digest_and_gives_the_space_back(cache: Cache, sample: Sample) -> None:
    sample.land(cache, range(6))
    before = cache.usage()
    assert cache.drop(sample.id, ChunkSpan(3, 6)) == 2 * K + 100
    assert present(cache, sample) == [0, 1, 2]
    assert cache.usage()[1] < before[1]
    assert sorted(cache.digests(sample.id, ChunkSpan(0, 6))) == list(range(6))
    assert cache.read(sample.id, ByteSpan(3 * K, 4 * K)) == bytes(K)  # why a caller looks again after a read
    assert cache.drop(sample.id, ChunkSpan(3, 6)) == 0
    assert cache.check(deep=True) == []


def test_drop_without_punch_leaves_the_bytes(cache: Cache, sample: Sample) -> None:
    sample.land(cache, [1])
    cache.drop(sample.id, ChunkSet(6, [1]), punch=False)
    assert present(cache, sample) == []
    assert cache.read(sample.id, ByteSpan(K, 2 * K)) == sample.chunk(1)


def test_drop_outside_the_blob_changes_nothing(cache: Cache, sample: Sample) -> None:
    sample.land(cache, [5])
    with pytest.raises(IndexError):
        cache.drop(sample.id, ChunkSpan(5, 7))
    assert present(cache, sample) == [5]


def test_a_disk_bad_chunk_is_a_hole_whose_digest_is_known(cache: Cache, sample: Sample) -> None:
    sample.land(cache, [1, 2])
    cache.commit([sample.landing(1, state=ChunkState.DISK_BAD)], now=3)
    assert present(cache, sample) == [2]
    assert sorted(cache.digests(sample.id, ChunkSpan(0, 6))) == [1, 2]
    sample.land(cache, [1])
    assert present(cache, sample) == [1, 2]
    assert cache.check(deep=True) == []


def test_runs_and_trust_are_kept(cache: Cache, sample: Sample) -> None:
    run = RunState(3, bytes(range(32)))
    cache.commit(sample.write(cache, [0, 1, 2]), runs={sample.id: run}, now=3)
    assert cache.progress(sample.id).run == run
    assert cache.progress(sample.id).trust is Trust.PROVISIONAL
    cache.commit([], trusts={sample.id: Trust.QUARANTINED}, now=4)
    assert cache.progress(sample.id).trust is Trust.QUARANTINED


def test_a_run_ahead_of_the_records_is_not_kept(cache: Cache, sample: Sample) -> None:
    sample.write(cache, [0, 1, 2])
    cache.commit([sample.landing(0), sample.landing(2)], runs={sample.id: RunState(3, bytes(32))}, now=3)
    assert cache.progress(sample.id).run is None
    cache.commit([sample.landing(1)], runs={sample.id: RunState(3, bytes(32))}, now=3)
    assert cache.progress(sample.id).run == RunState(3, bytes(32))
    cache.drop(sample.id, ChunkSpan(0, 1))
    cache.commit([], runs={sample.id: RunState(3, bytes(32))}, now=3)  # said before the drop
    assert cache.progress(sample.id).run is None


def test_a_run_does_not_outlive_what_it_ate(cache: Cache, sample: Sample) -> None:
    """Regression: it stayed, other bytes landed below its frontier, and the blob was called verified."""
    cache.commit(sample.write(cache, [0, 1, 2]), runs={sample.id: RunState(2, bytes(32))}, now=3)
    cache.drop(sample.id, ChunkSpan(2, 3))
    assert cache.progress(sample.id).run is not None
    cache.drop(sample.id, ChunkSpan(1, 2))
    assert cache.progress(sample.id).run is None


def test_a_run_outlives_what_a_trusted_list_binds(cache: Cache, sample: Sample) -> None:
    digests = b"".join(sample.landing(chunk).digest for chunk in range(6))
    listed = replace(sample.blob, chunk_list=ChunkList(K, digests, trusted=True))
    cache.put_ref(replace(sample, blob=listed).manifest(), now=2)
    run = RunState(2, bytes(32))
    cache.commit(sample.write(cache, [0, 1]), runs={sample.id: run}, now=3)
    cache.drop(sample.id, ChunkSpan(1, 2))
    assert cache.progress(sample.id).run == run
    cache.commit([], runs={sample.id: run}, now=3)
    assert cache.progress(sample.id).run == run
    assert cache.check(deep=True) == []


def test_a_verdict_does_not_outlive_a_record_that_was_spoilt(cache: Cache, sample: Sample) -> None:
    """Regression: a verified blob stayed so although nothing bound what would land in its hole."""
    sample.land(cache, range(6))
    cache.commit([], trusts={sample.id: Trust.VERIFIED}, now=4)
    cache.drop(sample.id, ChunkSpan(1, 2))
    assert cache.progress(sample.id).trust is Trust.VERIFIED  # its digest is proven, and binds
    key = chunk_key(sample.id, 2 * K)
    cache._index.write(lambda txn: txn.put("chunk", key, b"spoilt"))
    cache.drop(sample.id, ChunkSpan(2, 3))
    assert cache.progress(sample.id).trust is Trust.PROVISIONAL


def test_a_landing_that_nothing_binds_takes_a_verdict_back(cache: Cache, sample: Sample) -> None:
    sample.land(cache, range(6))
    cache.commit([], trusts={sample.id: Trust.VERIFIED}, now=4)
    cache._index.write(
        lambda txn: (txn.delete("chunk", chunk_key(sample.id, K)), txn.delete("bits", sample.id.raw))
    )
    assert present(cache, sample) == [0, 2, 3, 4, 5]
    sample.land(cache, [1])
    assert cache.progress(sample.id).trust is Trust.PROVISIONAL


def test_a_verified_blob_binds_what_lands_later(cache: Cache, sample: Sample) -> None:
    sample.land(cache, range(6))
    cache.commit([], trusts={sample.id: Trust.VERIFIED}, now=4)
    cache.drop(sample.id, ChunkSpan(0, 6))
    assert cache.required_digests(sample.id, ChunkSpan(0, 9)) == {
        n: sample.landing(n).digest for n in range(6)
    }
    other = Sample.random(5 * K + 100, seed=2)
    cache.prepare(sample.id)
    wrong = Landing(sample.id, 2, other.landing(2).digest, ChunkState.LANDED, 1)
    with pytest.raises(IntegrityError, match="chunk 2"):
        cache.commit([sample.landing(1), wrong], now=5)
    assert present(cache, sample) == [1]
    assert cache.progress(sample.id).trust is Trust.VERIFIED


def test_a_trusted_list_binds_from_the_start(cache: Cache) -> None:
    sample = Sample.random(3 * K, listed=True)
    cache.put_ref(sample.manifest(), now=1)
    assert cache.progress(sample.id).trust is Trust.ATTESTED
    assert cache.required_digests(sample.id, ChunkSpan(1, 2)) == {1: sample.landing(1).digest}
    cache.prepare(sample.id)
    with pytest.raises(IntegrityError):
        cache.commit([Landing(sample.id, 0, bytes(32), ChunkState.LISTED, 1)], now=5)
    assert present(cache, sample) == []
    assert cache.blob(sample.id) == sample.blob


def test_landings_of_unknown_blobs_and_chunks(cache: Cache, sample: Sample) -> None:
    cache.commit([Sample.random(K, seed=9).landing(0)], now=1)  # deleted meanwhile: ignored
    with pytest.raises(IndexError):
        cache.commit([Landing(sample.id, 6, bytes(32), ChunkState.LANDED, 0)], now=1)
    with pytest.raises(CacheError, match="knows no blob"):
        cache.progress(BlobId(bytes(16)))
    assert cache.blob(BlobId(bytes(16))) is None
    assert cache.drop(BlobId(bytes(16)), ChunkSpan(0, 1)) == 0


def test_an_empty_blob(cache: Cache) -> None:
    empty = Sample.of(b"")
    cache.put_ref(empty.manifest(), now=1)
    assert cache.prepare(empty.id).stat().st_size == 0
    assert cache.progress(empty.id).present.full
    cache.commit([], trusts={empty.id: Trust.VERIFIED}, now=2)
    assert cache.check(deep=True) == []


# Files that somebody laid hands on


def test_a_short_file_is_a_fault_and_never_zeros(cache: Cache, sample: Sample) -> None:
    sample.land(cache, range(6))
    os.truncate(cache.path(sample.id), 2 * K + 5)
    assert cache.read(sample.id, ByteSpan(0, K)) == sample.chunk(0)
    with pytest.raises(DiskFault, match=f"ends at byte {2 * K + 5}") as caught:
        cache.read(sample.id, ByteSpan(2 * K, 3 * K))
    assert caught.value.blob == str(sample.id)
    assert cache.read_nowait(sample.id, ByteSpan(2 * K, 3 * K)) is None
    with pytest.raises(DiskFault):
        cache.prepare(sample.id)
    assert [text for text in cache.check() if "instead of" in text]
    cache.drop(sample.id, ChunkSpan(0, 6))
    sample.land(cache, [2])
    assert cache.check(deep=True) == []


def test_a_deleted_file_is_not_made_again_under_present_chunks(cache: Cache, sample: Sample) -> None:
    sample.land(cache, [0])
    cache.path(sample.id).unlink()
    with pytest.raises(DiskFault, match="is gone"):
        cache.prepare(sample.id)
    assert any("is gone" in text for text in cache.check())
    cache.drop(sample.id, ChunkSpan(0, 6))
    cache.prepare(sample.id)
    assert cache.check() == []


def test_nor_under_chunks_that_landed_but_are_not_recorded(cache: Cache, sample: Sample) -> None:
    landings = sample.write(cache, [0, 1])
    cache.path(sample.id).unlink()
    with pytest.raises(DiskFault):
        cache.prepare(sample.id)
    with pytest.raises(DiskFault):
        cache.commit(landings, now=2)
    assert present(cache, sample) == []


def test_bytes_in_a_file_that_was_replaced_are_not_recorded(cache: Cache, sample: Sample) -> None:
    sample.land(cache, [0])
    landings = sample.write(cache, [1])
    path = cache.path(sample.id)
    path.rename(path.with_name("aside"))
    path.write_bytes(bytes(len(sample.data)))
    with pytest.raises(DiskFault, match="replaced"):
        cache.commit(landings, now=2)
    assert present(cache, sample) == [0]


@pytest.mark.parametrize("how", ["symlink", "hardlink", "fifo", "directory"])
def test_a_file_that_is_not_plainly_ours_is_refused(
    cache: Cache, sample: Sample, tmp_path: Path, how: str
) -> None:
    path, other = cache.path(sample.id), tmp_path / "other"
    other.write_bytes(b"precious")
    match how:
        case "symlink":
            path.symlink_to(other)
        case "hardlink":
            os.link(other, path)
        case "fifo":
            os.mkfifo(path)
        case _:
            path.mkdir()
    with pytest.raises(CacheError):
        cache.prepare(sample.id)
    with pytest.raises(CacheError):
        cache.read(sample.id, ByteSpan(0, 1))
    assert other.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, DiskFault), (errno.ENOSPC, NoSpaceError), (errno.EDQUOT, NoSpaceError)]
)
def test_a_failed_sync_records_nothing_and_is_not_forgotten(
    cache: Cache, sample: Sample, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[CacheError]
) -> None:
    healthy = Sample.random(2 * K, seed=5)
    cache.put_ref(healthy.manifest(ref="https://host/other.gguf"), now=1)
    sample.land(cache, [0])
    landings = sample.write(cache, [1, 2])
    inode = cache.path(sample.id).stat().st_ino
    real = os.fdatasync

    def failing(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == inode:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(kind):
        cache.commit([*landings, *healthy.write(cache, [0])], runs={sample.id: RunState(1, bytes(32))}, now=2)
    assert present(cache, sample) == [0]
    assert cache.progress(sample.id).run is None
    assert present(cache, healthy) == [0]
    # The kernel reports a lost write once; that the next sync succeeds must not make lost bytes count.
    monkeypatch.setattr(os, "fdatasync", real)
    with pytest.raises(DiskFault, match="fetch them again"):
        cache.commit(landings, now=3)
    for hole in cache.progress(sample.id).present.holes(ChunkSpan(0, 6)):
        cache.drop(sample.id, hole)
    sample.land(cache, [1, 2])
    assert present(cache, sample) == [0, 1, 2]
    assert cache.check(deep=True) == []


def test_an_io_error_while_reading_is_a_fault(
    cache: Cache, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample.land(cache, [0])

    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr(os, "preadv", failing)
    assert cache.read_nowait(sample.id, ByteSpan(0, K)) is None
    with pytest.raises(DiskFault, match="Input/output error"):
        cache.read(sample.id, ByteSpan(0, K))


# Refs


def test_a_ref_keeps_the_revisions_it_had(cache: Cache) -> None:
    one, two = Sample.random(K, seed=1), Sample.random(K, seed=2)
    cache.put_ref(one.manifest(revision="r1"), now=10)
    cache.put_ref(one.manifest(revision="r1"), now=11)
    cache.put_ref(two.manifest(revision="r2"), now=12)
    cache.put_ref(one.manifest(revision="r1"), now=13)
    (stored,) = cache.refs()
    assert stored.previous == ("r2", "r1")
    assert stored.added_at == 10
    assert stored.manifest == one.manifest(revision="r1")
    assert cache.orphans() == [two.id]


def test_removing_a_ref_returns_what_nobody_else_names(cache: Cache) -> None:
    one, two = Sample.random(K, seed=1), Sample.random(K, seed=2)
    both = Manifest("https://host/both", "r", "https/host", (Entry("a", one.blob), Entry("b", two.blob)))
    cache.put_ref(both, now=1)
    cache.put_ref(one.manifest(), now=1)
    assert cache.remove_ref("https://host/unknown") == []
    assert cache.remove_ref(both.ref) == [two.id]
    assert [stored.manifest.ref for stored in cache.refs()] == ["https://host/m.gguf"]
    assert cache.blob(two.id) is not None


def test_deleting_a_blob(cache: Cache, sample: Sample) -> None:
    sample.land(cache, range(6))
    cache.remove_ref("https://host/m.gguf")
    assert cache.delete_blobs([sample.id]) >= len(sample.data)
    assert cache.blob(sample.id) is None
    assert not cache.path(sample.id).exists()
    assert cache.check() == []
    cache.put_ref(sample.manifest(), now=2)
    sample.land(cache, [0])
    assert cache.check(deep=True) == []


@pytest.mark.parametrize("path", ["../m.gguf", "/m.gguf", "a\x00b"])
def test_a_path_that_leads_outside_is_not_written(cache: Cache, path: str) -> None:
    bad = Manifest("https://host/m.gguf", "r", "https/host", (Entry(path, Sample.random(K).blob),))
    with pytest.raises(IntegrityError, match="names the path"):
        cache.put_ref(bad, now=1)
    assert cache.refs() == []


def test_a_long_ref_is_no_problem_for_short_keys(cache: Cache) -> None:
    sample = Sample.random(K)
    ref = "https://host/" + "x" * 4000
    cache.put_ref(sample.manifest(ref=ref), now=1)
    assert cache.refs()[0].manifest.ref == ref


# Threads


def test_many_threads_with_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightfs.store.sparse.MAX_DESCRIPTORS", 2)
    with_few = Cache.open(tmp_path / "few", now=1)
    samples = [Sample.random(2 * K, seed=seed) for seed in range(6)]
    for number, sample in enumerate(samples):
        with_few.put_ref(sample.manifest(ref=f"https://host/{number}"), now=1)
    wrong: list[str] = []

    def work(seed: int) -> None:
        for step in range(60):
            sample = samples[(step * 5 + seed) % 6]
            if step % 20 == 0:
                sample.land(with_few, [0, 1])
            elif step > 20:
                if with_few.read(sample.id, ByteSpan(0, K)) != sample.chunk(0):
                    wrong.append(f"read {seed} {step}")
                if with_few.read_nowait(sample.id, ByteSpan(0, K)) not in (None, sample.chunk(0)):
                    wrong.append(f"read_nowait {seed} {step}")
                if not with_few.progress(sample.id).present.full:
                    wrong.append("lost")

    for sample in samples:
        sample.land(with_few, [0, 1])
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    opened = len([link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in _target(link)])
    assert opened <= 2 + 4  # the pool's, the lock, the index (twice) and its lock
    assert with_few.check(deep=True) == []
    with_few.close()


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def test_a_closed_cache_says_so(tmp_path: Path) -> None:
    cache = Cache.open(tmp_path / "cache", now=1)
    cache.close()
    cache.close()
    with pytest.raises(CacheError, match="was closed"):
        cache.refs()
    assert cache.read_nowait(BlobId(bytes(16)), ByteSpan(0, 1)) is None
