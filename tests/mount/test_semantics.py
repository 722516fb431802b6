"""docs/semantics.md, executed: one test for each statement, on a real mount by the real daemon over real origins.

Files are named after the statement that uses them: each is cold when its test begins. `lazy` fetches only what is read;
`hasty` gives up a read after a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from weightfs.config import Config
from weightfs.core.metalink import write_metalink
from weightfs.engine.settings import EngineSettings
from weightfs.sources.publish import describe
from weightfs.testing.daemon import Daemon
from weightfs.testing.mounts import can_mount
from weightfs.testing.nginx import Nginx
from weightfs.testing.origin import Fault, FaultKind, Origin, origin_in_thread
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nginx,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

MIB = 1 << 20
SIZE = 12 * MIB + 12_345
NAMES = ("s02", "s04", "s07", "s08", "s09", "s10", "s11", "s18", "s19", "s20", "s25")
READ = "fd = cold()\nfor at in map(int, sys.argv[3:]): assert os.pread(fd, 5000, at) == true(at, at + 5000)"
# `attempt` reads through the page cache; `direct` past it: that is one request where the kernel would try a failing
# page twice, and each failing answer is held longer than the one before (S17).
TRY = """
fd = cold()
def attempt(at):
    try: return os.pread(fd, 4096, at) == true(at, at + 4096)
    except OSError as error: return errno.errorcode[error.errno]
unbuffered, page = os.open(path, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096)
def direct(at):
    try: return os.preadv(unbuffered, [page], at) == 4096 and page[:] == true(at, at + 4096)
    except OSError as error: return errno.errorcode[error.errno]
"""


@dataclass(frozen=True)
class World:
    """An nginx, an origin that misbehaves, and a daemon for both."""

    directory: Path
    nginx: Nginx
    faulty: Origin
    daemon: Daemon

    def plain(self, name: str) -> Path:
        return self.directory / name

    def pin(self, name: str, query: str = "") -> str:
        ref = self.nginx.url(name) + query
        self.daemon.add(ref)
        return ref

    def cold_copy(self, name: str, seed: int) -> Path:
        """A new file at the origin; other bytes than every other one's, for one blob may have many names."""
        self.plain(name).write_bytes(content(seed))
        return self.plain(name)


def content(seed: int, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


def publish(path: Path, *urls: str) -> None:
    path.with_name(path.name + ".meta4").write_bytes(write_metalink(describe(path, list(urls))))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("origin")
    for number, name in enumerate(NAMES):
        (place / name).write_bytes(content(number))
    with (place / "s08-long").open("wb") as file:
        file.truncate(96 * MIB)
    return place


@pytest.fixture(scope="module")
def nginx(directory: Path) -> Iterator[Nginx]:
    with Nginx(directory) as server:
        yield server


@pytest.fixture(scope="module")
def faulty(directory: Path) -> Iterator[Origin]:
    with origin_in_thread(
        {f"/{name}": (directory / name).read_bytes() for name in ("s02", "s09", "s20")}
    ) as origin:
        yield origin


@pytest.fixture(scope="module")
def hasty_daemon(tmp_path_factory: pytest.TempPathFactory, nginx: Nginx) -> Iterator[Daemon]:
    refs = [nginx.url(name) for name in ("s18", "s19", "s20")]
    options = ["--fill", "never", "--workers", "0", "--read-timeout", "1s", "--retry-delay", "50ms"]
    with Daemon(tmp_path_factory.mktemp("hasty"), *refs, options=options) as daemon:
        yield daemon.begin()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, hasty_daemon: Daemon) -> Iterator[Daemon]:
    options = ["--fill", "never", "--workers", "1", "--header", "X-Token: open-sesame", "--readahead", "8MiB"]
    with Daemon(tmp_path_factory.mktemp("lazy"), options=options) as lazy:
        yield lazy.start()


@pytest.fixture(scope="module")
def world(directory: Path, nginx: Nginx, faulty: Origin, daemon: Daemon) -> World:
    return World(directory, nginx, faulty, daemon)


@pytest.fixture(scope="module")
def hasty(directory: Path, nginx: Nginx, faulty: Origin, hasty_daemon: Daemon) -> World:
    return World(directory, nginx, faulty, hasty_daemon.ready())


# --- names and attributes


