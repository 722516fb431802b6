"""The whole against plain bytes, on a real mount: reads and mapped reads between restarts, kills, rot and bad origins.

Each step drives the real daemon; the reader is another process. A read gives exactly the bytes, or, while the origin is
away or wrong, EIO. It ends with an honest origin: everything is then complete and right, and index and files agree.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from weightfs.core.geometry import MIB
from weightfs.core.metalink import write_metalink
from weightfs.sources.publish import describe
from weightfs.store.cache import Cache
from weightfs.testing.daemon import Daemon
from weightfs.testing.mounts import can_mount
from weightfs.testing.nginx import Nginx
from weightfs.testing.published import sample

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nginx,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
    pytest.mark.timeout(0 if os.environ.get("WEIGHTFS_SOAK") == "1" else 600),
]

SOAK = os.environ.get("WEIGHTFS_SOAK") == "1" or settings.get_current_profile_name() == "soak"
SIZE = 5 * MIB + 321
DATA = sample(SIZE, 77)
CHUNKS = st.integers(0, SIZE // MIB)
OFFSETS = st.integers(0, SIZE - 1)
LENGTHS = st.integers(1, 2 * MIB)

READ = """
start, stop = int(sys.argv[3]), int(sys.argv[4])
fd = cold()
try:
    got = b''
    while len(got) < stop - start and (piece := os.pread(fd, stop - start - len(got), start + len(got))): got += piece
    print('right' if got == true(start, stop) else 'WRONG')
except OSError as error:
    print(errno.errorcode[error.errno])
"""
MAPPED = """
start, stop = int(sys.argv[3]), int(sys.argv[4])
with mmap.mmap(cold(), 0, prot=mmap.PROT_READ) as mapped:
    print('right' if mapped[start:stop] == true(start, stop) else 'WRONG')
"""


class MountModel(RuleBasedStateMachine):
    """One cache, one origin, one daemon life after another."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="weightfs-model-"))
        origin = self.root / "origin"
        origin.mkdir()
        self.file, self.plain = origin / "m.bin", self.root / "plain"
        self.file.write_bytes(DATA)
        self.plain.write_bytes(DATA)
        self.nginx = Nginx(origin).__enter__()
        url = self.nginx.url("m.bin")
        (origin / "m.bin.meta4").write_bytes(write_metalink(describe(self.file, [url])))
        self.ref = url
        # Bounds short enough for a test: an origin that is away or wrong is told to the reader soon.
        options = ["--fill", "never", "--workers", "1", "--read-timeout", "1s", "--connect-timeout", "500ms"]
        self.daemon = Daemon(self.root / "daemon", self.ref, options=options).start()
        self.away = False
        self.wrong: set[int] = set()

    # ---- readers

    def _answers(self) -> set[str]:
        return {"right", "EIO"} if self.away or self.wrong else {"right"}

    @rule(start=OFFSETS, length=LENGTHS)
    def read_some(self, start: int, length: int) -> None:
        self.read(start, length)

    def read(self, start: int, length: int) -> None:
        found = self.daemon.run(READ, self.ref, self.plain, start, min(SIZE, start + length)).strip()
        assert found in self._answers(), found

    @precondition(lambda self: not self.away and not self.wrong)  # EIO on a page is SIGBUS
    @rule(start=OFFSETS, length=LENGTHS)
    def read_mapped(self, start: int, length: int) -> None:
        found = self.daemon.run(MAPPED, self.ref, self.plain, start, min(SIZE, start + length)).strip()
        assert found == "right"

    # ---- lives

    @rule()
    def restart(self) -> None:
        assert self.daemon.stop() == 0
        self.daemon.start()

    @rule()
    def kill(self) -> None:
        self.daemon.kill()
        self.daemon.start()

    @rule(chunk=CHUNKS)
    def rot_on_disk(self, chunk: int) -> None:
        """A byte of the cache file changes while nobody looks; of a chunk that is there, if it can be had."""
        self.read(chunk * MIB, 1)
        assert self.daemon.stop() == 0
        for path in (self.daemon.cache / "blobs").rglob("*"):
            if path.is_file():
                with path.open("r+b") as file:
                    file.seek(chunk * MIB)
                    file.write(bytes([DATA[chunk * MIB] ^ 0x55]))
        self.daemon.start()
        self.read(chunk * MIB, 1)

    # ---- the origin

    @rule()
    def origin_leaves_or_returns(self) -> None:
        if self.away:
            self.nginx.resume()
        else:
            self.nginx.pause()
        self.away = not self.away

    @rule(chunk=CHUNKS)
    def origin_goes_wrong(self, chunk: int) -> None:
        """One byte, under the same size and time: the validator cannot tell."""
        self.wrong.add(chunk)
        self._write_origin()
        self.read(chunk * MIB, 1)

    @rule()
    def origin_is_mended(self) -> None:
        self.wrong.clear()
        self._write_origin()
        # What was given up is held for a while: a new life asks again at once.
        self.restart()

    def _write_origin(self) -> None:
        before = self.file.stat()
        data = bytearray(DATA)
        for chunk in self.wrong:
            data[chunk * MIB] ^= 1
        with self.file.open("r+b") as file:
            file.write(data)
        os.utime(self.file, ns=(before.st_atime_ns, before.st_mtime_ns))

    def teardown(self) -> None:
        try:
            if self.away:
                self.origin_leaves_or_returns()
            self.origin_is_mended()
            done = self.daemon.cli("pull", self.ref)
            assert done.returncode == 0, done.stderr
            assert self.daemon.run(READ, self.ref, self.plain, 0, SIZE).strip() == "right"
            assert self.daemon.stop() == 0
            cache = Cache.open(self.daemon.cache, now=int(time.time()))
            try:
                assert cache.check(deep=True) == []
            finally:
                cache.close()
        finally:
            self.daemon.close()
            self.nginx.__exit__(None, None, None)
            shutil.rmtree(self.root, ignore_errors=True)


TestMountModel = MountModel.TestCase
TestMountModel.settings = settings(
    max_examples=100 if SOAK else 2,
    stateful_step_count=40 if SOAK else 8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
