"""Run one question or order on a cache: through the daemon that has it, else with an engine of our own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import click

from weightfs.cli.group import Stopped
from weightfs.cli.options import refuse_for_daemon

if TYPE_CHECKING:
    from weightfs.config import Config
    from weightfs.control.ports import Operations

T = TypeVar("T")


def ask(
    ctx: click.Context,
    config: Config,
    role: str,
    work: Callable[[Operations, bool], Awaitable[T]],
    *,
    fetches: bool = False,
    answers: bool = False,
    creates: bool = False,
    stopped: str = "stopped",
) -> T:
    """The result of `work(operations, is_daemon)`. UsageError if an option was given that the daemon would ignore.

    Args:
        ctx: The command's context: what was typed.
        config: Its settings.
        role: What a second command is told is going on.
        work: Called once.
        fetches: Whether worker processes and the control socket are worth their start.
        answers: Whether the control socket is: the work may take a while, and others want to know.
        creates: Whether a cache is made where there is none.
        stopped: What to say when a signal ends it.
    """
    import trio

    from weightfs.app.interrupts import run_until_signal
    from weightfs.app.local import find_operations
    from weightfs.app.settings import engine_settings, fetch_settings
    from weightfs.engine.settings import FillMode

    if not fetches:
        config = config.model_copy(update={"workers": 0})
    fetch = fetch_settings(config, chunks=ctx.params.get("chunks"))
    settings = engine_settings(config, fetch, mounted=False, fill=FillMode.NEVER)
    settings = replace(settings, tidies=fetches)  # who only looks changes nothing
    results: list[T] = []

    async def run() -> None:
        async with find_operations(
            config.cache, role, settings, create=creates, serve_control=fetches or answers
        ) as (operations, is_daemon):
            if is_daemon:
                refuse_for_daemon(ctx)
            results.append(await work(operations, is_daemon))

    signum = trio.run(run_until_signal, run)
    if signum is not None and not results:
        raise Stopped(signum, stopped)
    return results[0]
