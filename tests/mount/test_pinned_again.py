"""A blob that is removed and pinned again has the same inode: pages of its former life must not be served."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from weightfs.core.geometry import MIB
from weightfs.testing.daemon import Daemon, until
from weightfs.testing.mounts import can_mount
from weightfs.testing.nginx import Nginx

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nginx,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

DIGEST = """
import hashlib
with open(path, 'rb') as file: print(hashlib.sha256(file.read()).hexdigest())
"""


def test_wrong_bytes_that_were_read_are_gone_when_the_origin_is_right_again(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(4 * MIB)
    digest = hashlib.sha256(data).hexdigest()
    bad = bytearray(data)
    bad[MIB + 7] ^= 1
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "m.bin").write_bytes(bad)
    with Nginx(origin) as nginx:
        ref = f"{nginx.url('m.bin')}#sha256={digest}"
        with Daemon(tmp_path / "d", ref, options=["--no-passthrough"]) as daemon:
            daemon.start()
            assert daemon.run(DIGEST, ref).strip() == hashlib.sha256(bad).hexdigest()
            until(lambda: daemon.file(ref)["trust"] == "quarantined", "it is found to be wrong")
            assert daemon.cli("rm", ref).returncode == 0
            (origin / "m.bin").write_bytes(data)
            daemon.add(ref)
            assert daemon.cli("pull", ref).returncode == 0
            assert daemon.run(DIGEST, ref).strip() == digest
