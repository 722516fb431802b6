"""Reading the configuration again while the mount serves: `weightfs reload`, and SIGHUP under a service manager.

Rule: a configuration that is wrong changes nothing. What cannot change while it runs is named, and counts from the next
start on. One at a time.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from weightfs.app import notify
from weightfs.core.names import identity
from weightfs.core.ref import Ref
from weightfs.engine.engine import Engine
from weightfs.engine.settings import EngineSettings
from weightfs.errors import DaemonError, WeightfsError

log = logging.getLogger(__name__)

# The names of configuration.md for those of the settings that are called otherwise.
NAMES: Final = {
    "max_bytes": "max-size", "min_free_bytes": "min-free", "readahead_bytes": "readahead", "mirrors": "mirror",
    "commit_bytes": "commit-size", "commit_seconds": "commit-interval",
}  # fmt: skip
# Of the planner's bounds, which are one setting of the engine's; what follows from these is not named.
LIMITS: Final = {"max_jobs": "max-jobs", "max_retries": "retry", "backoff_base": "retry-delay"}


class Order(Protocol):
    """The part of `daemon.MountOrder` that may be another one now."""

    @property
    def refs(self) -> tuple[Ref, ...]:
        """What is to be pinned."""
        ...

    @property
    def engine(self) -> EngineSettings:
        """The engine's settings."""
        ...

    @property
    def mount(self) -> Any:
        """A dataclass."""
        ...

    @property
    def cache(self) -> Path:
        """The cache directory."""
        ...

    @property
    def metrics_listen(self) -> tuple[str, int] | None:
        """Where metrics are served, beside the control socket."""
        ...


@dataclass(frozen=True, slots=True)
class Reloaded:
    """`at_next_start`: settings that differ and do not count yet. `added`: refs that are new, and asked for now."""

    at_next_start: tuple[str, ...]
    added: tuple[str, ...]


def _differing(one: Any, other: Any) -> tuple[str, ...]:
    """The names of the fields of a dataclass in which the two differ."""
    return tuple(f.name for f in fields(one) if getattr(one, f.name) != getattr(other, f.name))


class Reloader:
    """`reread()` blocks, and gives the order of now; UsageError. `began` is what the daemon was started with."""

    def __init__(self, began: Order, reread: Callable[[], Order]) -> None:
        self._began = began
        self._reread = reread
        self._one = trio.Lock()
        self._engine: Engine | None = None
        self._ask: Callable[[Sequence[Ref]], None]

    def serve(self, engine: Engine, ask: Callable[[Sequence[Ref]], None]) -> None:
        """From now on. `ask(refs)` begins to ask for new refs, and does not wait."""
        self._engine, self._ask = engine, ask

    async def reload(self) -> Reloaded:
        """Take over what may change. WeightfsError, and then nothing has changed."""
        if self._engine is None:
            raise DaemonError("the mount is still being started; try again in a moment")
        async with self._one:
            try:
                order = await trio.to_thread.run_sync(self._reread)
            except OSError as error:  # as when the directory in which weightfs was started is gone
                raise DaemonError(f"the configuration cannot be read again: {error}") from error
            later = await self._engine.reload(order.engine)
            later += _differing(self._began.mount, order.mount)
            later += tuple(
                n for n in ("cache", "metrics_listen") if getattr(order, n) != getattr(self._began, n)
            )
            limits = _differing(self._engine.settings.limits, order.engine.limits)
            names = tuple(LIMITS[name] for name in limits if name in LIMITS)
            names += tuple(NAMES.get(name, name.replace("_", "-")) for name in later if name != "limits")
            known = {identity(stored.manifest.ref) for stored in self._engine.refs()}
            new = [ref for ref in order.refs if identity(str(ref)) not in known]
            self._ask(new)
        log.info(
            "the configuration was read again%s", f"; at the next start: {', '.join(names)}" if names else ""
        )
        return Reloaded(names, tuple(map(str, new)))

    async def on_hangup(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Reload at each SIGHUP, until cancelled."""
        with trio.open_signal_receiver(signal.SIGHUP) as signals:
            task_status.started()
            async for _ in signals:
                # sd_notify(3): the manager knows by READY=1 when it is over, and by the time which reload is meant.
                notify.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
                try:
                    await self.reload()
                except WeightfsError as error:
                    log.error("the configuration was not read again, and the old one stays: %s", error)
                finally:
                    notify.notify("READY=1")
