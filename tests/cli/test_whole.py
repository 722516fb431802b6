"""The program as people run it: processes, a real nginx, a real mount, exit codes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from weightfs.control.address import socket_path
from weightfs.mount import mounttable
from weightfs.testing.nginx import Nginx
from weightfs.testing.waiting import until

pytestmark = [pytest.mark.nginx, pytest.mark.timeout(180)]

BOUND = 60.0  # seconds; a hang becomes a failure
DATA = random.Random(7).randbytes(5 * 2**20 + 12345)
SHA256 = hashlib.sha256(DATA).hexdigest()


@dataclass
class Stage:
    """An origin, a cache, a mount point, and the program."""

    home: Path
    nginx: Nginx

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def mountpoint(self) -> Path:
        return self.home / "mnt"

    def env(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("WEIGHTFS_", "XDG_"))}
        return {**kept, "HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.home)}

    def command(self, *arguments: str | Path) -> list[str]:
        options = [] if arguments[0] == "umount" else ["--cache", str(self.cache)]
        return [sys.executable, "-m", "weightfs", *map(str, arguments), *options]

    def run(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=False,
            env=self.env(),
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    @contextlib.contextmanager
    def started(self, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env(),
        )
        try:
            yield process
        finally:
            process.kill()
            print(process.communicate())  # shown where the test fails

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return document

    def put(self, name: str, data: bytes = DATA) -> str:
        (self.nginx.root / name).write_bytes(data)
        return self.nginx.url(name)

    def path(self, name: str) -> Path:
        return self.mountpoint / "models" / "http" / f"127.0.0.1:{self.nginx.port}" / name

    def read(self, name: str) -> bytes:
        """By another process: a reader of ours may hang, and must then be killable."""
        return subprocess.run(["cat", self.path(name)], capture_output=True, timeout=BOUND, check=True).stdout

    def is_mounted(self) -> bool:
        return bool(mounttable.mounts_at(self.mountpoint))

    def close(self) -> None:
        """Kill whatever daemon is left, and take its mount away."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired, ValueError):
            status = self.status()
            if status["role"] == "mount":
                os.kill(status["pid"], signal.SIGKILL)
        while self.is_mounted():
            mounttable.take_away(self.mountpoint, lazy=True)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    (tmp_path / "www").mkdir()
    (tmp_path / "mnt").mkdir()
    with Nginx(tmp_path / "www", limit_rate=None) as nginx:
        one = Stage(tmp_path.resolve(), nginx)
        try:
            yield one
        finally:
            one.close()


@pytest.fixture
def slow_stage(tmp_path: Path) -> Iterator[Stage]:
    """An origin so slow that nothing is complete before a test has looked."""
    (tmp_path / "www").mkdir()
    (tmp_path / "mnt").mkdir()
    with Nginx(tmp_path / "www", limit_rate="1m") as nginx:
        one = Stage(tmp_path.resolve(), nginx)
        try:
            yield one
        finally:
            one.close()


# ---- pull, and what looks after a cache


def test_pull_verifies_and_a_second_one_asks_nobody(stage: Stage) -> None:
    ref = f"{stage.put('m.gguf')}#sha256={SHA256}"
    done = stage.run("pull", ref)
    assert done.stdout == f"{ref}: 5.0 MiB, verified\n"
    assert done.stderr == ""
    stage.nginx.pause()
    document = json.loads(stage.run("pull", "--json", ref).stdout)
    assert document["refs"][0]["trust"] == "verified"
    assert document["refs"][0]["blobs"][0]["sha256"] == SHA256
    stage.run("verify", ref)
    assert stage.run("ls").stdout == f"{ref}\n"
    assert stage.status()["role"] == "status"
    assert "freed" in stage.run("rm", ref).stdout
    assert stage.run("ls").stdout == ""


def test_pull_of_what_has_no_digest_says_so(stage: Stage) -> None:
    done = stage.run("pull", stage.put("m.gguf"), code=4)
    assert "unverifiable" in done.stdout
    assert "no digest" in done.stderr
    accepted = stage.run("pull", "--allow-unverifiable", stage.nginx.url("m.gguf"))
    assert accepted.stderr == "", "what was accepted is no failure"


def test_pull_of_what_is_not_there(stage: Stage) -> None:
    done = stage.run("pull", stage.nginx.url("none.gguf"), code=3)
    assert done.stderr.count("\n") == 1
    assert "none.gguf" in done.stderr
    assert "404" in done.stderr


