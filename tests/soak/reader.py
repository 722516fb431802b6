"""A client of the mount, as a process of its own: reads and maps files at random and compares each byte.

`reader.py SEED LIST REPORT`: LIST is JSON, pairs of (path in the mount, path of the same bytes elsewhere). Until its
standard input ends; REPORT then has what it counted. A wrong byte ends it at once with 1. Errors are noted with their
times: whether one was due is for the reader of the report to say.

Standard library only, and `-I -S`: quick to start, and nothing of weightfs is in it.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

MOST = 4 << 20  # bytes of one read
STEP = 128 << 10  # what a stream reads at once
MAPPED = 24  # pages touched of a mapping
PAGE = 4096
PAUSE = 0.03  # seconds between two things: readers alone would take the whole machine
MAX_ERRORS = 10_000  # kept in the report


class WrongBytes(Exception):
    """What was read is not what the file has."""


class Reader:
    """See the module."""

    def __init__(self, seed: int, files: list[tuple[str, str]]) -> None:
        self.chance = random.Random(seed)
        self.files = files
        self.counts = {"reads": 0, "bytes": 0, "streams": 0, "mappings": 0, "listings": 0, "longest": 0.0}
        self.errors: list[dict[str, Any]] = []

    def once(self) -> None:
        """One thing that a runtime would do."""
        path, plain = self.chance.choice(self.files)
        began = time.time()
        try:
            self.chance.choices((self.read, self.stream, self.map, self.look), (6, 2, 3, 1))[0](path, plain)
        except OSError as error:
            if len(self.errors) < MAX_ERRORS:
                name = errno.errorcode.get(error.errno or 0, str(error.errno))
                self.errors.append({"began": began, "ended": time.time(), "errno": name, "path": path})
            time.sleep(0.05)  # nobody tries again at once for ever
        self.counts["longest"] = max(self.counts["longest"], time.time() - began)

    def compare(self, got: bytes, plain: str, at: int, path: str) -> None:
        """WrongBytes unless `got` is what lies at `at`."""
        with open(plain, "rb") as file:
            true = os.pread(file.fileno(), len(got), at)
        if got != true:
            raise WrongBytes(f"{path} at {at}: {len(got)} bytes are not those of {plain}")
        self.counts["bytes"] += len(got)

    def read(self, path: str, plain: str) -> None:
        """Some bytes at some place."""
        size = os.stat(plain).st_size
        at = self.chance.randrange(size)
        fd = os.open(path, os.O_RDONLY)
        try:
            wanted = min(self.chance.randrange(1, MOST), size - at)
            got = b""
            while (
                len(got) < wanted
            ):  # pread(2) may give what came before an error, and the error the next time
                more = os.pread(fd, wanted - len(got), at + len(got))
                if not more:
                    raise WrongBytes(f"{path} ends at {at + len(got)}, and has {size} bytes")
                got += more
        finally:
            os.close(fd)
        self.compare(got, plain, at, path)
        self.counts["reads"] += 1

    def stream(self, path: str, plain: str) -> None:
        """From some place on, as a loader without mmap."""
        size = os.stat(plain).st_size
        at = self.chance.randrange(size)
        with open(path, "rb", buffering=0) as file:
            file.seek(at)
            for _ in range(self.chance.randrange(1, 64)):
                got = file.read(STEP)
                if not got and at < size:
                    raise WrongBytes(f"{path} ends at {at}, and has {size} bytes")
                self.compare(got, plain, at, path)
                at += len(got)
        self.counts["streams"] += 1

    def map(self, path: str, plain: str) -> None:
        """Pages of a mapping, in a child: a fault that cannot be served is a signal."""
        child = os.fork()
        if child == 0:
            os._exit(self.touch(path, plain, random.Random(self.chance.random())))
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGBUS:
            raise OSError(errno.EIO, "SIGBUS")
        if (code := os.waitstatus_to_exitcode(status)) == 1:
            raise WrongBytes(f"a mapping of {path}")
        if code:
            raise OSError(code, os.strerror(code))
        self.counts["mappings"] += 1

    def touch(self, path: str, plain: str, chance: random.Random) -> int:
        """0, 1 for a wrong byte, or an errno. `EPERM` is 1, and is none that could come here."""
        try:
            with open(path, "rb") as file, open(plain, "rb") as other:
                size = os.fstat(other.fileno()).st_size
                with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as view:
                    for _ in range(MAPPED):
                        at = chance.randrange(size) // PAGE * PAGE
                        if view[at : at + PAGE] != os.pread(other.fileno(), PAGE, at):
                            return 1
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def look(self, path: str, plain: str) -> None:
        """What `ls -l` asks."""
        for entry in os.scandir(os.path.dirname(path)):
            entry.stat()
        if os.stat(path).st_size != os.stat(plain).st_size:
            raise WrongBytes(f"the size of {path}")
        self.counts["listings"] += 1


def main() -> None:
    """See the module."""
    seed, files, report = sys.argv[1:4]
    reader = Reader(int(seed), json.loads(Path(files).read_text()))
    wrong = ""
    while not wrong and not select.select([sys.stdin], [], [], 0)[0]:
        time.sleep(reader.chance.uniform(0, PAUSE))
        try:
            reader.once()
        except WrongBytes as error:
            wrong = str(error)
    Path(report).write_text(json.dumps({**reader.counts, "errors": reader.errors, "wrong": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
