"""What people configured, in the terms of the layers below. The only place that knows both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from weightfs.app.credentials import hub_endpoint, hub_token, registry_auth_file
from weightfs.config import Config
from weightfs.config.values import parse_bandwidth
from weightfs.core.mirror_rules import PrefixRule
from weightfs.core.plan import Limits
from weightfs.core.ref import parse_ref
from weightfs.engine.settings import EngineSettings, FillMode, default_workers
from weightfs.errors import RefError, UsageError
from weightfs.sources import home_of
from weightfs.sources.base import FetchSettings

# Of a command that somebody watches: it gives up where a mount goes on trying for as long as a reader waits.
DEFAULT_RETRY: Final = 5


def fetch_settings(
    config: Config, *, chunks: str | None, env: Mapping[str, str] | None = None
) -> FetchSettings:
    """How to reach origins. ConfigError if a secret that was named cannot be had."""
    env = os.environ if env is None else env
    headers = tuple(rule.resolve(env) for rule in config.header)
    if chunks is not None and "://" not in chunks:
        chunks = os.path.abspath(chunks)  # noqa: PTH100  # lexical: a resolve() could wait for a stale mount
    return FetchSettings(
        connect_timeout=config.connect_timeout,
        timeout=config.timeout,
        stall_timeout=config.stall_timeout,
        retry=DEFAULT_RETRY if config.retry is None else config.retry,
        retry_delay=config.retry_delay,
        proxy=config.proxy,
        headers=headers,
        ca_file=None if config.ca_file is None else str(config.ca_file),
        private_hosts=config.private_hosts,
        trusted_keys=config.trusted_keys,
        chunks=chunks,
        policy=config.policy,
        hf_endpoint=hub_endpoint(config, env),
        hf_token=hub_token(config, env),
        endpoints=tuple((rule.host, rule.url) for rule in config.endpoint),
        docker_config=registry_auth_file(config, env),
    )


def with_header_origins(settings: EngineSettings, refs: Iterable[str]) -> EngineSettings:
    """The same, with the hosts of `refs` among those that get the configured headers.

    A fetch worker never resolves a ref, so it has to be told whose own hosts these are.
    """
    if not settings.fetch.headers:
        return settings
    homes = {home for ref in refs if (home := _home_of(ref, settings.fetch))}
    origins = tuple(sorted({*settings.fetch.header_origins, *homes}))
    return replace(settings, fetch=replace(settings.fetch, header_origins=origins))


def _home_of(ref: str, fetch: FetchSettings) -> str | None:
    try:
        return home_of(parse_ref(ref), fetch)
    except RefError:  # of a source that is not our own
        return None


def engine_settings(
    config: Config, fetch: FetchSettings, *, mounted: bool, fill: FillMode | None = None
) -> EngineSettings:
    """The engine's settings.

    Args:
        config: What was configured.
        fetch: From `fetch_settings`.
        mounted: Whether readers wait behind it: then a fault is retried until the reader's own bound, unless
            `retry` was set; a command gives up after `retry` in a row.
        fill: Instead of the configured mode.
    """
    retries = config.retry if mounted or config.retry is not None else DEFAULT_RETRY
    background = min(Limits().background_jobs, max(1, config.max_jobs - 1)) if mounted else config.max_jobs
    limits = Limits(
        max_jobs=config.max_jobs,
        background_jobs=background,
        backoff_base=config.retry_delay,
        max_retries=retries,
    )
    return EngineSettings(
        fetch=fetch,
        limits=limits,
        mirrors=tuple(PrefixRule(rule.prefix, rule.url, rule.priority) for rule in config.mirror),
        workers=default_workers() if config.workers is None else config.workers,
        fill=FillMode(config.fill) if fill is None else fill,
        keep_pinned=mounted,
        headers_first=True,
        policy=config.policy,
        read_timeout=config.read_timeout,
        readahead_bytes=config.readahead,
        bandwidth=None if config.bandwidth is None else parse_bandwidth(config.bandwidth),
        host_bandwidth=tuple((rule.name, parse_bandwidth(rule.bandwidth)) for rule in config.host),
        max_bytes=config.max_size,
        min_free_bytes=config.min_free,
        max_age=config.max_age,
        commit_bytes=config.commit_size,
        commit_seconds=config.commit_interval,
    )


def check_chunks(chunks: str | None, refs: int) -> None:
    """UsageError if one chunk list was given for several refs, or for none."""
    if chunks is not None and refs != 1:
        raise UsageError(
            f"--chunks names the chunk list of one ref, and {refs} were given; give them one by one"
        )