def test_s01_every_file_is_listed_at_full_size_as_soon_as_it_is_pinned(world: World) -> None:
    world.cold_copy("s01", 101)
    ref = world.pin("s01")
    code = "print(json.dumps([os.listdir(os.path.dirname(path)), os.stat(path).st_size]))"
    names, size = world.daemon.tell(code, ref)
    assert "s01" in names
    assert size == SIZE
    assert world.daemon.file(ref)["present_bytes"] == 0


def test_s02_metadata_never_waits(world: World) -> None:
    ref = world.faulty.url("s02")
    world.daemon.add(ref)
    world.faulty.always["/s02"] = Fault(FaultKind.STALL_BEFORE_BODY)
    readers = world.daemon.client(
        "fd = cold()\nthreading.stack_size(1 << 17)\n"
        "for n in range(200): threading.Thread(target=os.pread, args=(fd, 4096, n * 61_440)).start()",
        ref,
    )
    until(lambda: world.daemon.file(ref)["waiting_readers"] >= 150, "the readers wait")
    world.daemon.run(
        "folder = os.path.dirname(path)\n"
        "for _ in range(5):\n"
        f" assert os.stat(path).st_size == {SIZE} and os.listdir(folder) and list(os.scandir(folder))\n"
        " assert os.statvfs(path).f_blocks and 'user.weightfs.cached' in os.listxattr(path)\n"
        " assert os.getxattr(path, 'user.weightfs.cached') == b'0'",
        ref,
    )
    assert readers.poll() is None
    readers.kill()
    del world.faulty.always["/s02"]


