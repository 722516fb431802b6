"""The sources in use, one per scheme. Other settings make new ones; an old one is closed by its last user."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from weightfs.sources.base import FetchSettings, Source

CLOSE_SECONDS = 1.0


@dataclass(slots=True)
class _Open:
    source: Source
    users: int = 0
    retired: bool = False


class Origins:
    """`make(scheme, settings)` opens a source. Owned by the trio thread."""

    def __init__(
        self, settings: FetchSettings, make: Callable[[str, FetchSettings], Awaitable[Source]]
    ) -> None:
        self.settings = settings
        self._make = make
        self._open: dict[str, _Open] = {}

    @asynccontextmanager
    async def using(self, scheme: str) -> AsyncIterator[Source]:
        """The source for a scheme, with the settings of now; it stays open for as long as the block runs."""
        one = await self._get(scheme)
        one.users += 1
        try:
            yield one.source
        finally:
            one.users -= 1
            if one.retired and not one.users:
                await _close(one)

    async def _get(self, scheme: str) -> _Open:
        while scheme not in self._open:
            settings = self.settings
            made = _Open(await self._make(scheme, settings))
            if settings is not self.settings or self._open.setdefault(scheme, made) is not made:
                await _close(made)  # settings changed, or somebody else was quicker
        return self._open[scheme]

    async def change(self, settings: FetchSettings) -> None:
        """From now on."""
        self.settings = settings
        await self.aclose()

    async def aclose(self) -> None:
        """Close what nobody uses; the rest when it is not used any more."""
        retired, self._open = self._open, {}
        for one in retired.values():
            one.retired = True
            if not one.users:
                await _close(one)


async def _close(one: _Open) -> None:
    with trio.move_on_after(CLOSE_SECONDS, shield=True):
        await one.source.aclose()
