"""What was measured, as a table and as JSON.

Rule: a figure is never shown without its peer from the same run. Each measure keeps every round; what is shown is
minimum, median and maximum, and ratios are taken of medians.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

OURS = "weightfs"


@dataclass(frozen=True, slots=True)
class Aim:
    """What is aimed at: our median over that of the better of `peers` (or alone, where there is none)."""

    text: str
    bound: float
    at_least: bool = True
    peers: tuple[str, ...] = ()


@dataclass(slots=True)
class Measure:
    """One row: every round of every contender, in `unit`; `higher` values are better, or lower ones."""

    key: str
    title: str
    unit: str
    higher: bool
    aims: tuple[Aim, ...] = ()
    note: str = ""
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, contender: str, value: float) -> None:
        """One more round of one contender."""
        self.rounds.setdefault(contender, []).append(value)

    def median(self, contender: str) -> float:
        """Of all rounds. KeyError if it was not measured."""
        return statistics.median(self.rounds[contender])

    def value_of(self, aim: Aim) -> float | None:
        """What the aim's bound is compared with; None if it was not measured."""
        if OURS not in self.rounds:
            return None
        peers = [self.median(peer) for peer in aim.peers if peer in self.rounds]
        if aim.peers and not peers:
            return None
        if not peers:
            return self.median(OURS)
        return self.median(OURS) / (max(peers) if self.higher else min(peers))

    def reached(self, aim: Aim) -> bool | None:
        """Whether the aim was reached; None if it was not measured."""
        value = self.value_of(aim)
        if value is None:
            return None
        return value >= aim.bound if aim.at_least else value <= aim.bound


def text_of(measures: Sequence[Measure], machine: dict[str, str]) -> str:
    """The table, for a terminal or a file, 120 columns wide."""
    table = Table(show_lines=False)
    table.add_column("measure")
    table.add_column("contender")
    for heading in ("min", "median", "max"):
        table.add_column(heading, justify="right")
    table.add_column("unit")
    table.add_column("ours/it", justify="right")
    table.add_column("aim")
    for measure in measures:
        _rows(table, measure)
    out = StringIO()
    console = Console(file=out, width=132, color_system=None, highlight=False)
    for key, value in machine.items():
        console.print(f"{key}: {value}", markup=False)
    console.print(table)
    for measure in measures:
        if measure.note:
            console.print(f"{measure.title}: {measure.note}", markup=False)
    return out.getvalue()


def _rows(table: Table, measure: Measure) -> None:
    aims = [_verdict(measure, aim) for aim in measure.aims]
    for number, (contender, values) in enumerate(measure.rounds.items()):
        ratio = ""
        if contender != OURS and OURS in measure.rounds and measure.median(contender):
            ratio = f"{measure.median(OURS) / measure.median(contender):.2f}"
        figures = (min(values), measure.median(contender), max(values))
        table.add_row(
            measure.title if number == 0 else "",
            contender,
            *map(_figure, figures),
            measure.unit,
            ratio,
            aims[number] if number < len(aims) else "",
        )
    for aim in aims[len(measure.rounds) :]:
        table.add_row("", "", "", "", "", "", "", aim)
    table.add_section()


def _verdict(measure: Measure, aim: Aim) -> str:
    match measure.reached(aim):
        case None:
            return f"{aim.text}: not measured"
        case True:
            return f"{aim.text}: yes"
        case _:
            return f"{aim.text}: NO"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def json_of(measures: Sequence[Measure], machine: dict[str, str]) -> str:
    """Everything, every round."""
    rows = [
        {
            "key": measure.key,
            "title": measure.title,
            "unit": measure.unit,
            "higher_is_better": measure.higher,
            "note": measure.note,
            "contenders": {
                name: {
                    "rounds": values,
                    "min": min(values),
                    "median": measure.median(name),
                    "max": max(values),
                }
                for name, values in measure.rounds.items()
            },
            "aims": [
                {
                    "aim": aim.text,
                    "value": measure.value_of(aim),
                    "bound": aim.bound,
                    "reached": measure.reached(aim),
                }
                for aim in measure.aims
            ],
        }
        for measure in measures
    ]
    return json.dumps({"machine": machine, "measures": rows}, indent=2) + "\n"


def write(directory: Path, measures: Sequence[Measure], machine: dict[str, str]) -> str:
    """Write `bench.txt` and `bench.json`; the text."""
    directory.mkdir(parents=True, exist_ok=True)
    text = text_of(measures, machine)
    (directory / "bench.txt").write_text(text)
    (directory / "bench.json").write_text(json_of(measures, machine))
    return text
