"""`weightfs env` and `weightfs link`: telling runtimes where the models are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from weightfs.app.runtimes import RUNTIMES, as_shell, as_systemd, settings_for
from weightfs.cli.group import examples, say
from weightfs.cli.options import cache_options, json_option, load_config
from weightfs.errors import DaemonError, MountError, UsageError

if TYPE_CHECKING:
    from weightfs.app.ollama_store import Outcome
    from weightfs.config import Config

LINK_TIMEOUT: Final = (
    120.0  # seconds for thousands of small files on a slow disk; a dead mount would take for ever
)
MAX_TOLD: Final = 20  # names of which each is told by itself; --json has all

mountpoint_option = click.option(
    "--mountpoint", metavar="DIR", help="Where the models are mounted.  [default: as the cache's daemon says]"
)


@click.command(
    "env",
    short_help="Print the variables that a runtime needs.",
    epilog=examples(
        "weightfs env llama.cpp --mountpoint /mnt/models",
        'eval "$(weightfs env ollama)" && ollama serve',
        "weightfs env ollama --systemd > /etc/systemd/system/ollama.service.d/weightfs.conf",
    ),
)
@click.argument("runtime", metavar="RUNTIME", type=click.Choice(RUNTIMES))
@click.option("--systemd", is_flag=True, help="As a drop-in for the runtime's service.")
@mountpoint_option
@cache_options
@click.pass_context
def env(ctx: click.Context, /, runtime: str, systemd: bool, mountpoint: str | None, **_: object) -> int:
    """Print what RUNTIME (ollama, hf, llama.cpp or vllm) has to find in its environment to use the mount.

    `hf` is everything that uses the Hugging Face cache: transformers, diffusers, huggingface_hub.
    """
    config = load_config(ctx)
    place = _said_by_daemon(config) if mountpoint is None else _absolute(mountpoint)
    settings = settings_for(runtime, place)
    for line in as_systemd(settings, place) if systemd else as_shell(settings):
        click.echo(line)
    return 0


@click.command(
    "link",
    short_help="Make a store of a runtime's own that links into the mount.",
    epilog=examples(
        "weightfs link ollama ~/.ollama/models",
        "weightfs link ollama /srv/ollama --json | jq .kept",
    ),
)
@click.argument("runtime", metavar="ollama", type=click.Choice(("ollama",)))
@click.argument("directory", metavar="DIR")
@mountpoint_option
@json_option
@cache_options
@click.pass_context
def link(
    ctx: click.Context, /, runtime: str, directory: str, mountpoint: str | None, as_json: bool, **_: object
) -> int:
    """Make or update DIR as a real, writable OLLAMA_MODELS with the mount's models in it.

    Manifests are files, blobs are links into the mount, so that `ollama pull`, `create` and `rm` work beside them. What
    Ollama put there itself is left alone. Do it again when models were added to the mount or removed from it.
    """
    config = load_config(ctx)
    place = _said_by_daemon(config) if mountpoint is None else _mounted(mountpoint)
    outcome = _link(_absolute(directory), place)
    if as_json:
        document = {"runtime": runtime, "directory": str(_absolute(directory)), "mountpoint": str(place)}
        failed = [{"path": path, "error": _why(error)} for path, error in sorted(outcome.failed.items())]
        click.echo(json.dumps({**document, **outcome.document(), "failed": failed}, indent=2))
        _tell_failed(outcome, place)
        return 0
    for what, paths in outcome.document().items():
        for path in paths:
            click.echo(f"{what:9} {path}")
    if outcome.kept:
        say("what is marked `kept` is Ollama's own, and was left as it is")
    _tell_failed(outcome, place)
    return 0


def _why(error: OSError) -> str:
    return f"{error.filename or 'it'}: {error.strerror}"


def _tell_failed(outcome: Outcome, mountpoint: Path) -> None:
    """Say what could not be done. MountError: the mount was at fault, at least once; else UsageError."""
    if not outcome.failed:
        return
    failed = sorted(outcome.failed.items())
    for path, error in failed[:MAX_TOLD]:
        say(f"{path} was left as it is: {_why(error)}")
    mount = next((error for _, error in failed if _is_of(error, mountpoint)), None)
    count = f"{len(failed)} {'name was' if len(failed) == 1 else 'names were'} left as they were"
    if mount is not None:
        raise MountError(
            f"{count}: the mount at {mountpoint} cannot be read ({mount.strerror}); look into its daemon's log, and do "
            "this again"
        )
    raise UsageError(f"{count} ({failed[0][1].strerror}); mend that, and do this again: the rest is done")


def _is_of(error: OSError, mountpoint: Path) -> bool:
    return str(error.filename or "").startswith(f"{mountpoint}/")


def _link(directory: Path, mountpoint: Path) -> Outcome:
    """Update the store. UsageError: it cannot be there. MountError: the mount does not answer."""
    from weightfs.app.ollama_store import OllamaStore
    from weightfs.mount.mounttable import bounded

    def work() -> Outcome:
        real = Path(os.path.realpath(directory))
        if real.is_relative_to(os.path.realpath(mountpoint)):
            raise UsageError(
                f"{directory} is inside the mount at {mountpoint}, where nothing can be written; choose a "
                "directory outside of it"
            )
        if real.exists() and not real.is_dir():
            raise UsageError(f"{directory} is no directory; choose another name")
        _check_owner(real, mountpoint)
        return OllamaStore(real, mountpoint / "ollama").update()

    try:
        return bounded(work, LINK_TIMEOUT, f"{mountpoint} or {directory}")
    except OSError as error:
        if _is_of(error, mountpoint):
            raise MountError(
                f"the mount at {mountpoint} cannot be read: {error.strerror}; look into its daemon's log"
            ) from None
        raise UsageError(
            f"{directory} cannot be written: {error.strerror}; choose another directory, or run this as its owner"
        ) from None


def _check_owner(directory: Path, mountpoint: Path) -> None:
    """Refuse to work as root where somebody else may put links and a record of his own: they would lead root anywhere.

    What root makes there would be of no use either, since its owner could not change it. UsageError.
    """
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    if os.geteuid() == 0 and existing.stat().st_uid != 0:
        raise UsageError(
            f"{existing} belongs to another user, who could not change what root puts there; do it as that user: "
            f"`sudo -u \\#{existing.stat().st_uid} weightfs link ollama {directory} --mountpoint {mountpoint}`"
        )


def _said_by_daemon(config: Config) -> Path:
    """Where the daemon on this cache mounts. DaemonError if there is none."""
    import trio

    from weightfs.control.client import find_daemon

    async def ask() -> str | None:
        async with find_daemon(config.cache) as client:
            return None if client is None else client.process.get("mountpoint")

    place = trio.run(ask)
    if place is None:
        raise DaemonError(
            f"no mount serves the cache {config.cache}; start it with `weightfs mount`, or name a mount point with "
            "--mountpoint DIR"
        )
    return Path(place)


def _absolute(path: str) -> Path:
    """Lexical: a dead mount would block `resolve`."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100


def _mounted(path: str) -> Path:
    """MountError if there is no mount of ours."""
    from weightfs.mount.mounttable import FSTYPE, HELPER_TIMEOUT, bounded, canonical, mounts_at

    place = bounded(lambda: canonical(_absolute(path)), HELPER_TIMEOUT, f"The directory above {path}")
    if not any(mount.fstype == FSTYPE for mount in mounts_at(place)[-1:]):
        raise MountError(f"no weightfs is mounted at {place}; start it with `weightfs mount {place}`")
    return place
