"""The tree of names, kept as the manifests are: made anew whenever they change.

Rules. A small tree is made at once, so that who added a ref finds it when `add` returns. A large one takes seconds
(100,000 files: 10 s), so it is made in a thread, and what is known is served meanwhile; a name that the old tree does
not have, and a listing, wait for the new one (`settled`). Whatever a layout raises, the old tree stays, and nobody
waits for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from weightfs.core.manifest import Manifest
from weightfs.layouts.base import Layout
from weightfs.mount.inodes import Namespace
from weightfs.mount.ports import MountedEngine

AT_ONCE = 1000  # files of all refs; three layouts of them take 0.03 s, about what a commit does
# Of `Manifest.raw` that cost as much as a file: a layout may read it, and a Hub's list tells of a whole repository
# where a ref selects one file (21 MB of 100,000 files: 1 s).
RAW_BYTES = 200

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
        self._wanted = 0  # changes that were told
        self._shown = 0  # of these, how many the tree has
        self._wake = trio.Event()
        self._settled = trio.Event()
        self._stopped = False

    def make(self) -> Namespace:
        """The tree of what is pinned now, at once."""
        return self._build(self._engine.manifests())

    def changed(self) -> None:
        """The manifests changed. Never fails: a layout's bug must not fail the `add` behind the change."""
        self._wanted += 1
        manifests = self._engine.manifests()
        if self._shown < self._wanted - 1 or sum(map(_weight, manifests)) > AT_ONCE:
            self._wake.set()  # also behind one that is being made, which would come later and be older
            return
        try:
            self.show(self._build(manifests))
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
        try:
            self.show(await trio.to_thread.run_sync(self._build, manifests, abandon_on_cancel=True))
        except Exception:  # noqa: BLE001 - as in `changed`
            _log.exception("The tree could not be rebuilt; the old one stays")
        self._shown = wanted
        self._settled.set()
        self._settled = trio.Event()

    def _build(self, manifests: Sequence[Manifest]) -> Namespace:
        namespace = Namespace.build(entry for layout in self._layouts for entry in layout.entries(manifests))
        for conflict in namespace.conflicts:
            _log.warning("%s", conflict)
        return namespace


def _weight(manifest: Manifest) -> int:
    return len(manifest.entries) + len(manifest.raw) // RAW_BYTES
