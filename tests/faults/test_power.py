"""Power cuts on ext4, XFS and btrfs: no wrong byte afterwards, nothing recorded that is not there.

What a cut is, and how it is judged: power.py. Each test runs it in namespaces of its own, so nothing stays mounted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weightfs.core.geometry import MIB
from weightfs.testing import disks

SOAK = os.environ.get("WEIGHTFS_SOAK") == "1"
CUTS = 300 if SOAK else 5
UNSETTLED = 8 * MIB  # as the driver has it

pytestmark = [pytest.mark.nginx, pytest.mark.timeout(0 if SOAK else 120)]


def cuts_of(
    filesystem: str, place: Path, count: int, *more: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every cut, and the sums. Skips, with the reason, where the filesystem cannot be tried."""
    if (why := disks.missing(filesystem)) is not None:
        pytest.skip(f"{filesystem}: {why}")
    argv = [sys.executable, str(Path(__file__).with_name("power.py")), filesystem, "--cuts", str(count)]
    environment = {**os.environ, "TMPDIR": str(place)}
    done = subprocess.run(
        [*argv, "--place", str(place), *more],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=100 + 10 * count,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    assert "cuts" in lines[-1], done.stdout + done.stderr
    assert list(place.glob("weightfs-*")) == []
    return lines[:-1], lines[-1]


@pytest.mark.parametrize("filesystem", disks.FILESYSTEMS)
def test_after_a_power_cut_everything_recorded_is_there(tmp_path: Path, filesystem: str) -> None:
    cuts, sums = cuts_of(filesystem, tmp_path, CUTS)
    print(json.dumps(sums))
    assert [cut for cut in cuts if cut["problems"] or cut["lost"]] == []
    assert sums["refetched bytes, max"] <= UNSETTLED
    assert CUTS // 2 <= len(cuts) <= CUTS
    assert any(cut["landed"] for cut in cuts)


def test_records_before_their_data_are_noticed_and_never_served(tmp_path: Path) -> None:
    """The other order: the judge sees chunks that are not there; the engine finds each at its first touch."""
    filesystem = next(
        (name for name in disks.FILESYSTEMS if disks.missing(name) is None), disks.FILESYSTEMS[0]
    )
    cuts, sums = cuts_of(filesystem, tmp_path, 4, "--swapped")
    assert sums["chunks recorded and not there"] > 0
    assert [cut for cut in cuts if cut["problems"]] == []
