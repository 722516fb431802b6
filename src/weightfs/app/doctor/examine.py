"""All checks side by side, each with a bound, in the order in which they are told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from weightfs.app.credentials import hub_endpoint
from weightfs.app.doctor import origins, probes
from weightfs.app.doctor.verdicts import Verdict, ok, problem
from weightfs.app.settings import fetch_settings
from weightfs.config import Config
from weightfs.control.client import find_daemon
from weightfs.errors import ConfigError, DaemonError
from weightfs.sources.base import FetchSettings
from weightfs.units import counted

DAEMON_SECONDS: Final = 3.0  # it answers from memory
STEP_SECONDS: Final = 10.0  # more than any bound inside a probe: who is later hangs in the kernel


@dataclass(frozen=True, slots=True)
class Order:
    """What to examine. `refs` are those that were named, `chunks` the chunk list of the one."""

    config: Config
    refs: tuple[str, ...]
    env: Mapping[str, str]
    chunks: str | None = None


async def examine(order: Order) -> list[Verdict]:
    """Every verdict. Takes half a minute at most, a second where all is well."""
    config = order.config
    fetch: FetchSettings | None = None
    settings: list[Verdict] = []
    try:
        fetch = fetch_settings(config, chunks=order.chunks, env=order.env)
    except ConfigError as error:
        settings.append(problem("settings", str(error)))
    steps: dict[str, Callable[[], Awaitable[list[Verdict]]]] = {
        "machine": partial(_in_thread, "machine", partial(probes.look_at_machine, config, order.env)),
        "cache directory": partial(_in_thread, "cache directory", partial(probes.look_at_cache, config)),
        "mounts": partial(_in_thread, "mounts", probes.look_at_mounts),
        "sources": partial(_cache_and_sources, order, fetch),
    }
    if fetch is not None:
        steps["proxy"] = partial(origins.look_at_proxies, fetch)
    found: dict[str, list[Verdict]] = {}

    async def run(name: str, step: Callable[[], Awaitable[list[Verdict]]]) -> None:
        found[name] = await step()

    async with trio.open_nursery() as nursery:
        for name, step in steps.items():
            nursery.start_soon(run, name, step)
    return settings + [verdict for name in steps for verdict in found[name]]


async def _in_thread(name: str, look: Callable[[], list[Verdict]]) -> list[Verdict]:
    with trio.move_on_after(STEP_SECONDS):
        return await trio.to_thread.run_sync(look, abandon_on_cancel=True)
    return [_hangs(name)]


async def _cache_and_sources(order: Order, fetch: FetchSettings | None) -> list[Verdict]:
    verdicts, refs = await _look_into_cache(order.config.cache)
    if fetch is None:
        return verdicts
    config = order.config
    endpoints = [rule.url for rule in config.endpoint]
    if config.hf_endpoint is not None or order.env.get("HF_ENDPOINT"):
        endpoints.append(hub_endpoint(config, order.env))
    answers, skews = await origins.ask_all(
        fetch, order.refs, origins.checked((*config.refs, *refs)), endpoints
    )
    return [*verdicts, probes.look_at_clock(skews), *answers]


async def _look_into_cache(root: Path) -> tuple[list[Verdict], list[str]]:
    """Whether it is well, and its refs: from the daemon that has it, else from its index."""
    name = "cache"
    with trio.move_on_after(DAEMON_SECONDS) as asking:
        try:
            async with find_daemon(root) as daemon:
                if daemon is not None:
                    refs = [str(document["ref"]) for document in await daemon.refs()]
                    who = daemon.process
                    text = f"process {who['pid']} ({who['role']}) has it open, and answers; {counted(len(refs), 'ref')}"
                    return [ok(name, text)], refs
        except DaemonError as error:
            return [problem(name, str(error))], []
    if asking.cancelled_caught:
        text = "a daemon has it open and does not answer: see its log; `kill -CONT` if it was stopped, else end it"
        return [problem(name, text)], []
    with trio.move_on_after(STEP_SECONDS):
        return await trio.to_thread.run_sync(probes.look_at_index, root, abandon_on_cancel=True)
    return [_hangs(name)], []


def _hangs(name: str) -> Verdict:
    return problem(
        name,
        f"no answer within {STEP_SECONDS:g} s: the disk, or a network filesystem or mount in a path, hangs",
    )
