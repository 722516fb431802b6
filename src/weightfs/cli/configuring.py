"""`weightfs config check` and `weightfs config show`: what is configured, and by whom."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from weightfs.cli.group import examples
from weightfs.cli.options import (
    cache_options,
    fetch_options,
    given_settings,
    json_option,
    limit_options,
    parse_refs,
    verbose_option,
)
from weightfs.errors import ConfigError, RefError

SIZES = frozenset({"max-size", "min-free", "readahead", "commit-size"})  # the settings in bytes


@click.group(
    "config",
    short_help="Check and show the configuration.",
    epilog=examples("weightfs config check", "weightfs config show --json"),
)
def config() -> None:
    """Check the configuration, or show what is in effect and where it came from."""


@config.command(
    short_help="Validate the configuration.",
    epilog=examples("weightfs config check", "weightfs config check /etc/weightfs/config.toml"),
)
@click.argument("file", metavar="[FILE]", required=False)
@verbose_option
def check(file: str | None) -> int:
    """Validate FILE, or the file that the other commands read, with the WEIGHTFS_… variables.

    Tokens, and files and variables that settings name, belong to the machine: `weightfs doctor` looks at them.
    """
    from weightfs.app.effective import file_in_use
    from weightfs.config import load, read_file
    from weightfs.config.load import check as check_layer

    path = Path(file).expanduser() if file is not None else file_in_use(None, os.environ)
    refs = check_layer(read_file(path), str(path)).refs if path is not None else ()
    if file is None:
        refs = load({}).refs
    try:
        parse_refs(refs)
    except RefError as error:
        raise ConfigError(f"{path or 'WEIGHTFS_REFS'}: refs: {error}") from None
    click.echo(f"ok: {path}" if path is not None else "ok: there is no configuration file; the defaults hold")
    return 0


@config.command(
    short_help="Show the settings in effect.",
    epilog=examples(
        "weightfs config show",
        "weightfs config show --json | jq '.settings[] | select(.from != \"default\")'",
    ),
)
@json_option
@limit_options
@fetch_options
@cache_options
@click.pass_context
def show(ctx: click.Context, /, as_json: bool, **_: object) -> int:
    """Show every setting, its value, and where it came from. Secrets are not shown, only that they are set."""
    from weightfs.app.effective import effective, file_in_use

    given = ctx.params.get("config")
    file = None if given is None else Path(given).expanduser()
    settings = effective(given_settings(ctx), file=file, env=os.environ)
    if as_json:
        path = file_in_use(file, os.environ)
        rows = [{"key": one.key, "value": one.value, "from": one.place} for one in settings]
        document = {"file": None if path is None else str(path), "settings": rows}
        click.echo(json.dumps(document, indent=2))
        return 0
    for line in lines([(one.key, one.value, one.place) for one in settings]):
        click.echo(line)
    return 0


def lines(settings: list[tuple[str, Any, str]]) -> list[str]:
    """Key, value and place, aligned."""
    from weightfs.logs import one_line

    texts = [(key, one_line(_shown(key, value)), one_line(place)) for key, value, place in settings]
    first = max(len(key) for key, _, _ in texts)
    second = min(max(len(value) for _, value, _ in texts), 48)
    return [f"{key:<{first}}  {value:<{second}}  {place}" for key, value, place in texts]


def _shown(key: str, value: Any) -> str:
    """As it may be written into the file. Whatever is not a whole number is seconds."""
    from weightfs.units import exact_duration, exact_size

    match value:
        case None | []:
            return "-"
        case bool():
            return "true" if value else "false"
        case float():
            return exact_duration(value)
        case int() if key in SIZES:
            return exact_size(value)
        case str() | int():
            return str(value)
    return json.dumps(value)
