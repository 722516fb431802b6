"""A blob that is removed and pinned again has the same inode: pages of its former life must not be served."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import Any, cast

import pyfuse3
import pytest

from weightfs.core.geometry import MIB
from weightfs.layouts.models import ModelsLayout
from weightfs.mount.inodes import ROOT, Namespace
from weightfs.mount.ops import WeightOperations
from weightfs.mount.stats import MountStats
from weightfs.mount.trees import Trees
from weightfs.testing.daemon import Daemon
from weightfs.testing.fake_engine import FakeEngine
from weightfs.testing.mounts import can_mount
from weightfs.testing.nginx import Nginx
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nginx,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]


class Caller:
    """In the place of pyfuse3's context."""

    uid = gid = umask = pid = 0


async def test_pages_are_dropped_only_where_they_may_be_wrong() -> None:
    """Regression: of two first opens at once, one dropped the page that the other one's read waited for, and so waited
    with it, and could not be killed.
    """
    engine = FakeEngine()
    engine.add([("m", 5000)])
    trees = Trees(engine, [ModelsLayout()])
    for fresh, expected in ((True, [True, True, False, True]), (False, [False, True, False, True])):
        handlers = WeightOperations(engine, trees.make(), MountStats(), lambda: None, fresh=fresh)
        inode = ROOT
        for part in ("models", "https", "fake.example", "m"):
            node = trees.make().lookup(inode, part)
            assert node is not None
            inode = node.ino

        async def keeps(handlers: WeightOperations = handlers, inode: int = inode) -> bool:
            info = await handlers.open(
                pyfuse3.InodeT(inode), pyfuse3.FlagT(os.O_RDONLY), cast("Any", Caller())
            )
            return bool(info.keep_cache)

        found = [await keeps(), await keeps()]
        handlers.show(Namespace.build([]), 0)  # it is removed, and pinned again
        handlers.show(trees.make(), 0)
        assert [*found, await keeps(), await keeps()] == expected


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


def test_wrong_bytes_that_were_read_are_gone_after_a_repair(tmp_path: Path) -> None:
    """Regression: where nothing is passed through, the kernel went on giving out the pages of the quarantined file."""
    data = random.Random(3).randbytes(4 * MIB)
    digest = hashlib.sha256(data).hexdigest()
    wrong = bytearray(data)
    wrong[MIB + 7] ^= 1
    for name, content in (("bad", wrong), ("good", data)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.bin").write_bytes(content)
    with Nginx(tmp_path / "bad") as bad, Nginx(tmp_path / "good") as good:
        good.pause()
        ref = f"{bad.url('m.bin')}#sha256={digest}"
        with Daemon(tmp_path / "d", ref, options=["--no-passthrough"]) as daemon:
            daemon.config.write_text(
                f'[[mirror]]\nprefix = "{bad.url("")}"\nurl = "{good.url("")}"\npriority = 9\n'
            )
            daemon.start()
            assert daemon.run(DIGEST, ref).strip() == hashlib.sha256(wrong).hexdigest()
            until(lambda: daemon.file(ref)["trust"] == "quarantined", "it is found to be wrong")
            good.resume()
            done = daemon.cli("repair", ref)
            assert done.returncode == 0, done.stderr
            assert daemon.run(DIGEST, ref).strip() == digest
