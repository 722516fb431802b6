from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from weightfs.core.geometry import BlobShape, ChunkSpan
from weightfs.core.manifest import Blob, BlobId, ChunkList, Mirror, Policy, Trust
from weightfs.errors import ChunkListError, IntegrityError
from weightfs.store.cache import Cache, ChunkState, Landing, RunState
from weightfs.store.ledger import chunk_records
from weightfs.testing.caches import Sample

K = 4096


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    made = Cache.open(tmp_path / "cache", now=1)
    yield made
    assert made.check() == []
    made.close()


def add(cache: Cache, blob: Blob, sample: Sample, ref: str = "https://host/m.gguf") -> tuple[str, ...]:
    return cache.put_ref(replace(sample, blob=blob).manifest(ref=ref), now=1)


def states(cache: Cache, sample: Sample) -> dict[int, ChunkState]:
    with cache._index.read() as txn:
        shape = sample.blob.shape
        return {chunk: record.state for chunk, record in chunk_records(txn, sample.id, shape, shape.chunks)}


def land_wrong(cache: Cache, sample: Sample, chunk: int) -> None:
    """What a lying mirror delivers while nothing binds it."""
    bad = b"?" * len(sample.chunk(chunk))
    with cache.prepare(sample.id).open("r+b") as file:
        file.seek(sample.blob.shape.span_of(chunk).start)
        file.write(bad)
    cache.commit([Landing(sample.id, chunk, hashlib.sha256(bad).digest(), ChunkState.LANDED, 1)], now=2)


@pytest.fixture
def plain() -> Sample:
    return Sample.random(4 * K + 1)


@pytest.fixture
def listed() -> Sample:
    return Sample.random(4 * K + 1, listed=True)


def test_a_trusted_list_sorts_what_was_cached_without_it(cache: Cache, plain: Sample, listed: Sample) -> None:
    cache.put_ref(plain.manifest(), now=1)
    plain.land(cache, [0, 1])
    land_wrong(cache, plain, 2)
    cache.commit([], runs={plain.id: RunState(3, bytes(32))}, now=2)
    notes = cache.put_ref(listed.manifest(), now=2)
    assert len(notes) == 1
    assert "1 cached chunks" in notes[0]
    progress = cache.progress(plain.id)
    assert list(progress.present) == [0, 1]
    # Whoever reads at this moment meets what was there, not the zeros of a hole.
    assert cache.read(plain.id, plain.blob.shape.span_of(2)) == b"?" * K
    assert progress.trust is Trust.ATTESTED
    assert progress.run is None
    assert states(cache, plain)[0] is ChunkState.LISTED
    assert cache.blob(plain.id) == listed.blob
    plain.land(cache, [2])
    assert cache.check(deep=True) == []


def test_a_trusted_list_takes_a_blob_out_of_quarantine_if_it_finds_the_fault(
    cache: Cache, plain: Sample, listed: Sample
) -> None:
    cache.put_ref(plain.manifest(), now=1)
    plain.land(cache, [0, 1, 3, 4])
    land_wrong(cache, plain, 2)
    cache.commit([], trusts={plain.id: Trust.QUARANTINED}, now=2)
    assert set(states(cache, plain).values()) == {ChunkState.SUSPECT}
    cache.put_ref(listed.manifest(), now=2)
    assert cache.progress(plain.id).trust is Trust.ATTESTED
    assert list(cache.progress(plain.id).present) == [0, 1, 3, 4]


def test_but_not_if_it_agrees_with_every_byte(cache: Cache, plain: Sample, listed: Sample) -> None:
    cache.put_ref(plain.manifest(), now=1)
    plain.land(cache, range(5))
    cache.commit([], trusts={plain.id: Trust.QUARANTINED}, now=2)
    assert cache.put_ref(listed.manifest(), now=2) == ()
    assert cache.progress(plain.id).trust is Trust.QUARANTINED


def test_a_list_against_a_verified_blob_is_not_taken(cache: Cache, plain: Sample, listed: Sample) -> None:
    cache.put_ref(plain.manifest(), now=1)
    plain.land(cache, range(5))
    cache.commit([], trusts={plain.id: Trust.VERIFIED}, now=2)
    assert set(states(cache, plain).values()) == {ChunkState.PROVEN}
    lie = replace(listed.blob, chunk_list=ChunkList(K, bytes(32 * 5), trusted=True, signer="ab"))
    (note,) = add(cache, lie, plain)
    assert "wrong at chunk 0" in note
    blob = cache.blob(plain.id)
    assert blob is not None
    assert blob.chunk_list is None
    assert cache.progress(plain.id).trust is Trust.VERIFIED
    assert cache.progress(plain.id).present.full
    assert add(cache, listed.blob, listed) == ()  # the true one is welcome
    assert cache.progress(plain.id).trust is Trust.VERIFIED
    assert cache.blob(plain.id) == listed.blob


