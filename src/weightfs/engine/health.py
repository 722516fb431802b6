"""Watches over the cache's disk: gathers its errors, tries it while it is not healthy, and has the others act on it.

Rules (`core.diskhealth` has those of the states):

- Unstable, the disk is used as before. Bypassed, nothing is begun that would write to it but trials: background stands
  still, a pull ends, and what readers want and the cache has not goes to memory (`engine.uncached`). What is in the
  cache is served throughout.
- Healthy again, past faults of all blobs are forgiven, and background goes on where it was.
- A trial that does not come back is one that failed, and no other is begun before it has ended: a disk that hangs costs
  one thread.
- Each change is said once in the log; `trouble` says it for as long as it lasts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from weightfs.core import plan
from weightfs.core.diskhealth import DiskHealth, Health, HealthRules
from weightfs.engine.catalog import Catalog
from weightfs.engine.fetcher import Fetcher
from weightfs.errors import CacheError, DiskFault, LostFileError, NoDescriptorsError, NoSpaceError
from weightfs.store.cache import Cache

log = logging.getLogger(__name__)

RULES: Final = HealthRules()
TRIAL_SECONDS: Final = 30.0  # a disk that spins up, or is busy with others, takes ten


class DiskWatch:
    """One per engine. `revive()` has background go on of which nothing could be begun while the disk was bypassed."""

    def __init__(
        self,
        cache: Cache,
        catalog: Catalog,
        fetcher: Fetcher,
        revive: Callable[[], None],
        rules: HealthRules | None = None,
    ) -> None:
        self._cache = cache
        self._catalog = catalog
        self._fetcher = fetcher
        self._revive = revive
        self._health = DiskHealth(rules or RULES)
        self._changed = trio.Event()

    @property
    def state(self) -> Health:
        """What may be expected of the disk."""
        return self._health.state

    @property
    def bypassed(self) -> bool:
        """Whether nothing is to be put on the disk."""
        return self._health.state is Health.BYPASSED

    @property
    def trouble(self) -> str:
        """One sentence for people; empty if the disk is healthy."""
        match self._health.state:
            case Health.HEALTHY:
                return ""
            case Health.UNSTABLE:
                return f"the cache's disk is unstable: {self._health.text}"
            case Health.BYPASSED:
                return (
                    "the cache's disk fails again and again and is bypassed: what the cache has not is read from the "
                    "network and not kept, nothing is fetched in the background, and the disk is tried every "
                    f"{self._health.rules.pause:g} s; the last error was: {self._health.text}"
                )

    def failed(self, error: Exception) -> None:
        """Somebody was given this error by the cache. What is no fault of the disk itself is not counted."""
        if isinstance(error, DiskFault) and not isinstance(error, LostFileError):
            self._tell(self._health.fault(trio.current_time(), str(error)))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with trio.move_on_at(self._health.next_trial):
                await self._changed.wait()
            self._changed = trio.Event()
            if trio.current_time() >= self._health.next_trial:
                error = await self._try()
                if error is None:
                    self._health.skipped(trio.current_time())
                else:
                    self._tell(self._health.tried(trio.current_time(), error))

    async def _try(self) -> str | None:
        """What is wrong with the disk; empty if it took a trial, None if none was made. A full one is not sick."""
        late = f"a write did not end within {TRIAL_SECONDS:g} s"
        done = trio.Event()
        answer: str | None = ""

        async def write() -> None:
            nonlocal answer
            try:
                await trio.to_thread.run_sync(self._cache.trial, abandon_on_cancel=True)
            except NoSpaceError:
                pass
            except NoDescriptorsError as error:
                log.info("the cache's disk was not tried: %s", error)
                answer = None
            except CacheError as error:
                answer = str(error)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            with trio.move_on_after(TRIAL_SECONDS):
                await done.wait()
            if not done.is_set():
                self._tell(self._health.tried(trio.current_time(), late))
                await done.wait()
        return answer

    def _tell(self, changed: bool) -> None:
        self._changed.set()
        if not changed:
            return
        match self._health.state:
            case Health.HEALTHY:
                log.warning("the cache's disk is healthy again, and is used as before")
                self._fetcher.feed(plan.Background(on=True))
                for state in self._catalog.states():
                    self._fetcher.feed(plan.Remirrored(state.id, state.mirrors))  # forgives what was held
                self._revive()
            case Health.UNSTABLE:
                log.warning("%s", self.trouble)
            case Health.BYPASSED:
                log.error("%s", self.trouble)
                self._fetcher.feed(plan.Background(on=False))
        for state in self._catalog.states():
            state.notify()  # who waits for the whole of one looks again
