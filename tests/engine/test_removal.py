"""Removing a ref while the engine is at work on it: nothing freezes, nothing ends, nothing is left."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from weightfs.core.geometry import MIB, ByteSpan
from weightfs.core.manifest import Policy, Trust
from weightfs.core.ref import parse_ref
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import IntegrityError, WeightfsError
from weightfs.testing.engines import running_engine
from weightfs.testing.nginx import Nginx

pytestmark = pytest.mark.nginx

CONTENT = random.Random(3).randbytes(6 * MIB)


async def test_removing_during_complete_never_stops_the_loop(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "m.bin").write_bytes(CONTENT)
    # No chunk of it is complete within the time that a busy machine may take to come to the removal.
    with Nginx(tmp_path / "o", limit_rate="32k") as nginx:
        import hashlib

        ref = parse_ref(nginx.url("m.bin") + "#sha256=" + hashlib.sha256(CONTENT).hexdigest())
        async with running_engine(
            tmp_path / "cache", EngineSettings(workers=0, fill=FillMode.NEVER)
        ) as engine:
            for _ in range(3):
                await engine.add(ref)
                with trio.fail_after(20):
                    async with trio.open_nursery() as nursery:

                        async def pull() -> None:
                            with pytest.raises((WeightfsError, KeyError)):
                                await engine.complete(str(ref))

                        nursery.start_soon(pull)
                        while not engine.status().jobs:
                            await trio.lowlevel.checkpoint()
                        await engine.remove(str(ref))


async def test_hold_refuses_at_once_what_nothing_can_prove(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "m.bin").write_bytes(CONTENT)
    settings = EngineSettings(workers=0, fill=FillMode.NEVER, policy=Policy.HOLD)
    with Nginx(tmp_path / "o") as nginx:
        async with running_engine(tmp_path / "cache", settings) as engine:
            with trio.fail_after(20), pytest.raises(IntegrityError, match="no digest"):
                await engine.add(parse_ref(nginx.url("m.bin")))
            assert engine.manifests() == ()


async def test_complete_hashes_what_an_unclean_stop_left_in_doubt(tmp_path: Path) -> None:
    """The whole was proven before the stop; one chunk rotted since: complete finds and mends it."""
    import hashlib
    import shutil

    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "m.bin").write_bytes(CONTENT)
    settings = EngineSettings(workers=0, fill=FillMode.NEVER)
    with Nginx(tmp_path / "o") as nginx:
        ref = parse_ref(nginx.url("m.bin") + "#sha256=" + hashlib.sha256(CONTENT).hexdigest())
        async with running_engine(tmp_path / "cache", settings) as engine:
            blob = (await engine.add(ref)).entries[0].blob
            with trio.fail_after(30):
                await engine.complete(str(ref))
            await engine.quiet()
            shutil.copytree(tmp_path / "cache", tmp_path / "crashed")
        file = next(p for p in (tmp_path / "crashed" / "blobs").rglob("*") if p.is_file())
        with file.open("r+b") as data:
            data.write(bytes(100))
        async with running_engine(tmp_path / "crashed", settings) as engine:
            with trio.fail_after(30):
                await engine.complete(str(ref))
            assert engine.blob_status(blob.id).trust == Trust.VERIFIED
            nginx.stop()
            assert await engine.read(blob.id, ByteSpan(0, len(CONTENT))) == CONTENT
