"""Stacks of tasks and threads: bounded, grouped, and without a value."""

from __future__ import annotations

import threading

import pytest
import trio
import trio.testing

from weightfs import stacks
from weightfs.stacks import Stack, on_one_line


async def deep(depth: int) -> None:
    if depth:
        await deep(depth - 1)
    else:
        await trio.sleep_forever()


def named(found: tuple[Stack, ...], name: str) -> Stack:
    (one,) = [one for one in found if name in one.names]
    return one


async def test_many_tasks_at_one_place_are_told_once_and_deep_stacks_in_part() -> None:
    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(deep, 3, name=f"number {number:02}")
        nursery.start_soon(deep, 500, name="deep")
        await trio.testing.wait_all_tasks_blocked()
        found = stacks.stacks()
        nursery.cancel_scope.cancel()
    many = named(found.tasks, "number 00")
    assert many.count == 50
    assert len(many.names) == stacks.NAMES_AT_MOST
    assert many.frames[0].startswith("tests/cli/test_stacks.py:")
    assert "sleep_forever" in " ".join(many.frames)
    assert len(named(found.tasks, "deep").frames) == stacks.FRAMES_AT_MOST
    assert found.tasks_left_out == 0


async def test_more_tasks_than_are_told_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "TASKS_AT_MOST", 10)
    monkeypatch.setattr(stacks, "STACKS_AT_MOST", 1)
    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(deep, number)
        await trio.testing.wait_all_tasks_blocked()
        found = stacks.stacks()
        nursery.cancel_scope.cancel()
    assert len(found.tasks) == 1
    assert found.tasks[0].count + found.tasks_left_out > 30


async def test_a_thread_is_found_by_the_task_that_waits_for_it() -> None:
    release, inside = threading.Event(), threading.Event()

    def hang() -> None:
        inside.set()
        release.wait()

    async def work() -> None:
        await trio.to_thread.run_sync(hang)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, name="a work")
            await trio.testing.wait_all_tasks_blocked()
            assert inside.wait(60)
            (task,) = [one for one in nursery.child_tasks if one.name == "a work"]
            (frames,) = stacks.threads_of(task)
            assert any(frame.endswith("hang") for frame in frames)
            line = on_one_line(stacks.task_frames(task))
            assert "to_thread_run_sync" in line
            assert "\n" not in line
            assert named(stacks.stacks().threads, "hang from a work").count == 1
            release.set()
    finally:
        release.set()


def test_nothing_on_one_line() -> None:
    assert on_one_line(()) == "nowhere"
    assert on_one_line(("a:1 f", "b:2 g")) == "b:2 g < a:1 f"
