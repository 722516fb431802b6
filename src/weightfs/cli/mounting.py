"""`weightfs mount` and `weightfs umount`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from weightfs.cli.group import examples, presentable, say
from weightfs.cli.options import (
    cache_options,
    fetch_options,
    given_settings,
    limit_options,
    load_config,
    parse_refs,
    set_up_logging,
)
from weightfs.errors import UsageError, WeightfsError

if TYPE_CHECKING:
    from weightfs.app.daemon import MountOrder
    from weightfs.config import Config

# After the unmount the daemon commits, seals nothing more, and closes; it is bounded itself.
DAEMON_END: Final = 20.0  # seconds


@contextlib.contextmanager
def _failure_as_status() -> Iterator[None]:
    """What `mount` fails of is its last STATUS: `systemctl status` shows it also when it has given up trying.

    Of the journal it shows the last try alone, which was never made.
    """
    try:
        yield
    except WeightfsError as error:
        from weightfs.app.notify import notify

        notify(f"STATUS={presentable(str(error))}")
        raise


@click.command(
    short_help="Present models at a mount point.",
    epilog=examples(
        "weightfs mount ~/models https://models.example.com/tiny.gguf",
        "weightfs mount --detach --fill all ~/models",
        "weightfs mount --read-timeout 1m --policy strict --trusted-key key.pub ~/models \\",
        "    https://models.example.com/tiny.gguf",
    ),
)
@click.argument("mountpoint", metavar="MOUNTPOINT")
@click.argument("refs", metavar="[REF]...", nargs=-1)
@click.option(
    "--fill", metavar="MODE", help="Fetch in the background: never, opened or all.  [default: opened]"
)
@click.option(
    "--read-timeout", metavar="S", help="A read fails after waiting so long; 0: never.  [default: 10m]"
)
@click.option(
    "--readahead", metavar="SIZE", help="Largest window ahead of a sequential reader.  [default: 64MiB]"
)
@click.option("--allow-other/--no-allow-other", default=None, help="Let other users read the mount.")
@click.option(
    "--passthrough/--no-passthrough",
    default=None,
    help="Let the kernel read complete files from the cache itself, where it can.  [default: passthrough]",
)
@click.option(
    "--browse/--no-browse",
    default=None,
    help="Let the path of a model be enough to ask for it.  [default: no-browse]",
)
@click.option(
    "--metrics-listen",
    metavar="HOST:PORT",
    help="Metrics for Prometheus on this loopback port.  [default: off]",
)
@click.option("-d", "--detach", is_flag=True, help="Run in the background; return when the mount serves.")
@click.option(
    "--supervise",
    is_flag=True,
    help="Let a small parent start the daemon again when it ends; what is open goes on (Linux 6.9).",
)
@limit_options
@fetch_options
@cache_options
@click.pass_context
@_failure_as_status()
def mount(
    ctx: click.Context, /, mountpoint: str, refs: tuple[str, ...], detach: bool, supervise: bool, **_: object
) -> int:
    """Present models at MOUNTPOINT, at full size, at once; their bytes are fetched as they are read.

    All refs in the cache are there, and the REFs given. A ref that the cache knows is served without asking anybody;
    a new one is asked for as soon as the mount is up. Stays in the foreground until Ctrl-C, SIGTERM or
    `weightfs umount`, unless --detach is given.
    """
    from weightfs.app import supervisor

    supervised = supervisor.is_child(os.environ)  # started with the same command line as the supervisor
    detach, supervise = detach and not supervised, supervise and not supervised
    config = load_config(ctx, level="info", log=not detach)
    if supervise:
        return _supervise(config, mountpoint, detach=detach)
    order = _order(ctx, config, mountpoint, refs)
    from weightfs.app.daemon import run_mount

    directory = Path.cwd()

    def reread() -> MountOrder:
        with contextlib.chdir(directory):  # what detaches has left it; relative paths still belong to it
            new = load_config(ctx, level="info", log=False)
            found = _order(ctx, new, mountpoint, refs)
            set_up_logging(new, _log_file(new) if detach else None)
            return found

    if detach:
        return _detach(config, lambda ready: run_mount(order, ready, reread))
    return run_mount(order, _told_by_the_log, reread)


def _supervise(config: Config, mountpoint: str, *, detach: bool) -> int:
    """Stay small: what the daemon needs is not imported here."""
    if os.environ.get("NOTIFY_SOCKET"):
        raise UsageError(
            "a service manager runs this already; it can keep the mount itself: see docs/systemd.md"
        )
    from weightfs.app import detach as detaching
    from weightfs.app.supervisor import Supervisor

    directory = Path.cwd()
    command = [sys.executable, *sys.orig_argv[1:]]

    def work(ready: Callable[[Sequence[str]], None]) -> int:
        # Below an automount point the daemon has to stay in the service manager's process group: see `detaching`.
        own_group = not detaching.in_managers_group()
        supervisor = Supervisor(command, directory, on_started=lambda: ready([]), own_group=own_group)
        try:
            return supervisor.run()
        finally:
            _clear_dead_mount(directory / Path(mountpoint).expanduser())

    return _detach(config, work) if detach else work(_told_by_the_log)


def _clear_dead_mount(mountpoint: Path) -> None:
    """A daemon that could not end in order has left it."""
    from weightfs.errors import MountError
    from weightfs.mount.mounttable import HELPER_TIMEOUT, bounded, canonical, detach_stale

    try:
        bounded(lambda: detach_stale(canonical(mountpoint)), 2 * HELPER_TIMEOUT, str(mountpoint))
    except MountError as error:
        say(f"warning: {error}")


def _told_by_the_log(_: Sequence[str]) -> None:
    """In the foreground the warnings are on the terminal already."""


def _order(ctx: click.Context, config: Config, mountpoint: str, refs: tuple[str, ...]) -> MountOrder:
    from weightfs.app.daemon import MountOrder
    from weightfs.app.settings import check_chunks, engine_settings, fetch_settings, with_header_origins
    from weightfs.config.values import split_loopback_port
    from weightfs.mount.session import MountOptions

    chunks = ctx.params["chunks"]
    parsed = parse_refs((*config.refs, *refs))
    check_chunks(chunks, len(parsed))
    fetch = fetch_settings(config, chunks=chunks)
    place = Path(os.path.abspath(Path(mountpoint).expanduser()))  # noqa: PTH100  # a dead mount blocks resolve()
    for inner, outer in ((config.cache, place), (place, config.cache)):
        if inner.is_relative_to(outer):
            # Opening a cache file would be a request to ourselves.
            raise UsageError(f"{inner} is inside {outer}; keep the cache and the mount point apart")
    return MountOrder(
        mountpoint=place,
        cache=config.cache,
        refs=tuple(parsed),
        engine=with_header_origins(engine_settings(config, fetch, mounted=True), map(str, parsed)),
        mount=MountOptions(
            allow_other=config.allow_other,
            passthrough=config.passthrough,
            browse=config.browse,
            browse_ttl=config.browse_ttl,
            browse_timeout=config.browse_timeout,
        ),
        metrics_listen=split_loopback_port(config.metrics_listen) if config.metrics_listen else None,
    )


def _log_file(config: Config) -> Path:
    return config.log_file or config.cache / "weightfs.log"


def _detach(config: Config, work: Callable[[Callable[[Sequence[str]], None]], int]) -> int:
    from weightfs.app.detach import detach

    log_file = _log_file(config)
    warnings = detach(work, log_file, lambda: set_up_logging(config, log_file))
    for warning in warnings:
        say(f"warning: {warning}")
    return 0


@click.command(
    short_help="End a mount.",
    epilog=examples(
        "weightfs umount ~/models",
        "weightfs umount --lazy ~/models",
    ),
)
@click.argument("mountpoint", metavar="MOUNTPOINT")
@click.option("-z", "--lazy", is_flag=True, help="Detach it now, even if programs still use it.")
@cache_options
@click.pass_context
def umount(ctx: click.Context, /, mountpoint: str, lazy: bool, **_: object) -> int:
    """End the mount at MOUNTPOINT, and wait until its daemon has closed the cache."""
    given_settings(ctx)
    from weightfs.app import registry
    from weightfs.mount.mounttable import canonical, unmount

    path = canonical(Path(mountpoint).expanduser())
    with registry.watching(registry.daemon_of(path)) as daemon:
        unmount(path, lazy=lazy)
        if daemon is not None and not lazy and not registry.wait_for_end(daemon, DAEMON_END):
            say(
                f"warning: {path} is unmounted, but its daemon has not ended after {DAEMON_END:.0f} s; see its log"
            )
    return 0
