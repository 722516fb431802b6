"""A little of `make soak` in every run: kills, restarts, outages and a full disk under readers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from weightfs.testing import disks

SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.mount
@pytest.mark.skipif(disks.missing("ext4") is not None, reason="needs root, loop devices and namespaces")
@pytest.mark.timeout(400)
def test_a_quarter_of_a_minute() -> None:
    argv = [sys.executable, str(SOAK), "--minutes", "0.25", "--models", "6", "--readers", "2"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout
