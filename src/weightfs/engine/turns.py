"""Work on very many blobs in turns, so that whoever reads meanwhile does not wait for all of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, TypeVar

T = TypeVar("T")

AT_A_TIME: Final = 256  # blobs of 100,000 that are seen to before readers have a turn: a few milliseconds


def in_turns(items: Iterable[T]) -> Iterator[list[T]]:
    """`items` in lists of at most `AT_A_TIME`. Whoever goes through them ends each turn with a checkpoint."""
    rest = iter(items)
    while turn := list(islice(rest, AT_A_TIME)):
        yield turn


def taken_in_turns(items: list[T]) -> Iterator[list[T]]:
    """The same, from the end, and each is taken out: what nobody else has is freed turn by turn, not all at the end."""
    while items:
        turn = items[-AT_A_TIME:]
        del items[-AT_A_TIME:]
        yield turn
