from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightfs.core.geometry import ByteSpan, ChunkSpan
from weightfs.errors import CacheCorruptError, CacheError, DiskFault, NoSpaceError
from weightfs.store import probe
from weightfs.store.cache import Cache, RunState
from weightfs.store.index import TABLES, Index, Txn
from weightfs.testing.caches import Sample

K = 4096


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "cache" / "index"
    made.mkdir(parents=True)
    return made


@pytest.fixture
def index(directory: Path) -> Iterator[Index]:
    made = Index.open(directory, map_size=1 << 17)
    yield made
    made.close()


def test_the_map_grows_while_others_read(index: Index) -> None:
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not stop.is_set():
            with index.read() as txn:
                seen = len(txn.keys("chunk"))
                if seen % 100:
                    wrong.append(seen)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    runs = []
    for batch in range(20):

        def job(txn: Txn, batch: int = batch) -> None:
            runs.append(batch)
            for number in range(100):
                txn.put("chunk", b"%08d" % (batch * 100 + number), bytes(1000))

        index.write(job)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(runs) > 20  # a job that met the end of the map was run again
    with index.read() as txn:
        assert len(txn.keys("chunk")) == 2000


def test_an_exception_aborts(index: Index) -> None:
    def job(txn: Txn) -> None:
        txn.put("meta", b"k", b"v")
        raise KeyError("mine")

    with pytest.raises(KeyError):
        index.write(job)
    with index.read() as txn:
        assert txn.get("meta", b"k") is None


def test_commits_are_synced(index: Index) -> None:
    assert index._env.flags()["sync"]
    assert index._env.flags()["metasync"]
    assert not index._env.flags()["writemap"]


def failure(code: int) -> lmdb.Error:
    error = lmdb.Error("x")
    error.__dict__["code"] = code  # as the extension sets it
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (lmdb.CorruptedError("x"), CacheCorruptError),
        (lmdb.PageNotFoundError("x"), CacheCorruptError),
        (lmdb.PanicError("x"), DiskFault),
        (failure(28), NoSpaceError),
        (failure(122), NoSpaceError),
        (failure(5), DiskFault),
        (failure(30), DiskFault),
        (lmdb.ReadersFullError("x"), CacheError),
        (lmdb.BadTxnError("x"), CacheCorruptError),
        (lmdb.BadDbiError("x"), CacheCorruptError),
    ],
)
def test_lmdb_errors_are_translated(index: Index, error: lmdb.Error, kind: type[CacheError]) -> None:
    def job(_: Txn) -> None:
        raise error

    with pytest.raises(CacheError) as caught:
        index.write(job)
    assert type(caught.value) is kind
    with pytest.raises(CacheError), index.read():
        raise error


