"""Refs in the index: what a layout has to say again is kept to the byte, and an index of format 1 is read as it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.manifest import Blob, BlobId, Entry, Manifest, Mirror, Policy, Trust
from weightfs.errors import CacheCorruptError, CacheError, IntegrityError
from weightfs.store import records
from weightfs.store.cache import Cache
from weightfs.store.index import Index, Txn
from weightfs.store.records import BlobRecord, EntryRecord, RecordError, RefRecord
from weightfs.testing.caches import Sample

K = 4096
REF = "ollama://aya:8b"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(root: Path) -> Iterator[Cache]:
    made = Cache.open(root, now=1)
    yield made
    problems = made.check(deep=True)
    made.close()
    assert not problems


def git_blob(data: bytes, url: str = "https://hub/config.json") -> Blob:
    sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).digest()
    blob_id = BlobId.of_git(sha1, len(data))
    return Blob(blob_id, BlobShape(len(data), K), None, (Mirror(url),), git_sha1=sha1)


def manifest_of(*blobs: Blob, ref: str = REF, revision: str = "r1", raw: bytes = b"{}") -> Manifest:
    entries = tuple(Entry(f"f{number}", blob) for number, blob in enumerate(blobs))
    return Manifest(ref, revision, "ollama/library/aya/8b", entries, raw)


# ---- records


digests = st.one_of(
    st.tuples(st.none(), st.none()),
    st.tuples(st.binary(min_size=32, max_size=32), st.none()),
    st.tuples(st.none(), st.binary(min_size=20, max_size=20)),
)
ids = st.binary(min_size=16, max_size=16).map(BlobId)
spans = st.tuples(st.integers(0, 1 << 50), st.integers(0, 1 << 50)).map(
    lambda ends: ByteSpan(min(ends), max(ends))
)


@given(ids, digests, st.integers(0, 1 << 40), st.sampled_from(Trust))
def test_a_blob_record_is_read_back_as_it_was(
    blob_id: BlobId, digest: tuple[bytes | None, bytes | None], size: int, trust: Trust
) -> None:
    sha256, git_sha1 = digest
    blob = Blob(blob_id, BlobShape.of(size), sha256, (Mirror("https://h/m", 3, "v"),), git_sha1=git_sha1)
    record = BlobRecord(blob, trust, None)
    assert records.decode_blob(blob_id, records.encode_blob(record)) == record
    assert record.initial_trust is blob.initial_trust


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b/c", "ü"]), ids, st.none() | spans), max_size=4),
    st.booleans(),
    st.lists(st.text(max_size=5), max_size=3),
)
def test_a_ref_record_is_read_back_as_it_was(
    entries: list[tuple[str, BlobId, ByteSpan | None]], pinned: bool, previous: list[str]
) -> None:
    record = RefRecord(
        REF, "r", "tree", tuple(EntryRecord(*entry) for entry in entries), 7, tuple(previous), pinned
    )
    assert records.decode_ref(records.encode_ref(record)) == record


@pytest.mark.parametrize(
    "change",
    [
        {"git_sha1": "00" * 19},
        {"git_sha1": "00" * 32},
        {"git_sha1": 7},
        {"sha256": "00" * 20},
        {"sha256": "00" * 32, "git_sha1": "00" * 20},
    ],
)
def test_a_digest_that_cannot_be_one_is_damage(change: dict[str, object]) -> None:
    blob = git_blob(b"x")
    fields = json.loads(records.encode_blob(BlobRecord(blob, Trust.PROVISIONAL, None)))
    with pytest.raises(RecordError, match="malformed"):
        records.decode_blob(blob.id, json.dumps(fields | change).encode())


@pytest.mark.parametrize(
    "entry",
    [
        ["a"],
        ["a", "00" * 16, 1],
        ["a", "00" * 16, 2, 1],
        ["a", "00" * 16, 0, True],
        ["a", "00" * 16, 0, 1, 2],
    ],
)
def test_an_entry_that_cannot_be_one_is_damage(entry: list[object]) -> None:
    fields = json.loads(records.encode_ref(RefRecord(REF, "r", "tree", (), 7, ())))
    with pytest.raises(RecordError, match="malformed"):
        records.decode_ref(json.dumps(fields | {"entries": [entry]}).encode())


# ---- the cache


def test_everything_that_a_manifest_has_is_kept(cache: Cache) -> None:
    data = b"{}" * 4000
    tar = Sample.random(3 * K)
    given = Manifest(
        "oci://h.example/m:t",
        "sha256:ab",
        "oci/h.example/m/t",
        (
            Entry("config.json", git_blob(data)),
            Entry("w/one", tar.blob, ByteSpan(512, 700)),
            Entry("w/none", tar.blob, ByteSpan(700, 700)),
            Entry("all", tar.blob),
        ),
        raw=b'{"not":\n "ours"}\0\xff',
    )
    cache.put_ref(given, now=5)
    stored = cache.ref(given.ref)
    assert stored is not None
    assert stored.manifest == given
    assert cache.refs() == [stored]
    assert cache.blob(given.entries[0].blob.id) == given.entries[0].blob
    assert cache.progress(given.entries[0].blob.id).trust is Trust.PROVISIONAL
    assert cache.ref("oci://h.example/m:other") is None


def test_what_the_origin_said_goes_with_the_revision_and_with_the_ref(cache: Cache) -> None:
    blob = Sample.random(K).blob
    for number, raw in enumerate((b"one", b"two", b"")):
        cache.put_ref(manifest_of(blob, revision=f"r{number}", raw=raw), now=1)
        assert [stored.manifest.raw for stored in cache.refs()] == [raw]
    cache.put_ref(manifest_of(blob, raw=b"x"), now=1)
    cache.remove_ref(REF)
    cache.put_ref(manifest_of(blob, raw=b""), now=1)
    assert cache.check() == []
    assert cache.refs()[0].manifest.raw == b""


def test_a_large_one_makes_the_index_grow(cache: Cache, root: Path) -> None:
    raw = bytes(20 << 20)
    for number in range(16):  # more than the map has at first
        cache.put_ref(manifest_of(git_blob(b"x"), ref=f"hf://o/{number}@main", raw=raw), now=1)
    assert {len(stored.manifest.raw) for stored in cache.refs()} == {len(raw)}
    assert cache.ref_names() == sorted(f"hf://o/{number}@main" for number in range(16))


def test_the_bound_is_told(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightfs.store.refs.MAX_RAW", 10)
    cache.put_ref(manifest_of(git_blob(b"x"), raw=bytes(10)), now=1)
    with pytest.raises(IntegrityError, match=f"{REF} has 11 bytes, and 10 can be kept"):
        cache.put_ref(manifest_of(git_blob(b"x"), raw=bytes(11)), now=1)
    assert cache.refs()[0].manifest.raw == bytes(10)


def test_what_could_not_be_read_back_is_not_written(cache: Cache) -> None:
    blob = git_blob(bytes(10))
    past = Manifest(REF, "r", "tree", (Entry("f", blob, ByteSpan(5, 11)),))
    with pytest.raises(IntegrityError, match="after the end"):
        cache.put_ref(past, now=1)
    with pytest.raises(IntegrityError, match="two kinds of digest"):
        cache.put_ref(manifest_of(replace(blob, sha256=bytes(32))), now=1)
    assert cache.refs() == []


def test_a_damaged_manifest_is_found(root: Path) -> None:
    cache = Cache.open(root, now=1)
    cache.put_ref(manifest_of(git_blob(b"x"), raw=b"what it said"), now=1)
    key = records.ref_key(REF)
    cache._index.write(lambda txn: txn.put("raw", key, b"what it did not say, with some check"))
    cache._index.write(lambda txn: txn.put_sealed("raw", bytes(32), b"of nobody"))
    found = cache.check()
    assert [text for text in found if REF in text and "was damaged" in text]
    assert [text for text in found if "table raw" in text and bytes(32).hex() in text]
    with pytest.raises(CacheCorruptError, match="raw was damaged"):
        cache.refs()
    cache.close()


def test_a_ref_stays_pinned_until_it_is_not(cache: Cache, root: Path) -> None:
    assert cache.mark_ref(REF, pinned=True) is False
    cache.put_ref(manifest_of(git_blob(b"x")), now=1)
    assert cache.refs()[0].pinned is False
    assert cache.mark_ref(REF, pinned=True) is True
    cache.put_ref(manifest_of(git_blob(b"y"), revision="r2"), now=1)
    assert (cache.refs()[0].pinned, cache.refs()[0].previous) == (True, ("r1",))
    cache.mark_ref(REF, pinned=False)
    assert cache.refs()[0].pinned is False


def test_the_marks_of_a_ref_are_kept_until_they_are_set_anew(cache: Cache, root: Path) -> None:
    cache.put_ref(manifest_of(git_blob(b"x")), now=1)
    cache.mark_ref(REF, paused=True)
    cache.mark_ref(REF, fill="never")
    cache.put_ref(manifest_of(git_blob(b"y"), revision="r2"), now=1)
    (ref,) = cache.refs()
    assert (ref.pinned, ref.paused, ref.fill) == (False, True, "never")
    cache.mark_ref(REF, paused=False, fill="")
    assert (cache.refs()[0].paused, cache.refs()[0].fill) == (False, "")
    for paused in (True, True, False, False):
        cache.pause(paused=paused)
        assert cache.paused() is paused


# ---- merging


def test_one_id_keeps_its_digest(cache: Cache) -> None:
    blob = git_blob(b"some text")
    cache.put_ref(manifest_of(blob), now=1)
    for other in (
        replace(blob, git_sha1=bytes(20)),
        replace(blob, git_sha1=None, sha256=bytes(32)),  # of another kind: nothing says that they agree
    ):
        with pytest.raises(IntegrityError, match="another digest"):
            cache.put_ref(manifest_of(other, ref="hf://o/other@main"), now=1)
    cache.put_ref(manifest_of(replace(blob, git_sha1=None)), now=1)
    assert cache.blob(blob.id) == blob  # what was learnt is not forgotten


def test_a_gits_digest_that_is_learnt_later(cache: Cache) -> None:
    blob = git_blob(b"some text")
    cache.put_ref(manifest_of(replace(blob, git_sha1=None)), now=1)
    assert cache.progress(blob.id).trust is Trust.UNVERIFIABLE
    other = replace(blob, shape=BlobShape(blob.size, 2 * K))  # and with another chunk length
    cache.put_ref(manifest_of(other), now=1)
    assert cache.blob(blob.id) == other


# ---- format 1


def old_blob_record(record: BlobRecord) -> bytes:
    """As format 1 wrote it."""
    blob = record.blob
    fields = {
        "size": blob.size,
        "chunk_length": blob.shape.chunk_length,
        "sha256": None if blob.sha256 is None else blob.sha256.hex(),
        "mirrors": [[mirror.url, mirror.priority, mirror.validator] for mirror in blob.mirrors],
        "policy": blob.policy.value,
        "trust": record.trust.value,
        "list": None if record.list_trusted is None else [record.list_trusted, record.list_signer],
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def old_ref_record(manifest: Manifest, added_at: int, previous: list[str]) -> bytes:
    """As format 1 wrote it."""
    fields = {
        "ref": manifest.ref,
        "revision": manifest.revision,
        "tree": manifest.tree,
        "entries": [[entry.path, str(entry.blob.id)] for entry in manifest.entries],
        "added_at": added_at,
        "previous": previous,
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def test_an_index_of_format_1_opens_unchanged(root: Path) -> None:
    samples = [
        Sample.random(4 * K, seed=1),
        Sample.random(3 * K + 5, seed=2, listed=True),
        Sample.of(b"x" * 100, known=False, policy=Policy.HOLD),
    ]
    manifests = [sample.manifest(ref=f"https://host/{number}") for number, sample in enumerate(samples)]
    cache = Cache.open(root, now=1)
    for sample, manifest in zip(samples, manifests, strict=True):
        cache.put_ref(manifest, now=1)
        sample.land(cache, [0])
    cache.close()
    index = Index.open(root / "index")

    def back_to_1(txn: Txn) -> None:
        for sample, manifest in zip(samples, manifests, strict=True):
            raw = sample.id.raw
            record = records.decode_blob(sample.id, txn.get_sealed("blob", raw) or b"")
            txn.put_sealed("blob", raw, old_blob_record(record))
            txn.put_sealed("ref", records.ref_key(manifest.ref), old_ref_record(manifest, 1, ["r0"]))
        txn.put("meta", b"format", b"1")

    index.write(back_to_1)
    with index._env.begin(write=True) as txn:  # format 1 had no such table
        txn.drop(index._tables["raw"], delete=True)
    index.close()

    cache = Cache.open(root, now=2)
    assert cache.was_clean
    assert [stored.manifest for stored in cache.refs()] == manifests
    assert [(stored.previous, stored.pinned) for stored in cache.refs()] == [(("r0",), False)] * 3
    for sample in samples:
        assert cache.blob(sample.id) == sample.blob
        progress = cache.progress(sample.id)
        assert (list(progress.present), len(progress.suspect)) == ([0], 0)
        assert progress.trust is sample.blob.initial_trust
    cache.put_ref(replace(manifests[0], raw=b"said"), now=3)
    assert cache.check(deep=True) == []
    cache.close()
    index = Index.open(root / "index")
    with index.read() as read:
        assert read.get("meta", b"format") == b"2"
    index.close()


def test_a_weightfs_of_format_1_refuses_what_is_written_now(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cache.open(root, now=1).close()
    monkeypatch.setattr("weightfs.store.opening.FORMAT", 1)
    with pytest.raises(CacheError, match="made by a newer weightfs"):
        Cache.open(root, now=1)
