"""`weightfs gc` on an idle cache, as people run it; and its words."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weightfs.cli.cleaning import gc_lines
from weightfs.store.cache import Cache

SIZE = 2_000_000
BOUND = 60.0


class Idle:
    """A cache with two pulled models; the first is the older one."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.cache = home / "cache"
        self.refs = []
        for name in ("one", "two"):
            data = hashlib.shake_128(name.encode()).digest(SIZE)
            (home / f"{name}.bin").write_bytes(data)
            self.refs.append(f"file://{home}/{name}.bin#sha256={hashlib.sha256(data).hexdigest()}")

    def run(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("WEIGHTFS_", "XDG_"))}
        done = subprocess.run(
            [sys.executable, "-m", "weightfs", *arguments, "--cache", str(self.cache)],
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=False,
            env={**kept, "HOME": str(self.home)},
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    def tell(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    def present(self) -> dict[str, int]:
        return {ref["ref"]: ref["present_bytes"] for ref in self.tell("ls")["refs"]}

    def used_at(self, times: list[int]) -> None:
        """As if the models were used then."""
        cache = Cache.open(self.cache, now=0)
        try:
            ids = [stored.manifest.entries[0].blob for stored in cache.refs()]
            cache.note_uses(
                {blob.id: [time] * blob.shape.chunk_count for blob, time in zip(ids, times, strict=True)}
            )
        finally:
            cache.close()


@pytest.fixture
def idle(tmp_path: Path) -> Idle:
    made = Idle(tmp_path.resolve())
    made.run("pull", "--workers", "0", "-q", *made.refs)
    return made


def test_gc_of_an_idle_cache(idle: Idle) -> None:
    now = int(Path(idle.home / "one.bin").stat().st_mtime)
    idle.used_at([now - 10 * 86_400, now - 3600])
    one, two = idle.refs
    assert idle.tell("gc")["evicted"] == []  # no limit is configured, and the disk has room
    planned = idle.tell("gc", "--dry-run", "--max-size", "3MB")
    assert [(item["ref"], item["nbytes"], item["whole"]) for item in planned["evicted"]] == [
        (one, SIZE, True)
    ]
    assert planned["dry_run"] is True
    assert idle.present() == {one: SIZE, two: SIZE}
    text = idle.run("gc", "--max-age", "7d").stdout.splitlines()
    assert text[0].startswith(f"{one.partition('#')[0]}")
    assert "1.9 MiB evicted, not used for" in text[0]
    assert text[-1].startswith("1.9 MiB freed; 1.9 MiB in the cache")
    assert idle.present() == {one: 0, two: SIZE}
    cache = Cache.open(idle.cache, now=0)
    try:
        assert cache.check(deep=True) == []
    finally:
        cache.close()
    # What is evicted is pulled again; what the limits are too small for is told, with the code of a full cache.
    idle.run("pull", "--workers", "0", "-q", "--max-size", "5MB", *idle.refs)
    assert idle.present() == {one: SIZE, two: SIZE}
    failed = idle.run("pull", "--workers", "0", "-q", "--max-size", "1MiB", idle.refs[0])
    assert failed.stderr == ""  # it is whole already
    idle.run("rm", *idle.refs)
    failed = idle.run("pull", "--workers", "0", "-q", "--max-size", "1500000", idle.refs[0], code=5)
    assert "max-size" in failed.stderr
    assert "raise max-size" in failed.stderr


def test_who_only_looks_evicts_nothing(idle: Idle) -> None:
    idle.used_at([1, 2])
    idle.home.joinpath("config.toml").write_text('max-size = "1MiB"\nmax-age = "1h"\n')
    for command in (["ls"], ["status"], ["verify"]):
        idle.run(*command, "--config", str(idle.home / "config.toml"))
    assert sum(idle.present().values()) == 2 * SIZE


REPORT = {
    "dry_run": True,
    "evicted": [
        {"ref": "https://h/m", "blob": "00", "nbytes": 2**20, "idle_seconds": 7200.0, "whole": True},
        {"ref": "https://h/n", "blob": "01", "nbytes": 2**20, "idle_seconds": 60.0, "whole": False},
    ],
    "freed_bytes": 2**21,
    "missing_bytes": 2**20,
    "held_bytes": 2**22,
    "limit_bytes": 2**20,
}


def test_the_words_of_gc() -> None:
    assert gc_lines(REPORT) == [
        "https://h/m: 1.0 MiB would be evicted, not used for 2h",
        "https://h/n: 1.0 MiB of it would be evicted, not used for 1m",
        "2.0 MiB to be freed; 4.0 MiB in the cache, limit 1.0 MiB",
        "warning: 1.0 MiB more are beyond the limits, and what is left is pinned or in use",
    ]
    done = {**REPORT, "dry_run": False, "evicted": [], "missing_bytes": 0, "limit_bytes": None}
    assert gc_lines(done) == ["2.0 MiB freed; 4.0 MiB in the cache, no limit"]
