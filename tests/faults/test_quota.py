"""A quota that is used up: EDQUOT, as btrfs gives it for its qgroups, to root as well. `statvfs` knows nothing of it.

ext4 and XFS spare root (CAP_SYS_RESOURCE), and need a kernel with their quota formats.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.plan import Limits
from weightfs.core.ref import parse_ref
from weightfs.engine import committer, dropping, uncached
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import NoSpaceError
from weightfs.testing import disks
from weightfs.testing.engines import running_engine
from weightfs.testing.origin import Origin, open_origin
from weightfs.testing.published import sample

QUOTA = 32 * MIB  # the index reserves eight of them
LARGE = sample(QUOTA + 5 * MIB)
QUICK = Limits(hold_base=0.05, hold_cap=0.2, backoff_base=0.01, backoff_cap=0.1)
LAZY = EngineSettings(workers=0, fill=FillMode.NEVER, readahead_bytes=0, limits=QUICK, commit_seconds=0.05)
SECONDS = 60


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (committer, dropping):
        monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(uncached, "REFUSAL_SECONDS", 0.1)


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Path]:
    """A directory whose filesystem has room, of which little may be used."""
    if (why := disks.missing("btrfs")) is not None or shutil.which("btrfs") is None:
        pytest.skip(f"no quota can be set here: {why or 'btrfs is not installed'}")
    image = tmp_path / "btrfs.img"
    disks.make_disk(image, "btrfs")
    with disks.mounted(image, "btrfs") as directory:
        disks.run("btrfs", "quota", "enable", str(directory))
        disks.run("btrfs", "qgroup", "limit", str(QUOTA), str(directory))
        yield directory
    image.unlink()


def ref_of(origin: Origin, name: str, data: bytes) -> str:
    return f"{origin.url(name)}#sha256={hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize("workers", [0, 1])
async def test_what_a_quota_does_not_let_in_is_read_past_the_cache_and_the_disk_is_not_sick(
    limited: Path, workers: int
) -> None:
    """Nobody can be evicted either: btrfs writes nothing in place, so that the index cannot say who went."""
    async with open_origin({"/large": LARGE}) as origin:
        ref = ref_of(origin, "large", LARGE)
        with trio.fail_after(SECONDS):
            async with running_engine(limited / "cache", replace(LAZY, workers=workers)) as engine:
                blob = (await engine.add(parse_ref(ref))).entries[0].blob
                for _ in range(2):
                    for start in range(0, len(LARGE), MIB):
                        span = ByteSpan(start, start + MIB).clamp(len(LARGE))
                        assert await engine.read(blob.id, span) == LARGE[span.start : span.stop]
                status = engine.status()
                assert status.uncached_bytes > 0
                assert status.disk == "healthy"
                assert "full" in status.trouble
                assert 0 < engine.blob_status(blob.id).present_bytes < QUOTA
                with pytest.raises(NoSpaceError, match="full"):
                    await engine.complete(ref)
                free = os.statvfs(limited)
                assert free.f_bavail * free.f_frsize > 100 * MIB  # it is not the disk that is full
                disks.run("btrfs", "qgroup", "limit", "none", str(limited))
                while not engine.blob_status(blob.id).complete:
                    with contextlib.suppress(NoSpaceError):
                        await engine.complete(ref)
                    await trio.sleep(0.01)
                assert engine.status().disk == "healthy"
