"""A read that hangs in the real daemon, in a task or in a thread: seen, told, answered, and nothing else suffers."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest

from weightfs.testing.daemon import Daemon
from weightfs.testing.mounts import can_mount
from weightfs.testing.waiting import until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]

# The engine's reads hang while there is a file `hang`. The watchdog looks every 50 ms, and takes a read for overdue as
# soon as there is a file `overdue`: when that is by the clock is tested with a clock of our own.
SABOTAGE = """
import os, time
import trio
from weightfs.engine.engine import Engine
from weightfs.mount import watchdog
where, kind = {where!r}, {kind!r}
def exists(name): return os.path.exists(os.path.join(where, name))
def hang_here():
    while exists("hang"): time.sleep(0.01)
honest, honest_nowait = Engine.read, Engine.read_nowait
async def read(self, blob, span):
    if exists("hang"):
        if kind == "thread": await trio.to_thread.run_sync(hang_here)
        else: await trio.sleep_forever()
    return await honest(self, blob, span)
def read_nowait(self, blob, span):
    return None if exists("hang") else honest_nowait(self, blob, span)
Engine.read, Engine.read_nowait = read, read_nowait
watchdog.LOOK_EVERY = 0.05
watchdog._is_overdue = lambda one, _bound, _now: one.wait is not None and one.op == "read" and exists("overdue")
"""
READ = """
direct = os.open(path, os.O_RDONLY | os.O_DIRECT)  # one request: the kernel does not ask again by itself
try: os.preadv(direct, [mmap.mmap(-1, 4096)], 8192)
except OSError as error: print(json.dumps(error.errno))
else: print(json.dumps("bytes"))
"""


def inflight(daemon: Daemon) -> dict[str, Any]:
    document: dict[str, Any] = daemon.ask(lambda client: client.inflight())
    return document


@pytest.mark.parametrize("kind", ["task", "thread"])
def test_it_is_seen_and_answered_and_the_next_read_is_right(tmp_path: Path, kind: str) -> None:
    model = tmp_path / "m.bin"
    model.write_bytes(bytes(range(256)) * 1024)
    ref = f"file://{model}"
    flags = tmp_path / "flags"
    flags.mkdir()
    sabotage = SABOTAGE.format(where=str(flags), kind=kind)
    options = ["--workers", "0", "--fill", "never", "--no-passthrough"]
    with Daemon(tmp_path / "daemon", ref, options=options, sabotage=sabotage) as daemon:
        daemon.start()
        (flags / "hang").touch()
        reader = daemon.client(READ, ref, model)

        def seen() -> dict[str, Any]:
            reads = [one for one in inflight(daemon)["requests"] if one["op"] == "read"]
            return reads[0] if reads else {}

        read = until(seen, "debug inflight shows the read")
        assert read["wait"]["ref"] == ref
        assert read["waits"] is not None
        assert [chunk["chunk"] for chunk in read["wait"]["chunks"]] == [0]
        assert (
            json.loads(daemon.cli("debug", "inflight", "--json").stdout)["requests"][0]["number"]
            == read["number"]
        )
        shown = daemon.cli("debug", "inflight").stdout
        assert re.search(
            r"^\S+  read \(request \d+, inode \d+\), bytes \[\d+, \d+\)$", shown, re.MULTILINE
        ), shown
        assert f"    {ref}: " in shown
        stacks = daemon.cli("debug", "stacks").stdout
        assert f"read request {read['number']}" in stacks
        assert ("hang_here" in stacks) == (kind == "thread")
        # Nobody else suffers.
        assert json.loads(daemon.run("print(json.dumps(os.stat(path).st_size))", ref, model)) == 262_144

        (flags / "overdue").touch()
        assert json.loads(daemon.finish(reader)) == errno.EIO
        (flags / "overdue").unlink()
        seen_now = inflight(daemon)
        assert (seen_now["left_behind"] > 0) == (kind == "thread")
        assert seen_now["overdue"] > 0
        overdue = [line for line in daemon.log.splitlines() if "A read is overdue" in line]
        assert overdue, daemon.log
        for words in (
            f"{ref} has ",
            "of 1 chunks",
            "chunk 0 ",
            "it gets EIO",
            "its task is at",
            f"inode {read['inode']}",
        ):
            assert words in overdue[0]
        assert ("its thread is at" in overdue[0]) == (kind == "thread")

        (flags / "hang").unlink()
        right = "print(json.dumps(os.pread(cold(), 262144, 0) == true(0, 262144)))"
        assert json.loads(daemon.run(right, ref, model)) is True
        until(lambda: inflight(daemon)["left_behind"] == 0, "what was left behind has ended")
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log
