"""What every command says, and how it ends, when something is typed wrong; and that help costs nothing."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import Result

import weightfs
from weightfs import errors
from weightfs.cli import cli
from weightfs.cli.group import Stopped, report
from weightfs.cli.keeping import report_lines, verdict
from weightfs.cli.looking import aligned, long_lines, status_lines
from weightfs.errors import FailureKind, ReadError, SourceError, UsageError
from weightfs.testing.commands import invoke

REF = "https://models.example.com/m.gguf"


def sentence(result: Result) -> str:
    """The one line on stderr."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("weightfs: ")
    return lines[0].removeprefix("weightfs: ")


def test_version(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--version", cache=False)
    assert result.output == f"weightfs {weightfs.__version__}\n"


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_helps_with_examples(tmp_path: Path, command: str) -> None:
    result = invoke(tmp_path, command, "--help", cache=False)
    assert result.exit_code == 0
    assert "Examples:\n    weightfs " in result.output
    assert cli.commands[command].short_help


@pytest.mark.parametrize("arguments", [[], ["debug"], ["config"]])
def test_what_is_incomplete_shows_the_help_as_it_is(tmp_path: Path, arguments: list[str]) -> None:
    """It was told as one sentence of three thousand characters."""
    result = invoke(tmp_path, *arguments, cache=False)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == invoke(tmp_path, *arguments, "--help", cache=False).stdout


def test_help_tells_the_exit_codes_that_the_errors_have(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--help", cache=False)
    for code in {
        cls.exit_code for cls in vars(errors).values() if isinstance(cls, type) and hasattr(cls, "exit_code")
    }:
        assert f"\n    {code}    " in result.output


BAD = [
    (["frob"], "No such command 'frob'; see `weightfs --help`"),
    (["pull"], "Missing argument 'REF...'; see `weightfs pull --help`"),
    (["pull", "--frob", REF], "No such option"),
    (["mount"], "Missing argument 'MOUNTPOINT'; see `weightfs mount --help`"),
    (["pull", "ftp://h/m.gguf"], "ftp"),
    (["pull", "htps://h/m.gguf"], "https://"),
    (["pull", "m.gguf"], "m.gguf"),
    (["pull", "https://"], "https://"),
    (["pull", "https://h/"], "https://h/"),
    (["pull", "https://u:hunter2@h/m.gguf"], "h/m.gguf"),
    (["pull", "https://h/a/../b.gguf"], ".."),
    (["pull", "https://h/m.gguf#sha256=zz"], "sha256"),
    (["pull", "https://h/" + "x" * 5000], "characters"),
    (["pull", "https://h/m\n.gguf"], "control character"),
    (["pull", REF, "--retry", "-1"], "--retry: must be a whole number from 0 to 1000"),
    (["pull", REF, "--retry", "many"], "--retry: must be"),
    (["pull", REF, "--timeout", "soon"], "--timeout: 'soon' is not a duration"),
    (["pull", REF, "--policy", "loose"], "--policy: must be 'strict'"),
    (["pull", REF, "--proxy", "nonsense"], "--proxy: a proxy is written"),
    (["pull", REF, "--header", "hunter2"], "--header: a header is written 'Name: value'"),
    (["pull", REF, "--header", "Host: h"], "belongs to weightfs"),
    (["pull", REF, "--trusted-key", "RWQ"], "--trusted-key: 'RWQ' is not a minisign public key"),
    (["pull", REF, "https://h/b.gguf", "--chunks", "x.meta4"], "--chunks names the chunk list of one ref"),
    (["pull", REF, "--workers", "1000"], "--workers: must be a whole number from 0 to 64"),
    (["pull", REF, "--config", "/no/such.toml"], "/no/such.toml cannot be read"),
    (["pull", REF, "--log-file", "/no/such/log"], "log file /no/such/log cannot be written"),
    (["mount", "/mnt/x", "--fill", "some"], "--fill: must be 'never'"),
    (["mount", "/mnt/x", "--read-timeout", "0.1"], "--read-timeout: must be from"),
    (
        ["mount", "/mnt/x", "--metrics-listen", "0.0.0.0:9637"],
        "is not on this machine's loopback, and metrics have",
    ),
    (["mount", "/mnt/x", "--metrics-listen", "[::]:9637"], "is not on this machine's loopback"),
    (
        ["mount", "/mnt/x", "--metrics-listen", "localhost:9637"],
        "is not an address and a port, such as 127.0.0.1:",
    ),
    (["mount", "/mnt/x", "ftp://h/m.gguf"], "ftp"),
    (["mount", "/mnt/x", "--detach", "ftp://h/m.gguf"], "ftp"),
    (["mount", "/mnt/x", "--chunks", "x.meta4"], "one ref"),
    (["verify", "ftp://h/m.gguf"], "ftp"),
    (["rm"], "Missing argument"),
    (["status", "--log-level", "loud"], "--log-level: must be"),
]


@pytest.mark.parametrize(
    ("arguments", "says"), BAD, ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else ""
)
def test_what_is_typed_wrong_ends_with_2_and_one_sentence(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    result = invoke(tmp_path, *arguments)
    assert result.exit_code == 2
    assert says in sentence(result)
    assert "hunter2" not in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "cache").exists(), "nothing was done"


def test_a_relative_path_is_told_how_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_text("x")
    assert f"write file://{tmp_path}/m.gguf" in sentence(invoke(tmp_path, "pull", "m.gguf"))


def test_the_file_is_named_in_an_error(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("fil = 'all'")
    result = invoke(tmp_path, "ls", WEIGHTFS_CONFIG=str(file))
    assert result.exit_code == 2
    assert sentence(result) == f"{file}: unknown key 'fil'; the nearest known one is 'fill'"


def test_the_cache_and_the_mount_point_are_apart(tmp_path: Path) -> None:
    for arguments in (
        ["mount", str(tmp_path / "m"), "--cache", str(tmp_path / "m" / "cache")],
        ["mount", str(tmp_path / "m" / "sub"), "--cache", str(tmp_path / "m")],
    ):
        result = invoke(tmp_path, *arguments, cache=False)
        assert result.exit_code == 2
        assert "apart" in sentence(result)


@pytest.mark.parametrize("command", [["ls"], ["status"], ["verify"], ["rm", REF]])
def test_no_cache_is_5(tmp_path: Path, command: list[str]) -> None:
    result = invoke(tmp_path, *command)
    assert result.exit_code == 5
    assert "there is no cache at" in sentence(result)
    assert not (tmp_path / "cache").exists()


def test_a_cache_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    result = invoke(tmp_path, "pull", REF)
    assert result.exit_code == 5
    assert str(tmp_path / "cache") in sentence(result)


def test_a_cache_directory_without_permission(tmp_path: Path) -> None:
    # Not even root makes a directory there.
    result = invoke(tmp_path, "pull", REF, "--cache", "/sys/weightfs/cache", cache=False)
    assert result.exit_code == 5
    assert "/sys/weightfs" in sentence(result)


def test_umount_of_what_is_no_mount(tmp_path: Path) -> None:
    result = invoke(tmp_path, "umount", str(tmp_path))
    assert result.exit_code == 6
    assert "is not a weightfs mount" in sentence(result)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SourceError("x", kind=FailureKind.NOT_FOUND), 3),
        (ReadError("x", kind=FailureKind.STALL), 3),
        (ReadError("x", kind=FailureKind.MISMATCH), 4),
        (errors.ChunkListError("x"), 4),
        (errors.NoSpaceError("x"), 5),
        (errors.MountError("x"), 6),
        (errors.DaemonError("x"), 7),
        (ExceptionGroup("g", [ValueError("y"), ExceptionGroup("h", [errors.MountError("x")])]), 6),
        (ZeroDivisionError("x"), 1),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (Stopped(15, "stopped; all is kept"), 143),
        (click.exceptions.Exit(9), 9),
        (SystemExit(8), 8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error, verbose=False) == code
    said = capsys.readouterr().err
    assert said == "" if isinstance(error, click.exceptions.Exit | SystemExit) else said.count("\n") == 1


def test_a_fault_of_ours_points_to_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    report(ZeroDivisionError("token=hunter2"), verbose=False)
    said = capsys.readouterr().err
    assert said == (
        "weightfs: a fault of weightfs itself: ZeroDivisionError: token=***; run it again with -v for the traceback\n"
    )


def test_verbose_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("weightfs.cli.looking.ask", fail)
    quiet = invoke(tmp_path, "ls")
    assert (quiet.exit_code, "Traceback" in quiet.stderr, "-v" in quiet.stderr) == (1, False, True)
    loud = invoke(tmp_path, "ls", "-v")
    assert (loud.exit_code, "Traceback" in loud.stderr) == (1, True)


def test_the_traceback_tells_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: it was the interpreter's own."""
    error = UsageError("https://h.example/m.gguf?sig=hunter2 is unknown")
    error.__cause__ = ValueError("Bearer hunter2")
    assert report(error, verbose=True) == 2
    said = capsys.readouterr().err
    assert "ValueError: Bearer ***" in said
    assert "UsageError: https://h.example/m.gguf?… is unknown" in said
    assert "hunter2" not in said


def test_help_and_version_import_no_machinery() -> None:
    code = (
        "import sys\nfrom weightfs.cli import cli\n"
        "for arguments in (['--version'], ['--help'], ['pull', '--help']):\n"
        "    try:\n        cli.main(arguments)\n    except SystemExit:\n        pass\n"
        "heavy = {'trio', 'httpx', 'pydantic', 'rich', 'pyfuse3', 'lmdb', 'starlette', 'hypercorn', 'cryptography'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == "[]\n"


def test_a_closed_pipe_is_a_quiet_end() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "weightfs", "--help"],
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == b""


FILE = {
    "path": "m.gguf",
    "waiting_readers": 2,
    "error": "",
    "mirrors": [
        {
            "url": "https://h/m",
            "faults": 3,
            "mismatches": 1,
            "rate": 1048576.0,
            "wrong": {"wire": 1, "disk": 0, "origin": 0},
        }
    ],
    "wrong": {"wire": 1, "disk": 2, "origin": 0},
}
STATUS = {
    "role": "mount",
    "mountpoint": "/mnt",
    "pid": 7,
    "uptime": 90.0,
    "cache": "/c",
    "cache_bytes": 2**20,
    "held_bytes": 2**20,
    "limit_bytes": 2**22,
    "evicted_bytes": 2**21,
    "free_bytes": 2**30,
    "fetched_bytes": 2**20,
    "mismatched_chunks": 1,
    "disk_faults": 0,
    "disk": "bypassed",
    "trouble": "the disk is full",
    "paused": False,
    "refs": [
        {
            "ref": REF,
            "trust": "provisional",
            "size_bytes": 1000,
            "present_bytes": 999,
            "complete": False,
            "files": [FILE],
        }
    ],
    "jobs": [
        {
            "first_chunk": 1,
            "last_chunk": 4,
            "mirror": "https://h/m",
            "bytes_left": 5,
            "age": 1.0,
            "priority": "demand",
        }
    ],
}


def test_the_status_for_people() -> None:
    lines = status_lines(STATUS)
    assert lines[0] == "serving /mnt (pid 7, for 1m30s)"
    assert "disk: bypassed" in lines
    assert "trouble: the disk is full" in lines
    assert "holds 1.0 MiB of at most 4.0 MiB" in lines
    assert "evicted 2.0 MiB since the start" in lines
    assert any("99%" in line and REF in line for line in lines), "never 100 % before it is complete"
    assert "  m.gguf: 2 readers wait" in lines
    assert "  https://h/m: 3 faults, 1 wrong chunks, 1.0 MiB/s" in lines
    assert "  m.gguf: wrong chunks: 1 by the wire, 2 by the disk" in lines
    assert "  https://h/m: wrong chunks: 1 by the wire" in lines
    assert any("chunks 1 to 4" in line for line in lines)


def test_an_idle_cache_and_a_command_at_work() -> None:
    assert status_lines({**STATUS, "role": "status", "refs": []})[0] == "idle: no daemon has this cache"
    assert status_lines({**STATUS, "role": "pull"})[0] == "weightfs pull is at work (pid 7)"
    unlimited = status_lines({**STATUS, "limit_bytes": None, "evicted_bytes": 0})
    assert not any("at most" in line or "evicted" in line for line in unlimited)


def test_columns() -> None:
    assert aligned([("a", "1"), ("bbb", "22")], right=(1,)) == ["a     1", "bbb  22"]
    assert aligned([]) == []
    ref = {**STATUS["refs"][0], "complete": True, "blobs": [{"path": "models/x"}]}  # type: ignore[index]
    assert long_lines([ref]) == [f"provisional  1000 B  100%  {REF}", "    models/x"]


def test_a_report_for_people() -> None:
    report_ = {
        "ref": REF,
        "ok": False,
        "checked_chunks": 5,
        "checked_bytes": 5 * 2**20,
        "bad": [["m.gguf", 3]],
        "repaired": 0,
        "quarantined": [],
    }
    assert report_lines(report_) == [
        f"{REF}: DAMAGED, 5 chunks (5.0 MiB) checked",
        "    m.gguf: chunk 3 is damaged",
    ]
    assert "fetched again when it is wanted" in verdict([report_], repair=False)
    assert "pull it again" in verdict([report_], repair=True)
    assert "weightfs repair" in verdict([{**report_, "quarantined": ["m.gguf"]}], repair=True)


def test_publish(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x" * 3_000_000)
    result = invoke(tmp_path, "publish", str(file), "--url", REF, "--json", cache=False)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["files"] == [f"{file}.meta4"]
    assert document["sha256"] in Path(document["files"][0]).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf", "m.gguf.meta4"] or len(
        list(tmp_path.iterdir())
    ) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["none.gguf", "--url", REF], 2, "cannot be read"),
        ([".", "--url", REF], 2, "directory"),
        (["m.gguf"], 2, "Missing option '--url'"),
        (["m.gguf", "--url", "ftp://h/m"], 4, "ftp"),
        (["m.gguf", "--url", REF, "--sign", "none.key"], 2, "none.key cannot be read"),
        (["m.gguf", "--url", REF, "--sign", "m.gguf"], 4, "secret key"),
    ],
)
def test_publish_of_what_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(b"x" * 100)
    result = invoke(tmp_path, "publish", *arguments, cache=False)
    assert result.exit_code == code, result.stderr
    assert says in sentence(result)
    assert not Path("m.gguf.meta4").exists()