def test_pull_from_an_origin_that_is_away(stage: Stage) -> None:
    url = stage.put("m.gguf")
    stage.nginx.pause()
    done = stage.run("pull", url, "--retry", "1", "--retry-delay", "10ms", code=3)
    assert done.stderr.count("\n") == 1
    assert f"127.0.0.1:{stage.nginx.port}" in done.stderr


def test_pull_of_other_bytes_than_promised(stage: Stage) -> None:
    done = stage.run("pull", f"{stage.put('m.gguf')}#sha256={'0' * 64}", code=4)
    assert "quarantined" in done.stderr


def test_pull_that_is_interrupted_goes_on_from_there(slow_stage: Stage) -> None:
    ref = f"{slow_stage.put('m.gguf', DATA * 4)}#sha256={hashlib.sha256(DATA * 4).hexdigest()}"
    with slow_stage.started("pull", ref, "--max-jobs", "2") as process:
        until(lambda: socket_path(slow_stage.cache).exists())
        until(lambda: any(ref_["present_bytes"] for ref_ in slow_stage.status()["refs"]))
        slow_stage.nginx.pause()  # on a busy machine the rest would come before the next command has started
        assert slow_stage.status()["role"] == "pull"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=BOUND)
    assert process.returncode == 130, said
    assert "are kept in" in said
    present = slow_stage.status()["refs"][0]["present_bytes"]
    assert present > 0
    assert not socket_path(slow_stage.cache).exists()


def test_pull_keeps_to_its_bandwidth(stage: Stage) -> None:
    """A busy machine takes longer, never less."""
    began = time.monotonic()
    stage.run("pull", f"{stage.put('m.gguf')}#sha256={SHA256}", "--bandwidth", "2MiB", "--max-jobs", "2")
    assert time.monotonic() - began > 2.1


def test_verify_finds_and_repairs_a_flipped_bit(stage: Stage) -> None:
    ref = f"{stage.put('m.gguf')}#sha256={SHA256}"
    stage.run("pull", ref)
    (file,) = [
        path
        for path in (stage.cache / "blobs").rglob("*")
        if path.is_file() and path.stat().st_size == len(DATA)
    ]
    with file.open("r+b") as blob:
        blob.seek(3 * 2**20)
        byte = blob.read(1)[0]
        blob.seek(3 * 2**20)
        blob.write(bytes([byte ^ 1]))
    damaged = stage.run("verify", code=4)
    assert "chunk 3 is damaged" in damaged.stdout
    assert "--repair" in damaged.stderr
    repaired = stage.run("verify", "--repair")
    assert "fetched again: 1 chunk\n" in repaired.stdout
    stage.run("verify")


# ---- mount


@pytest.mark.mount
def test_add_restart_update_pin_and_rm_with_a_mount(stage: Stage) -> None:
    """What was added to a running mount is shown by the next one; a changed file is followed when asked for."""
    ref = stage.put("m.gguf")
    stage.run("mount", "--detach", "--fill", "never", stage.mountpoint)
    stage.run("add", ref)
    until(lambda: stage.path("m.gguf").exists())
    assert stage.read("m.gguf") == DATA
    stage.run("umount", stage.mountpoint)
    stage.nginx.pause()
    stage.run("mount", "--detach", "--fill", "never", stage.mountpoint)
    assert stage.read("m.gguf") == DATA
    stage.nginx.resume()

    newer = DATA[:-1]
    stage.put("m.gguf", newer)
    assert stage.read("m.gguf") == DATA  # nobody has asked
    (update,) = json.loads(stage.run("update", "--json").stdout)["updates"]
    assert (update["ref"], update["outcome"]) == (ref, "updated")
    told = stage.run("update", ref).stdout
    assert told == f"{ref}: unchanged, {update['new_revision']}\n"
    until(lambda: stage.path("m.gguf").stat().st_size == len(newer))
    assert stage.read("m.gguf") == newer

    stage.put("n.gguf")
    assert "pinned" in stage.run("add", "--pin", stage.nginx.url("n.gguf")).stdout
    until(lambda: all(ref_["complete"] for ref_ in stage.status()["refs"]))
    assert [ref_["pinned"] for ref_ in stage.status()["refs"]] == [False, True]
    assert "no longer pinned" in stage.run("unpin", stage.nginx.url("n.gguf")).stdout
    refused = stage.run("add", "--retry", "3", ref, code=2)
    assert "--retry would be ignored" in refused.stderr
    stage.run("rm", ref, stage.nginx.url("n.gguf"))
    until(lambda: not stage.path("m.gguf").exists())
    stage.run("umount", stage.mountpoint)
    assert stage.run("ls").stdout == ""


