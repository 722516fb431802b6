"""A fuzzed index and fuzzed data files: no wrong byte, no crash loop. How a round is judged: fuzz.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = os.environ.get("WEIGHTFS_SOAK") == "1"
ROUNDS = 5_000 if SOAK else 20
SEED = 20  # its first rounds damage index and data, seen and unseen

pytestmark = pytest.mark.timeout(0 if SOAK else 120)


def test_damage_of_any_kind_costs_fetches_and_nothing_else(tmp_path: Path) -> None:
    argv = [
        sys.executable,
        str(Path(__file__).with_name("fuzz.py")),
        "--rounds",
        str(ROUNDS),
        "--seed",
        str(SEED),
    ]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=100 + 5 * ROUNDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sums = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(sums))
    assert sums["faults"] == 0
    assert sums["executions"] >= 2 * ROUNDS
    assert sums["second life: all right"] > ROUNDS // 2
