"""Passthrough on a real mount: who reads what way, through every transition. Clients are other processes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from weightfs.testing.daemon import Daemon
from weightfs.testing.fake_engine import pattern
from weightfs.testing.mounts import NOBODY, FakeMount, can_mount
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
    pytest.mark.skipif(
        tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2]) < (6, 9),
        reason="needs Linux 6.9",
    ),
]

SIZE = 5_000_003
A = {"a": SIZE}
ON = "Complete files are passed through"
OFF = "Complete files are read through weightfs, not passed through"

HELPERS = f"""
SIZE = {SIZE}
def numbers(): return os.stat(at('a')).st_ino & 1
def shown(bit):
    end = time.monotonic() + 15
    while numbers() != bit:
        assert time.monotonic() < end, 'the name does not lead to the other inode'
        time.sleep(0.01)
def equal(fd, start=0, stop=SIZE):
    while start < stop:
        want = min(1 << 20, stop - start)
        assert os.pread(fd, want, start) == pattern('a', start, start + want), start
        start += want
def mapped(fd, flags=mmap.MAP_SHARED): return mmap.mmap(fd, 0, flags=flags, prot=mmap.PROT_READ)
def bare(fd):
    # As a C program maps; Python's mmap keeps a descriptor of its own.
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    return (ctypes.c_char * SIZE).from_address(libc.mmap(None, ctypes.c_size_t(SIZE), 1, 1, fd, ctypes.c_long(0)))
def opened(): return os.open(at('a'), os.O_RDONLY)
def wait(word='open'):
    print(word, flush=True)
    sys.stdin.readline()
