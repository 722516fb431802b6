"""The kernel's traps, each on a real mount: what blocks, fails or is killed takes nothing else with it."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Callable

import pytest

from weightfs.testing.mounts import FakeMount
from weightfs.testing.waiting import until

pytestmark = pytest.mark.mount

Start = Callable[..., FakeMount]
GIB = 1 << 30

# Threads that each read 4 KiB at its own place, 4 MiB apart. With O_DIRECT these are background requests for the
# kernel, like read-ahead and unlike single pages (Linux 6.18): only they count against max_background.
BLOCKED = """
count, direct = int(sys.argv[2]), sys.argv[3] == 'direct'
fd = os.open(at('held'), os.O_RDONLY | (os.O_DIRECT if direct else 0))
codes = []
def work(number):
    start = number * (4 << 20) + direct * (1 << 20)
    buffer = mmap.mmap(-1, 4096)
    assert os.preadv(fd, [buffer], start) == 4096
    codes.append(0 if buffer[:] == pattern('held', start, start + 4096) else -1)
threading.stack_size(1 << 17)
threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(sorted(set(codes))))
"""
OTHERS_GO_ON = """
for step in range(20):
    assert os.stat(at('other')).st_size == 50_000_000
    assert os.listdir(at('')), os.listxattr(at('other'))
    start = step * 1_234_567
    with open(at('other'), 'rb', buffering=0) as file:
        assert os.pread(file.fileno(), 300_000, start) == pattern('other', start, start + 300_000)
"""


def test_hundreds_of_blocked_reads_stop_nobody_else(start: Start) -> None:
    """The kernel's default of 12 background requests, or pyfuse3's of 99 tasks, would stop all of this."""
    server = start({"held": 8 * GIB, "other": 50_000_000})
    server.call("hold", name="held")
    direct = server.start(BLOCKED, 400, "direct")
    until(lambda: server.call("stats")["waiting"] >= 400, "the background requests block")
    server.run(OTHERS_GO_ON)
    buffered = server.start(BLOCKED, 700, "buffered")
    until(lambda: server.call("stats")["waiting"] >= 1100, "the single pages block")
    server.run(OTHERS_GO_ON)
    assert server.call("stats")["in_flight"] >= 1100
    server.call("let_go", name="held")
    assert server.finish(buffered) == server.finish(direct) == "[0]"
    assert server.call("stats")["in_flight"] == 0


def test_a_failing_range_under_map_populate_is_asked_for_seldom_and_its_process_can_be_killed(
    start: Start,
) -> None:
    server = start({"bad": 50_000_000, "other": 50_000_000})
    server.call("fail", name="bad", kind="not_found", chunk=3)
    client = server.start(
        "fd = os.open(at('bad'), os.O_RDONLY)\n"
        "mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)"
    )
    until(lambda: server.call("stats")["held"], "the first failure")
    beats = server.call("stats")["beats"]
    # Two hundred heartbeats later the kernel has its answer and asks again: thousands of times, were it not held.
    until(lambda: server.call("stats")["beats"] > beats + 200, "the heart beats")
    stats = server.call("stats")
    assert stats["failed_reads"] >= 2
    assert stats["failed_reads"] < 200
    assert len(stats["spans"]["bad"]) < 200
    server.run(OTHERS_GO_ON)
    assert client.poll() is None
    client.kill()
    assert client.wait(30) == -signal.SIGKILL


def test_each_failure_reaches_the_reader_in_its_own_way(start: Start) -> None:
    names = ("read", "changed", "fault", "madvise", "prefix", "bug", "short")
    server = start(dict.fromkeys(names, 8 << 20))
    for name in ("read", "fault", "madvise"):
        server.call("fail", name=name, kind="timeout")
    server.call("fail", name="changed", kind="changed")
    server.call("set", name="bug", bug="a handler's bug")
    server.call("set", name="short", excess=1)
    read = "file = open(at(sys.argv[2]), 'rb', buffering=0)\ntry: file.read(4096)\nexcept OSError as e: print(e.errno)"
    mapped = "fd = os.open(at(sys.argv[2]), os.O_RDONLY)\nview = mmap.mmap(fd, 0, prot=mmap.PROT_READ)\n"
    fault = server.start(mapped + "view[5]", "fault")
    advise = server.start(
        mapped + "libc = ctypes.CDLL(None, use_errno=True)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "where = libc.mmap(None, ctypes.c_size_t(4096), 1, 1, fd, ctypes.c_long(0))\n"
        "assert libc.madvise(ctypes.c_void_p(where), ctypes.c_size_t(4096), 22) == -1\n"
        "print(ctypes.get_errno())",
        "madvise",
    )
    readers = {name: server.start(read, name) for name in ("read", "changed", "bug", "short")}
    told = {name: int(server.finish(client)) for name, client in readers.items()}
    assert told == {"read": errno.EIO, "changed": errno.ESTALE, "bug": errno.EIO, "short": errno.EIO}
    assert int(server.finish(advise)) == errno.EFAULT
    assert fault.wait(30) == -signal.SIGBUS
    # The mount lives, the bugs were counted, and what is well again can be read.
    assert server.call("stats")["internal_errors"] >= 2
    server.call("set", name="bug", bug="")
    server.call("fail", name="read", kind=None)
    for name in ("bug", "read"):
        server.run(
            "while True:\n"
            " try:\n  data = open(at(sys.argv[2]), 'rb').read(4096)\n  break\n"
            " except OSError as error: assert error.errno == errno.EIO\n"
            "assert data == pattern(sys.argv[2], 0, 4096)",
            name,
        )


def test_150_killed_readers_never_freeze_the_server(start: Start) -> None:
    """A withdrawn request must not leave pyfuse3 in a read of /dev/fuse, with the GIL held, while nobody asks more.

    The proof that it is not is its answer on a way that does not lead through the mount. Its loop is kept busy, so that
    there is time between epoll's word and the read. (Read-ahead is background work and never withdrawn; questions
    that are not sent yet are: here, one for an extended attribute.)
    """
    server = start({"other": 50_000_000})
    server.call("busy", seconds=0.002)
    killer = server.start(
        """
