"""Evicting from the store: what may be mapped is never punched, digests stay, and a stop in between leaves no waste."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from weightfs.core.manifest import Trust
from weightfs.store import evicting
from weightfs.store.cache import Cache
from weightfs.store.evicting import Use
from weightfs.store.index import Index, Txn
from weightfs.testing.caches import Sample

K = 4096
COUNT = 8


@pytest.fixture
def sample() -> Sample:
    return Sample.random(COUNT * K - 100)


@pytest.fixture
def cache(tmp_path: Path, sample: Sample) -> Iterator[Cache]:
    made = Cache.open(tmp_path / "c", now=1)
    made.put_ref(sample.manifest(), now=1)
    try:
        yield made
        assert made.check(deep=True) == []
    finally:
        made.close()


def file_of(cache: Cache, sample: Sample) -> Path:
    return cache.path(sample.id)


def test_parts_of_a_file_that_was_never_whole_are_punched(cache: Cache, sample: Sample) -> None:
    sample.land(cache, range(6))
    ino = file_of(cache, sample).stat().st_ino
    assert cache.evict(sample.id, [1, 2]) == 2 * K
    assert list(cache.progress(sample.id).present) == [0, 3, 4, 5]
    assert file_of(cache, sample).stat().st_ino == ino
    assert file_of(cache, sample).read_bytes()[K : 3 * K] == bytes(2 * K)
    assert set(cache.digests(sample.id, sample.blob.shape.chunks)) == set(range(6))
    assert cache.occupancy(sample.id)[0] == 4 * K
    assert cache.evict(sample.id, [1, 7]) == 0  # nothing there


def test_a_file_that_was_whole_is_never_punched(cache: Cache, sample: Sample) -> None:
    sample.land(cache, range(COUNT))
    assert cache.progress(sample.id).use.whole
    assert cache.evict(sample.id, [1]) is None
    assert 1 not in cache.progress(sample.id).present
    assert file_of(cache, sample).read_bytes() == sample.data  # who has it mapped sees no hole
    with file_of(cache, sample).open("rb") as old:
        assert cache.evict(sample.id) == COUNT * K
        assert old.read() == sample.data
    assert not file_of(cache, sample).exists()
    assert not cache.progress(sample.id).present
    assert not cache.progress(sample.id).use.whole
    sample.land(cache, [0, 1])  # in another file, which may be punched
    assert cache.evict(sample.id, [1]) == K


def test_the_mark_is_in_the_transaction_of_the_last_chunk(
    cache: Cache, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop right after the commit that makes a blob whole leaves it marked."""
    sample.land(cache, range(COUNT - 1))
    seen: list[bool] = []
    honest = Index.write

    def looking(self: Index, job: object) -> object:
        result: object = honest(self, job)  # type: ignore[arg-type]
        seen.append(cache.progress(sample.id).present.full is cache.progress(sample.id).use.whole)
        return result

    monkeypatch.setattr(Index, "write", looking)
    sample.land(cache, [COUNT - 1])
    assert seen == [True]


def test_proven_digests_bind_after_an_eviction(cache: Cache, sample: Sample) -> None:
    sample.land(cache, range(COUNT))
    cache.commit([], trusts={sample.id: Trust.VERIFIED}, now=2)
    cache.evict(sample.id)
    assert len(cache.required_digests(sample.id, sample.blob.shape.chunks)) == COUNT
    assert cache.progress(sample.id).trust is Trust.VERIFIED  # every hole is bound


def test_a_stop_between_the_records_and_the_file_leaves_no_waste(tmp_path: Path, sample: Sample) -> None:
    cache = Cache.open(tmp_path / "c", now=1)
    cache.put_ref(sample.manifest(), now=1)
    sample.land(cache, range(COUNT))
    cache._index.write(lambda txn: evicting.take_whole(txn, sample.id))
    assert file_of(cache, sample).exists()
    cache.close()
    cache = Cache.open(tmp_path / "c", now=2)
    try:
        assert not file_of(cache, sample).exists()
        assert cache.check(deep=True) == []
        assert cache.blob(sample.id) is not None  # listed as before
    finally:
        cache.close()


