"""The origin that everybody downloads from, where to work, and how contenders take turns.

Rule: they take turns within every round, the first one rotating; what one left behind (dirty pages,
files) is gone before the next begins. Throughput is in MB/s of file content.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from contenders import (
    MIB,
    WEIGHTFS,
    RcloneMount,
    WeightfsMount,
    empty,
    run,
)
from report import Measure

from weightfs.testing.nginx import Nginx

MB = 1_000_000
NAME = "model.gguf"
TLS = "tls"


@dataclass(slots=True)
class Bench:
    """The origin, and where to work: `work` on the disk, `shm` in memory."""

    work: Path
    shm: Path
    rounds: int
    size: int
    ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    origin: Nginx = field(init=False)

    def __enter__(self) -> Self:
        with self.ends:
            root = empty(self.shm / "origin")
            self.origin = self.ends.enter_context(Nginx(root, workers=2, server_config="autoindex on;"))
            write_random(root / NAME, self.size)
            run(WEIGHTFS, "publish", root / NAME, "--url", self.origin.url(NAME))
            # A .meta4 names mirrors: what is fetched over https is published apart, so that all of it is.
            (root / TLS).mkdir()
            os.link(root / NAME, root / TLS / NAME)
            run(WEIGHTFS, "publish", root / TLS / NAME, "--url", self.origin.https_url(f"{TLS}/{NAME}"))
            self.ends = self.ends.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.ends.close()

    def turns(self, measure: Measure, contenders: dict[str, Callable[[], float]]) -> Measure:
        """Let them take turns, `rounds` times."""
        names = list(contenders)
        for name in names:
            measure.rounds[name] = []
        for number in range(self.rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                os.sync()
                measure.add(name, contenders[name]())
        return measure

    def speed(self, seconds: float) -> float:
        """MB/s of one file read in `seconds`."""
        return self.size / seconds / MB

    def weightfs(self, where: Path | None = None) -> WeightfsMount:
        """A mount with an empty cache."""
        base = where or self.work
        return WeightfsMount(base / "weightfs-mnt", empty(base / "weightfs-cache"))

    def rclone(self, url: str | None = None) -> RcloneMount:
        """A mount with an empty cache."""
        return RcloneMount(
            self.work / "rclone-mnt", empty(self.work / "rclone-cache"), url or self.origin.url("")
        )


def write_random(path: Path, size: int) -> None:
    """Bytes that nothing compresses and no two chunks share."""
    with path.open("wb") as file:
        for _ in range(0, size, 16 * MIB):
            file.write(os.urandom(min(16 * MIB, size - file.tell())))


def sparse(path: Path, size: int) -> None:
    """A file of zeros that takes no room."""
    with path.open("wb") as file:
        file.truncate(size)


def stored(directory: Path) -> int:
    """Bytes that the files below occupy."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
