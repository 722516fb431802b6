"""The ledger against a plain dict, also when its process dies between any two stores into the shared memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.mount.ledger import HEAD, SIZE, SLOT, Entry, Ledger

INODES = st.integers(1, 6)
STEPS = st.lists(st.tuples(st.sampled_from(["open", "lend", "release", "reborn"]), INODES), max_size=60)


def content(ledger: Ledger) -> dict[int, tuple[int, int]]:
    return {entry.ino: (entry.handles, entry.backing) for entry in ledger.entries()}


def reborn(memory: memoryview) -> Ledger:
    """The next process's."""
    return Ledger(memory)


@given(STEPS)
def test_it_is_what_was_opened_and_not_released(steps: list[tuple[str, int]]) -> None:
    memory = memoryview(bytearray(HEAD + 8 * SLOT))
    ledger, model = Ledger(memory), dict[int, tuple[int, int]]()
    for step, ino in steps:
        handles, backing = model.get(ino, (0, 0))
        match step:
            case "open":
                ledger.opened(ino)
                model[ino] = (handles + 1, backing)
            case "lend" if handles:
                ledger.lent(ino, 100 + ino)
                model[ino] = (handles, 100 + ino)
            case "release":
                ledger.released(ino)
                model[ino] = (handles - 1, backing)
            case "reborn":
                ledger = reborn(memory)
        model = {ino: held for ino, held in model.items() if held[0] > 0}
        assert content(ledger) == model
        assert len(ledger) == len(model)
    assert ledger.whole
    assert content(reborn(memory)) == model


class Dying(Exception):
    """The process ends here."""


class Mortal:
    """A view of words that lets so many stores through, and no more: all views of one ledger share `left`."""

    def __init__(self, view: memoryview, left: list[int]) -> None:
        self._view = view
        self._left = left

    def __getitem__(self, index: int) -> int:
        return int(self._view[index])

    def __setitem__(self, index: int, value: int) -> None:
        if not self._left[0]:
            raise Dying
        self._left[0] -= 1
        self._view[index] = value


@given(STEPS, st.integers(0, 40))
def test_no_moment_to_die_loses_a_handle(steps: list[tuple[str, int]], stores: int) -> None:
    """What was answered is in it; of what was under way, at most that one thing is there or not."""
    memory = memoryview(bytearray(HEAD + 8 * SLOT))
    ledger = Ledger(memory)
    left = [stores]
    ledger._words = Mortal(ledger._words, left)  # type: ignore[assignment]
    ledger._inos = Mortal(ledger._inos, left)  # type: ignore[assignment]
    before: dict[int, tuple[int, int]] = {}
    last: tuple[str, int] | None = None
    try:
        for step, ino in steps:
            before, last = content(ledger), (step, ino)
            match step:
                case "open":
                    ledger.opened(ino)
                case "lend":
                    ledger.lent(ino, 100 + ino)
                case "release":
                    ledger.released(ino)
    except Dying:
        pass
    else:
        before, last = content(ledger), None
    after = content(reborn(memory))
    under_way = {last[1]} if last is not None else set()
    assert {ino: held for ino, held in after.items() if ino not in under_way} == {
        ino: held for ino, held in before.items() if ino not in under_way
    }
    for ino in under_way:
        handles, _ = after.get(ino, (0, 0))
        was = before.get(ino, (0, 0))[0]
        assert last is not None
        assert handles in {was, was + (last[0] == "open") - (last[0] == "release" and was > 0)}


def test_a_full_one_says_so_for_good() -> None:
    memory = memoryview(bytearray(HEAD + 2 * SLOT))
    ledger = Ledger(memory)
    for ino in (2, 4, 6):
        ledger.opened(ino)
    assert not ledger.whole
    for ino in (2, 4, 6):
        ledger.released(ino)
    assert not reborn(memory).whole
    assert content(ledger) == {}


@contextmanager
def shared() -> Iterator[int]:
    fd = os.memfd_create("test")
    try:
        os.ftruncate(fd, SIZE)
        yield fd
    finally:
        os.close(fd)


def test_it_survives_in_shared_memory_with_its_head() -> None:
    with shared() as fd:
        first = Ledger(memoryview(mmap.mmap(fd, SIZE)))
        first.describe({"version": 1, "path": "/mnt/modèles\udcff" + "ü" * 2000})
        first.attempts += 2
        first.opened(2**62 - 2)
        first.lent(2**62 - 2, 7)
        second = Ledger(memoryview(mmap.mmap(fd, SIZE)))
        assert second.facts() == {"version": 1, "path": "/mnt/modèles\udcff" + "ü" * 2000}
        assert second.attempts == 2
        assert list(second.entries()) == [Entry(2**62 - 2, 1, 7)]


@pytest.mark.parametrize("head", [b"", b"[]", b"{", b"\xff\xfe"])
def test_a_head_that_is_none(head: bytes) -> None:
    memory = memoryview(bytearray(HEAD + SLOT))
    memory[: len(head)] = head
    with pytest.raises(ValueError):  # noqa: PT011 - every kind of it
        Ledger(memory).facts()
    with pytest.raises(ValueError, match="do not fit"):
        Ledger(memory).describe({"path": "x" * HEAD})
