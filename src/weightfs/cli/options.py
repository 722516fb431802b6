"""Options that several commands share, and the way from options to a `Config`.

An option's value goes to `config` as it was typed: bounds and units are checked there, once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.core import ParameterSource

from weightfs.cli.group import Invocation
from weightfs.errors import RefError, UsageError

if TYPE_CHECKING:
    from weightfs.config import Config
    from weightfs.core.ref import Ref
    from weightfs.logs import LogLevel

F = TypeVar("F", bound=Callable[..., Any])

# Parameter names that are not named like their setting.
_KEYS: Final = {"trusted_key": "trusted-keys", "private_host": "private-hosts"}
# Settings that decide how origins are asked, and what the cache may hold: a daemon has its own.
FETCH_KEYS: Final = (
    "retry", "retry-delay", "timeout", "connect-timeout", "stall-timeout", "proxy", "header", "ca-file",
    "private-hosts", "trusted-keys", "policy", "workers", "max-jobs", "bandwidth", "hf-endpoint", "hf-token-file",
    "registry-auth-file", "max-size", "min-free", "max-age",
)  # fmt: skip


def _set_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_object(Invocation).verbose = True  # type: ignore[union-attr]  # `WeightfsGroup.main` sets it


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_set_verbose,
    help="Log everything, and show tracebacks.",
)

cache_options = _stack(
    click.option("--cache", metavar="DIR", help="Cache directory.  [default: ~/.cache/weightfs]"),
    click.option("--config", metavar="FILE", help="Configuration file."),
    click.option("--log-level", metavar="LEVEL", help="debug, info, warning, error.  [default: warning; mount: info]"),
    click.option("--log-json/--no-log-json", default=None, help="Log lines as JSON objects."),
    click.option("--log-file", metavar="FILE", help="Log to a file instead of stderr."),
    verbose_option,
)  # fmt: skip

fetch_options = _stack(
    click.option(
        "--retry", metavar="N", help="Give up after N retries in a row.  [default: 5; mount: never]"
    ),
    click.option(
        "--retry-delay", metavar="S", help="Base of the growing pause between retries.  [default: 0.5s]"
    ),
    click.option("--timeout", metavar="S", help="Bound on response headers and manifests.  [default: 30s]"),
    click.option("--connect-timeout", metavar="S", help="Bound on connecting.  [default: 10s]"),
    click.option(
        "--stall-timeout",
        metavar="S",
        help="A body that gives less than 16 KiB in so long ends.  [default: 30s]",
    ),
    click.option("--proxy", metavar="URL", help="Proxy for http and https.  [default: from the environment]"),
    click.option(
        "--header", metavar="'K: V'", multiple=True, help="Header for the ref's own host; repeatable."
    ),
    click.option("--ca-file", metavar="FILE", help="Trust the certificates in this PEM file."),
    click.option(
        "--private-host", metavar="HOST", multiple=True, help="Allow redirects to this private host."
    ),
    click.option("--chunks", metavar="FILE|URL", help="Where the .meta4 is, if not beside the file."),
    click.option(
        "--trusted-key", metavar="KEY|FILE", multiple=True, help="Minisign key that signs chunk lists."
    ),
    click.option(
        "--hf-endpoint", metavar="URL", help="Where the Hub's API is.  [default: https://huggingface.co]"
    ),
    click.option("--hf-token-file", metavar="FILE", help="File with the token for the Hub."),
    click.option(
        "--registry-auth-file", metavar="FILE", help="Credentials for registries, as docker's config.json."
    ),
    click.option("--policy", metavar="POLICY", help="strict, provisional or hold.  [default: provisional]"),
    click.option(
        "--workers", metavar="N", help="Fetch worker processes; 0: none.  [default: cores, at most 4]"
    ),
    click.option("--max-jobs", metavar="N", help="Requests in flight.  [default: 32]"),
    click.option(
        "--bandwidth",
        metavar="RATE",
        help="Bytes per second, such as 10MiB, or by time of day: '08:00,2MiB 18:00,off'.  [default: no limit]",
    ),
)

limit_options = _stack(
    click.option("--max-size", metavar="SIZE", help="What the cache may hold.  [default: no limit]"),
    click.option(
        "--min-free",
        metavar="SIZE",
        help="What its filesystem has to keep free; 0: nothing.  [default: 1 %, at most 1 GiB]",
    ),
    click.option("--max-age", metavar="S", help="Evict what was not used for so long.  [default: no limit]"),
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


def given_settings(ctx: click.Context) -> dict[str, Any]:
    """What was typed, by key of the configuration."""
    from weightfs.config.load import parse_headers
    from weightfs.config.model import Config, keys_of

    known = set(keys_of(Config))
    settings: dict[str, Any] = {}
    for name, value in ctx.params.items():
        key = _KEYS.get(name, name.replace("_", "-"))
        if key in known and key != "refs" and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            settings[key] = list(value) if isinstance(value, tuple) else value
    if "header" in settings:
        settings["header"] = parse_headers(settings["header"], "--header")
    return settings


def load_config(ctx: click.Context, *, level: LogLevel = "warning", log: bool = True) -> Config:
    """The configuration of this command, logging from `level` on by default; with `log`, it is set up. ConfigError."""
    from weightfs.config import load

    file = ctx.params.get("config")
    config = load(given_settings(ctx), file=None if file is None else Path(file).expanduser())
    chosen: LogLevel = "debug" if is_verbose(ctx) else config.log_level or level
    config = config.model_copy(update={"log_level": chosen})
    if log:
        set_up_logging(config)
    return config


def is_verbose(ctx: click.Context) -> bool:
    """Whether `-v` was given."""
    invocation = ctx.find_object(Invocation)
    return invocation is not None and invocation.verbose


def set_up_logging(config: Config, file: Path | None = None) -> None:
    """As configured, or to `file`. UsageError if the file cannot be opened."""
    from weightfs import logs

    file = file or config.log_file
    try:
        logs.set_up(config.log_level or "warning", as_json=config.log_json, file=file)
    except OSError as error:
        raise UsageError(f"the log file {file} cannot be written: {error.strerror}; name another") from None


def parse_refs(texts: tuple[str, ...]) -> list[Ref]:
    """The refs that were typed, each once. RefError; of a relative path of a file it says how to write it."""
    from weightfs.core.names import identity
    from weightfs.core.ref import parse_ref

    refs: dict[str, Ref] = {}
    for text in texts:
        try:
            ref = parse_ref(text)
        except RefError:
            path = Path(text)
            if "://" not in text and path.is_file():
                raise RefError(f"{text} is a relative path; write file://{path.absolute()}") from None
            raise
        refs[identity(str(ref))] = ref
    return list(refs.values())


def refuse_for_daemon(ctx: click.Context) -> None:
    """UsageError if an option was given that a running daemon would ignore."""
    given = [
        key
        for key in (*given_settings(ctx), "chunks")
        if key in FETCH_KEYS or (key == "chunks" and ctx.params.get("chunks"))
    ]
    if given:
        names = ", ".join(f"--{key.removesuffix('s') if key in _KEYS.values() else key}" for key in given)
        raise UsageError(
            f"a daemon has this cache and works with its own settings, so {names} would be ignored; "
            "set it for the daemon, or unmount first"
        )
