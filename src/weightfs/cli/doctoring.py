"""`weightfs doctor`: what stands in the way on this machine, and what to do about it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from weightfs.cli.group import Stopped, examples
from weightfs.cli.options import (
    cache_options,
    fetch_options,
    json_option,
    limit_options,
    load_config,
    parse_refs,
)

if TYPE_CHECKING:
    from weightfs.app.doctor.verdicts import Verdict

PROBLEMS: Final = 8  # an exit code of its own: the doctor itself worked


@click.command(
    short_help="Check machine, cache and sources.",
    epilog=examples(
        "weightfs doctor",
        "weightfs doctor hf://Qwen/Qwen3-8B-GGUF",
        "weightfs doctor --json | jq -r '.checks[] | select(.level != \"ok\").text'",
    ),
)
@click.argument("refs", metavar="[REF]...", nargs=-1)
@click.option("--allow-other/--no-allow-other", default=None, help="Check for a mount that others may read.")
@click.option("--read-timeout", metavar="S", help="Check for a mount with this bound.  [default: 10m]")
@json_option
@limit_options
@fetch_options
@cache_options
@click.pass_context
def doctor(ctx: click.Context, /, refs: tuple[str, ...], as_json: bool, **_: object) -> int:
    """Check kernel, FUSE, limits, cache, mounts, clock, proxy and sources, and say what to do about each.

    Each source of the cache and of the configuration is asked for one of its refs, and for every REF given: once, for
    some seconds at most, whatever --retry and --timeout say. Nothing is changed or fetched. Ends with code 8 if
    there is a problem; a warning is none.
    """
    import trio

    from weightfs.app.doctor.examine import Order, examine
    from weightfs.app.doctor.verdicts import Level, is_sound
    from weightfs.app.interrupts import run_until_signal
    from weightfs.app.settings import check_chunks

    config = load_config(ctx)
    named, chunks = tuple(str(ref) for ref in parse_refs(refs)), ctx.params["chunks"]
    check_chunks(chunks, len(named))
    order = Order(config, named, os.environ, chunks)
    results: list[list[Verdict]] = []

    async def run() -> None:
        results.append(await examine(order))

    signum = trio.run(run_until_signal, run)
    if signum is not None and not results:
        raise Stopped(signum, "stopped")
    verdicts = results[0]
    if as_json:
        checks = [{"check": one.check, "level": str(one.level), "text": one.text} for one in verdicts]
        click.echo(json.dumps({"sound": is_sound(verdicts), "checks": checks}, indent=2))
    else:
        for line in lines(verdicts):
            click.echo(line)
        counts = {level: sum(one.level is level for one in verdicts) for level in Level}
        click.echo(f"problems: {counts[Level.PROBLEM]}, warnings: {counts[Level.WARNING]}")
    return 0 if is_sound(verdicts) else PROBLEMS


def lines(verdicts: Sequence[Verdict]) -> list[str]:
    """One line each: level, subject, sentence."""
    from weightfs.logs import one_line, redact

    width = max((len(one.check) for one in verdicts), default=0)
    return [f"{one.level:<7}  {one.check:<{width}}  {one_line(redact(one.text))}" for one in verdicts]