def test_publish_signs_and_minisign_agrees(tmp_path: Path) -> None:
    key, public, file = tmp_path / "k.key", tmp_path / "k.pub", tmp_path / "m.gguf"
    file.write_bytes(b"x" * 100)
    make = ["minisign", "-G", "-W", "-p", str(public), "-s", str(key)]
    subprocess.run(make, capture_output=True, timeout=60, check=True)
    result = invoke(tmp_path, "publish", str(file), "--url", REF, "--sign", str(key), cache=False)
    assert result.exit_code == 0, result.stderr
    check = ["minisign", "-V", "-p", str(public), "-m", f"{file}.meta4"]
    assert subprocess.run(check, capture_output=True, timeout=60, check=False).returncode == 0


def test_the_password_of_a_key(tmp_path: Path) -> None:
    # minisign's format with the least scrypt: "Ed", "Sc", "B2", salt, 2^15 operations, 16 MiB, then what is encrypted
    raw = b"EdScB2" + bytes(32) + (2**15).to_bytes(8, "little") + (2**24).to_bytes(8, "little") + bytes(104)
    key, file = tmp_path / "k.key", tmp_path / "m.gguf"
    key.write_text(f"untrusted comment: a key\n{base64.b64encode(raw).decode()}\n")
    file.write_bytes(b"x" * 100)
    arguments = ["publish", str(file), "--url", REF, "--sign", str(key)]
    missing = invoke(tmp_path, *arguments, cache=False)
    assert missing.exit_code == 2
    assert "WEIGHTFS_SIGN_PASSWORD" in sentence(missing)
    wrong = invoke(tmp_path, *arguments, cache=False, WEIGHTFS_SIGN_PASSWORD="hunter2")
    assert wrong.exit_code == 4
    assert "hunter2" not in wrong.stderr
    assert not (tmp_path / "m.gguf.meta4").exists()
