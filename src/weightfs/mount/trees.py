"""The tree of names, kept as the manifests are: a new one whenever they change.

Rules. It is joined from a part for each group of manifests (`layouts.base.group_of`), and a part is made anew only if
its group changed; where parts are in one another's way, everything is made at once, as if there were one. A small tree
is made at once, so that who added a ref finds it when `add` returns. A large one (100,000 files: seconds) is made in a
thread, and what is known is served meanwhile; a name that the old tree does not have, and a listing, wait for the new
one (`settled`). Whatever a layout raises, the old tree stays, and nobody waits for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from weightfs.core.manifest import Manifest
from weightfs.layouts.base import Layout, group_of
from weightfs.mount.inodes import Namespace
from weightfs.mount.ports import MountedEngine

AT_ONCE = 1000  # files of all refs; three layouts of them take 0.03 s, about what a commit does
# Of `Manifest.raw` that cost as much as a file: a layout may read it, and a Hub's list tells of a whole repository
# where a ref selects one file (21 MB of 100,000 files: 1 s).
RAW_BYTES = 200

_EMPTY = ""  # the group of no manifest: what the layouts show when nothing is pinned

_log = logging.getLogger(__name__)


class Trees:
    """Belongs to one mount. `show` is given each new tree, in the trio thread."""

    def __init__(
        self,
        engine: MountedEngine,
        layouts: Sequence[Layout],
        show: Callable[[Namespace], None] = lambda _: None,
    ) -> None:
        self.show = show
        self._engine = engine
        self._layouts = layouts
        # By group; used by one builder at a time.
        self._parts: dict[str, tuple[list[Manifest], Namespace]] = {}
        self.tree = Namespace({}, ())  # the newest
        self._large = False  # whether that is too large to be made, or let go, at once
        self._wanted = 0  # changes that were told
        self._shown = 0  # of these, how many the tree has
        self._wake = trio.Event()
        self._settled = trio.Event()
        self._stopped = False

    async def first(self) -> Namespace:
        """The tree of what is pinned when this returns: the caller sees to it that `changed` is told from then on."""
        previous, current = self._engine.on_change, False

        def changed() -> None:
            nonlocal current
            current = False

        self._engine.on_change = changed
        try:
            while not current:
                current = True
                manifests = self._engine.manifests()
                self._note_size(manifests)
                self.tree = await trio.to_thread.run_sync(self._build, manifests)
        finally:
            self._engine.on_change = previous
        return self.tree

    def make(self) -> Namespace:
        """The tree of what is pinned now, at once."""
        return self._build(self._engine.manifests())

    def changed(self) -> None:
        """The manifests changed. Never fails: a layout's bug must not fail the `add` behind the change."""
        self._wanted += 1
        manifests = self._engine.manifests()
        was_large = self._large
        self._note_size(manifests)
        if self._shown < self._wanted - 1 or was_large or self._large:
            self._wake.set()  # also behind one that is being made, which would come later and be older
            return
        try:
            self.tree = self._build(manifests)
            self.show(self.tree)
        except Exception:  # noqa: BLE001
            _log.exception("The tree could not be rebuilt; the old one stays")
        self._shown = self._wanted

    async def settled(self) -> None:
        """Return when the tree is as the manifests were when this was called, or when the mount is about to go."""
        wanted = self._wanted
        while self._shown < wanted and not self._stopped:
            await self._settled.wait()

    async def run(self) -> None:
        """Make large trees, until cancelled."""
        try:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                await self._remake()
        finally:
            self.stop()

    def stop(self) -> None:
        """The mount is about to go: nobody waits for a newer tree any more."""
        self._stopped = True
        self._settled.set()

    async def _remake(self) -> None:
        wanted, manifests = self._wanted, self._engine.manifests()
        going = [self.tree]
        try:
            self.tree = await trio.to_thread.run_sync(self._build, manifests, abandon_on_cancel=True)
            self.show(self.tree)
        except Exception:  # noqa: BLE001 - as in `changed`
            _log.exception("The tree could not be rebuilt; the old one stays")
        self._shown = wanted
        self._settled.set()
        self._settled = trio.Event()
        await trio.to_thread.run_sync(going.clear, abandon_on_cancel=True)  # many objects to be freed

    def _note_size(self, manifests: Sequence[Manifest]) -> None:
        self._large = sum(map(_weight, manifests)) > AT_ONCE

    def _build(self, manifests: Sequence[Manifest]) -> Namespace:
        groups: dict[str, list[Manifest]] = {_EMPTY: []}
        for manifest in manifests:
            groups.setdefault(group_of(manifest), []).append(manifest)
        self._parts = {group: self._part(group, mine) for group, mine in groups.items()}
        namespace = Namespace.join(part for _, part in self._parts.values())
        if namespace is None:
            namespace = self._made_of(manifests)
            for conflict in namespace.conflicts:
                _log.warning("%s", conflict)
        return namespace

    def _part(self, group: str, manifests: list[Manifest]) -> tuple[list[Manifest], Namespace]:
        known = self._parts.get(group)
        if known is not None and known[0] == manifests:
            return known
        return manifests, self._made_of(manifests)

    def _made_of(self, manifests: Sequence[Manifest]) -> Namespace:
        return Namespace.build(entry for layout in self._layouts for entry in layout.entries(manifests))


def _weight(manifest: Manifest) -> int:
    return len(manifest.entries) + len(manifest.raw) // RAW_BYTES
