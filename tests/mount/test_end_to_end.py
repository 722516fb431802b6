"""What programs do with a cold file: the real daemon, a real kernel mount, a real nginx, against the plain bytes.

Each test has its own cold file. `clients.plain` is the origin's copy; nginx's log says what was fetched.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightfs.store.cache import Cache
from weightfs.testing.daemon import Daemon
from weightfs.testing.models import ModelShape, layer_names, make_safetensors
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
SIZE = 20 * MIB + 54_321
LAYERS = ModelShape(dim=256, layers=16, ff=1024)  # 67 MB, 4 MB a layer

# Every thread works at its own places; what differs from the plain bytes is printed.
THREADS = """
size, dice = os.path.getsize(plain), random.Random(int(sys.argv[3]))
bad = []
def in_threads(count, work):
    places = [[dice.randrange(size) for _ in range(4)] for _ in range(count)]
    def run(mine):
        try:
            for at in mine:
                if not work(at): bad.append(at)
        except BaseException as error: bad.append(repr(error))
    threads = [threading.Thread(target=run, args=(mine,)) for mine in places]
    for one in threads: one.start()
    for one in threads: one.join()
    print(json.dumps(bad))
"""


class Stage:
    """The origin and the daemon."""

    def __init__(self, directory: Path, nginx: Nginx, daemon: Daemon) -> None:
        self.directory = directory
        self.nginx = nginx
        self.daemon = daemon

    def plain(self, name: str) -> Path:
        return self.directory / name

    def cold(self, name: str, *, tls: bool = False) -> str:
        """Pin a new file of random bytes; nginx's log begins after that."""
        if not self.plain(name).exists():
            self.plain(name).write_bytes(random.Random(name).randbytes(SIZE))
        ref = self.nginx.https_url(name) if tls else self.nginx.url(name)
        self.daemon.add(ref)
        self.nginx.forget_requests()
        return ref

    def fetched(self, ref: str, least: int = 0) -> int:
        """Bytes that the origin gave of a ref's file, once nothing of it is in flight and `least` were logged."""
        self.daemon.quiet(ref)
        name = ref.rsplit("/", 1)[1]
        until(lambda: self.nginx.bytes_sent(name) >= least, "nginx logs a request after its last byte")
        return self.nginx.bytes_sent(name)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("origin")
    with Nginx(directory) as nginx:
        options = [
            "--fill",
            "never",
            "--workers",
            "1",
            "--ca-file",
            str(nginx.ca_file),
            "--stall-timeout",
            "1s",
        ]
        with Daemon(tmp_path_factory.mktemp("daemon"), options=options) as daemon:
            yield Stage(directory, nginx, daemon.start())


@pytest.fixture(scope="module")
def faulty(stage: Stage) -> Iterator[Origin]:
    names = ("stalled", "killed")
    files = {f"/{name}": random.Random(name).randbytes(SIZE) for name in names}
    for name, data in files.items():
        (stage.directory / name[1:]).write_bytes(data)
    with origin_in_thread(files) as origin:
        yield origin


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_a_sequential_read_gives_the_plain_bytes_and_fetches_each_once(stage: Stage, tls: bool) -> None:
    name = f"sequential-{tls}"
    ref = stage.cold(name, tls=tls)
    compared = stage.daemon.command(["cmp", str(stage.daemon.path(ref)), str(stage.plain(name))])
    stage.daemon.finish(compared)
    assert stage.fetched(ref, SIZE) == SIZE
    assert {request.scheme for request in stage.nginx.requests()} == {"https" if tls else "http"}


@pytest.mark.parametrize("seed", [1, 2])
def test_random_reads_of_any_length(stage: Stage, seed: int) -> None:
    name = f"random-{seed}"
    ref = stage.cold(name, tls=seed == 2)
    stage.daemon.run(
        "size, dice, fd = os.path.getsize(plain), random.Random(int(sys.argv[3])), cold()\n"
        "for _ in range(300):\n"
        " at = dice.randrange(size + 10)\n"
        " count = dice.choice((1, 511, 4096, 65_537, 1 << 20, 5_000_000))\n"
        " assert os.pread(fd, count, at) == true(at, at + count), (at, count)",
        ref,
        stage.plain(name),
        seed,
    )
    assert stage.fetched(ref) <= SIZE