def test_a_trusted_list_stays(cache: Cache, plain: Sample, listed: Sample) -> None:
    cache.put_ref(listed.manifest(), now=1)
    assert cache.put_ref(plain.manifest(), now=1) == ()  # the list is not published any more
    assert cache.blob(plain.id) == listed.blob
    for trusted in (False, True):
        other = replace(listed.blob, chunk_list=ChunkList(K, bytes(32 * 5), trusted))
        (note,) = add(cache, other, listed)
        assert "which stays" in note
        assert cache.blob(plain.id) == listed.blob
    untrusted = replace(
        listed.blob, chunk_list=replace(listed.blob.chunk_list or ChunkList(K, b"", True), trusted=False)
    )
    assert add(cache, untrusted, listed) == ()
    assert cache.progress(plain.id).trust is Trust.ATTESTED
    assert cache.blob(plain.id) == listed.blob


def test_an_untrusted_list_drops_nothing(cache: Cache, plain: Sample) -> None:
    cache.put_ref(plain.manifest(), now=1)
    land_wrong(cache, plain, 1)
    untrusted = Sample.random(4 * K + 1, listed=False)
    assert cache.put_ref(untrusted.manifest(), now=1) == ()
    assert list(cache.progress(plain.id).present) == [1]
    assert cache.progress(plain.id).trust is Trust.PROVISIONAL
    assert cache.blob(plain.id) == untrusted.blob


def test_another_chunk_length_before_anything_is_there(cache: Cache, plain: Sample) -> None:
    cache.put_ref(plain.manifest(), now=1)
    finer = Sample.random(4 * K + 1, chunk_length=1024, listed=True)
    assert cache.put_ref(finer.manifest(), now=1) == ()
    assert cache.blob(plain.id) == finer.blob
    assert cache.progress(plain.id).present.count == 17
    assert cache.progress(plain.id).trust is Trust.ATTESTED
    finer.land(cache, range(17))
    assert cache.check(deep=True) == []


@pytest.mark.parametrize("landed", [True, False])
def test_another_chunk_length_is_refused_once_there_is_a_file(
    cache: Cache, plain: Sample, landed: bool
) -> None:
    cache.put_ref(plain.manifest(), now=1)
    if landed:
        plain.land(cache, [3])
    else:
        cache.prepare(plain.id)  # chunks of the old shape may be on their way
    finer = Sample.random(4 * K + 1, chunk_length=1024, listed=True)
    (note,) = cache.put_ref(finer.manifest(), now=1)
    assert "keeps its chunk length of 4096" in note
    assert cache.blob(plain.id) == plain.blob
    assert list(cache.progress(plain.id).present) == ([3] if landed else [])
    assert cache.progress(plain.id).trust is Trust.PROVISIONAL


def test_one_id_for_two_contents_is_refused(cache: Cache, plain: Sample) -> None:
    cache.put_ref(plain.manifest(), now=1)
    longer = replace(plain.blob, shape=BlobShape(5 * K, K))
    with pytest.raises(IntegrityError, match="bytes in the cache"):
        add(cache, longer, plain, ref="https://host/other")
    twin = replace(plain.blob, sha256=plain.id.raw + bytes(16))
    with pytest.raises(IntegrityError, match="another digest"):
        add(cache, twin, plain, ref="https://host/other")
    assert [stored.manifest for stored in cache.refs()] == [plain.manifest()]


@pytest.mark.parametrize("chunks", [ChunkList(1024, bytes(32 * 5), True), ChunkList(K, bytes(32 * 4), True)])
def test_a_list_that_does_not_fit_is_refused(cache: Cache, plain: Sample, chunks: ChunkList) -> None:
    with pytest.raises(ChunkListError):
        add(cache, replace(plain.blob, chunk_list=chunks), plain)
    assert cache.refs() == []


def test_mirrors_and_policy(cache: Cache, plain: Sample) -> None:
    one = replace(plain.blob, mirrors=(Mirror("https://a/1", 5),), policy=Policy.STRICT)
    two = replace(plain.blob, mirrors=(Mirror("https://b/1"), Mirror("https://a/1", 7)))
    add(cache, one, plain, ref="https://a/1")
    add(cache, two, plain, ref="https://b/1")
    blob = cache.blob(plain.id)
    assert blob is not None
    assert blob.mirrors == two.mirrors  # joined by URL, the newest first
    assert blob.policy is Policy.STRICT
    cache.remove_ref("https://a/1")
    three = replace(plain.blob, mirrors=(Mirror("https://c/1"),))
    add(cache, three, plain, ref="https://b/1")
    blob = cache.blob(plain.id)
    assert blob is not None
    assert blob.mirrors == three.mirrors
    assert blob.policy is Policy.PROVISIONAL


def test_a_digest_that_was_learnt_is_not_forgotten(cache: Cache) -> None:
    sample = Sample.random(K)
    known = replace(sample.blob, id=BlobId(bytes(16)))
    add(cache, known, sample)
    add(cache, replace(known, sha256=None), sample)
    blob = cache.blob(known.id)
    assert blob is not None
    assert blob.sha256 == known.sha256


def test_unverifiable_blobs(cache: Cache) -> None:
    sample = Sample.of(b"x" * 5000, known=False)
    cache.put_ref(sample.manifest(), now=1)
    sample.land(cache, [0, 1])
    assert cache.progress(sample.id).trust is Trust.UNVERIFIABLE
    assert cache.required_digests(sample.id, ChunkSpan(0, 2)) == {}