def test_a_map_at_its_limit_is_an_error(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightfs.store.index._MAX_MAP_SIZE", 1 << 17)
    with pytest.raises(CacheError, match="outgrew"):
        index.write(lambda txn: txn.put("list", b"k", bytes(1 << 18)))


def test_an_index_that_we_closed_is_not_walked_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[Path] = []
    real = probe.walk

    def counting(path: Path) -> str | None:
        walks.append(path)
        return real(path)

    monkeypatch.setattr(probe, "walk", counting)
    Index.open(directory).close()
    Index.open(directory).close()
    assert walks == []
    Index.open(directory).abandon()
    Index.open(directory).close()
    assert walks == [directory]
    os.utime(directory / "data.mdb")  # the same bytes
    Index.open(directory).close()
    assert walks == [directory]
    with (directory / "data.mdb").open("ab") as file:
        file.write(bytes(4096))
    Index.open(directory).close()
    assert walks == [directory, directory]


def test_a_walk_that_does_not_end_is_given_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Index.open(directory).abandon()
    monkeypatch.setattr(probe, "_WALK", "import signal; signal.pause()")
    monkeypatch.setattr(probe, "PROBE_TIMEOUT", 0.05)
    with pytest.raises(CacheCorruptError, match="does not answer"):
        Index.open(directory)


def test_a_walk_that_somebody_ended_is_no_damage(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The OOM killer may choose the walker; Ctrl-C on the terminal reached it, too, and set a sound index aside."""
    Index.open(directory).abandon()
    for how in (
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "raise KeyboardInterrupt",
        "import none",
    ):
        monkeypatch.setattr(probe, "_WALK", how)
        with pytest.raises(CacheError, match=r"was ended .*: try again") as caught:
            Index.open(directory)
        assert type(caught.value) is CacheError, "and so it is not set aside"
    monkeypatch.undo()
    Index.open(directory).close()


def test_ctrl_c_on_the_terminal_does_not_reach_a_walk(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Index.open(directory).abandon()
    alone = "import os, sys; print(os.getpgrp() == os.getpid(), file=sys.stderr); sys.exit(4)"
    monkeypatch.setattr(probe, "_WALK", alone)
    with pytest.raises(CacheCorruptError, match="True"):
        Index.open(directory)


def test_a_walk_that_cannot_begin_is_no_damage(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Index.open(directory).abandon()
    (tmp_path / "python").write_text("")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(
        CacheError, match=r"cannot be started \(Permission denied\): make it executable"
    ) as caught:
        Index.open(directory)
    assert type(caught.value) is CacheError


def test_room_is_kept_for_a_full_disk(directory: Path) -> None:
    index = Index.open(directory)
    found = (directory / "data.mdb").stat()
    index.close()
    assert found.st_size < 1 << 20
    assert found.st_blocks * 512 > 4 << 20


# Values that somebody, or something, has changed


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sample]:
    root = tmp_path_factory.mktemp("template") / "cache"
    sample = Sample.random(5 * K + 9, listed=True)
    cache = Cache.open(root, now=1)
    cache.put_ref(sample.manifest(), now=1)
    cache.commit(sample.write(cache, [0, 1, 3]), runs={sample.id: RunState(2, bytes(32))}, now=1)
    cache.close()
    return root, sample


def every_value(root: Path) -> list[tuple[str, bytes, bytes]]:
    index = Index.open(root / "index")
    with index.read() as txn:
        found = [(table, key, value) for table in TABLES for key, value in txn.scan(table)]
    index.close()
    return found


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_value_never_means_another_exception_or_wrong_bytes(
    template: tuple[Path, Sample], data: st.DataObject
) -> None:
    whole, sample = template
    root = whole.with_name("changed")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    values = every_value(root)
    table, key, value = data.draw(st.sampled_from(values))
    how = data.draw(st.sampled_from(["cut", "longer", "noise", "flip", "gone", "other"]))
    match how:
        case "cut":
            bad: bytes | None = value[: data.draw(st.integers(0, max(0, len(value) - 1)))]
        case "longer":
            bad = value + data.draw(st.binary(min_size=1, max_size=50))
        case "noise":
            bad = data.draw(st.binary(min_size=len(value), max_size=len(value)))
        case "flip":
            at = data.draw(st.integers(0, len(value) - 1)) if value else 0
            bad = value[:at] + bytes([value[at] ^ 1 << data.draw(st.integers(0, 7))]) + value[at + 1 :]
        case "other":
            bad = data.draw(st.sampled_from(values))[2]
        case _:
            bad = None
    change(root, table, key, bad)
    use(root, sample)
    use(root, sample)  # what was found wrong is set aside now


def change(root: Path, table: str, key: bytes, value: bytes | None) -> None:
    index = Index.open(root / "index")
    index.write(lambda txn: txn.delete(table, key) if value is None else txn.put(table, key, value))
    index.close()


def use(root: Path, sample: Sample) -> None:
    """Every reading call, as the engine makes them. A chunk that is served without doubt has the right bytes."""
    try:
        cache = Cache.open(root, now=1)
    except CacheError:
        return
    try:
        cache.check(deep=True)
        cache.usage()
        try:
            for stored in cache.refs():
                assert stored.manifest == sample.manifest()
            progress = cache.progress(sample.id)
            digests = cache.digests(sample.id, ChunkSpan(0, 6))
            cache.required_digests(sample.id, ChunkSpan(0, 6))
            if progress.run is not None:
                assert progress.run == RunState(2, bytes(32))
            for chunk in progress.present:
                span = sample.blob.shape.span_of(chunk)
                if cache.read(sample.id, span) != sample.chunk(chunk):
                    assert digests.get(chunk) != sample.landing(chunk).digest
                    raise AssertionError(f"chunk {chunk} counts as present, and is not")
            cache.drop(sample.id, ChunkSpan(3, 4), punch=False)
            cache.prepare(sample.id)
        except CacheError:
            return
    finally:
        cache.close()


def test_bits_that_are_gone_are_made_from_the_records(template: tuple[Path, Sample]) -> None:
    whole, sample = template
    root = whole.with_name("bits-gone")
    shutil.copytree(whole, root)
    change(root, "bits", sample.id.raw, None)
    cache = Cache.open(root, now=1)
    progress = cache.progress(sample.id)
    assert list(progress.present) == list(progress.suspect) == [0, 1, 3]
    assert cache.read(sample.id, ByteSpan(0, K)) == sample.chunk(0)
    cache.close()


def fill(descriptor: int) -> None:
    try:
        while True:
            os.write(descriptor, bytes(4096))
    except OSError as error:
        assert error.errno == errno.ENOSPC  # noqa: PT017 - the loop is what raises


def test_the_whole_disk_is_full(tmp_path: Path) -> None:
    """A real filesystem of 24 MiB. Dropping, which makes room, works when nothing else does."""
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=24m tmpfs {mountpoint} 2>/dev/null"):
        pytest.skip("cannot mount a small filesystem here")
    try:
        cache = Cache.open(mountpoint / "cache", now=1)
        sample = Sample.random(12 << 20, chunk_length=64 << 10)
        cache.put_ref(sample.manifest(), now=1)
        sample.land(cache, range(100))
        ballast = os.open(mountpoint / "ballast", os.O_WRONLY | os.O_CREAT)
        fill(ballast)
        os.close(ballast)
        assert cache.free_bytes() == 0
        assert cache.drop(sample.id, ChunkSpan(0, 10)) == 10 * (64 << 10)
        assert cache.free_bytes() >= 10 * (64 << 10)
        sample.land(cache, [0])
        assert cache.check(deep=True) == []
        cache.close()
    finally:
        assert os.system(f"umount {mountpoint}") == 0


def test_a_disk_that_is_full_at_the_last_page_of_a_commit_is_not_a_sick_one(tmp_path: Path) -> None:
    """Regression: LMDB then refuses every further call, which counted as an I/O error, also to who only read."""
    place = tmp_path / "index"
    place.mkdir()
    index = Index.open(place)
    index.write(lambda txn: txn.put("meta", b"a", b"1"))
    # The page that names the newest state has a descriptor of its own, whose writes are synced.
    mine = [int(name) for name in os.listdir("/proc/self/fd")]
    of_data = [fd for fd in mine if _target(fd) == str(place / "data.mdb")]
    (newest,) = (fd for fd in of_data if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DSYNC)
    with open("/dev/full", "r+b", buffering=0) as full:
        os.dup2(full.fileno(), newest, inheritable=False)
    with pytest.raises(NoSpaceError):
        index.write(lambda txn: txn.put("meta", b"b", b"2"))
    with index.read() as txn:
        assert txn.get("meta", b"a") == b"1"
    index.write(lambda txn: txn.put("meta", b"c", b"3"))
    index.close()
    assert (place / "closed").exists(), "what was told is on the disk"


def _target(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:  # of the listing itself
        return ""