"""

EVERY_WAY = """
fd = opened()
equal(fd)
assert os.pread(fd, 100, SIZE) == b''
assert mapped(fd)[:] == pattern('a', 0, SIZE)
assert mapped(fd, mmap.MAP_SHARED | mmap.MAP_POPULATE)[:] == pattern('a', 0, SIZE)
assert mapped(fd, mmap.MAP_PRIVATE)[SIZE - 9:] == pattern('a', SIZE - 9, SIZE)
direct, page, got = os.open(at('a'), os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 1 << 20), b''
while count := os.preadv(direct, [page], len(got)): got += page[:count]
assert got == pattern('a', 0, SIZE)
out, done = os.memfd_create('out'), 0
while count := os.sendfile(out, fd, done, SIZE): done += count
assert done == SIZE and os.pread(out, SIZE, 0) == pattern('a', 0, SIZE)
assert os.lseek(fd, 0, os.SEEK_HOLE) == SIZE
told = os.fstat(fd)
assert (told.st_size, told.st_blocks) == (SIZE, -(-SIZE // 4096) * 8), told
assert told.st_ino == os.stat(at('a')).st_ino
print(told.st_ino & 1)
"""

SLEEPY = """
passthrough.SELF_TEST_TIMEOUT = 0.5
real = ops.WeightOperations.open
async def never(self, *rest):
    if self._passthrough.private: await trio.sleep_forever()
    return await real(self, *rest)
ops.WeightOperations.open = never
"""

Serve = Callable[..., FakeMount]


@pytest.fixture
def cache(place: Path) -> Path:
    """The fake engine's cache, on the filesystem of temporary files."""
    directory = place.parent / "cache"
    directory.mkdir()
    os.chown(directory, NOBODY, NOBODY)  # root may use it all the same
    return directory


@pytest.fixture
def serve(start: Callable[..., FakeMount], cache: Path) -> Serve:
    """Serve complete files out of a cache directory."""
    return partial(start, A, present=1.0, cache=cache)


def run(server: FakeMount, code: str) -> str:
    return server.run(HELPERS + code)


def client(server: FakeMount, code: str) -> subprocess.Popen[str]:
    """Start a client, and return when it `wait`s for the first time."""
    started = server.start(HELPERS + code, talk=True)
    heard(started)
    return started


def heard(process: subprocess.Popen[str], word: str = "open") -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    if line != f"{word}\n":
        assert process.stderr is not None
        raise AssertionError(line + process.stderr.read())


def say(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def stats(server: FakeMount) -> tuple[int, int, int]:
    """Reads that came, handles passed through so far, inodes passed through now."""
    told = server.call("stats")
    assert told["internal_errors"] == 0, server.log
    return told["reads"], told["passed_opens"], told["passed_files"]


def all_closed(server: FakeMount) -> None:
    until(lambda: server.call("stats")["passed_files"] == 0, "every backing file is given back")
    until(lambda: not any(server.call("stats")["handles"].values()), "every handle is released")


def nobody_has_open(file: Path) -> bool:
    """Whether no descriptor, mapping or backing id anywhere has the file: only then can it be leased for writing."""
    with file.open("rb") as mine:
        try:
            fcntl.fcntl(mine, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return False
            raise
        fcntl.fcntl(mine, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True


def cached_file(cache: Path) -> Path:
    (file,) = cache.iterdir()
    return file


# --- a complete file


def test_every_way_to_read_gives_the_bytes_and_no_read_comes_to_us(serve: Serve) -> None:
    server = serve()
    assert run(server, EVERY_WAY) == "1"
    assert stats(server)[:2] == (0, 2)
    all_closed(server)
    assert server.log.count(ON) == 1
    assert "WARNING" not in server.log
    server.tell("stop")
    assert server.ended() == {"ended": True, "leaked_fds": 0}


def test_an_incomplete_file_is_read_through_us(start: Callable[..., FakeMount], cache: Path) -> None:
    server = start(A, cache=cache)
    reads = EVERY_WAY.replace("-(-SIZE // 4096) * 8", "8")
    assert run(server, reads) == "0"
    got, passed, files = stats(server)
    assert got > 0
    assert (passed, files) == (0, 0)


def test_64_threads_open_and_read_at_once(serve: Serve, cache: Path) -> None:
    server = serve()
    run(
        server,
        """
bad = []
def work(number):
    try:
        for step in range(20):
            fd = opened()
            start = (number * 7919 + step * 104729 * 31) % (SIZE - 70000)
            equal(fd, start, start + 70000)
            view = mapped(fd)
            assert view[start] == pattern('a', start, start + 1)[0]
            os.close(fd)
    except BaseException as error: bad.append(repr(error))
threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
for one in threads: one.start()
for one in threads: one.join()
assert not bad, bad[:3]
""",
    )
    assert stats(server)[:2] == (0, 64 * 20)
    all_closed(server)
    until(lambda: nobody_has_open(cached_file(cache)), "the kernel has let the cache file go")


def test_the_backing_file_is_open_for_as_long_as_a_handle_or_a_mapping_is(serve: Serve, cache: Path) -> None:
    server = serve()
    assert nobody_has_open(cached_file(cache))
    user = client(
        server,
        "one, two = opened(), opened()\nwait()\nview = bare(one)\nos.close(one)\nos.close(two)\nwait()\n"
        "assert view[:] == pattern('a', 0, SIZE)",
    )
    assert stats(server)[1:] == (2, 1)
    assert not nobody_has_open(cached_file(cache))
    say(user)
    heard(user)
    all_closed(server)  # we are told that nobody has it, and the mapping reads on
    assert not nobody_has_open(cached_file(cache))
    server.finish(user, say="\n")
    until(lambda: nobody_has_open(cached_file(cache)), "the kernel has let the cache file go")


def test_readers_outlive_the_server(serve: Serve, place: Path) -> None:
    server = serve()
    user = client(
        server,
        "fd = opened()\nview = mapped(fd)\nother = mapped(opened())\nwait()\n"
        "equal(fd)\nassert view[:] == other[:] == pattern('a', 0, SIZE)\nwait()\nequal(fd)\nprint(view[5])",
    )
    server.kill()
    say(user)
    heard(user)
    with FakeMount(place, {"b": 100}) as second:  # in the place of the dead one
        second.ready().run("assert open(at('b'), 'rb').read() == pattern('b', 0, 100)")
        assert server.finish(user, say="\n") == str(pattern("a", 5, 6)[0])


def test_readers_outlive_an_unmount(serve: Serve) -> None:
    server = serve(options={"unmount_timeout": 0.3})
    user = client(server, "fd = opened()\nview = mapped(fd)\nwait()\nequal(fd)\nprint(view[5])")
    server.tell("stop")
    assert server.ended() == {"ended": True, "leaked_fds": 0}
    assert server.finish(user, say="\n") == str(pattern("a", 5, 6)[0])


# --- transitions


def test_a_file_becomes_complete_while_it_is_open(start: Callable[..., FakeMount], cache: Path) -> None:
    """Who has it open goes on as before; who opens it next is passed through; both at once is no EIO."""
    server = start(A, cache=cache)
    user = client(
        server,
        "old = opened()\nequal(old, 0, 4096)\nview = mapped(old)\nwait()\nshown(1)\nnew = opened()\nequal(new)\n"
        "assert mapped(new)[:] == pattern('a', 0, SIZE)\n"
        "again = os.open(f'/proc/self/fd/{old}', os.O_RDONLY)\n"
        "wait('both')\nequal(old)\nequal(again)\nassert view[:] == pattern('a', 0, SIZE)\n"
        "assert os.fstat(old).st_ino + 1 == os.fstat(new).st_ino",
    )
    server.call("complete", name="a")
    before = stats(server)[0]
    say(user)
    heard(user, "both")
    reads, passed, files = stats(server)
    assert (passed, files) == (1, 1)
    assert reads == before  # the new handle asked for nothing
    server.finish(user, say="\n")
    assert stats(server)[0] > reads
    all_closed(server)


def test_a_file_is_found_bad_while_it_is_passed_through(serve: Serve) -> None:
    """Handles go on as they are; whoever opens it then is served by us at once, though the name is still cached."""
    server = serve()
    user = client(
        server,
        "old = opened()\nequal(old, 0, 4096)\nwait()\n"
        "new = opened()\nassert os.fstat(new).st_ino + 1 == os.fstat(old).st_ino\nequal(new)\nwait('both')\n"
        "equal(old)\nview = mapped(old)\n"
        "try: os.open(f'/proc/self/fd/{old}', os.O_RDONLY)\nexcept OSError as error: print(error.errno)\n"
        "wait('third')\nshown(1)\nthird = opened()\nequal(third)\nequal(new)\nequal(old)\n"
        "assert view[:] == pattern('a', 0, SIZE)",
    )
    server.call("spoil", name="a")
    say(user)
    heard(user, "both")
    reads, passed, _ = stats(server)
    assert reads > 0
    assert passed == 1
    say(user)
    heard(user, str(errno.ESTALE))  # the name cannot be looked up again here
    heard(user, "third")
    server.call("complete", name="a")
    server.finish(user, say="\n")
    assert stats(server)[1] == 2
    all_closed(server)


def test_a_name_that_is_cached_when_the_file_is_found_bad_is_read_through_us(serve: Serve) -> None:
    server = serve()
    user = client(
        server,
        "assert numbers() == 1\nwait()\nfd = opened()\nequal(fd)\nwait()\nsecond = opened()\nequal(second)",
    )
    server.call("spoil", name="a")
    say(user)
    heard(user)
    # The second handle has to go the way of the first, if it has the same inode.
    server.call("complete", name="a")
    server.finish(user, say="\n")
    reads, _, _ = stats(server)
    assert reads > 0
    all_closed(server)


def test_a_file_is_removed_while_it_is_passed_through(serve: Serve, cache: Path) -> None:
    server = serve()
    user = client(
        server,
        "fd = opened()\nview = mapped(fd)\nwait()\n"
        "try: opened()\nexcept FileNotFoundError: print('gone', flush=True)\n"
        "equal(fd)\nassert view[:] == pattern('a', 0, SIZE)\nassert os.fstat(fd).st_size == SIZE",
    )
    server.call("remove", name="a")
    assert not list(cache.iterdir())
    say(user)
    heard(user, "gone")
    server.finish(user)
    until(lambda: server.call("stats")["passed_files"] == 0, "the backing file is given back")
    assert stats(server)[:2] == (0, 1)


def test_a_tree_is_rebuilt_around_open_files(serve: Serve) -> None:
    server = serve()
    user = client(server, "fd = opened()\nwait()\nequal(fd)\nequal(opened())")
    server.call("add", files={"b": 10}, present=1.0)
    server.finish(user, say="\n")
    server.run("assert open(at('b'), 'rb').read() == pattern('b', 0, 10)")
    assert stats(server)[:2] == (0, 3)


def test_no_reader_ever_fails_while_a_file_changes_its_state_again_and_again(serve: Serve) -> None:
    server = serve()
    code = """
end, ways = time.monotonic() + float(sys.argv[2]), set()
while time.monotonic() < end:
    fd = opened()
    ways.add(os.fstat(fd).st_ino & 1)
    start = int(time.monotonic() * 1e6) % (SIZE - 5000)
    equal(fd, start, start + 5000)
    view = mapped(fd)
    assert view[start:start + 10] == pattern('a', start, start + 10)
    os.close(fd)
print(json.dumps(sorted(ways)))
"""
    users = [server.start(HELPERS + code, 1.5) for _ in range(4)]
    while any(user.poll() is None for user in users):
        server.call("spoil", name="a")
        before = server.call("stats")["beats"]
        until(lambda: server.call("stats")["beats"] > before + 5, "the heart beats")  # noqa: B023 - called here
        server.call("complete", name="a")
        until(lambda: server.call("stats")["beats"] > before + 40, "the heart beats")  # noqa: B023 - called here
    assert {1} <= set().union(*(json.loads(server.finish(user)) for user in users))
    all_closed(server)


# --- without


@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [
        ("passthrough.TESTED = frozenset({'0.1'})", "was not tested with it (0.1)"),
        ("passthrough._Requests.find = lambda *_: -1", "self-test failed (No such device or address)"),
        (
            "words = iter((9, 10, 11))\npassthrough._Requests.find = lambda *_: next(words)",
            "self-test failed (Operation canceled)",
        ),
        ("passthrough._HEADER_WORDS = 999", "self-test failed (No such device or address)"),
        ("passthrough._BACKING_OPEN = 0x4010E5FF", "self-test failed ("),
        ("passthrough._FOPEN_PASSTHROUGH = 0", "self-test"),
        (
            "passthrough._libc.process_vm_readv = lambda *_: -1",
            "self-test failed (No such device or address)",
        ),
        ("passthrough.pyfuse3.__file__ = '/nowhere.so'", "self-test failed (/nowhere.so"),
        ("passthrough.ctypes.CDLL = lambda _: object()", "self-test failed ("),
        ("session._PASSTHROUGH2 = 0", "the kernel does not offer it"),
        (
            SLEEPY,
            "self-test failed (no end within 0.5 s)",
        ),
    ],
)
def test_on_any_doubt_files_are_read_through_us(serve: Serve, sabotage: str, reason: str) -> None:
    server = serve(sabotage=f"import trio\nfrom weightfs.mount import ops, passthrough, session\n{sabotage}")
    assert run(server, EVERY_WAY) == "0"
    reads, passed, files = stats_of_a_sick_one(server)
    assert reads > 0
    assert (passed, files) == (0, 0)
    assert server.log.count(OFF) == 1
    assert reason in server.log, server.log
    assert ON not in server.log


def stats_of_a_sick_one(server: FakeMount) -> tuple[int, int, int]:
    told = server.call("stats")
    return told["reads"], told["passed_opens"], told["passed_files"]


def test_it_can_be_switched_off(serve: Serve) -> None:
    server = serve(options={"passthrough": False})
    assert run(server, EVERY_WAY) == "0"
    assert stats(server)[1:] == (0, 0)
    assert "passed through" not in server.log


def test_an_ordinary_user_reads_through_us(serve: Serve) -> None:
    server = serve(ordinary_user=True)
    assert run(server, EVERY_WAY) == "0"
    assert stats(server)[1:] == (0, 0)
    assert server.log.count(OFF) == 1
    assert "CAP_SYS_ADMIN" in server.log


@pytest.fixture
def stacked(place: Path) -> Iterator[Path]:
    """A directory on an overlay filesystem, as containers have."""
    base = place.parent / "layers"
    for name in ("lower", "upper", "work", "merged"):
        (base / name).mkdir(parents=True)
    layers = ",".join(f"{name}dir={base / name}" for name in ("lower", "upper", "work"))
    command = ["mount", "-t", "overlay", "overlay", "-o", layers, str(base / "merged")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no overlay filesystem can be mounted here")
    yield base / "merged"
    subprocess.run(["umount", "-l", str(base / "merged")], check=True)


def test_a_cache_on_a_stacked_filesystem_is_read_through_us(
    start: Callable[..., FakeMount], stacked: Path
) -> None:
    server = start(A, present=1.0, cache=stacked)
    reads = EVERY_WAY.replace("print(told.st_ino & 1)", "print('read')")
    assert run(server, reads) == run(server, reads) == "read"
    got, passed, files = stats(server)
    assert got > 0
    assert (passed, files) == (0, 0)
    assert server.log.count(OFF) == 1
    run(server, "shown(0)")


@pytest.mark.parametrize("kind", ["missing", "cut", "link", "names", "other", "fifo", "slow"])
def test_a_cache_file_that_is_not_as_it_should_be_is_not_passed_through(
    serve: Serve, cache: Path, kind: str
) -> None:
    slow = (
        "import threading\nfrom weightfs.mount import passthrough\npassthrough.LEND_TIMEOUT = 0.1\n"
        "real, gate = passthrough._Opening.run, threading.Event()\n"
        "passthrough._Opening.run = lambda self: (gate.wait(0.5), real(self))"
    )
    server = serve(sabotage=slow if kind == "slow" else "")
    file = cached_file(cache)
    match kind:
        case "missing":
            file.unlink()
        case "cut":
            os.truncate(file, SIZE - 1)
        case "link":
            file.rename(cache / "elsewhere")
            file.symlink_to(cache / "elsewhere")
        case "names":
            os.link(file, cache / "second")
        case "other":
            os.chown(file, NOBODY, NOBODY)
        case "fifo":
            file.unlink()
            os.mkfifo(file)
        case _:
            pass
    run(server, "fd = opened()\nequal(fd)\nequal(opened())")
    reads, passed, files = stats(server)
    assert reads > 0
    assert (passed, files) == (0, 0)
    assert "is not passed through" in server.log
    server.tell("stop")
    assert server.ended()["ended"]


def test_nobody_writes_even_if_root_makes_the_mount_writable(serve: Serve, place: Path, cache: Path) -> None:
    server = serve()
    subprocess.run(["mount", "-o", "remount,rw", str(place)], check=False, capture_output=True)
    told = run(
        server,
        "for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):\n"
        " try: print(os.open(at('a'), flags))\n except OSError as error: print(error.errno)",
    )
    assert told.split() == [str(errno.EROFS)] * 3
    assert cached_file(cache).read_bytes() == pattern("a", 0, SIZE)


# --- the whole of it


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    file = tmp_path / "origin" / "m.bin"
    file.parent.mkdir()
    file.write_bytes(hashlib.shake_128(b"passed through").digest(3_500_000))
    return file


def test_the_real_daemon_passes_sealed_files_through_and_mends_them_under_their_readers(
    tmp_path: Path, plain: Path
) -> None:
    """A mapping shows what is on the disk: the damage, then the right bytes again; never a hole."""
    ref = f"file://{plain}"
    with Daemon(tmp_path / "daemon", ref, options=["--fill", "never", "--workers", "0"]) as daemon:
        daemon.start()
        assert daemon.run("print(os.stat(path).st_ino & 1)", ref) == "0"
        daemon.complete(ref)
        assert ON in daemon.log
        user = daemon.client(
            "end = time.monotonic() + 15\n"
            "while not os.stat(path).st_ino & 1: assert time.monotonic() < end; time.sleep(0.02)\n"
            "fd = cold()\nview = mmap.mmap(fd, 0, prot=mmap.PROT_READ)\nos.close(fd)\n"
            "assert view[:] == true(0, len(view))\nprint('open', flush=True)\n"
            "seen, asked = set(), threading.Thread(target=sys.stdin.readline)\nasked.start()\n"
            "while asked.is_alive(): seen.add(view[2_000_000:2_000_006])\n"
            "seen.add(view[2_000_000:2_000_006])\n"
            "print(json.dumps(sorted(one.hex() for one in seen)))\nassert view[:] == true(0, len(view))",
            ref,
            plain,
            talk=True,
        )
        heard(user)
        data = next(file for file in daemon.cache.rglob("*") if file.stat().st_size == 3_500_000)
        with data.open("r+b") as file:
            file.seek(2_000_000)
            file.write(b"rotten")
        repaired = daemon.cli("verify", "--repair", ref)
        assert repaired.returncode == 0, repaired.stderr
        right = plain.read_bytes()[2_000_000:2_000_006]
        seen = json.loads(daemon.finish(user, say="\n"))
        assert set(seen) <= {right.hex(), b"rotten".hex()}
        assert data.read_bytes() == plain.read_bytes()
        until(lambda: daemon.run("print(os.stat(path).st_ino & 1)", ref) == "1", "it is sealed again")
        assert daemon.run("print(open(path, 'rb').read() == true(0, 3_500_000))", ref, plain) == "True"


def test_after_a_kill_every_chunk_is_hashed_once_before_the_file_is_passed_through_again(
    tmp_path: Path, plain: Path
) -> None:
    ref = f"file://{plain}"
    with Daemon(tmp_path / "daemon", ref, options=["--fill", "never", "--workers", "0"]) as daemon:
        daemon.start().complete(ref)
        daemon.kill()
        daemon.start()
        assert daemon.run("print(os.stat(path).st_ino & 1)", ref) == "0"
        assert daemon.run("print(open(path, 'rb').read() == true(0, 3_500_000))", ref, plain) == "True"
        until(lambda: daemon.run("print(os.stat(path).st_ino & 1)", ref) == "1", "nothing is suspect")
        assert daemon.run("print(open(path, 'rb').read() == true(0, 3_500_000))", ref, plain) == "True"
