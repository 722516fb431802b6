"""`weightfs add`, `update`, `pin` and `unpin`: what the cache knows, what that is now, and what is kept whole.

Rule: each REF is seen to by itself. One that fails is told on stderr and does not stop the others; the exit code is the
highest of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import click

from weightfs.cli.asking import ask
from weightfs.cli.group import examples, say
from weightfs.cli.options import (
    cache_options,
    fetch_options,
    json_option,
    load_config,
    parse_refs,
)

if TYPE_CHECKING:
    from weightfs.control.ports import Document, Operations

HEADERS_WAIT: Final = 60.0  # seconds, for the small files and headers of one ref
AT_ONCE: Final = 4  # origins asked at the same time, as when a mount starts


@dataclass(slots=True)
class Outcome:
    """What became of each ref: its document, or the error as one."""

    done: dict[str, Document] = field(default_factory=dict)
    failed: dict[str, Document] = field(default_factory=dict)

    def tell(self, key: str, line: Callable[[Document], str], *, as_json: bool) -> int:
        """Print it, the documents as a list under `key`; the exit code."""
        documents = [self.done[name] for name in sorted(self.done)]
        errors = [{"ref": name, **self.failed[name]} for name in sorted(self.failed)]
        if as_json:
            click.echo(json.dumps({key: documents, "errors": errors}, indent=2))
        else:
            for document in documents:
                click.echo(line(document))
        for error in errors:
            say(str(error["error"]))
        return max((int(error["exit_code"]) for error in errors), default=0)


async def for_each(names: Sequence[str], do: Callable[[str], Awaitable[Document]]) -> Outcome:
    """Do it for every name, a few at a time."""
    import trio

    from weightfs.control.documents import error_to_json
    from weightfs.errors import WeightfsError

    outcome = Outcome()
    left = iter(names)

    async def work() -> None:
        for name in left:
            try:
                outcome.done[name] = await do(name)
            except WeightfsError as error:
                outcome.failed[name] = error_to_json(error)

    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(work)
    return outcome


async def headers_of(operations: Operations, document: Document, *, asked: bool) -> None:
    """Wait for the small files and headers of what was added. SourceError if they do not come and were `asked` for."""
    from weightfs.errors import FailureKind, SourceError

    ref = document["ref"]
    answer = await operations.headers(ref, wait=HEADERS_WAIT)
    if asked and not answer["ready"]:
        raise SourceError(
            f"{ref} was added, but its headers did not come within {HEADERS_WAIT:.0f} s; "
            f"`weightfs ls -l --fetch {ref}` goes on with them",
            kind=FailureKind.TIMEOUT,
        )


@click.command(
    short_help="Make models known.",
    epilog=examples(
        "weightfs add ollama://aya:8b",
        "weightfs add --pin hf://Qwen/Qwen3-8B-GGUF/*Q4_K_M*",
        "weightfs add --chunks model.meta4 https://models.example.com/model.gguf",
    ),
)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--pin", "pinned", is_flag=True, help="Keep all of them, as `weightfs pin` does.")
@click.option("--wait", is_flag=True, help="Wait until small files and headers have been fetched, too.")
@json_option
@fetch_options
@cache_options
@click.pass_context
def add(
    ctx: click.Context, /, refs: tuple[str, ...], pinned: bool, wait: bool, as_json: bool, **_: object
) -> int:
    """Ask what the REFs are, and show them in a running mount, and in every mount to come.

    Small files and the headers of model files are fetched at once: by the mount, or by this command if there is none. A
    tag stays at what it is now until `weightfs update`. A REF that is known already is left as it is.
    """
    config = load_config(ctx)
    parsed = parse_refs(refs)
    from weightfs.app.settings import check_chunks

    check_chunks(ctx.params["chunks"], len(parsed))

    async def work(operations: Operations, is_daemon: bool) -> Outcome:
        async def one(name: str) -> Document:
            document = await operations.add(name)
            if pinned:
                document = await operations.pin(document["ref"], pinned=True)
            if wait or not is_daemon:  # who works alone ends when this does
                await headers_of(operations, document, asked=wait)
            return document

        return await for_each([str(ref) for ref in parsed], one)

    outcome = ask(ctx, config, "add", work, creates=True, answers=True)
    return outcome.tell("refs", _known_line, as_json=as_json)


def _known_line(document: Document) -> str:
    from weightfs.logs import redact_url
    from weightfs.units import format_size

    files = len(document["blobs"])
    return (
        f"{redact_url(document['ref'])}: {format_size(document['size_bytes'])} in {files} "
        f"file{'' if files == 1 else 's'}, {document['revision']}{', pinned' if document['pinned'] else ''}"
    )


@click.command(
    short_help="Follow tags to what they are now.",
    epilog=examples(
        "weightfs update",
        "weightfs update ollama://aya:8b",
        "weightfs update --json | jq '.updates[] | select(.rolled_back)'",
    ),
)
@click.argument("refs", metavar="[REF]...", nargs=-1)
@json_option
@fetch_options
@cache_options
@click.pass_context
def update(ctx: click.Context, /, refs: tuple[str, ...], as_json: bool, **_: object) -> int:
    """Ask again what the REFs are, and show that from now on. Without a REF: all that may have moved.

    What is named by a digest or a commit does not move. What only the old one had is deleted as soon as nobody has it
    open. A tag that goes back to an older digest is followed too, with a warning.
    """
    config = load_config(ctx)
    parsed = parse_refs(refs)
    from weightfs.app.settings import check_chunks
    from weightfs.core.names import moves

    check_chunks(ctx.params["chunks"], len(parsed))

    async def work(operations: Operations, is_daemon: bool) -> Outcome:
        names = [str(ref) for ref in parsed]
        if not names:
            names = [ref["ref"] for ref in await operations.refs() if moves(ref["ref"])]

        async def one(name: str) -> Document:
            document = await operations.update(name)
            if not is_daemon:
                await headers_of(operations, document, asked=False)
            return document

        return await for_each(names, one)

    outcome = ask(ctx, config, "update", work, answers=True)
    return outcome.tell("updates", update_line, as_json=as_json)


def update_line(document: Document) -> str:
    """What became of one ref, for people."""
    from weightfs.logs import redact_url

    name, old, new = redact_url(document["ref"]), document["old_revision"], document["new_revision"]
    match document["outcome"]:
        case "unchanged":
            return f"{name}: unchanged, {new}"
        case "rolled back":
            return f"{name}: warning: went back to an older digest, from {old} to {new}"
        case _:
            return f"{name}: updated from {old} to {new}"


def _set_pin(ctx: click.Context, refs: tuple[str, ...], *, pinned: bool, as_json: bool) -> int:
    config = load_config(ctx)
    parsed = parse_refs(refs)
    served: list[bool] = []

    async def work(operations: Operations, _: bool) -> Outcome:
        served.append((await operations.health())["role"] == "mount")

        async def one(name: str) -> Document:
            return await operations.pin(name, pinned=pinned)

        return await for_each([str(ref) for ref in parsed], one)

    outcome = ask(ctx, config, "pin" if pinned else "unpin", work)

    def line(document: Document) -> str:
        from weightfs.logs import redact_url

        told = f"{redact_url(document['ref'])}: {'pinned' if pinned else 'no longer pinned'}"
        if pinned and not document["complete"]:
            told += (
                "; its rest is being fetched"
                if served[0]
                else "; a mount will fetch its rest, or `weightfs pull`"
            )
        return told

    return outcome.tell("refs", line, as_json=as_json)


@click.command(
    short_help="Keep models whole.",
    epilog=examples(
        "weightfs pin ollama://aya:8b",
        "weightfs ls --json | jq '.refs[] | select(.pinned).ref'",
    ),
)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@json_option
@cache_options
@click.pass_context
def pin(ctx: click.Context, /, refs: tuple[str, ...], as_json: bool, **_: object) -> int:
    """Keep all of the REFs: a mount fetches what is missing in the background, whatever --fill says, from now on.

    That holds after a restart and for what `weightfs update` brings. The REFs must be known: `weightfs add --pin`
    does both.
    """
    return _set_pin(ctx, refs, pinned=True, as_json=as_json)


@click.command(
    short_help="Take a pin back.",
    epilog=examples(
        "weightfs unpin ollama://aya:8b",
    ),
)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@json_option
@cache_options
@click.pass_context
def unpin(ctx: click.Context, /, refs: tuple[str, ...], as_json: bool, **_: object) -> int:
    """Fetch no more of the REFs than is asked for. What is cached stays."""
    return _set_pin(ctx, refs, pinned=False, as_json=as_json)
