"""`fill`, `pause` and `resume`, `status REF` and `top`: on an idle cache, and with a real mount."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weightfs.testing.commands import run
from weightfs.testing.daemon import Daemon
from weightfs.testing.models import make_gguf
from weightfs.testing.mounts import can_mount
from weightfs.testing.waiting import until

DATA = bytes(range(256)) * 4096 * 3


def put(tmp_path: Path, name: str) -> str:
    path = tmp_path / name
    path.write_bytes(DATA)
    return f"file://{path}"


def marks(tmp_path: Path) -> list[tuple[str, bool]]:
    return [(ref["fill"], ref["paused"]) for ref in json.loads(run(tmp_path, "ls", "--json").stdout)["refs"]]


def test_marks_on_an_idle_cache_are_noted_for_the_mount_to_come(tmp_path: Path) -> None:
    one, two = put(tmp_path, "one.bin"), put(tmp_path, "two.bin")
    run(tmp_path, "add", one, two)
    assert run(tmp_path, "fill", one).stdout == (
        f"{one}: all of it is wanted; a mount will fetch its rest, or `weightfs pull`\n"
    )
    assert run(tmp_path, "fill", "--mode", "never", two).stdout == (
        f"{two}: no more of it is fetched than is asked for\n"
    )
    assert f"{one}: paused; " in run(tmp_path, "pause", one).stdout
    assert f"once `weightfs resume {one}` lets it" in run(tmp_path, "fill", one).stdout
    assert marks(tmp_path) == [("all", True), ("never", False)]
    (ref,) = json.loads(run(tmp_path, "resume", one, "--json").stdout)["refs"]
    assert not ref["paused"]
    assert run(tmp_path, "fill", "--mode", "default", one, two).exit_code == 0
    assert marks(tmp_path) == [("default", False)] * 2


def test_everything_is_paused_and_resumed(tmp_path: Path) -> None:
    one = put(tmp_path, "one.bin")
    run(tmp_path, "add", one)
    run(tmp_path, "pause", one)
    assert "everything is paused" in run(tmp_path, "pause", "--all").stdout
    assert "paused: nothing is fetched" in run(tmp_path, "status").stdout
    assert "but everything is paused" in run(tmp_path, "resume", one).stdout
    run(tmp_path, "pause", one)
    assert "but for 1 ref paused by name" in run(tmp_path, "resume", "--all").stdout
    assert "(paused)" in run(tmp_path, "status").stdout
    assert json.loads(run(tmp_path, "pause", "--all", "--json").stdout)["all_paused"] is True
    run(tmp_path, "resume", one)
    assert run(tmp_path, "resume", "--all").stdout == "resumed\n"


@pytest.mark.parametrize("command", ["fill", "pause", "resume"])
def test_what_is_typed_wrong(tmp_path: Path, command: str) -> None:
    one = put(tmp_path, "one.bin")
    assert "weightfs" in run(tmp_path, command, one, code=5).stderr  # no cache is made for it
    run(tmp_path, "add", one)
    assert "is not in the cache" in run(tmp_path, command, f"file://{tmp_path}/other", code=2).stderr
    run(tmp_path, command, code=2)
    if command != "fill":
        assert "--all" in run(tmp_path, command, "--all", one, code=2).stderr


def test_the_chunks_of_a_ref_on_an_idle_cache(tmp_path: Path) -> None:
    make_gguf(tmp_path / "m.gguf")
    ref, other = f"file://{tmp_path}/m.gguf", put(tmp_path, "one.bin")
    run(tmp_path, "add", ref, other)
    shown = run(tmp_path, "status", other).stdout
    assert f"{other}\n  0% of 3.0 MiB, " in shown
    assert "\n    ...\n" in shown
    run(tmp_path, "pull", ref, other, "--allow-unverifiable")
    lines = run(tmp_path, "status", ref, other).stdout.splitlines()
    assert sum(line.strip() == "###" for line in lines) == 1
    assert sum(line.strip() == "h" for line in lines) == 1, "the header of the GGUF"
    document = json.loads(run(tmp_path, "status", "--json", other).stdout)
    (one,) = document["refs"]
    (file,) = one["chunks"]["files"]
    assert file["runs"] == {"present": [[0, 3]], "quarantined": [], "in_flight": []}
    assert (file["chunk_count"], file["first_chunk"], file["header_bytes"]) == (3, 0, None)
    assert "is not in the cache" in run(tmp_path, "status", f"file://{tmp_path}/x", code=2).stderr


def test_top_shows_an_idle_cache_once(tmp_path: Path) -> None:
    one = put(tmp_path, "one.bin")
    run(tmp_path, "add", one)
    lines = run(tmp_path, "top").stdout.splitlines()
    assert lines[0] == "idle"
    assert any("one.bin" in line and " 0%" in line for line in lines)


@pytest.mark.mount
def test_a_mount_fills_what_it_is_told_to_and_rests_when_paused_also_after_a_restart(tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("needs /dev/fuse and CAP_SYS_ADMIN")
    refs = [put(tmp_path, name) for name in ("one.bin", "two.bin")]
    with Daemon(tmp_path / "d", *refs, options=("--fill", "never", "--workers", "0")) as daemon:
        daemon.start()

        def here(ref: str) -> int:
            return int(daemon.file(ref)["present_bytes"])

        def cli_(*arguments: str) -> str:
            done = daemon.cli(*arguments)
            assert done.returncode == 0, done.stderr
            return done.stdout

        cli_("pause", "--all")
        assert "its rest is being fetched" in cli_("fill", *refs)
        assert daemon.run("print(len(open(path, 'rb').read(10)))", refs[0]) == "10"  # readers are served
        assert daemon.stop() == 0
        daemon.start()
        assert daemon.status()["paused"]
        daemon.quiet(refs[0])
        assert here(refs[0]) < len(DATA)
        assert here(refs[1]) == 0
        assert "paused: nothing" in cli_("top")
        assert cli_("resume", "--all") == "resumed\n"
        for ref in refs:
            until(lambda ref=ref: here(ref) == len(DATA), f"{ref} is filled")  # type: ignore[misc]
        assert "###" in cli_("status", refs[0])
        _watch_and_quit(daemon)
        assert daemon.stop() == 0


def _watch_and_quit(daemon: Daemon) -> None:
    """On a terminal `top` goes on until q is pressed, and leaves the terminal as it was."""
    master, slave = pty.openpty()
    try:
        before: Any = __import__("termios").tcgetattr(slave)
        watching = subprocess.Popen(
            [sys.executable, "-m", "weightfs", "top", "--interval", "0.2", "--cache", str(daemon.cache)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
        )
        shown = bytearray()

        def looked() -> bool:
            shown.extend(os.read(master, 1 << 16))
            return shown.count(b"one.bin") >= 2

        until(looked, "two pictures")
        os.write(master, b"q")
        assert watching.wait(30) == 0
        assert __import__("termios").tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)
