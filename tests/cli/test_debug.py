"""`weightfs debug`: sentences where nobody answers, SIGUSR2, and a bundle that has everything but secrets."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from weightfs.app import bundle as app
from weightfs.app.bundle import Bundle, scrubbed, secrets_of
from weightfs.app.daemon import MountOrder
from weightfs.cli import cli
from weightfs.cli.debugging import inflight_lines, stacks_lines
from weightfs.errors import DaemonError, UsageError
from weightfs.testing.daemon import Daemon
from weightfs.testing.mounts import can_mount
from weightfs.testing.nginx import Nginx
from weightfs.testing.waiting import until

CANARY = "c4n4ry-" + "never" * 3
needs_mount = pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN")


def invoke(tmp_path: Path, *arguments: str, **env: str) -> Result:
    empty = tmp_path / "empty.toml"
    empty.touch()
    base = {"WEIGHTFS_CONFIG": str(empty), "HF_TOKEN": "", "DOCKER_CONFIG": str(tmp_path)}
    cache = ["--cache", str(tmp_path / "cache")]
    return CliRunner().invoke(cli, [*arguments, *cache], env={**base, **env}, prog_name="weightfs")


def parts(archive: bytes) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        found = {}
        for member in tar.getmembers():
            assert member.isfile()
            assert member.mode == 0o600
            data = tar.extractfile(member)
            assert data is not None
            directory, _, name = member.name.partition("/")
            assert directory == "weightfs-debug"
            found[name] = data.read().decode()
        return found


@pytest.mark.parametrize("command", ["inflight", "stacks"])
def test_nothing_to_look_into_is_one_sentence_and_makes_no_cache(tmp_path: Path, command: str) -> None:
    result = invoke(tmp_path, "debug", command)
    assert result.exit_code == 7
    assert f"no daemon has the cache {tmp_path / 'cache'}" in result.stderr
    assert ("kill -USR2" in result.stderr) == (command == "stacks")
    assert not (tmp_path / "cache").exists()


def test_a_bundle_is_made_without_a_daemon_too_and_says_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "b.tar.gz"
    result = invoke(tmp_path, "debug", "bundle", "-o", str(out))
    assert result.exit_code == 0, result.stderr
    assert str(out) in result.stdout
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    found = parts(out.read_bytes())
    assert set(found) == {"about.json", "config.json", "doctor.json"}
    about = json.loads(found["about.json"])
    assert set(about["missing"]) == {"health.json", "inflight.json", "log.txt", "stacks.json", "status.json"}
    assert "no daemon has the cache" in about["missing"]["status.json"]
    assert "warning: stacks.json is not in it" in result.stderr
    assert about["packages"]["pyfuse3"] != "unknown"
    assert os.uname().release in about["kernel"]
    assert about["libfuse"].startswith("3.")
    again = invoke(tmp_path, "debug", "bundle", "-o", str(out))
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    assert not (tmp_path / "cache").exists()


def test_no_secret_of_the_configuration_the_log_or_a_ref_is_in_it(tmp_path: Path) -> None:
    """One canary, in every place where a secret may stand."""
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "weightfs.log").write_text(
        f"INFO a line as it should not be: {CANARY}-header, {CANARY}-env, {CANARY}-argv and {CANARY}-hub\n"
        f"INFO another: {CANARY}-proxy, {CANARY}-https, {CANARY}-all/1\n"
        f"INFO GET https://me:{CANARY}@host/x?sig={CANARY}\n"
    )
    file = tmp_path / "config.toml"
    file.write_text(
        f"""
        proxy = "http://me:{CANARY}-proxy@127.0.0.1:1"
        refs = ["https://host.example/m.gguf?sig={CANARY}-query"]
        [[header]]
        name = "X-Weird"
        value = "{CANARY}-header"
        [[header]]
        name = "Authorization"
        prefix = "Bearer "
        value-env = "MY_SECRET"
        """
    )
    out = tmp_path / "b.tar.gz"
    result = invoke(
        tmp_path,
        *("debug", "bundle", "-o", str(out), "--config", str(file), "--header", f"X-Other: {CANARY}-argv"),
        MY_SECRET=f"{CANARY}-env",
        HF_TOKEN=f"{CANARY}-hub",
        https_proxy=f"http://me:{CANARY}-https@127.0.0.1:1",
        all_proxy=f"me:{CANARY}-all/1@127.0.0.1:1",
    )
    assert result.exit_code == 0, result.stderr
    archive = out.read_bytes()
    assert CANARY.encode() not in gzip.decompress(archive)
    assert CANARY not in result.stdout + result.stderr
    found = parts(archive)
    assert "a line as it should not be: ***, ***, *** and ***" in found["log.txt"]
    assert (
        "https://host.example/m.gguf?…" in json.loads(found["config.json"])[_index(found, "refs")]["value"][0]
    )


def _index(found: dict[str, str], key: str) -> int:
    return [one["key"] for one in json.loads(found["config.json"])].index(key)


@pytest.mark.mount
@needs_mount
def test_a_running_daemon_is_in_it_and_no_query_of_its_refs(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "m.gguf").write_bytes(b"GGUF" + bytes(5000))
    with (
        Nginx(files) as nginx,
        Daemon(
            tmp_path / "daemon", f"{nginx.url('m.gguf')}?sig={CANARY}", options=["--workers", "1"]
        ) as daemon,
    ):
        daemon.begin()
        until(lambda: "serves the cache" in daemon.log, "it serves")
        until(lambda: daemon.status()["refs"], "the ref is there")
        out = tmp_path / "b.tar.gz"
        done = daemon.cli("debug", "bundle", "-o", str(out))
        assert done.returncode == 0, done.stderr
        found = parts(out.read_bytes())
        assert {"about.json", "status.json", "inflight.json", "stacks.json", "health.json"} <= set(found)
        assert json.loads(found["status.json"])["refs"][0]["ref"].endswith("/m.gguf?…")
        assert json.loads(found["health.json"])["pid"] == daemon.pid
        assert json.loads(found["stacks.json"])["tasks"]
        assert CANARY.encode() not in gzip.decompress(out.read_bytes())
        assert CANARY not in str(daemon.ask(lambda client: client.inflight()))

        daemon.signal(signal.SIGUSR2)
        until(lambda: "most recent call first" in daemon.log, "SIGUSR2 writes stacks to the log")
        workers = daemon.status()["worker_pids"]  # it answers still
        for number in workers:
            os.kill(number, signal.SIGUSR2)
        until(lambda: "engine/worker.py" in daemon.log, "a worker does the same")
        assert daemon.status()["worker_pids"] == workers
        assert daemon.stop() == 0


# --- parts, and lines for people


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"x{CANARY}y", "x***y"),
        (f"Bearer {CANARY}", "Bearer ***"),
        ("https://u:p@h/x?a=b#sha256=00", "https://h/x?…#sha256=00"),
        ("plain", "plain"),
        (7, 7),
        (None, None),
        ([f"{CANARY}"], ["***"]),
        ({CANARY: {"a": CANARY}}, {"***": {"a": "***"}}),
    ],
)
def test_scrubbing(text: Any, shown: Any) -> None:
    assert scrubbed(text, (CANARY,)) == shown


def test_a_header_that_cannot_be_had_keeps_the_others_secret(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        f'[[header]]\nname = "A"\nvalue = "{CANARY}"\n[[header]]\nname = "B"\nvalue-env = "NOT_THERE"\n'
    )
    found = secrets_of({}, file, {"HF_TOKEN": CANARY + "2"})
    assert set(found) == {CANARY, CANARY + "2"}
    assert found[0] == CANARY + "2"  # the longer one first: else its end would stay


def test_a_short_value_is_no_secret(tmp_path: Path) -> None:
    """It would be found in every word."""
    file = tmp_path / "c.toml"
    file.write_text('[[header]]\nname = "A"\nvalue = "1"\n')
    assert secrets_of({}, file, {}) == ()


def test_a_part_is_cut_where_it_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "PART_BYTES", 100)
    assert app._bytes("x" * 500, ()) == b"x" * 86 + b"\n... cut here\n"
    assert len(app._bytes({"a": ["x" * 50] * 50}, ())) == 100
    assert app._bytes(f"one {CANARY}\ntwo", (CANARY,)) == b"one ***\ntwo\n"


def test_the_end_of_a_log_is_what_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "LOG_BYTES", 10)
    (tmp_path / "log").write_bytes(b"0123456789abcdefghij")
    assert app._end_of_log(tmp_path / "log", None) == "abcdefghij"


def test_without_a_log_file_it_is_the_daemons_lines_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "journalctl"
    program.write_text('#!/bin/sh\n[ "$1" = _PID=42 ] && echo "asked: $*"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert app._end_of_log(tmp_path / "none", 42).startswith("asked: _PID=42 -n ")
    with pytest.raises(DaemonError, match="nothing of process 43"):
        app._end_of_log(tmp_path / "none", 43)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(DaemonError, match="cannot be read"):
        app._end_of_log(tmp_path / "none", 42)


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        app.write(Bundle({"a": b"b"}), tmp_path / "none" / "b.tar.gz", 0.0)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError):
        app.write(Bundle({"a": b"b"}), tmp_path / "link", 0.0)
    assert not (tmp_path / "elsewhere").exists()


def test_lines_of_what_is_in_flight() -> None:
    chunk = {"chunk": 3, "state": "fetching", "job": 7, "mirror": "https://h/m", "age": 2.0, "suspect": False}
    rest = {"chunk": 4, "state": "given up", "job": None, "suspect": True, "rest": 90.0, "why": "it is 404"}
    request = {
        "op": "read",
        "number": 5,
        "inode": 9,
        "age": 12.0,
        "name": "",
        "offset": 0,
        "size": 10,
        "pid": None,
        "held": False,
        "overdue": True,
        "wait": {
            "ref": "https://h/m",
            "present_chunks": 1,
            "chunk_count": 9,
            "obstacle": "a reason",
            "chunks": [{**chunk, "rest": None, "why": ""}, rest],
            "left_out": 2,
        },
    }
    lookup = {**request, "op": "lookup", "name": "n", "offset": None, "pid": 12, "held": True, "wait": None}
    fetch = {
        "age": 2.0,
        "first_chunk": 3,
        "last_chunk": 4,
        "bytes_left": 1 << 20,
        "priority": "demand",
        "mirror": "https://h/m",
    }
    lines = inflight_lines(
        {
            "requests": [request, lookup],
            "requests_left_out": 3,
            "left_behind": 1,
            "overdue": 2,
            "fetches": [fetch],
        }
    )
    assert lines == [
        "5 requests of the kernel in flight, the oldest first",
        "12s  read (request 5, inode 9), bytes [0, 10), overdue",
        "    https://h/m: 1 of 9 chunks are here",
        "    a reason",
        "    chunk 3: fetching, job 7 from https://h/m for 2.0s",
        "    chunk 4: given up, to be hashed again first, for another 1m30s, it is 404",
        "    and 2 more chunks",
        "12s  lookup (request 5, inode 9), name n, by process 12, its failing answer is held back, overdue",
        "... and 3 more",
        "1 works hang whose requests were answered long ago: weightfs debug stacks",
        "2 were overdue since the start: the log has each with all that it waited for",
        "",
        "1 fetch in flight",
        " AGE  CHUNKS     LEFT  FOR     MIRROR",
        "2.0s  3-4     1.0 MiB  demand  https://h/m",
    ]
    empty = {"requests": [], "requests_left_out": 0, "left_behind": 0, "overdue": 0, "fetches": []}
    assert inflight_lines(empty) == ["0 requests of the kernel in flight", "", "0 fetches in flight"]


def test_lines_of_stacks() -> None:
    one = {"names": ["a", "b"], "count": 3, "frames": ["x.py:1 f", "y.py:2 g"]}
    document = {"tasks": [one], "tasks_left_out": 2, "threads": [], "threads_left_out": 0}
    assert stacks_lines(document) == [
        "5 tasks",
        "  3 x a, b, …",
        "      x.py:1 f",
        "      y.py:2 g",
        "  ... and 2 more",
        "",
        "0 threads",
    ]


# --- the bounds


def test_the_three_bounds_go_from_the_command_line_to_who_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[MountOrder] = []

    def run(order: MountOrder, *_: object) -> int:
        orders.append(order)
        return 0

    monkeypatch.setattr("weightfs.app.daemon.run_mount", run)
    options = ["--read-timeout", "70s", "--connect-timeout", "3s", "--stall-timeout", "4s"]
    assert invoke(tmp_path, "mount", str(tmp_path / "mnt"), *options).exit_code == 0
    (order,) = orders
    assert order.engine.read_timeout == 70
    assert (order.engine.fetch.connect_timeout, order.engine.fetch.stall_timeout) == (3, 4)
