"""`serve` inside the test's own process (only its clients are others): what it does to the engine and to its caller."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio

from weightfs.core.manifest import Manifest
from weightfs.errors import MountError
from weightfs.layouts.base import Dir, File, Link
from weightfs.layouts.models import ModelsLayout
from weightfs.mount.mounttable import mounts_at
from weightfs.mount.serve import Mounted, serve
from weightfs.testing.fake_engine import FakeEngine, pattern
from weightfs.testing.mounts import can_mount

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]


class FragileLayout:
    name = "fragile"
    broken = False

    def entries(self, manifests: Sequence[Manifest]) -> Iterator[tuple[str, File | Dir | Link]]:
        if self.broken:
            raise RuntimeError("a layout's bug")
        yield "fragile", Dir()
        for manifest in manifests:
            yield "fragile/link", Link(f"../models/{manifest.tree}/a")


async def output(*command: str) -> bytes:
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    return done.stdout


def engine_with(*names: str) -> FakeEngine:
    engine = FakeEngine()
    engine.add((name, 5000) for name in names)
    return engine


async def test_it_serves_rebuilds_and_hands_everything_back(place: Path, nursery: trio.Nursery) -> None:
    engine, layout = engine_with("a"), FragileLayout()
    before = engine.on_change
    scope = trio.CancelScope()
    done = trio.Event()

    async def life(task_status: trio.TaskStatus[Mounted]) -> None:
        with scope:
            await serve(place, engine, [ModelsLayout(), layout], task_status=task_status)
        done.set()

    await nursery.start(life)
    assert await output("cat", str(place / "fragile" / "link")) == pattern("a", 0, 5000)
    engine.add([("b", 10)])
    assert b"\nb\n" in b"\n" + await output("ls", str(place / "models/https/fake.example"))
    layout.broken = True
    engine.add([("c", 10)])  # the layout's bug fails neither this call nor the mount
    assert await output("ls", str(place / "models/https/fake.example")) == b"a\nb\n"
    scope.cancel()
    await done.wait()
    assert not mounts_at(place)
    assert engine.failing_all
    assert engine.on_change is before


async def test_a_second_mount_in_one_process_is_refused_and_harms_nothing(
    place: Path, nursery: trio.Nursery
) -> None:
    other = place.parent / "other"
    other.mkdir()
    mounted = await nursery.start(serve, place, engine_with("a"), [ModelsLayout()])
    with pytest.raises(MountError, match="one session"):
        await serve(other, engine_with("b"), [ModelsLayout()])
    assert not mounts_at(other)
    assert await output("cat", str(place / "models/https/fake.example/a")) == pattern("a", 0, 5000)
    assert await mounted.probe()
    nursery.cancel_scope.cancel()


async def test_a_mount_that_cannot_be_made_is_one_plain_error(place: Path) -> None:
    with pytest.raises(MountError, match="does not exist"):
        await serve(place / "nowhere", engine_with("a"), [ModelsLayout()])
