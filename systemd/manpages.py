"""Writes the manual pages and the shell completions, as the command line describes itself: `manpages.py TREE`.

Below TREE they are where `share/` of a prefix has them. Needs click-man, click and `weightfs.cli`, nothing else.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Final

import click
from click_man.core import generate_man_page

import weightfs
from weightfs.cli import cli
from weightfs.cli.completing import script

PLACES: Final = {
    "bash": "bash-completion/completions/weightfs",
    "zsh": "zsh/site-functions/_weightfs",
    "fish": "fish/vendor_completions.d/weightfs.fish",
}
SEE_ALSO: Final = "configuration.md, semantics.md, systemd.md and troubleshooting.md in share/doc/weightfs"


def roff(line: str) -> str:
    """One line of text that groff takes as it is: groff_man(7), "Portability"."""
    escaped = line.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def sections(epilog: str) -> str:
    """The blocks at the end of a command's help, each with its heading, line by line."""
    text = ""
    for block in epilog.replace("\b\n", "").strip().split("\n\n"):
        heading, *lines = block.split("\n")
        if heading not in ("Examples:", "Exit codes:"):
            heading, lines = "Notes:", [heading, *lines]
        body = "\n".join(roff(line.removeprefix("  ")) for line in lines)
        text += f".SH {heading.removesuffix(':').upper()}\n.nf\n{body}\n.fi\n"
    return text


def pages(
    command: click.Command, name: str, date: str, parent: click.Context | None = None
) -> dict[str, str]:
    """The page of a command and those of its own commands, by file name."""
    ctx = click.Context(command, info_name=name, parent=parent)
    # A mark for click alone: what follows is not wrapped.
    command.help = (command.help or "").replace("\b\n", "")
    page = generate_man_page(ctx, version=weightfs.__version__, date=date) + sections(command.epilog or "")
    above = f".BR {ctx.parent.command_path.replace(' ', '-')} (1)\n" if ctx.parent else ""
    found = {f"{ctx.command_path.replace(' ', '-')}.1": f"{page}.SH SEE ALSO\n{above}"}
    if not above:
        found = {file: text + f"{roff(SEE_ALSO)}\n" for file, text in found.items()}
    for child, one in getattr(command, "commands", {}).items():
        if not one.hidden:
            found |= pages(one, child, date, ctx)
    return found


def main() -> None:
    """See the module."""
    tree = Path(sys.argv[1])
    # https://reproducible-builds.org/specs/source-date-epoch/
    date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())))
    files = {f"man/man1/{name}": text for name, text in pages(cli, "weightfs", date).items()}
    files |= {path: script(cli, shell) for shell, path in PLACES.items()}
    for path, text in files.items():
        target = tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


if __name__ == "__main__":
    main()
