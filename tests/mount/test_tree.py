"""What a client of a real mount sees: names, attributes, bytes, and refusals. One server for all of them."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightfs.mount import mounttable
from weightfs.testing.mounts import FakeMount, can_mount
from weightfs.testing.waiting import until

pytestmark = pytest.mark.mount

MANY = {f"many/file-{number:04}": number for number in range(2000)}
FILES = {"a.gguf": 5_000_001, "sub/b.gguf": 70_000, "sub/deep/c": 1, "empty": 0, "big": 3 << 30, **MANY}


@pytest.fixture(scope="module")
def mounted() -> Iterator[FakeMount]:
    if not can_mount():
        pytest.skip("needs /dev/fuse and CAP_SYS_ADMIN")
    with (
        tempfile.TemporaryDirectory() as place,
        FakeMount(Path(place).resolve(), FILES, present=0.5) as server,
    ):
        yield server.ready()


def test_is_a_weightfs_mount_read_only_without_devices_or_setuid(mounted: FakeMount) -> None:
    (mount,) = mounttable.mounts_at(mounted.mountpoint)
    assert (mount.fstype, mount.source, mount.device) == ("fuse.weightfs", "weightfs", mounted.device)
    line = next(text for text in Path("/proc/self/mountinfo").read_text().splitlines() if mount.path in text)
    assert {"ro", "nosuid", "nodev"} <= set(line.split()[5].split(","))
    assert "default_permissions" in line


def test_names_attributes_and_bytes(mounted: FakeMount) -> None:
    told = json.loads(
        mounted.run(
            """
seen = {}
for directory, _, names in os.walk(root):
    for name in names:
        path = os.path.join(directory, name)
        info = os.lstat(path)
        seen[os.path.relpath(path, at(''))] = [oct(info.st_mode), info.st_size, info.st_nlink, info.st_mtime]
info = os.stat(root)
assert oct(info.st_mode) == '0o40555' and info.st_ino == 1 and info.st_nlink == 3, info
assert info.st_uid == os.getuid() and info.st_gid == os.getgid()
for name in 'a.gguf', 'sub/b.gguf', 'sub/deep/c', 'empty':
    with open(at(name), 'rb') as file:
        data = file.read()
    assert data == pattern(name, 0, seen[name][1]), name
with open(at('a.gguf'), 'rb') as file:
    assert os.pread(file.fileno(), 100, 4_999_999) == pattern('a.gguf', 4_999_999, 5_000_001)
    assert os.pread(file.fileno(), 100, 5_000_001) == b''
    assert os.pread(file.fileno(), 100, 1 << 60) == b''
print(json.dumps(seen))
"""
        )
    )
    assert told == {name: ["0o100444", size, 1, 1_700_000_000.0] for name, size in FILES.items()}


def test_a_directory_of_2000_entries_is_whole(mounted: FakeMount) -> None:
    names = mounted.run("print('\\n'.join(os.listdir(at('many'))))").splitlines()
    assert sorted(names) == [f"file-{number:04}" for number in range(2000)]


def test_st_blocks_tell_what_is_cached_and_are_never_zero_for_content(mounted: FakeMount) -> None:
    mounted.call("add", files={"cold": 4096, "cold-large": 1 << 20})
    blocks = json.loads(
        mounted.run(
            "print(json.dumps([os.stat(at(n)).st_blocks for n in ('big', 'cold', 'cold-large', 'empty')]))"
        )
    )
    assert blocks == [(3 << 30) // 2 // 512, 8, 8, 0]


@pytest.mark.parametrize("name", ["state", "digest", "cached", "source"])
def test_extended_attributes(mounted: FakeMount, name: str) -> None:
    value = mounted.run("print(os.getxattr(at('a.gguf'), 'user.weightfs.' + sys.argv[2]).decode())", name)
    listed = mounted.run("print(os.listxattr(at('a.gguf')))")
    assert f"user.weightfs.{name}" in listed
    expected = {"state": "provisional", "cached": "2500000", "source": "https://fake.example/a.gguf"}
    assert value == expected.get(name, value)
    if name == "digest":
        assert value.startswith("sha256:")
        assert len(value) == 71


def test_an_unknown_attribute_and_a_missing_name(mounted: FakeMount) -> None:
    assert json.loads(
        mounted.run(
            """
def code(call):
    try: call()
    except OSError as error: return error.errno
print(json.dumps([code(lambda: os.getxattr(at('a.gguf'), 'user.other')), code(lambda: os.stat(at('nothing'))),
    code(lambda: os.stat(at('a.gguf/x'))), code(lambda: os.stat(root.encode() + b'/\\xff')),
    code(lambda: os.listdir(at('a.gguf')))]))
