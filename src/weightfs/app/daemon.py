"""`weightfs mount`: the mount first, from the index alone; then the network; and an end that leaves nothing.

A ref that the cache knows is served without asking anybody. A new one is asked for once the mount is up: if
its origin says that there is no such thing, the whole start fails, unless the mount was taken over, and has its
users; if the origin cannot be reached, the mount stays and asks again and again.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from weightfs.app import notify, registry, standing, supervisor
from weightfs.app.fdstore import FdStore
from weightfs.app.groups import most_telling
from weightfs.app.interrupts import run_until_signal
from weightfs.app.local import take_over
from weightfs.app.measuring import mount_measures
from weightfs.app.memory import give_back_buffers
from weightfs.app.reloading import Reloader
from weightfs.control.metrics import Scraper
from weightfs.control.metrics_port import serve_metrics
from weightfs.control.operations import ProcessInfo
from weightfs.core.names import identity
from weightfs.core.ref import Ref
from weightfs.core.retry import delay, is_permanent
from weightfs.engine.engine import Engine
from weightfs.engine.settings import EngineSettings
from weightfs.errors import MountError, SourceError, WeightfsError
from weightfs.layouts.huggingface import HuggingFaceLayout
from weightfs.layouts.models import ModelsLayout
from weightfs.layouts.ollama import OllamaLayout
from weightfs.logs import redact
from weightfs.mount import mounttable
from weightfs.mount.serve import Mounted, serve
from weightfs.mount.session import MountOptions
from weightfs.mount.stats import MountStats
from weightfs.stacks import tell_on_signal

# How long "ready" may wait for the first answers about new refs; the mount serves all the while.
FIRST_ANSWERS: Final = 30.0  # seconds
RESOLVE_AT_ONCE: Final = 4
RETRY_BASE: Final = 1.0
RETRY_CAP: Final = 60.0
LAYOUTS: Final = (ModelsLayout(), OllamaLayout(), HuggingFaceLayout())

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MountOrder:
    """What to mount and how."""

    mountpoint: Path  # absolute
    cache: Path
    refs: tuple[Ref, ...]
    engine: EngineSettings
    mount: MountOptions
    metrics_listen: tuple[str, int] | None = None  # a loopback address and a port


def run_mount(
    order: MountOrder, on_ready: Callable[[Sequence[str]], None], reread: Callable[[], MountOrder]
) -> int:
    """Serve until a signal or until unmounted from outside; the exit code, which is `supervisor.AGAIN` after SIGUSR1.

    Args:
        order: What to do.
        on_ready: Called once, when the mount serves and every new ref has been asked for, with warnings.
        reread: What the configuration says now, for `weightfs reload`; UsageError. Called in a thread.

    Raises:
        WeightfsError: It could not start, or the mount broke.
    """

    def detach_at_once() -> None:
        try:
            mounttable.take_away(order.mountpoint, lazy=True)
        except (OSError, MountError) as error:
            log.error("the mount at %s stays behind: %s", order.mountpoint, error)  # one line

    give_back_buffers()
    tell_on_signal()
    store = FdStore.from_environment(os.environ)
    work = partial(_serve, order, on_ready, store, Reloader(order, reread))
    try:
        signum = trio.run(partial(run_until_signal, work, last_resort=detach_at_once, leave=store.leave))
    except BaseExceptionGroup as group:
        raise most_telling(group) from group
    if signum == signal.SIGUSR1:
        return supervisor.AGAIN
    notify.notify("STATUS=unmounted; what has landed is kept")
    return 0


async def _serve(
    order: MountOrder, on_ready: Callable[[Sequence[str]], None], store: FdStore, reloader: Reloader
) -> None:
    stats = MountStats()
    info = ProcessInfo(
        "mount",
        order.cache,
        order.mountpoint,
        int(time.time()),
        mount_measures=partial(mount_measures, stats),
        reload=reloader.reload,
    )
    notify.notify("STATUS=opening the cache")
    async with (
        take_over(info, order.engine) as (engine, operations),
        trio.open_nursery() as nursery,
    ):
        if order.metrics_listen is not None:
            scraper = Scraper(engine, info.mount_measures)
            nursery.start_soon(serve_metrics, scraper, *order.metrics_listen)
        mounted = await nursery.start(_mount, order, engine, stats, nursery.cancel_scope, store)
        operations.requests = stats.requests
        with registry.registered(mounted.path, order.cache):
            try:
                await _greet(order, engine, mounted, nursery, on_ready, reloader)
                await trio.sleep_forever()
            finally:
                # Before the end begins: the manager bounds it from here on, and wants no pings any more.
                doing = "leaving the mount to the next one" if store.leaving else "unmounting"
                notify.notify(f"STOPPING=1\nSTATUS={doing}, and committing what has landed")


async def _mount(
    order: MountOrder,
    engine: Engine,
    stats: MountStats,
    scope: trio.CancelScope,
    store: FdStore,
    task_status: trio.TaskStatus[Mounted] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve, and end everything when somebody unmounts from outside."""
    await serve(
        order.mountpoint, engine, LAYOUTS, order.mount, stats=stats, keeper=store, task_status=task_status
    )
    log.info("%s was unmounted", order.mountpoint)
    scope.cancel()