@pytest.mark.mount
def test_mount_read_ask_and_umount(stage: Stage) -> None:
    first, second = stage.put("m.gguf"), stage.put("other.gguf", DATA[:1000])
    stage.run("mount", "--detach", stage.mountpoint, first)
    assert stage.path("m.gguf").stat().st_size == len(DATA)
    assert stage.read("m.gguf") == DATA
    status = stage.status()
    assert (status["role"], status["mountpoint"]) == ("mount", str(stage.mountpoint))
    assert status["refs"][0]["present_bytes"] == len(DATA)
    # Through the daemon:
    stage.run("pull", "--allow-unverifiable", second)
    assert stage.read("other.gguf") == DATA[:1000]
    assert stage.run("ls").stdout.split() == sorted([first, second])
    stage.run("verify")
    refused = stage.run("pull", second, "--header", "A: b", code=2)
    assert "--header" in refused.stderr
    stage.run("rm", second)
    assert not stage.path("other.gguf").exists()
    assert "rm" not in stage.run("rm", second, code=2).stdout
    busy = stage.run("mount", "--detach", stage.home / "mnt2", code=5)
    assert str(stage.mountpoint) in busy.stderr
    stage.run("umount", stage.mountpoint)
    assert not stage.is_mounted()
    assert stage.status()["role"] == "status", "the cache is free when umount returns"


@pytest.mark.mount
def test_what_the_cache_knows_is_served_without_the_network(stage: Stage) -> None:
    stage.run("pull", "--allow-unverifiable", stage.put("m.gguf"))
    stage.nginx.pause()
    stage.run("mount", "--detach", stage.mountpoint, stage.nginx.url("m.gguf"))
    assert stage.read("m.gguf") == DATA
    stage.run("umount", stage.mountpoint)


@pytest.mark.mount
def test_a_mount_of_what_is_not_there_fails_and_leaves_nothing(stage: Stage) -> None:
    for detach in (["--detach"], []):
        done = stage.run("mount", *detach, stage.mountpoint, stage.nginx.url("none.gguf"), code=3)
        assert "none.gguf" in done.stderr
        assert not stage.is_mounted()
        assert stage.run("ls").stdout == ""


@pytest.mark.mount
def test_an_origin_that_is_away_at_the_start_is_asked_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = stage.put("m.gguf")
    stage.nginx.pause()
    quick = ["--retry", "0"]
    done = stage.run("mount", "--detach", stage.mountpoint, url, *quick)
    assert "warning" in done.stderr
    assert "goes on asking" in done.stderr
    assert not stage.path("m.gguf").exists()
    stage.nginx.resume()
    until(stage.path("m.gguf").exists)
    assert stage.read("m.gguf") == DATA
    stage.run("umount", stage.mountpoint)


@pytest.mark.mount
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_mount_cleanly(stage: Stage, signum: signal.Signals) -> None:
    with stage.started("mount", stage.mountpoint, stage.put("m.gguf")) as process:
        until(stage.path("m.gguf").exists)
        process.send_signal(signum)
        _, said = process.communicate(timeout=BOUND)
    assert process.returncode == 0, said
    assert not stage.is_mounted()
    assert not socket_path(stage.cache).exists()


@pytest.mark.mount
def test_unmounted_from_outside_it_ends(stage: Stage) -> None:
    with stage.started("mount", stage.mountpoint, stage.put("m.gguf")) as process:
        until(stage.path("m.gguf").exists)
        mounttable.take_away(stage.mountpoint, lazy=False)
        _, said = process.communicate(timeout=BOUND)
    assert process.returncode == 0, said


@pytest.mark.mount
@pytest.mark.parametrize("mountpoint", ["none", "www", "file"])
def test_mount_points_that_cannot_be(stage: Stage, mountpoint: str) -> None:
    stage.put("m.gguf")
    (stage.home / "file").write_text("")
    done = stage.run("mount", "--detach", stage.home / mountpoint, code=6)
    assert str(stage.home / mountpoint) in done.stderr
    assert done.stderr.count("\n") == 1