fd = os.open(at('other'), os.O_RDONLY)
for number in range(int(sys.argv[2])):
    child = os.fork()
    while not child: os.getxattr(fd, 'user.weightfs.state')
    time.sleep(0.001 + number % 16 * 0.0003)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(number, flush=True)
    sys.stdin.readline()
""",
        150,
        talk=True,
    )
    assert killer.stdout is not None
    assert killer.stdin is not None
    beats = 0
    for number in range(150):
        assert killer.stdout.readline() == f"{number}\n"
        now = server.call("stats")["beats"]
        assert now >= beats
        beats = now
        killer.stdin.write("\n")
        killer.stdin.flush()
    server.finish(killer)
    server.call("busy", seconds=0)
    until(lambda: server.call("stats")["beats"] > beats + 10, "the heart beats")
    server.run(OTHERS_GO_ON)
    assert server.call("stats")["internal_errors"] == 0
    assert "fuse_reply" not in server.log


def test_a_reader_killed_amid_its_read_dies_at_once_and_the_bytes_are_there_for_the_next(
    start: Start,
) -> None:
    server = start({"held": 50_000_000})
    server.call("hold", name="held")
    reader = server.start("open(at('held'), 'rb', buffering=0).read(4096)")
    until(lambda: server.call("stats")["waiting"], "the read blocks")
    reader.kill()
    assert reader.wait(30) == -signal.SIGKILL
    server.call("let_go", name="held")
    server.run("assert open(at('held'), 'rb').read(4096) == pattern('held', 0, 4096)")
    until(lambda: server.call("stats")["handles"]["held"] == 0, "handles are released")


def test_open_never_waits_and_never_fails_for_reasons_of_data(start: Start) -> None:
    server = start({"held": 5000, "bad": 5000})
    server.call("hold", name="held")
    server.call("fail", name="bad", kind="tls")
    told = server.run(
        "print(json.dumps([os.fstat(os.open(at(n), os.O_RDONLY)).st_size for n in ('held', 'bad')]))"
    )
    assert json.loads(told) == [5000, 5000]


def test_a_second_open_finds_the_pages_of_the_first(start: Start) -> None:
    server = start({"a": 3_000_000})
    for _ in range(3):
        server.run("assert open(at('a'), 'rb').read() == pattern('a', 0, 3_000_000)")
    # Not exactly once: the kernel may let go of a page at any time (seen once on a busy machine). Dropped at each open,
    # all of them would be asked for three times.
    assert sum(stop - begin for begin, stop in server.call("stats")["spans"]["a"]) < 2 * 3_000_000
