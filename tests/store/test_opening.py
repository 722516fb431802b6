from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from weightfs.core.geometry import ByteSpan, ChunkSpan
from weightfs.errors import CacheBusyError, CacheCorruptError, CacheError, CacheFormatError
from weightfs.store import opening
from weightfs.store.cache import Cache
from weightfs.store.index import Index, Txn
from weightfs.testing.caches import Sample

K = 4096


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def filled(root: Path, chunks: int = 4) -> Sample:
    """A cache with every chunk of one blob, closed cleanly."""
    sample = Sample.random(chunks * K)
    cache = Cache.open(root, now=1)
    cache.put_ref(sample.manifest(), now=1)
    sample.land(cache, range(chunks))
    cache.close()
    return sample


def killed(root: Path, copy: Path) -> Path:
    """The directory as a process that is killed now would leave it."""
    cache = Cache.open(root, now=1)
    shutil.copytree(root, copy)
    cache.close()
    return copy


def edit(root: Path, table: str, key: bytes, value: bytes | None) -> None:
    index = Index.open(root / "index")

    def job(txn: Txn) -> None:
        if value is None:
            txn.delete(table, key)
        else:
            txn.put(table, key, value)

    index.write(job)
    index.close()


def test_modes(root: Path) -> None:
    old = os.umask(0)
    try:
        sample = filled(root)
    finally:
        os.umask(old)
    for path in (root, *root.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert (root / "blobs" / str(sample.id)).is_file()


def test_create_false_makes_nothing(root: Path) -> None:
    with pytest.raises(CacheError, match="there is no cache"):
        Cache.open(root, create=False, now=1)
    assert not root.exists()


def test_an_empty_wide_open_directory_is_closed_to_others(root: Path) -> None:
    root.mkdir(mode=0o777)
    root.chmod(0o777)
    Cache.open(root, now=1).close()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_a_directory_with_other_things_that_others_may_write_is_refused(root: Path) -> None:
    root.mkdir()
    root.chmod(0o777)
    (root / "letter.txt").touch()
    with pytest.raises(CacheError, match="chmod go-w"):
        Cache.open(root, now=1)
    root.chmod(0o755)
    Cache.open(root, now=1).close()
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


def test_a_file_in_place_of_the_directory(root: Path) -> None:
    root.touch()
    with pytest.raises(CacheError, match="not a directory"):
        Cache.open(root, now=1)


@pytest.mark.parametrize("name", ["index", "blobs", "lock", "index/data.mdb", "index/lock.mdb"])
def test_links_are_not_followed(root: Path, tmp_path: Path, name: str) -> None:
    filled(root)
    target = tmp_path / "target"
    (root / "index" / "lock.mdb").touch()  # as earlier versions have it
    (root / name).rename(target)
    (root / name).symlink_to(target)
    with pytest.raises(CacheError):
        Cache.open(root, now=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_cache_of_another_user_is_refused(root: Path) -> None:
    filled(root)
    os.chown(root, 12345, -1)
    with pytest.raises(CacheError, match="belongs to user 12345"):
        Cache.open(root, now=1)


# The lock


def test_the_second_process_is_told_who_has_it(root: Path) -> None:
    cache = Cache.open(root, now=1)
    with pytest.raises(CacheBusyError, match=str(os.getpid())) as caught:
        Cache.open(root, now=1)
    assert caught.value.pid == os.getpid()
    cache.close()
    Cache.open(root, now=1).close()


def test_busy_without_a_readable_pid(root: Path) -> None:
    filled(root)
    (root / "lock").write_text("who knows")
    with (root / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CacheBusyError, match="another weightfs") as caught:
            Cache.open(root, now=1)
    assert caught.value.pid is None


def test_a_failed_open_gives_the_lock_back(root: Path) -> None:
    filled(root)
    edit(root, "meta", b"format", b"99")
    for _ in range(2):
        with pytest.raises(CacheFormatError):
            Cache.open(root, now=1)
    edit(root, "meta", b"format", b"2")
    Cache.open(root, now=1).close()


# Format


def test_a_newer_format_is_refused_and_left_alone(root: Path) -> None:
    filled(root)
    edit(root, "meta", b"format", b"3")
    with pytest.raises(CacheFormatError, match=r"format 3.*upgrade weightfs"):
        Cache.open(root, now=1)
    edit(root, "meta", b"format", b"2")
    cache = Cache.open(root, now=1)
    assert cache.was_clean  # the refusal wrote nothing
    cache.close()


def test_an_older_format_is_migrated_in_the_opening_transaction(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = filled(root)
    monkeypatch.setattr(opening, "FORMAT", 3)
    monkeypatch.setattr(opening, "MIGRATIONS", {2: lambda txn: txn.put("meta", b"from", b"1")})
    cache = Cache.open(root, now=1)
    assert len(cache.progress(sample.id).present) == 4
    cache.close()
    index = Index.open(root / "index")
    with index.read() as txn:
        assert (txn.get("meta", b"format"), txn.get("meta", b"from")) == (b"3", b"1")
    index.close()


def test_a_migration_that_fails_leaves_the_old_format(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = filled(root)

    def failing(txn: Txn) -> None:
        txn.put("meta", b"from", b"1")
        raise CacheError("half-way")

    with monkeypatch.context() as patch:
        patch.setattr(opening, "FORMAT", 3)
        patch.setattr(opening, "MIGRATIONS", {2: failing})
        with pytest.raises(CacheError, match="half-way"):
            Cache.open(root, now=1)
        patch.setattr(opening, "MIGRATIONS", {})
        with pytest.raises(CacheFormatError, match="cannot read any more"):
            Cache.open(root, now=1)
    cache = Cache.open(root, now=1)
    assert len(cache.progress(sample.id).present) == 4
    cache.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [(b"format", b"one"), (b"format", None), (b"format", b""), (b"state", b"{}"), (b"state", None)],
)
def test_damaged_meta(root: Path, key: bytes, value: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    sample = filled(root)
    edit(root, "meta", key, value)
    assert_goes_on_from_its_copy(root, sample, caplog)


def assert_goes_on_from_its_copy(root: Path, sample: Sample, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        cache = Cache.open(root, now=1)
    (record,) = caplog.records
    assert "its copy takes its place" in record.message
    assert (root / "index.damaged").is_dir()
    assert [stored.manifest for stored in cache.refs()] == [sample.manifest()]
    progress = cache.progress(sample.id)
    assert not cache.was_clean
    assert progress.present.full
    assert progress.suspect.full  # until it was hashed once more
    assert progress.use.whole  # it may be mapped: no holes are punched
    assert cache.check(deep=True) == []
    cache.close()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        cache = Cache.open(root, now=1)
    assert caplog.records == []
    assert cache.was_clean
    cache.close()


# Clean and unclean


def test_a_clean_stop_leaves_nothing_suspect(root: Path) -> None:
    sample = filled(root)
    cache = Cache.open(root, now=1)
    instance = cache.instance
    assert (cache.was_clean, cache.epoch, len(cache.progress(sample.id).suspect)) == (True, 1, 0)
    cache.close()
    cache = Cache.open(root, now=1)
    assert cache.instance == instance
    assert len(instance) == 32
    cache.close()


def test_an_unclean_stop_makes_everything_suspect_until_it_was_hashed(root: Path, tmp_path: Path) -> None:
    sample = filled(root)
    copy = killed(root, tmp_path / "copy")
    cache = Cache.open(copy, now=1)
    progress = cache.progress(sample.id)
    assert (cache.was_clean, cache.epoch) == (False, 2)
    assert list(progress.suspect) == [0, 1, 2, 3]
    good = progress.suspect.copy()
    good.discard(3)
    cache.commit([], rehashed={sample.id: good}, now=2)
    assert list(cache.progress(sample.id).suspect) == [3]
    sample.land(cache, [3])  # fetched again: hashed in this epoch too
    assert list(cache.progress(sample.id).suspect) == []
    assert cache.check(deep=True) == []
    cache.close()
    cache = Cache.open(copy, now=1)
    assert len(cache.progress(sample.id).suspect) == 0
    cache.close()


def test_suspicion_survives_further_crashes_and_clean_stops(root: Path, tmp_path: Path) -> None:
    sample = filled(root)
    first = killed(root, tmp_path / "first")
    Cache.open(first, now=1).close()
    cache = Cache.open(first, now=1)
    assert (cache.was_clean, cache.epoch, len(cache.progress(sample.id).suspect)) == (True, 2, 4)
    cache.close()
    cache = Cache.open(killed(first, tmp_path / "second"), now=1)
    assert (cache.epoch, len(cache.progress(sample.id).suspect)) == (3, 4)
    cache.close()


def test_the_epoch_begins_again_after_its_last(root: Path, tmp_path: Path) -> None:
    filled(root)
    index = Index.open(root / "index")
    index.write(lambda txn: opening.put_state(txn, opening.State(0xFFFF, clean=False, instance="x")))
    index.close()
    cache = Cache.open(root, now=1)
    assert cache.epoch == 1
    cache.close()


def test_a_file_that_was_touched_while_we_were_away_is_suspect(root: Path) -> None:
    sample = filled(root)
    path = root / "blobs" / str(sample.id)
    with path.open("r+b") as file:
        file.seek(K + 7)
        file.write(b"flip")
    cache = Cache.open(root, now=1)
    assert cache.was_clean
    assert len(cache.progress(sample.id).suspect) == 4
    assert [text for text in cache.check(deep=True) if "chunk 1" in text]
    cache.close()


def test_a_file_that_was_replaced_while_we_were_away_is_suspect(root: Path) -> None:
    sample = filled(root)
    path = root / "blobs" / str(sample.id)
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").rename(path)
    cache = Cache.open(root, now=1)
    assert len(cache.progress(sample.id).suspect) == 4
    cache.close()


@pytest.mark.parametrize(("length", "left"), [(None, 0), (0, 0), (2 * K + 5, 2), (4 * K - 1, 3)])
def test_chunks_of_a_short_or_missing_file_are_absent(
    root: Path, caplog: pytest.LogCaptureFixture, length: int | None, left: int
) -> None:
    sample = filled(root)
    path = root / "blobs" / str(sample.id)
    if length is None:
        path.unlink()
    else:
        os.truncate(path, length)
    with caplog.at_level(logging.WARNING):
        cache = Cache.open(root, now=1)
    assert "fetched again" in caplog.text
    assert list(cache.progress(sample.id).present) == list(range(left))
    assert sorted(cache.digests(sample.id, ChunkSpan(0, 4))) == [0, 1, 2, 3]
    if left:
        cache.drop(sample.id, ChunkSpan(0, 4))
    sample.land(cache, range(4))
    assert cache.read(sample.id, ByteSpan(0, 4 * K)) == sample.data
    assert cache.check(deep=True) == []
    cache.close()


def test_a_longer_file_is_cut_to_its_length(root: Path) -> None:
    sample = filled(root)
    path = root / "blobs" / str(sample.id)
    os.truncate(path, 100 * K)
    cache = Cache.open(root, now=1)
    assert any("instead of" in text for text in cache.check())
    cache.prepare(sample.id)
    assert path.stat().st_size == 4 * K
    assert len(cache.progress(sample.id).present) == 4
    cache.close()


def test_what_a_crash_left_unrecorded_gives_its_space_back(root: Path, tmp_path: Path) -> None:
    sample = Sample.random(4 * K)
    cache = Cache.open(root, now=1)
    cache.put_ref(sample.manifest(), now=1)
    sample.write(cache, range(4))
    shutil.copytree(root, tmp_path / "copy")
    cache.close()
    cache = Cache.open(tmp_path / "copy", now=1)
    assert cache.prepare(sample.id).stat().st_blocks == 0
    sample.write(cache, [0])
    assert cache.prepare(sample.id).stat().st_blocks > 0  # but only once
    cache.close()


def test_a_deletion_that_a_crash_interrupted_is_finished(root: Path) -> None:
    sample = filled(root)
    index = Index.open(root / "index")
    index.write(lambda txn: txn.put_sealed("doomed", sample.id.raw, b""))
    index.write(lambda txn: txn.delete("blob", sample.id.raw))
    index.write(lambda txn: txn.delete("bits", sample.id.raw))
    index.close()
    cache = Cache.open(root, now=1)
    assert not cache.path(sample.id).exists()
    cache.close()


def test_a_stranger_in_the_directory_is_reported_and_kept(root: Path) -> None:
    filled(root)
    (root / "blobs" / "notes.txt").write_text("mine")
    cache = Cache.open(root, now=1)
    (finding,) = cache.check()
    assert "notes.txt" in finding
    assert (root / "blobs" / "notes.txt").read_text() == "mine"
    cache.close()


# An index that cannot be read


def spoil(root: Path, how: str) -> None:
    data = root / "index" / "data.mdb"
    size = data.stat().st_size
    if how == "truncate":
        os.truncate(data, size // 2)
    elif how == "text":
        data.write_text("not a database\n" * 1000)
    elif how in ("gone", "directory"):
        data.unlink()
        if how == "directory":
            data.mkdir()
    else:
        with data.open("r+b") as file:
            if how != "meta":
                file.seek(2 * K)
            length = size - 2 * K if how != "meta" else 2 * K
            file.write(bytes(length) if how == "zeros" else hashlib.shake_128(b"noise").digest(length))


@pytest.mark.parametrize("how", ["truncate", "zeros", "noise", "text", "meta", "directory"])
def test_a_damaged_index_is_set_aside_and_its_copy_takes_its_place(
    root: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    sample = filled(root, chunks=600)
    spoil(root, how)
    # In a process of its own first: without the probe it dies of SIGBUS or SIGABRT, which a test would not survive.
    shutil.copytree(root, root.with_name("trial"))
    program = "import sys, pathlib, weightfs.store.cache as c; c.Cache.open(pathlib.Path(sys.argv[1]), now=1).close()"
    done = subprocess.run(
        [sys.executable, "-c", program, root.with_name("trial")],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{root.with_name('trial')}/index is damaged" in done.stderr
    assert "next start" not in done.stderr, "it is this one"
    assert_goes_on_from_its_copy(root, sample, caplog)


def test_a_missing_index_is_its_copy(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    sample = filled(root)
    spoil(root, "gone")
    with caplog.at_level(logging.ERROR):
        cache = Cache.open(root, now=1)
    assert "is missing: its copy takes its place" in caplog.text
    assert cache.progress(sample.id).suspect.full
    assert cache.check(deep=True) == []
    cache.close()


def test_whoever_goes_on_from_a_copy_punches_no_hole_and_says_so_once(root: Path) -> None:
    """The copy is older than the file, which may have been whole, and lent to readers, since."""
    sample = Sample.random(4 * K)
    cache = Cache.open(root, now=1)
    cache.put_ref(sample.manifest(), now=1)
    sample.land(cache, range(2))
    assert not cache.progress(sample.id).use.whole
    cache.close()
    spoil(root, "gone")
    cache = Cache.open(root, now=1)
    assert cache.progress(sample.id).use.whole
    assert cache.evict(sample.id, [0]) is None  # its bytes stay
    cache.evict(sample.id)  # as a whole it may go, and with it the mark
    sample.land(cache, range(1))
    cache.close()
    cache = Cache.open(root, now=1)
    assert not cache.progress(sample.id).use.whole
    assert cache.was_clean
    cache.close()


def test_a_ref_that_was_added_is_copied_at_once_and_one_copy_is_kept(root: Path) -> None:
    sample = filled(root)
    (before,) = (root / "index.copy").iterdir()
    cache = Cache.open(root, now=1)
    cache.put_ref(Sample.random(K).manifest(ref="https://host/other"), now=1)
    (after,) = (root / "index.copy").iterdir()
    assert before != after
    crashed = root.with_name("crashed")
    shutil.copytree(root, crashed)
    cache.close()
    spoil(crashed, "gone")
    cache = Cache.open(crashed, now=1)
    assert len(cache.refs()) == 2
    assert cache.progress(sample.id).present.full
    cache.close()


def test_without_a_good_copy_the_index_is_empty_and_no_data_file_is_deleted(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample = filled(root)
    spoil(root, "noise")
    (copy,) = (root / "index.copy").iterdir()
    with copy.open("r+b") as file:
        file.write(b"x")
    with caplog.at_level(logging.WARNING):
        cache = Cache.open(root, now=1)
    assert f"{copy} is damaged, and not used" in caplog.text
    assert "starts with an empty index" in caplog.text
    assert "next start" not in caplog.text, "it is this one"
    assert cache.refs() == []
    assert cache.path(sample.id).stat().st_size == len(sample.data)
    cache.close()


def test_what_was_removed_or_spoilt_since_the_copy_was_made_is_not_believed(root: Path) -> None:
    """The copy is older than the file: its records are hashed before they are used."""
    sample = filled(root)
    path = root / "blobs" / str(sample.id)
    with path.open("r+b") as file:
        file.seek(K)
        file.write(b"other")
    spoil(root, "gone")
    cache = Cache.open(root, now=1)
    assert 1 in cache.progress(sample.id).suspect
    (finding,) = cache.check(deep=True)
    assert "chunk 1" in finding
    cache.close()


def test_damage_that_is_found_in_use_is_told_to_the_next_start_and_not_copied(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample = filled(root)
    index = Index.open(root / "index")
    with index.read() as txn:
        (key,) = txn.keys("ref")
    index.write(lambda txn: txn.put("ref", key, b"spoilt"))
    index.close()
    cache = Cache.open(root, now=1)
    with pytest.raises(CacheCorruptError, match="the next start of weightfs sets it aside"):
        cache.refs()
    cache.close()
    caplog.clear()
    assert_goes_on_from_its_copy(root, sample, caplog)


def the_copy(root: Path) -> tuple[str, int]:
    """Its name and its inode, which another copy has not."""
    (copy,) = (root / "index.copy").iterdir()
    return copy.name, copy.stat().st_ino


def test_an_index_that_has_not_changed_is_not_copied_again(root: Path) -> None:
    """So `ls` and `status` of a large idle cache write no megabytes when they end."""
    filled(root)
    before = the_copy(root)
    for _ in range(2):
        cache = Cache.open(root, now=2)
        cache.refs()
        cache.close()
        assert the_copy(root) == before
    spoil(root, "gone")
    cache = Cache.open(root, now=3)
    assert [stored.manifest.ref for stored in cache.refs()] == ["https://host/m.gguf"]
    cache.close()


def test_what_has_changed_is_in_the_copy_that_a_close_leaves(root: Path) -> None:
    sample = filled(root)
    changes: list[Callable[[Cache], object]] = [
        lambda cache: cache.mark_ref("https://host/m.gguf", pinned=True),
        lambda cache: cache.drop(sample.id, ChunkSpan(1, 2)),
    ]
    for change in changes:
        before = the_copy(root)
        cache = Cache.open(root, now=2)
        change(cache)
        cache.close()
        assert the_copy(root) != before
    spoil(root, "gone")
    cache = Cache.open(root, now=3)
    assert list(cache.progress(sample.id).present) == [0, 2, 3]
    (stored,) = cache.refs()
    assert stored.pinned
    cache.close()


def test_a_copy_that_is_gone_or_that_a_crash_has_outdated_is_made_again(root: Path, tmp_path: Path) -> None:
    filled(root)
    before = the_copy(root)
    (root / "index.copy" / before[0]).unlink()
    Cache.open(root, now=2).close()
    crashed = killed(root, tmp_path / "copy")
    before = the_copy(crashed)
    Cache.open(crashed, now=3).close()
    assert the_copy(crashed) != before


def test_a_read_only_cache_is_one_sentence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(root)
    real = os.open

    def refusing(path: str | Path, flags: int, *args: int, **kwargs: int) -> int:
        if str(path).endswith("/lock") and flags & os.O_RDWR:
            raise OSError(30, "Read-only file system")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(CacheError, match="Read-only file system; give user"):
        Cache.open(root, now=1)