def test_sixty_four_threads_fault_one_cold_mapping(stage: Stage) -> None:
    ref = stage.cold("faults")
    code = "view = mmap.mmap(cold(), 0, prot=mmap.PROT_READ)\n"
    code += "in_threads(64, lambda at: view[at] == true(at, at + 1)[0])"
    assert stage.daemon.tell(THREADS + code, ref, stage.plain("faults"), 3) == []
    assert stage.fetched(ref) <= SIZE


def test_sixty_four_threads_read_one_cold_file(stage: Stage) -> None:
    ref = stage.cold("reads")
    code = "fd = cold()\nin_threads(64, lambda at: os.pread(fd, 300_000, at) == true(at, at + 300_000))"
    assert stage.daemon.tell(THREADS + code, ref, stage.plain("reads"), 4) == []
    assert stage.fetched(ref) <= SIZE


def test_map_populate_of_a_cold_file(stage: Stage) -> None:
    ref = stage.cold("populate", tls=True)
    stage.daemon.run(
        "view = mmap.mmap(cold(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)\n"
        "assert view[:] == true(0, len(view))",
        ref,
        stage.plain("populate"),
    )
    assert stage.fetched(ref, SIZE) == SIZE


def test_o_direct_nine_in_flight(stage: Stage) -> None:
    """As llama.cpp reads with direct I/O: nine requests of a MiB at once."""
    ref = stage.cold("direct")
    stage.daemon.run(
        """
from concurrent.futures import ThreadPoolExecutor
size, fd = os.path.getsize(plain), os.open(path, os.O_RDONLY | os.O_DIRECT)
def piece(at):
    buffer = mmap.mmap(-1, 1 << 20)
    count = os.preadv(fd, [buffer], at)
    return buffer[:count] == true(at, at + (1 << 20))
with ThreadPoolExecutor(9) as pool:
    assert all(pool.map(piece, range(0, size, 1 << 20)))
""",
        ref,
        stage.plain("direct"),
    )
    assert stage.fetched(ref, SIZE) == SIZE


def test_sendfile(stage: Stage) -> None:
    ref = stage.cold("sendfile")
    stage.daemon.run(
        """
import socket
size, fd = os.path.getsize(plain), cold()
near, far = socket.socketpair()
got = bytearray()
def receive():
    while piece := far.recv(1 << 20): got.extend(piece)
thread = threading.Thread(target=receive)
thread.start()
sent = 0
while sent < size: sent += os.sendfile(near.fileno(), fd, sent, size - sent)
near.close()
thread.join()
assert got == true(0, size)
""",
        ref,
        stage.plain("sendfile"),
    )
    assert stage.fetched(ref, SIZE) == SIZE


def test_cp_and_sparse_tar(stage: Stage, tmp_path: Path) -> None:
    """Both look for holes first, and would make zeros of what they take for one."""
    ref = stage.cold("copied")
    stage.daemon.finish(
        stage.daemon.command(["cp", "--sparse=auto", str(stage.daemon.path(ref)), str(tmp_path / "cp")])
    )
    assert (tmp_path / "cp").read_bytes() == stage.plain("copied").read_bytes()
    ref = stage.cold("archived")
    path = stage.daemon.path(ref)
    stage.daemon.finish(
        stage.daemon.command(["tar", "-S", "-C", str(path.parent), "-cf", str(tmp_path / "tar"), path.name])
    )
    told = subprocess.run(["tar", "-xOf", str(tmp_path / "tar")], capture_output=True, check=True)
    assert (
        hashlib.sha256(told.stdout).digest() == hashlib.sha256(stage.plain("archived").read_bytes()).digest()
    )


def test_safe_open_of_one_layer_fetches_its_share(stage: Stage) -> None:
    name = "model.safetensors"
    make_safetensors(stage.plain(name), LAYERS)
    whole = stage.plain(name).stat().st_size
    ref = stage.cold(name)
    code = """
import hashlib, json, sys
from safetensors import safe_open
digest = hashlib.sha256()
with safe_open(sys.argv[1], framework="numpy") as model:
    for name in json.loads(sys.argv[2]): digest.update(model.get_tensor(name).tobytes())
print(digest.hexdigest())
"""
    names = json.dumps(layer_names(LAYERS, 7))

    def read(path: Path) -> str:
        return stage.daemon.finish(stage.daemon.command([sys.executable, "-c", code, str(path), names]))

    assert read(stage.daemon.path(ref)) == read(stage.plain(name))
    layer = whole // LAYERS.layers
    # The kernel reads 4 MiB around a fault, of the head as of the layer, and goes on for as much; we read ahead at most
    # as much as that again.
    assert layer <= stage.fetched(ref) <= 2 * (layer + 3 * 4 * MIB) < whole * 0.6


