"""`weightfs completion SHELL`: what a shell reads to complete commands and options. click knows how."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import get_completion_class

from weightfs.cli.group import examples

SHELLS: Final = ("bash", "zsh", "fish")


@click.command(
    short_help="Print a shell's completion script.",
    epilog=examples(
        "weightfs completion bash > ~/.local/share/bash-completion/completions/weightfs",
        "weightfs completion fish > ~/.config/fish/completions/weightfs.fish",
        "source <(weightfs completion zsh)",
    ),
)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script with which SHELL completes commands, options and their values.

    `make install` has put it where the shells look for it.
    """
    click.echo(script(ctx.find_root().command, shell))


def script(cli: click.Command, shell: str) -> str:
    """The script for one of SHELLS."""
    found = get_completion_class(shell)
    assert found is not None  # click knows all of SHELLS
    return found(cli, {}, "weightfs", "_WEIGHTFS_COMPLETE").source()
