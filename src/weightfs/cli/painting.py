"""Lines that are pictures: blocks and colours where a terminal and a person take them, else plain ASCII."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

import click


def takes_blocks() -> bool:
    """Whether there is a terminal that has blocks, and a person who wants colours (no-color.org)."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    able = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and encoding == "utf8"
    return able and not os.environ.get("NO_COLOR")


def paint(lines: Sequence[str], styles: Mapping[str, str]) -> None:
    """Print them; `styles`: of which colour each mark is, empty where there are none."""
    if not styles:
        for line in lines:
            click.echo(line)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        text = Text(line)
        for mark, style in styles.items():
            text.highlight_regex(f"{mark}+", style)
        console.print(text)
