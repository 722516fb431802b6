"""`weightfs reload`: have a running mount read its configuration again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from weightfs.cli.asking import ask
from weightfs.cli.group import examples
from weightfs.cli.options import cache_options, json_option, load_config
from weightfs.errors import DaemonError

if TYPE_CHECKING:
    from weightfs.control.ports import Document, Operations


@click.command(
    short_help="Have a mount read its configuration again.",
    epilog=examples("weightfs reload", "systemctl reload weightfs"),
)
@json_option
@cache_options
@click.pass_context
def reload(ctx: click.Context, /, as_json: bool, **_: object) -> int:
    """Have the mount that has the cache read its configuration file, tokens and credentials again.

    New refs, limits of the cache, bandwidth, read-timeout, logging, and how origins are reached count from then on. The
    rest counts from the next start. A configuration that is wrong is refused, and the old one stays.
    """
    config = load_config(ctx)

    async def work(operations: Operations, is_daemon: bool) -> Document:
        if not is_daemon:
            raise DaemonError(f"nothing runs on the cache {config.cache}, so there is nothing to reload")
        return await operations.reload()

    found = ask(ctx, config, "reload", work)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return 0
    click.echo("the configuration was read again")
    for ref in found["added"]:
        click.echo(f"new: {ref}")
    for name in found["at_next_start"]:
        click.echo(f"counts from the next start: {name}")
    return 0
