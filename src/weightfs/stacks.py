"""Where the tasks and threads of this process are: for a daemon that does not do what it should.

Rules. Only file, line and function are told, never a value: no secret can be in it. Everything is bounded, for there
may be two thousand tasks; tasks, and threads, with the same stack are told once. Called in the trio thread.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath
from types import FrameType
from typing import Final

import trio

TASKS_AT_MOST: Final = 1000  # looked at; the rest is counted
STACKS_AT_MOST: Final = 200  # of each kind, that are told
FRAMES_AT_MOST: Final = 40  # innermost, of one stack
NAMES_AT_MOST: Final = 8  # of those that have the same stack
NAME_LENGTH: Final = 120  # characters
LINE_FRAMES: Final = 12  # of a stack on one line, for the log

Frames = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """`count` tasks or threads that are at one place. `frames`: outermost first, each `file:line function`."""

    names: tuple[str, ...]
    count: int
    frames: Frames


@dataclass(frozen=True, slots=True)
class Stacks:
    """Of the whole process. `..._left_out`: tasks or threads that are not told."""

    tasks: tuple[Stack, ...]
    tasks_left_out: int
    threads: tuple[Stack, ...]
    threads_left_out: int


def stacks() -> Stacks:
    """Every task of this trio run, and every thread of this process."""
    tasks: list[tuple[str, Frames]] = []
    unseen = 0
    for task in _tasks():
        if len(tasks) < TASKS_AT_MOST:
            tasks.append((task.name, task_frames(task)))
        else:
            unseen += 1
    told_tasks, left_tasks = _grouped(tasks)
    told_threads, left_threads = _grouped(_threads())
    return Stacks(told_tasks, left_tasks + unseen, told_threads, left_threads)


def task_frames(task: trio.lowlevel.Task) -> Frames:
    """Where a task waits."""
    return _told(frame_and_line for frame_and_line in task.iter_await_frames())


def threads_of(task: trio.lowlevel.Task) -> list[Frames]:
    """Where the threads are that a task waits for: trio names them after it."""
    return [frames for name, frames in _threads() if name.endswith(f" from {task.name}")]


def on_one_line(frames: Frames) -> str:
    """The innermost frames, innermost first."""
    return " < ".join(reversed(frames[-LINE_FRAMES:])) or "nowhere"


def tell_on_signal() -> None:
    """From now on SIGUSR2 has the stacks of this process's threads written to stderr, also while its loop stands still.

    Nothing of ours runs then: the interpreter's faulthandler writes from the signal handler itself, in C, and takes
    neither the interpreter's lock nor memory; 100 threads of 100 frames at most, to the descriptor that is noted now.
    Interrupted system calls are started again. It looks at threads that run, so it is for a process that hangs. Where
    there is no stderr (in a test) there is none of it.
    """
    with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
        faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True, chain=False)


def _tasks() -> Iterator[trio.lowlevel.Task]:
    """The tree of tasks, outermost first."""
    root = trio.lowlevel.current_root_task()
    waiting = [root] if root is not None else []
    while waiting:
        task = waiting.pop()
        yield task
        waiting.extend(child for nursery in task.child_nurseries for child in nursery.child_tasks)


def _threads() -> list[tuple[str, Frames]]:
    frames = sys._current_frames()
    return [
        (thread.name, _told(traceback.walk_stack(frames[thread.ident]), innermost_first=True))
        for thread in threading.enumerate()
        if thread.ident in frames
    ]


def _told(stack: Iterable[tuple[FrameType, int]], *, innermost_first: bool = False) -> Frames:
    found = [f"{_short(frame.f_code.co_filename)}:{line} {frame.f_code.co_qualname}" for frame, line in stack]
    if innermost_first:
        found.reverse()
    return tuple(found[-FRAMES_AT_MOST:])


@lru_cache(maxsize=1024)
def _short(path: str) -> str:
    """The last parts of a path say which file it is."""
    return "/".join(PurePath(path).parts[-3:])


def _grouped(named: Iterable[tuple[str, Frames]]) -> tuple[tuple[Stack, ...], int]:
    """Those with the same frames together, most first; how many are left out."""
    groups: dict[Frames, list[str]] = {}
    for name, frames in named:
        groups.setdefault(frames, []).append(name[:NAME_LENGTH])
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    told = tuple(
        Stack(tuple(sorted(set(names))[:NAMES_AT_MOST]), len(names), frames)
        for frames, names in ordered[:STACKS_AT_MOST]
    )
    return told, sum(len(names) for _, names in ordered[STACKS_AT_MOST:])
