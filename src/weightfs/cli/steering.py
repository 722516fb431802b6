"""`weightfs fill`, `pause` and `resume`: what is fetched although nobody waits for it.

Rule: each is a mark beside the ref, in the index. So it holds after a restart, and on an idle cache for the mount to
come; a command never waits for what it set going.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import click

from weightfs.cli.adding import Outcome, for_each
from weightfs.cli.asking import ask
from weightfs.cli.group import examples
from weightfs.cli.options import cache_options, json_option, load_config, parse_refs

if TYPE_CHECKING:
    from weightfs.control.ports import Document, Operations

MODES = ("all", "opened", "never", "default")
_MEANING = {
    "all": "all of it is wanted",
    "opened": "it is completed once somebody opens it",
    "never": "no more of it is fetched than is asked for",
    "default": "the mount's own mode holds for it again",
}


def _mark(
    ctx: click.Context,
    role: str,
    refs: tuple[str, ...],
    do: Callable[[Operations, str], Awaitable[Document]],
    line: Callable[[Document, bool], str],
    *,
    as_json: bool,
) -> int:
    """Do it to each ref; `line` gets the ref's document and whether a mount has the cache."""
    config = load_config(ctx)
    parsed = parse_refs(refs)
    mounted: list[bool] = []

    async def work(operations: Operations, _: bool) -> Outcome:
        mounted.append((await operations.health())["role"] == "mount")

        async def one(name: str) -> Document:
            return await do(operations, name)

        return await for_each([str(ref) for ref in parsed], one)

    outcome = ask(ctx, config, role, work)
    return outcome.tell("refs", lambda document: line(document, mounted[0]), as_json=as_json)


@click.command(
    short_help="Complete models in the background.",
    epilog=examples(
        "weightfs fill ollama://aya:8b",
        "weightfs fill --mode never hf://Qwen/Qwen3-8B-GGUF",
        "weightfs fill --mode default ollama://aya:8b",
    ),
)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="all",
    show_default=True,
    help="all: now; opened: once somebody opens it; never; default: as the mount's --fill says.",
)
@json_option
@cache_options
@click.pass_context
def fill(ctx: click.Context, /, refs: tuple[str, ...], mode: str, as_json: bool, **_: object) -> int:
    """Have a mount complete the REFs in the background, and do not wait for it: `weightfs pull` does.

    The mode of a REF goes before the mount's --fill, and holds after a restart and for what `weightfs update` brings.
    Unlike a pinned REF, one that is filled may be evicted, and its fill makes no room by evicting others.
    """

    async def do(operations: Operations, name: str) -> Document:
        return await operations.set_fill(name, mode)

    def line(document: Document, mounted: bool) -> str:
        from weightfs.logs import redact_url

        told = f"{redact_url(document['ref'])}: {_MEANING[mode]}"
        if mode == "all" and document["complete"]:
            return f"{told}, and there"
        if mode == "all":
            told += (
                "; its rest is being fetched"
                if mounted
                else "; a mount will fetch its rest, or `weightfs pull`"
            )
        if mode == "all" and document["paused"]:
            told += f", once `weightfs resume {redact_url(document['ref'])}` lets it"
        return told

    return _mark(ctx, "fill", refs, do, line, as_json=as_json)


def _pause(
    ctx: click.Context, refs: tuple[str, ...], *, everything: bool, paused: bool, as_json: bool
) -> int:
    role = "pause" if paused else "resume"
    if bool(refs) == everything:
        raise click.UsageError(f"name the refs, or say --all, as in `weightfs {role} --all`", ctx)
    if everything:
        return _pause_all(ctx, role, paused=paused, as_json=as_json)
    all_paused: list[bool] = []

    async def do(operations: Operations, name: str) -> Document:
        answer = await operations.pause(name, paused=paused)
        all_paused.append(answer["all_paused"])
        document: Document = answer["refs"][0]
        return document

    def line(document: Document, _: bool) -> str:
        from weightfs.logs import redact_url

        name = redact_url(document["ref"])
        if paused:
            return f"{name}: paused; what readers and `weightfs pull` wait for is still fetched"
        held = "; but everything is paused, and `weightfs resume --all` ends that" if all_paused[-1] else ""
        return f"{name}: resumed{held}"

    return _mark(ctx, role, refs, do, line, as_json=as_json)


def _pause_all(ctx: click.Context, role: str, *, paused: bool, as_json: bool) -> int:
    config = load_config(ctx)

    async def work(operations: Operations, _: bool) -> tuple[Document, list[str]]:
        answer = await operations.pause(None, paused=paused)
        return answer, [ref["ref"] for ref in await operations.refs() if ref["paused"]]

    answer, still = ask(ctx, config, role, work)
    if as_json:
        click.echo(json.dumps({**answer, "errors": []}, indent=2))
    elif paused:
        click.echo("everything is paused; what readers and `weightfs pull` wait for is still fetched")
    elif still:
        from weightfs.units import counted

        click.echo(
            f"resumed, but for {counted(len(still), 'ref')} paused by name; `weightfs status` shows which"
        )
    else:
        click.echo("resumed")
    return 0


@click.command(
    short_help="Hold background fetching back.",
    epilog=examples("weightfs pause --all", "weightfs pause ollama://aya:8b"),
)
@click.argument("refs", metavar="[REF]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Everything, also what is added later.")
@json_option
@cache_options
@click.pass_context
def pause(ctx: click.Context, /, refs: tuple[str, ...], everything: bool, as_json: bool, **_: object) -> int:
    """Fetch nothing of the REFs that nobody waits for, until `weightfs resume`, also after a restart.

    Reads are served as before, with what they read ahead, and so is `weightfs pull`. A file that an unpaused REF names
    too goes on. What is on its way still lands: a few MiB, or nothing more where an origin has no ranges.
    """
    return _pause(ctx, refs, everything=everything, paused=True, as_json=as_json)


@click.command(
    short_help="Let background fetching go on.",
    epilog=examples("weightfs resume --all", "weightfs resume ollama://aya:8b"),
)
@click.argument("refs", metavar="[REF]...", nargs=-1)
@click.option(
    "--all", "everything", is_flag=True, help="End `pause --all`; REFs that were paused by name stay so."
)
@json_option
@cache_options
@click.pass_context
def resume(ctx: click.Context, /, refs: tuple[str, ...], everything: bool, as_json: bool, **_: object) -> int:
    """Take a pause back: what is pinned, or filled by its mode, is fetched again."""
    return _pause(ctx, refs, everything=everything, paused=False, as_json=as_json)