def test_several_readers_of_one_cold_file_fetch_each_byte_once(stage: Stage) -> None:
    ref = stage.cold("shared")
    code = "print(hashlib.sha256(open(path, 'rb').read()).hexdigest())"
    readers = [stage.daemon.client(code, ref) for _ in range(5)]
    told = {stage.daemon.finish(reader) for reader in readers}
    assert told == {hashlib.sha256(stage.plain("shared").read_bytes()).hexdigest()}
    assert stage.fetched(ref, SIZE) == SIZE


def test_five_hundred_blocked_readers_stop_nobody_else(stage: Stage, faulty: Origin) -> None:
    other = stage.cold("other")
    whole = "assert open(path, 'rb').read() == true(0, 1 << 30)"
    stage.daemon.run(whole, other, stage.plain("other"))
    stage.daemon.quiet(other)
    stalled = faulty.url("stalled")
    stage.daemon.add(stalled)
    faulty.always["/stalled"] = Fault(FaultKind.STALL_BEFORE_BODY)
    # With O_DIRECT each read is one request: all of them wait in the daemon.
    readers = stage.daemon.client(
        "fd = os.open(path, os.O_RDONLY | os.O_DIRECT)\nthreading.stack_size(1 << 17)\nbad = []\n"
        "def read(at):\n"
        " buffer = mmap.mmap(-1, 4096)\n"
        " if os.preadv(fd, [buffer], at) != 4096 or buffer[:] != true(at, at + 4096): bad.append(at)\n"
        "threads = [threading.Thread(target=read, args=(n * 40_960,)) for n in range(500)]\n"
        "for one in threads: one.start()\nfor one in threads: one.join()\nassert not bad",
        stalled,
        stage.plain("stalled"),
    )
    until(lambda: stage.daemon.file(stalled)["waiting_readers"] == 500, "all wait")
    stage.daemon.run(
        "for _ in range(20):\n assert os.stat(path).st_size and os.listdir(os.path.dirname(path))\n" + whole,
        other,
        stage.plain("other"),
    )
    past_the_page_cache = (
        "fd, buffer = os.open(path, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 1 << 20)\n"
        "for at in range(0, 20 << 20, 1 << 20):\n"
        " assert os.preadv(fd, [buffer], at) == 1 << 20 and buffer[:] == true(at, at + (1 << 20))"
    )
    stage.daemon.run(past_the_page_cache, other, stage.plain("other"))
    cold = stage.cold("cold-beside")
    stage.daemon.run(whole, cold, stage.plain("cold-beside"))
    assert stage.daemon.file(stalled)["waiting_readers"] == 500
    del faulty.always["/stalled"]
    stage.daemon.finish(readers)


def test_a_reader_killed_in_mid_read_leaves_nothing_behind(stage: Stage, faulty: Origin) -> None:
    ref = faulty.url("killed")
    stage.daemon.add(ref)
    stage.daemon.run("assert os.pread(cold(), 9, 0) == true(0, 9)", ref, stage.plain("killed"))
    stage.daemon.quiet(ref)  # head and tail are there; from now on answers stop in the middle of a chunk
    faulty.always["/killed"] = Fault(FaultKind.STALL_MID_BODY, after=300_000)
    asked = len(faulty.requests("/killed"))
    reader = stage.daemon.client("os.pread(cold(), 9, 5 << 20)", ref)
    until(lambda: len(faulty.requests("/killed")) > asked, "the origin was asked for its chunks")
    until(lambda: stage.daemon.file(ref)["waiting_readers"], "it waits")
    reader.kill()
    assert reader.wait(60) == -signal.SIGKILL
    del faulty.always["/killed"]
    stage.daemon.run("assert open(path, 'rb').read() == true(0, 1 << 30)", ref, stage.plain("killed"))
    stage.daemon.quiet(ref)
    assert stage.daemon.file(ref)["waiting_readers"] == 0
    assert stage.daemon.file(ref)["present_chunks"] == stage.daemon.file(ref)["chunk_count"]


def test_zz_at_the_end_memory_index_and_files_agree(stage: Stage) -> None:
    """Last in this file: everything above went through this one daemon."""
    assert stage.daemon.stop() == 0
    cache = Cache.open(stage.daemon.cache, create=False, now=0)
    try:
        assert cache.was_clean
        assert cache.check(deep=True) == []
    finally:
        cache.close()
    assert "Traceback" not in stage.daemon.log