async def _greet(
    order: MountOrder,
    engine: Engine,
    mounted: Mounted,
    nursery: trio.Nursery,
    on_ready: Callable[[Sequence[str]], None],
    reloader: Reloader,
) -> None:
    log.info("%s serves the cache %s", mounted.path, order.cache)
    notify.notify("READY=1")
    interval = notify.watchdog_interval()
    if interval is not None:
        nursery.start_soon(standing.keep_alive, mounted, engine, interval)
    if notify.has_manager() and not supervisor.is_child(os.environ):  # that one shows it to nobody
        nursery.start_soon(standing.tell_status, engine)
        await nursery.start(reloader.on_hangup)  # in a terminal that is closed SIGHUP means something else
    known = {identity(stored.manifest.ref) for stored in engine.refs()}
    new = [ref for ref in order.refs if identity(str(ref)) not in known]
    answers = _FirstAnswers(engine, nursery, strict=not mounted.resumed)
    with trio.move_on_after(FIRST_ANSWERS):
        await answers.ask(new)
    reloader.serve(engine, answers.begin)
    on_ready(answers.warnings)
    notify.notify(f"{notify.STARTED}=1")


class _FirstAnswers:
    """Asks for new refs once; whatever could not be reached is asked for again in `nursery`.

    `strict`: what an origin refuses for good ends the start.
    """

    def __init__(self, engine: Engine, nursery: trio.Nursery, *, strict: bool) -> None:
        self._strict = strict
        self._engine = engine
        self._nursery = nursery
        self._limit = trio.CapacityLimiter(RESOLVE_AT_ONCE)
        self.warnings: list[str] = []

    async def ask(self, refs: Sequence[Ref]) -> None:
        """Return when each has been answered or found out of reach; the first permanent error is raised."""
        for one in self._begin(refs):
            await one.asked.wait()
            if one.error is not None:
                if self._strict:
                    raise one.error
                one.warning = f"{one.error}; the mount, which is in use, goes on without it"
                log.error("%s", one.warning)
            if one.warning:
                self.warnings.append(one.warning)

    def begin(self, refs: Sequence[Ref]) -> None:
        """The same without waiting: what goes wrong is in the log."""
        for one in self._begin(refs):
            one.asked.set()

    def _begin(self, refs: Sequence[Ref]) -> list[_Pending]:
        pending = [_Pending(ref) for ref in refs]
        for one in pending:
            self._nursery.start_soon(self._resolve, one)
        return pending

    async def _resolve(self, one: _Pending) -> None:
        attempt = 0
        while not await self._try(one, attempt):
            pause = delay(attempt, base=RETRY_BASE, cap=RETRY_CAP, retry_after=None, jitter=random.random())  # noqa: S311  # no secret
            await trio.sleep(max(pause, RETRY_BASE))
            attempt += 1

    async def _try(self, one: _Pending, attempt: int) -> bool:
        """Whether this was the last word on the ref."""
        try:
            async with self._limit:
                await self._engine.add(one.ref)
            if attempt:
                log.info("%s is there now", redact(str(one.ref)))
        except SourceError as error:
            if not is_permanent(error.kind):
                one.warning = f"{error}; the mount serves what the cache has, and goes on asking"
                log.warning("%s", one.warning)
                one.asked.set()
                return False
            one.fail(error)
        except WeightfsError as error:
            one.fail(error)
        one.asked.set()
        return True


class _Pending:
    """A ref that is being asked for."""

    def __init__(self, ref: Ref) -> None:
        self.ref = ref
        self.asked = trio.Event()
        self.error: WeightfsError | None = None
        self.warning = ""

    def fail(self, error: WeightfsError) -> None:
        """The origin's last word was no."""
        if self.asked.is_set():
            log.error("%s; the ref is given up until the next start", error)
        self.error = error