"""
        )
    ) == [errno.ENODATA, errno.ENOENT, errno.ENOTDIR, errno.ENOENT, errno.ENOTDIR]


WRITES = {
    "open for writing": "os.open(at('a.gguf'), os.O_WRONLY)",
    "open for both": "os.open(at('a.gguf'), os.O_RDWR)",
    "truncate on open": "os.open(at('a.gguf'), os.O_RDONLY | os.O_TRUNC)",
    "create": "os.open(at('new'), os.O_CREAT | os.O_WRONLY)",
    "mkdir": "os.mkdir(at('new'))",
    "rmdir": "os.rmdir(at('sub'))",
    "unlink": "os.unlink(at('a.gguf'))",
    "rename": "os.rename(at('a.gguf'), at('z'))",
    "truncate": "os.truncate(at('a.gguf'), 1)",
    "chmod": "os.chmod(at('a.gguf'), 0o777)",
    "chown": "os.chown(at('a.gguf'), 1, 1)",
    "utime": "os.utime(at('a.gguf'))",
    "setxattr": "os.setxattr(at('a.gguf'), 'user.x', b'1')",
    "removexattr": "os.removexattr(at('a.gguf'), 'user.weightfs.state')",
    "link": "os.link(at('a.gguf'), at('hard'))",
    "symlink": "os.symlink('a.gguf', at('soft'))",
    "mknod": "os.mknod(at('fifo'), 0o010644)",
    "access": "sys.exit(0) if not os.access(at('a.gguf'), os.W_OK) else None",
}


def test_every_write_is_refused_as_read_only(mounted: FakeMount) -> None:
    del (writes := dict(WRITES))["access"]
    codes = json.loads(
        mounted.run(
            """
codes = {}
for name, code in json.loads(sys.argv[2]).items():
    try: eval(code)
    except OSError as error: codes[name] = error.errno
    else: codes[name] = 0
assert not os.access(at('a.gguf'), os.W_OK) and os.access(at('a.gguf'), os.R_OK)
print(json.dumps(codes))
""",
            json.dumps(writes),
        )
    )
    assert codes == dict.fromkeys(writes, errno.EROFS)


def test_statfs_is_the_caches_room(mounted: FakeMount) -> None:
    info = mounted.run(
        "s = os.statvfs(root); print(s.f_blocks * s.f_frsize, s.f_bavail * s.f_frsize, s.f_namemax)"
    )
    assert info == f"{1 << 40} {1 << 39} 255"


def test_seek_hole_direct_io_mmap_and_large_requests(mounted: FakeMount) -> None:
    mounted.run(
        """
fd = os.open(at('a.gguf'), os.O_RDONLY)
assert os.lseek(fd, 0, os.SEEK_HOLE) == 5_000_001
assert os.lseek(fd, 5, os.SEEK_DATA) == 5
direct = os.open(at('big'), os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 9 << 20)
assert os.preadv(direct, [buffer], 1 << 20) == 9 << 20
assert buffer[:] == pattern('big', 1 << 20, 10 << 20)
view = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
assert view[4_000_000:4_100_000] == pattern('a.gguf', 4_000_000, 4_100_000)
"""
    )
    spans = mounted.call("stats")["spans"]["big"]
    assert max(stop - begin for begin, stop in spans) == 1 << 20


def test_64_threads_fault_cold_pages_of_one_mapping(mounted: FakeMount) -> None:
    mounted.run(
        """
fd = os.open(at('big'), os.O_RDONLY)
size = 64 << 20
view = mmap.mmap(fd, size, prot=mmap.PROT_READ)
wrong = []
gate = threading.Barrier(64)
def work(number):
    gate.wait()
    for step in range(8):
        start = ((number * 8 + step) * 7919 * 4096) % (size - 4096)
        if view[start:start + 4096] != pattern('big', start, start + 4096): wrong.append(start)
threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong, wrong
"""
    )


def test_map_populate_reads_everything_once(mounted: FakeMount) -> None:
    mounted.call("add", files={"populated": 20_000_000})
    mounted.run(
        """
fd = os.open(at('populated'), os.O_RDONLY)
view = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
assert view[:] == pattern('populated', 0, 20_000_000)
"""
    )
    spans = mounted.call("stats")["spans"]["populated"]
    assert sum(stop - begin for begin, stop in spans) == 20_000_000


def test_one_blob_has_one_inode_and_its_names_are_counted(mounted: FakeMount) -> None:
    assert mounted.run("s = os.stat(at('a.gguf')); print(s.st_nlink, s.st_ino > 1)") == "1 True"
    until(lambda: mounted.call("stats")["handles"]["a.gguf"] == 0, "the handles are released")


def test_a_new_tree_is_seen_at_once_and_an_open_file_outlives_its_name(mounted: FakeMount) -> None:
    mounted.call("add", files={"later/x": 200_000})
    client = mounted.start(
        """
fd = os.open(at('later/x'), os.O_RDONLY)
print('open', flush=True)
while True:
    try: os.stat(at('later/x'))
    except FileNotFoundError: break
    time.sleep(0.02)
assert os.fstat(fd).st_size == 200_000
"""
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "open\n"
    mounted.call("remove", name="later/x")
    mounted.finish(client)
    assert mounted.call("stats")["internal_errors"] == 0