def test_s03_a_files_content_never_changes(world: World) -> None:
    old, new = content(301), content(302)
    world.plain("s03").write_bytes(old)
    world.plain("s03.old").write_bytes(old)
    ref = world.pin("s03")
    reader = world.daemon.client(
        TRY + "assert attempt(0) is True\nprint('read', flush=True)\nsys.stdin.readline()\n"
        "print(json.dumps([os.fstat(fd).st_ino, attempt(0), direct(6 << 20)]))",
        ref,
        world.plain("s03.old"),
        talk=True,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "read\n"
    world.daemon.quiet(ref)
    world.plain("s03").write_bytes(new)
    os.utime(world.plain("s03"), (1, 1))  # nginx's ETag is made of the size and the time in seconds
    inode, cached, changed = json.loads(world.daemon.finish(reader, "go on\n"))
    assert (cached, changed) == (True, "ESTALE")
    world.daemon.ask(lambda client: client.remove(ref))
    world.pin("s03")
    again = "print(json.dumps([os.stat(path).st_ino, open(path, 'rb').read() == true(0, 1 << 30)]))"
    until(lambda: world.daemon.tell(again, ref, world.plain("s03"))[0] != inode, "the new version is shown")
    assert world.daemon.tell(again, ref, world.plain("s03"))[1] is True


def test_s04_the_filesystem_is_read_only(world: World) -> None:
    ref = world.pin("s04")
    refused = world.daemon.tell(
        """
folder = os.path.dirname(path)
new = os.path.join(folder, 'new')
attempts = {
    'write': lambda: os.open(path, os.O_WRONLY), 'append': lambda: os.open(path, os.O_RDWR | os.O_APPEND),
    'create': lambda: os.open(new, os.O_WRONLY | os.O_CREAT), 'truncate': lambda: os.truncate(path, 0),
    'mkdir': lambda: os.mkdir(new), 'mknod': lambda: os.mkfifo(new), 'symlink': lambda: os.symlink('x', new),
    'link': lambda: os.link(path, new), 'rename': lambda: os.rename(path, new), 'unlink': lambda: os.unlink(path),
    'rmdir': lambda: os.rmdir(folder), 'chmod': lambda: os.chmod(path, 0o600), 'chown': lambda: os.chown(path, 1, 1),
    'utime': lambda: os.utime(path), 'setxattr': lambda: os.setxattr(path, 'user.x', b'x'),
    'removexattr': lambda: os.removexattr(path, 'user.weightfs.state'),
}
told = {}
for name, attempt in attempts.items():
    try: attempt(); told[name] = 'done'
    except OSError as error: told[name] = errno.errorcode[error.errno]
print(json.dumps(told))
""",
        ref,
    )
    assert set(refused.values()) == {"EROFS"}, refused


def test_s05_st_blocks_tells_what_is_cached(world: World) -> None:
    world.cold_copy("s05", 105)
    ref = world.pin("s05")
    blocks = "print(os.stat(path).st_blocks)"
    assert world.daemon.run(blocks, ref) == "8"
    world.daemon.run(READ, ref, world.plain("s05"), 5 * MIB)
    world.daemon.quiet(ref)
    present = world.daemon.file(ref)["present_bytes"]
    assert 0 < present < SIZE
    until(
        lambda: int(world.daemon.run(blocks, ref)) * 512 == -(-present // 4096) * 4096, "the kernel asks anew"
    )


def test_s06_extended_attributes_tell_the_state_and_no_secret(world: World) -> None:
    path = world.cold_copy("s06", 106)
    publish(path, world.nginx.url("s06") + "?token=open-sesame")
    ref = world.pin("s06", "?token=open-sesame")
    told = world.daemon.tell(
        "print(json.dumps({n: os.getxattr(path, n).decode() for n in os.listxattr(path)}))", ref
    )
    assert told == {
        "user.weightfs.state": "attested",
        "user.weightfs.digest": f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}",
        "user.weightfs.cached": "0",
        "user.weightfs.source": world.nginx.url("s06"),
    }


# --- reading


def test_s07_a_read_returns_exactly_the_bytes_at_the_offset(world: World) -> None:
    ref = world.pin("s07")
    world.daemon.run(
        f"fd, size, dice = cold(), {SIZE}, random.Random(7)\n"
        "for _ in range(150):\n"
        " at, count = dice.randrange(size + 9), dice.choice((1, 4096, 70_001, 1 << 20, 3_000_000))\n"
        " assert os.pread(fd, count, at) == true(at, at + count), (at, count)",
        ref,
        world.plain("s07"),
    )


def test_s08_a_read_fetches_the_chunks_that_it_touches(world: World) -> None:
    ref = world.pin("s08")
    world.nginx.forget_requests()
    world.daemon.run(READ, ref, world.plain("s08"), 5 * MIB - 100)
    world.daemon.quiet(ref)
    # Its own two, and, at the first open, the first and the last.
    touched = 3 * MIB + SIZE % MIB
    until(lambda: world.nginx.bytes_sent("s08") >= touched, "nginx logs a request after its last byte")
    assert world.nginx.bytes_sent("s08") == touched
    long = world.pin("s08-long")
    world.daemon.run("fd = cold()\nfor _ in range(48): assert os.read(fd, 1 << 20) == bytes(1 << 20)", long)
    world.daemon.quiet(long)
    kernel = 8 * MIB  # its own read-ahead, two windows of 4 MiB, is a read to us
    ahead = 8 * MIB  # this daemon's; by default it is as the statement says
    assert EngineSettings().readahead_bytes == Config().readahead == 64 * MIB
    assert 48 * MIB < world.nginx.bytes_sent("s08-long") <= (48 + 2) * MIB + ahead + kernel


def test_s09_readers_do_not_wait_for_one_anothers_chunks(world: World) -> None:
    ref = world.faulty.url("s09")
    world.daemon.add(ref)
    world.daemon.run(READ, ref, world.plain("s09"), 0)
    world.daemon.quiet(ref)
    world.faulty.script("/s09", Fault(FaultKind.STALL_BEFORE_BODY))
    blocked = world.daemon.client(READ, ref, world.plain("s09"), 5 * MIB)
    until(lambda: world.daemon.file(ref)["waiting_readers"], "one reader waits")
    world.daemon.run(
        "view = mmap.mmap(cold(), 0, prot=mmap.PROT_READ)\nbad = []\n"
        "def fault(at):\n if view[at:at + 100] != true(at, at + 100): bad.append(at)\n"
        "places = [(8 << 20) + n * 100_000 for n in range(32)]\n"
        "threads = [threading.Thread(target=fault, args=(at,)) for at in places]\n"
        "for one in threads: one.start()\nfor one in threads: one.join()\nassert not bad",
        ref,
        world.plain("s09"),
    )
    assert blocked.poll() is None
    blocked.kill()


def test_s10_mmap_populate_o_direct_sendfile_and_no_holes(world: World) -> None:
    ref = world.pin("s10")
    world.daemon.run(
        f"""
size = {SIZE}
fd = cold()
assert os.lseek(fd, 0, os.SEEK_HOLE) == size and os.lseek(fd, 5, os.SEEK_DATA) == 5
assert mmap.mmap(fd, 0, prot=mmap.PROT_READ)[size - 5:] == true(size - 5, size)
direct, buffer = os.open(path, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 1 << 20)
assert os.preadv(direct, [buffer], 3 << 20) == 1 << 20 and buffer[:] == true(3 << 20, 4 << 20)
target = os.memfd_create('target')
sent = 0
while sent < size: sent += os.sendfile(target, fd, sent, size - sent)
assert os.pread(target, size, 0) == true(0, size)
populated = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
assert populated[:] == true(0, size)
""",
        ref,
        world.plain("s10"),
    )


def test_s11_pages_that_were_read_stay_in_the_page_cache(world: World) -> None:
    """With the daemon stopped, only the kernel can answer; an open anew throws nothing away."""
    ref = world.pin("s11")
    reader = world.daemon.client(
        f"""
fd = cold()
assert os.pread(fd, {SIZE}, 0) == true(0, {SIZE})
print('read', flush=True)
sys.stdin.readline()
assert os.pread(fd, {SIZE}, 0) == true(0, {SIZE})
print('again', flush=True)
sys.stdin.readline()
view = mmap.mmap(cold(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
pages = -(-{SIZE} // mmap.PAGESIZE)
resident = (ctypes.c_ubyte * pages)()
start = ctypes.addressof(ctypes.c_char.from_buffer(view))
assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t({SIZE}), resident)
print(sum(page & 1 for page in resident), pages, flush=True)
os._exit(0)  # ctypes still holds the mapping, and mmap's destructor would complain
""",
        ref,
        world.plain("s11"),
        talk=True,
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    assert reader.stdout.readline() == "read\n"
    world.daemon.signal(signal.SIGSTOP)
    try:
        reader.stdin.write("the daemon is stopped\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "again\n"
    finally:
        world.daemon.signal(signal.SIGCONT)
    resident, pages = world.daemon.finish(reader, "it goes on\n").split()
    assert resident == pages


# --- trust


def test_s12_strict_and_hold_give_out_nothing_unproven(world: World, tmp_path: Path) -> None:
    path = world.cold_copy("s12", 112)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    ref, wrong = (world.nginx.url("s12") + f"#sha256={text}" for text in (digest, "0" * 64))
    strict = Daemon(
        tmp_path / "strict", wrong, options=["--policy", "strict", "--fill", "never", "--workers", "0"]
    )
    other = hashlib.sha256(world.cold_copy("s12.gone", 212).read_bytes()).hexdigest()
    gone = world.nginx.url("s12.gone") + f"#sha256={other}"
    hold = Daemon(
        tmp_path / "hold", ref, gone, options=["--policy", "hold", "--fill", "never", "--workers", "0"]
    )
    with strict.begin(), hold.begin():
        assert strict.ready().tell(TRY + "print(json.dumps(direct(0)))", wrong, path) == "EIO"
        assert strict.file(wrong)["trust"] == "quarantined"
        hold.ready().run(READ, ref, path, 5 * MIB)
        file = hold.file(ref)  # one read, and all of it was fetched and proven before the answer
        assert (file["trust"], file["present_bytes"]) == ("verified", SIZE)
        world.plain("s12.gone").unlink()  # S16 holds here too: what cannot mend is not waited for
        assert hold.tell(TRY + "print(json.dumps(direct(0)))", gone) == "EIO"


def test_s13_provisional_bytes_may_turn_out_wrong_and_the_file_is_then_quarantined(world: World) -> None:
    path = world.cold_copy("s13", 113)
    ref = world.nginx.url("s13") + f"#sha256={'1' * 64}"
    world.daemon.add(ref)
    state = "print(os.getxattr(path, 'user.weightfs.state').decode())"
    world.daemon.run(READ, ref, path, 0)  # the origin's bytes, given out in good faith
    assert world.daemon.run(state, ref) == "provisional"
    world.daemon.run("for _ in iter(lambda fd=cold(): os.read(fd, 1 << 20), b''): pass", ref)
    until(lambda: world.daemon.run(state, ref) == "quarantined", "the whole is judged")
    assert (
        world.daemon.tell(
            TRY + "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)\nprint(json.dumps(attempt(6 << 20)))",
            ref,
            path,
        )
        == "EIO"
    )
    assert "quarantine" in world.daemon.log


def test_s14_one_bad_chunk_costs_one_chunk(world: World) -> None:
    path = world.cold_copy("s14", 114)
    good = path.read_bytes()
    bad = good[: 5 * MIB] + bytes([good[5 * MIB] ^ 1]) + good[5 * MIB + 1 :]
    world.plain("s14.bad").write_bytes(bad)
    publish(path, world.nginx.url("s14.bad"), world.nginx.url("s14"))
    shutil.copy(path.with_name("s14.meta4"), path.with_name("s14.bad.meta4"))
    ref = world.pin("s14.bad")
    world.daemon.run(f"assert open(path, 'rb').read() == true(0, {SIZE})", ref, path)
    total = world.nginx.bytes_sent("s14") + world.nginx.bytes_sent("s14.bad")
    assert total <= SIZE + 2 * MIB

    alone = world.cold_copy("s14.alone", 214)
    publish(alone, world.nginx.url("s14.alone"))
    ref = world.pin("s14.alone")
    honest = alone.with_name("s14.honest")
    honest.write_bytes(alone.read_bytes())
    with alone.open("r+b") as file:
        times = alone.stat()
        file.seek(5 * MIB)
        file.write(b"wrong")
    os.utime(alone, ns=(times.st_atime_ns, times.st_mtime_ns))  # nginx's ETag is the time and the size
    told = world.daemon.tell(TRY + "print(json.dumps([direct(n << 20) for n in range(12)]))", ref, honest)
    assert told == [True] * 5 + ["EIO"] + [True] * 6


# --- failing


def test_s15_a_read_is_bounded_while_faults_are_transient(hasty: World) -> None:
    ref = hasty.nginx.url("s18")
    hasty.nginx.pause()
    try:
        assert hasty.daemon.tell(TRY + "print(json.dumps(direct(5 << 20)))", ref) == "EIO"
    finally:
        hasty.nginx.resume()
    assert "did not arrive within 1 s" in hasty.daemon.log


def test_s16_what_cannot_mend_fails_at_once_and_is_remembered(world: World) -> None:
    path = world.cold_copy("s16", 116)
    ref = world.pin("s16")
    path.unlink()
    world.nginx.forget_requests()
    code = TRY + "print(direct(5 << 20))"
    first = world.daemon.client(code, ref)
    until(lambda: f"{ref} has no such file" in world.daemon.log, "the origin said no")
    later = [world.daemon.client(code, ref) for _ in range(3)]
    assert {world.daemon.finish(reader) for reader in (first, *later)} == {"EIO"}
    asked = world.nginx.ranges("s16")
    assert len(asked) == len(set(asked)) <= 3  # the first and the last chunk (open), and this one


def test_s17_a_fault_that_fails_is_sigbus_and_failing_answers_are_held(world: World) -> None:
    path = world.cold_copy("s17", 117)
    ref = world.pin("s17")
    path.unlink()
    fault = world.daemon.client("print(mmap.mmap(cold(), 0, prot=mmap.PROT_READ)[10 << 20])", ref)
    # The statement is about time, so this one reads the clock; only the lower bound, which no load can break.
    held = world.daemon.tell(
        TRY + "began = time.monotonic()\nassert direct(2 << 20) == 'EIO'\nprint(time.monotonic() - began)",
        ref,
    )
    assert held >= 1
    assert fault.wait(60) == -signal.SIGBUS


def test_s18_an_error_is_never_cached(hasty: World) -> None:
    ref = hasty.nginx.url("s18")
    hasty.nginx.pause()
    reader = hasty.daemon.client(
        TRY + "print(direct(8 << 20), flush=True)\nsys.stdin.readline()\n"
        "while direct(8 << 20) is not True: pass\nassert attempt(8 << 20) is True",
        ref,
        hasty.plain("s18"),
        talk=True,
    )
    assert reader.stdout is not None
    told = reader.stdout.readline()
    hasty.nginx.resume()
    assert told == "EIO\n"
    hasty.daemon.finish(reader, "the origin is back\n")


def test_s19_open_never_fails(hasty: World) -> None:
    ref = hasty.nginx.url("s19")
    hasty.nginx.pause()
    try:
        hasty.daemon.run(f"for _ in range(5): assert os.fstat(cold()).st_size == {SIZE}", ref)
    finally:
        hasty.nginx.resume()


def test_s20_a_killed_reader_is_gone(hasty: World, world: World) -> None:
    ref = world.faulty.url("s20")
    world.daemon.add(ref)
    world.faulty.always["/s20"] = Fault(FaultKind.STALL_BEFORE_BODY)
    wait = "print('reading', flush=True)\n"
    buffered = world.daemon.client(wait + "os.pread(cold(), 4096, 3 << 20)", ref)
    mapped = world.daemon.client(wait + "mmap.mmap(cold(), 0, prot=mmap.PROT_READ)[7 << 20]", ref)
    for reader in (buffered, mapped):
        assert reader.stdout is not None
        reader.stdout.readline()
    until(lambda: world.daemon.file(ref)["waiting_readers"] >= 2, "both wait")
    for reader in (buffered, mapped):
        reader.kill()
        assert reader.wait(60) == -signal.SIGKILL
    del world.faulty.always["/s20"]

    ref = hasty.nginx.url("s20")
    hasty.nginx.pause()
    try:
        direct = hasty.daemon.client(
            "fd = os.open(path, os.O_RDONLY | os.O_DIRECT)\nos.preadv(fd, [mmap.mmap(-1, 4096)], 3 << 20)",
            ref,
        )
        until(lambda: hasty.daemon.file(ref)["waiting_readers"], "it waits")
        direct.kill()
        assert direct.wait(60) == -signal.SIGKILL  # the kernel waited for the answer, which came
    finally:
        hasty.nginx.resume()


# --- crashes and restarts


@dataclass(frozen=True)
class Crash:
    """What was seen of a daemon's SIGKILL, and of its successor without an origin, then with one."""

    dead: dict[str, object]
    fault: int
    stale_mounts: int
    mounts_after: int
    offline: dict[str, object]
    refetched: int
    rotten_asked_for: list[str]
    whole: object


@pytest.fixture(scope="module")
def crash(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crash]:
    from weightfs.mount.mounttable import mounts_at

    root = tmp_path_factory.mktemp("crash-origin")
    path = root / "s21"
    path.write_bytes(content(121))
    options = ["--fill", "never", "--workers", "1"]
    with Nginx(root) as nginx:
        publish(path, nginx.url("s21"))
        ref = nginx.url("s21")
        with Daemon(tmp_path_factory.mktemp("crash"), ref, options=options) as daemon:
            daemon.start()
            daemon.run(READ, ref, path, *(n * MIB for n in range(8)))
            until(lambda: daemon.file(ref)["durable_chunks"] >= 8, "they are durable")
            user = daemon.client(
                TRY
                + "view = mmap.mmap(fd, 0, prot=mmap.PROT_READ)\nprint('open', flush=True)\nsys.stdin.readline()\n"
                "told = {'read': attempt(10 << 20)}\n"
                "for name, call in (('open', cold), ('statvfs', lambda: os.statvfs(path))):\n"
                " try: call(); told[name] = 'done'\n"
                " except OSError as error: told[name] = errno.errorcode[error.errno]\n"
                "print(json.dumps(told), flush=True)\nview[10 << 20]",
                ref,
                path,
                talk=True,
            )
            assert user.stdout is not None
            assert user.stdin is not None
            assert user.stdout.readline() == "open\n"
            daemon.kill()
            user.stdin.write("it is dead\n")
            user.stdin.flush()
            dead = json.loads(user.stdout.readline())
            fault = user.wait(60)
            stale = len(mounts_at(daemon.mountpoint))
            blob = next(p for p in daemon.cache.rglob("*") if p.is_file() and p.stat().st_size == SIZE)
            with blob.open("r+b") as file:
                file.seek(3 * MIB + 77)
                file.write(b"rot")
            nginx.pause()
            daemon.start()
            offline = daemon.tell(
                TRY
                + "print(json.dumps({'names': os.listdir(os.path.dirname(path)), 'size': os.stat(path).st_size, "
                "'reads': [attempt(n << 20) for n in (0, 1, 2, 4, 5, 6, 7)]}))",
                ref,
                path,
            )
            nginx.resume()
            nginx.forget_requests()
            whole = daemon.tell(f"print(json.dumps(open(path, 'rb').read() == true(0, {SIZE})))", ref, path)
            daemon.quiet(ref)
            asked = nginx.ranges("s21")
            assert daemon.file(ref)["trust"] in ("attested", "verified")
            yield Crash(
                dead,
                fault,
                stale,
                len(mounts_at(daemon.mountpoint)),
                offline,
                nginx.bytes_sent("s21"),
                asked,
                whole,
            )


def test_s21_after_kill_9_no_wrong_byte_is_read_and_little_is_fetched_again(crash: Crash) -> None:
    """test_restart.py kills amid a fill; here the daemon was idle, so that nothing durable is fetched again."""
    assert crash.whole is True
    assert crash.refetched <= SIZE - 7 * MIB


def test_s22_after_an_unclean_stop_every_chunk_is_hashed_before_its_first_use(crash: Crash) -> None:
    assert crash.whole is True
    assert any(asked.startswith(f"bytes={3 * MIB}-") for asked in crash.rotten_asked_for), (
        crash.rotten_asked_for
    )


def test_s23_a_mount_is_served_from_the_index_alone(crash: Crash) -> None:
    assert crash.offline == {"names": ["s21"], "size": SIZE, "reads": [True] * 7}


def test_s24_without_the_daemon_enotconn_and_sigbus_and_then_the_stale_mount_is_removed(crash: Crash) -> None:
    assert crash.dead == {"read": "ENOTCONN", "open": "ENOTCONN", "statvfs": "ENOTCONN"}
    assert crash.fault == -signal.SIGBUS
    assert crash.stale_mounts == crash.mounts_after == 1


def test_s25_removing_a_ref_frees_what_only_it_had(world: World) -> None:
    ref = world.pin("s25")
    reader = world.daemon.client(
        TRY + "assert attempt(0) is True\nprint('read', flush=True)\nsys.stdin.readline()\n"
        "print(json.dumps([attempt(0), direct(6 << 20)]))",
        ref,
        world.plain("s25"),
        talk=True,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "read\n"
    world.daemon.quiet(ref)
    blob = world.daemon.file(ref)["blob"]
    kept = [path for path in world.daemon.cache.rglob("*") if blob in path.name.replace("-", "")]
    assert kept
    removed = world.daemon.cli("rm", ref)
    assert removed.returncode == 0, removed.stderr
    assert not any(path.exists() for path in kept)
    known, unread = json.loads(world.daemon.finish(reader, "it is gone\n"))
    assert (known, unread) == (True, "EIO")
    until(lambda: world.daemon.run("print(os.path.exists(path))", ref) == "False", "the name is gone")


def test_s26_limits_have_the_least_recently_used_evicted_and_never_what_is_open(tmp_path: Path) -> None:
    refs, plains = [], []
    for number in range(3):
        plain = tmp_path / "origin" / f"{number}.bin"
        plain.parent.mkdir(exist_ok=True)
        plain.write_bytes(random.Random(number).randbytes(2 * MIB))
        plains.append(plain)
        refs.append(f"file://{plain}")
    options = ["--fill", "never", "--workers", "0", "--max-size", "5MiB", "--min-free", "0"]
    whole = "print(open(path, 'rb').read() == true(0, 2 << 20))"
    with Daemon(tmp_path / "daemon", *refs, options=options) as daemon:
        daemon.start()
        held = daemon.client(
            "fd = cold(); assert os.read(fd, 2 << 20) == true(0, 2 << 20); print('open', flush=True)\n"
            "sys.stdin.readline(); print(os.pread(fd, 2 << 20, 0) == true(0, 2 << 20))",
            refs[0],
            plains[0],
            talk=True,
        )
        assert held.stdout is not None
        assert held.stdout.readline() == "open\n"
        for number in (1, 2, 1, 2):
            assert daemon.run(whole, refs[number], plains[number]) == "True"
            assert daemon.status()["held_bytes"] <= 5 * MIB
        assert daemon.file(refs[0])["present_bytes"] == 2 * MIB
        assert daemon.file(refs[1])["present_bytes"] < 2 * MIB
        assert daemon.run("print(os.stat(path).st_size)", refs[1]) == str(2 * MIB)
        assert daemon.finish(held, say="\n") == "True"
