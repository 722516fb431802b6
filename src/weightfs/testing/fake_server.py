"""The process behind `FakeMount`: it serves a mount over the fake engine, commanded by lines of JSON.

Rule: every command gets exactly one line as its answer, but `stop`, after which the last line says how `serve` ended.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from weightfs.app.daemon import LAYOUTS
from weightfs.errors import FailureKind, MountError, SourceError
from weightfs.mount.serve import serve
from weightfs.mount.session import MountOptions
from weightfs.mount.stats import MountStats
from weightfs.testing.fake_engine import FakeEngine
from weightfs.testing.shelf import take


class Server:
    """The server process: `serve`, and commands from standard input."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.engine = FakeEngine()
        self.stats = MountStats()
        self.beats = 0
        self.busy = 0.0

    async def main(self) -> int:
        """Serve as many rounds as wanted; the last word is how the last one ended."""
        before = _open_fds()
        answer: dict[str, Any] = {}
        for _ in range(self.config["rounds"]):
            answer = await self._serve()
        answer["leaked_fds"] = _open_fds() - before
        _say(answer)
        return 0

    async def _serve(self) -> dict[str, Any]:

        exec(self.config["sabotage"], {})  # noqa: S102 - the test's own
        cache = self.config["cache"]
        self.engine = FakeEngine(None if cache is None else Path(cache))
        self.engine.add(self.config["files"].items(), present=self.config["present"])
        options = MountOptions(**self.config["options"])
        answer: dict[str, Any] = {"ended": True}
        async with trio.open_nursery() as nursery:

            async def life(task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED) -> None:
                where = Path(self.config["mountpoint"])
                layouts = LAYOUTS if self.config["every_layout"] else LAYOUTS[:1]
                try:
                    await serve(
                        where, self.engine, layouts, options, stats=self.stats, task_status=task_status
                    )
                except MountError as error:
                    answer.clear()
                    answer["error"] = str(error)
                    task_status.started(None)
                nursery.cancel_scope.cancel()

            mounted = await nursery.start(life)
            if mounted is not None:
                _say({"ready": True, "device": mounted.device})
                nursery.start_soon(self._beat)
                await self._listen()
                nursery.cancel_scope.cancel()
        return answer

    async def _beat(self) -> None:
        while True:
            await trio.sleep(0 if self.busy else 0.01)
            time.sleep(self.busy)  # noqa: ASYNC251 - blocks the loop: that is what it is for
            self.beats += 1

    async def _listen(self) -> None:
        buffer = b""
        async with trio.lowlevel.FdStream(os.dup(0)) as stdin:
            async for piece in stdin:
                buffer += piece
                while b"\n" in buffer:
                    line, _, buffer = buffer.partition(b"\n")
                    command = json.loads(line)
                    if command["do"] == "stop":
                        return
                    try:
                        _say(self.command(**command))
                    except Exception as error:  # noqa: BLE001 - told to the test
                        _say({"failed": repr(error)})

    def command(self, do: str, **arguments: Any) -> dict[str, Any]:
        """`stats`; a method of the engine; `set` (fields of a file); `busy` (how long each heartbeat blocks).

        `put` and `offer` (to who browses) take what `shelf.take` reads, `deny` a ref and the kind of failure.
        """
        match do:
            case "stats":
                return self._tell()
            case "set":
                file = self.engine.files[arguments.pop("name")]
                bug = arguments.pop("bug", None)
                if bug is not None:
                    file.error = RuntimeError(bug) if bug else None
                for name, value in arguments.items():
                    setattr(file, name, value)
            case "busy":
                self.busy = arguments["seconds"]
            case "fail":
                kind = arguments["kind"]
                chunk = arguments.get("chunk", -1)
                self.engine.fail(arguments["name"], None if kind is None else FailureKind(kind), chunk)
            case "add":
                self.engine.add(arguments["files"].items(), present=arguments.get("present", 0.0))
            case "put" | "unpin" | "offer" | "deny" | "hold_browse" | "let_browse_go":
                self._shelve(do, arguments)
            case "remove" | "hold" | "let_go" | "complete" | "spoil":
                getattr(self.engine, do)(arguments["name"])
            case _:
                raise ValueError(do)
        return {}

    def _shelve(self, do: str, arguments: dict[str, Any]) -> None:
        engine = self.engine
        match do:
            case "unpin":
                engine.unpin(arguments["ref"])
            case "put":
                shelved = take(arguments)
                engine.put(shelved.manifest, shelved.contents, present=arguments.get("present", 0.0))
            case "offer":
                shelved = take(arguments)
                engine.offers[shelved.manifest.ref] = partial(engine.put, shelved.manifest, shelved.contents)
            case "deny":
                kind = FailureKind(arguments["kind"])
                engine.offers[arguments["ref"]] = SourceError("it fails on purpose", kind=kind)
            case "hold_browse":
                engine.browsing = trio.Event()
            case _:
                gate, engine.browsing = engine.browsing, None
                if gate is not None:
                    gate.set()

    def _tell(self) -> dict[str, Any]:
        return {
            "beats": self.beats,
            "asked": self.engine.asked,
            "waiting": self.engine.waiting,
            "most_waiting": self.engine.most_waiting,
            "reads": self.stats.reads,
            "failed_reads": self.stats.failed_reads,
            "delayed_reads": self.stats.delayed_reads,
            "held": self.stats.held,
            "internal_errors": self.stats.internal_errors,
            "passed_opens": self.stats.passed_opens,
            "passed_files": self.stats.passed_files,
            "in_flight": len(list(self.stats.in_flight(trio.current_time()))),
            "spans": {
                name: [[s.start, s.stop] for s in file.reads] for name, file in self.engine.files.items()
            },
            "handles": {name: file.handles for name, file in self.engine.files.items()},
        }


def _open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _say(answer: dict[str, Any]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def main(arguments: Sequence[str]) -> int:
    """Run the server with a configuration in JSON (`FakeMount` starts it)."""
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    return trio.run(Server(json.loads(arguments[0])).main)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
