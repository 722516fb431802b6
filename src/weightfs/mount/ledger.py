"""What the kernel has open, written where a SIGKILL cannot reach it: memory that outlives the process.

Rules. An inode is entered before its OPEN is answered, and struck off after its RELEASE was: a process that dies in
between has entered one handle too many, never one too few, for the kernel sends what was not answered again. One too
many costs what a forgotten handle costs: the blob is not evicted until the unmount. Every change is a store of one
aligned word, or concerns an inode whose handles still say 0; so no moment to die leaves a wrong entry. A ledger
that was ever full is not whole, and says so for good.

Layout, native byte order: a head with a JSON object (see `takeover`), padded with zeros, whose last two words are
`attempts` and `overflown`; then slots of (inode: 8 bytes, handles: 4, backing id: 4), unused where handles are 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

HEAD: Final = 8192  # bytes; the longest path takes half of it
SLOTS: Final = 65_536  # inodes that are open at once; the memory of those that never were is not used
SLOT: Final = 16
SIZE: Final = HEAD + SLOTS * SLOT
_TEXT: Final = HEAD - 8  # bytes of JSON
_ATTEMPTS: Final = HEAD // 4 - 2  # indexes of 4-byte words
_OVERFLOWN: Final = HEAD // 4 - 1


@dataclass(frozen=True, slots=True)
class Entry:
    """An inode that is open. `backing`: the id of its backing file in the kernel; 0: it is read through us."""

    ino: int
    handles: int
    backing: int


class Ledger:
    """On a writable buffer of at least a head and a slot; without one, in memory that ends with the process."""

    def __init__(self, buffer: memoryview | None = None) -> None:
        self._memory = memoryview(bytearray(2 * HEAD)) if buffer is None else buffer
        # A store through a view of words is one instruction; `struct` would go byte by byte.
        self._words = self._memory.cast("I")
        self._inos = self._memory.cast("Q")
        self._slots = (len(self._memory) - HEAD) // SLOT
        self._at: dict[int, int] = {}  # inode → slot
        self._free: list[int] = []
        self._unused = 0  # no slot from here on was ever used
        for slot in range(self._slots):
            ino = self._inos[_ino(slot)]
            if not ino:
                break  # slots are used in order
            if self._words[_handles(slot)]:
                self._at[ino] = slot
            else:
                self._free.append(slot)
            self._unused = slot + 1

    # --- the head

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Write the JSON object. Once, before the memory is given to anybody else."""
        text = json.dumps(facts, ensure_ascii=False).encode(errors="surrogateescape")
        if len(text) > _TEXT:
            raise ValueError(f"{len(text)} bytes do not fit")
        self._memory[: len(text)] = text

    def facts(self) -> dict[str, Any]:
        """The JSON object. ValueError if there is none."""
        facts = json.loads(bytes(self._memory[:_TEXT]).rstrip(b"\0").decode(errors="surrogateescape"))
        if not isinstance(facts, dict):
            raise ValueError("not an object")  # noqa: TRY004 - of what was read, not of an argument
        return facts

    @property
    def attempts(self) -> int:
        """How many processes in a row have begun with it, and did not come to serve."""
        return self._words[_ATTEMPTS]

    @attempts.setter
    def attempts(self, value: int) -> None:
        self._words[_ATTEMPTS] = value

    @property
    def whole(self) -> bool:
        """Whether everything that is open is in it."""
        return not self._words[_OVERFLOWN]

    # --- the slots

    def __len__(self) -> int:
        return len(self._at)

    def entries(self) -> Iterator[Entry]:
        """Yield what is open."""
        for ino, slot in self._at.items():
            yield Entry(ino, self._words[_handles(slot)], self._words[_backing(slot)])

    def opened(self, ino: int) -> None:
        """One handle more; to be called before its OPEN is answered."""
        slot = self._at.get(ino)
        if slot is None:
            if self._free:
                slot = self._free.pop()
            elif self._unused < self._slots:
                slot = self._unused
                self._unused += 1
            else:
                self._words[_OVERFLOWN] = 1
                return
            self._at[ino] = slot
            self._words[_backing(slot)] = 0
            self._inos[_ino(slot)] = ino
        self._words[_handles(slot)] += 1

    def lent(self, ino: int, backing: int) -> None:
        """The inode, which is open, is passed through; to be called before its OPEN is answered."""
        slot = self._at.get(ino)
        if slot is not None:
            self._words[_backing(slot)] = backing

    def released(self, ino: int) -> None:
        """One handle less; to be called after its RELEASE was answered."""
        slot = self._at.get(ino)
        if slot is not None:
            self._words[_handles(slot)] -= 1
            if not self._words[_handles(slot)]:
                del self._at[ino]
                self._free.append(slot)


def _ino(slot: int) -> int:
    return (HEAD + slot * SLOT) // 8


def _handles(slot: int) -> int:
    return (HEAD + slot * SLOT + 8) // 4


def _backing(slot: int) -> int:
    return (HEAD + slot * SLOT + 12) // 4