def test_a_file_in_which_chunks_landed_since_is_not_deleted_at_the_next_start(
    tmp_path: Path, sample: Sample
) -> None:
    """The file could not be deleted when it was evicted, and was used again."""
    cache = Cache.open(tmp_path / "c", now=1)
    cache.put_ref(sample.manifest(), now=1)
    sample.land(cache, range(COUNT))
    cache._index.write(lambda txn: evicting.take_whole(txn, sample.id))
    sample.land(cache, [3])
    cache.close()
    cache = Cache.open(tmp_path / "c", now=2)
    try:
        assert list(cache.progress(sample.id).present) == [3]
        assert cache.check(deep=True) == []
        assert evicting.settle_doomed(cache._index) == []
    finally:
        cache.close()


def test_uses_are_recorded_and_damaged_ones_are_taken_with_care(cache: Cache, sample: Sample) -> None:
    assert cache.progress(sample.id).use == Use()
    cache.note_uses({sample.id: [5, 6, 7]})
    assert cache.progress(sample.id).use == Use(times=(5, 6, 7))
    sample.land(cache, range(COUNT))
    assert cache.progress(sample.id).use == Use(whole=True, times=(5, 6, 7))
    cache.note_uses({sample.id: [2**40, -3]})
    assert cache.progress(sample.id).use == Use(whole=True, times=(2**32 - 1, 0))
    stranger = Sample.random(K, seed=9)
    cache.note_uses({stranger.id: [1]})
    for damage in (b"", b"\0\2\0\0", b"\7\0", b"\1"):

        def spoil(txn: Txn, damage: bytes = damage) -> None:
            txn.put_sealed("use", sample.id.raw, damage)

        cache._index.write(spoil)
        assert cache.progress(sample.id).use == Use(whole=True)
    cache._index.write(lambda txn: txn.put("use", sample.id.raw, b"unsealed nonsense"))
    assert cache.progress(sample.id).use == Use(whole=True)
    with pytest.raises(ValueError, match="256 regions"):
        cache.note_uses({sample.id: [0] * 256})


def test_unknown_blobs(cache: Cache) -> None:
    stranger = Sample.random(K, seed=9)
    assert cache.evict(stranger.id) == 0
    assert cache.evict(stranger.id, [0]) == 0
    assert cache.occupancy(stranger.id) == (0, 0)


def test_a_cache_of_format_1_may_have_been_passed_through(tmp_path: Path, sample: Sample) -> None:
    """It did not note what was whole once: nothing of it is punched."""
    cache = Cache.open(tmp_path / "c", now=1)
    cache.put_ref(sample.manifest(), now=1)
    sample.land(cache, range(4))

    def back(txn: object) -> None:
        txn.delete("use", sample.id.raw)  # type: ignore[attr-defined]
        txn.put("meta", b"format", b"1")  # type: ignore[attr-defined]

    cache._index.write(back)
    cache.close()
    cache = Cache.open(tmp_path / "c", now=2)
    try:
        assert cache.progress(sample.id).use.whole
        assert cache.evict(sample.id, [1]) is None
    finally:
        cache.close()


def test_a_filesystem_that_cannot_free_parts(
    cache: Cache, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample.land(cache, range(3))
    monkeypatch.setattr(type(cache._files), "punch", lambda *_: False)
    assert cache.evict(sample.id, [1]) is None


def test_the_check_sees_a_blob_that_is_whole_and_not_marked(tmp_path: Path, sample: Sample) -> None:
    cache = Cache.open(tmp_path / "c", now=1)
    cache.put_ref(sample.manifest(), now=1)
    sample.land(cache, range(COUNT))
    cache._index.write(lambda txn: evicting.put_use(txn, sample.id, Use()))
    assert any("not marked as whole" in finding for finding in cache.check())
    cache.close()
