"""What a check comes to: its subject, a level, and one sentence that says what to do."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Level(enum.StrEnum):
    """`WARNING`: it works, but less well than it could. `PROBLEM`: something does not work."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check; `check` is its subject, the same text for all of its verdicts."""

    check: str
    level: Level
    text: str


def ok(check: str, text: str) -> Verdict:
    """All is well."""
    return Verdict(check, Level.OK, text)


def warning(check: str, text: str) -> Verdict:
    """It works, but."""
    return Verdict(check, Level.WARNING, text)


def problem(check: str, text: str) -> Verdict:
    """It does not work."""
    return Verdict(check, Level.PROBLEM, text)


def is_sound(verdicts: Iterable[Verdict]) -> bool:
    """Whether none is a problem."""
    return all(verdict.level is not Level.PROBLEM for verdict in verdicts)
