"""When the tree follows the manifests: at once where it is small, beside the readers where it is large."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import trio
import trio.testing

from weightfs.core.manifest import Manifest
from weightfs.layouts.base import Item
from weightfs.layouts.models import ModelsLayout
from weightfs.mount import trees
from weightfs.mount.inodes import ROOT, DirNode, Namespace
from weightfs.mount.trees import Trees
from weightfs.testing.fake_engine import FakeEngine
from weightfs.testing.layouts import made_up_manifest


class Gate(ModelsLayout):
    """A layout that waits for `go` in every build but the first, and may then fail."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.fails = False
        self.builds: list[bool] = []  # whether each was made in the main thread
        self.seen: list[str] = []  # the refs of each

    def entries(self, manifests: Sequence[Manifest]) -> Iterator[tuple[str, Item]]:
        self.builds.append(threading.current_thread() is threading.main_thread())
        self.seen += [manifest.ref for manifest in manifests]
        assert self.go.wait(60)
        if self.fails:
            raise RuntimeError("a layout's bug")
        return super().entries(manifests)


class Stage:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trees, "AT_ONCE", 2)
        self.engine, self.gate = FakeEngine(), Gate()
        self.shown: list[Namespace] = []
        self.trees = Trees(self.engine, [self.gate], self.shown.append)
        self.engine.on_change = self.trees.changed

    def add(self, name: str, files: int, *, raw: bytes = b"") -> None:
        manifest = made_up_manifest(f"https/{name}", {f"{k}.gguf": f"{name}{k}" for k in range(files)})
        manifest = replace(manifest, raw=raw)
        self.engine.put(manifest, {entry.blob.id: bytes(entry.blob.size) for entry in manifest.entries})

    def names(self) -> set[str]:
        tree = self.shown[-1]
        models = tree.lookup(ROOT, "models")
        https = models and tree.lookup(models.ino, "https")
        return set() if https is None else {name for _, name, _ in tree.listing(https, 2)}  # type: ignore[arg-type]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


async def test_a_small_tree_is_there_when_the_change_was_told(stage: Stage) -> None:
    stage.add("a", 2)
    assert stage.names() == {"a"}
    await stage.trees.settled()
    assert all(stage.gate.builds)


async def test_a_change_of_one_ref_makes_nothing_anew_of_the_others(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "AT_ONCE", 1000)
    for name in ("a", "b"):
        stage.add(name, 1)
    stage.gate.seen.clear()
    stage.add("c", 1)
    assert stage.names() == {"a", "b", "c"}
    assert stage.gate.seen == ["https://example.org/https/c"]
    stage.add("b", 2)
    assert stage.gate.seen[1:] == ["https://example.org/https/b"]
    stage.engine.unpin("https://example.org/https/a")
    assert stage.names() == {"b", "c"}
    assert len(stage.gate.seen) == 2
    assert len(stage.shown[-1]) == len(Trees(stage.engine, [stage.gate]).make())


async def test_refs_in_one_anothers_way_are_told_and_both_shown(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.add("a", 1)
    manifest = made_up_manifest("https/a", {"0.gguf": "another"})
    manifest = replace(manifest, ref="https://example.org/other")
    stage.engine.put(manifest, {entry.blob.id: bytes(entry.blob.size) for entry in manifest.entries})
    assert "taken twice" in caplog.text
    tree = stage.shown[-1]
    node = tree.lookup(ROOT, "models")
    for name in ("https", "a"):
        assert node is not None
        node = tree.lookup(node.ino, name)
    assert isinstance(node, DirNode)
    assert sorted(name.partition("~")[0] for name in node.names) == ["0.gguf", "0.gguf"]


async def test_one_file_of_a_large_repository_does_not_hold_the_loop_while_the_whole_list_is_read(
    stage: Stage,
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.trees.run)
        stage.add("a", 1, raw=bytes(3 * trees.RAW_BYTES))
        await stage.trees.settled()
        assert stage.names() == {"a"}
        nursery.cancel_scope.cancel()
    assert not any(stage.gate.builds)


async def test_a_large_tree_is_made_beside_the_readers_and_awaited_by_who_needs_it(stage: Stage) -> None:
    stage.add("a", 1)
    at_once = len(stage.gate.builds)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.trees.run)
        stage.gate.go.clear()
        stage.add("b", 5)
        stage.add("c", 1)
        assert stage.names() == {"a"}  # and this loop runs
        with trio.move_on_after(0) as waiting:
            await stage.trees.settled()
        assert waiting.cancelled_caught
        stage.gate.go.set()
        await stage.trees.settled()
        assert stage.names() == {"a", "b", "c"}
        assert stage.gate.builds == [True] * at_once + [False] * (len(stage.gate.builds) - at_once)
        nursery.cancel_scope.cancel()


async def test_a_small_change_does_not_overtake_a_large_one(stage: Stage) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.trees.run)
        stage.gate.go.clear()
        stage.add("a", 5)
        await trio.testing.wait_all_tasks_blocked()
        ref = stage.engine.manifests()[-1].ref
        stage.engine.unpin(ref)
        stage.gate.go.set()
        await stage.trees.settled()
        assert stage.names() == set()
        nursery.cancel_scope.cancel()


async def test_a_layouts_bug_leaves_the_old_tree_and_nobody_waiting(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.add("a", 1)
    stage.gate.fails = True
    stage.add("b", 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.trees.run)
        stage.add("c", 5)
        await stage.trees.settled()
        assert stage.names() == {"a"}
        assert [record.message for record in caplog.records] == [
            "The tree could not be rebuilt; the old one stays"
        ] * 2
        stage.gate.fails = False
        stage.add("d", 1)
        await stage.trees.settled()
        assert stage.names() == {"a", "b", "c", "d"}
        nursery.cancel_scope.cancel()


async def test_who_waits_is_let_go_at_the_end(stage: Stage) -> None:
    stage.gate.go.clear()
    async with trio.open_nursery() as outer, trio.open_nursery() as nursery:
        nursery.start_soon(stage.trees.run)
        stage.add("a", 5)
        outer.start_soon(stage.trees.settled)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    stage.gate.go.set()
