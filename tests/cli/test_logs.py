"""One line a record, no secrets, no flood."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs import journal, logs
from weightfs.core.manifest import BlobId
from weightfs.errors import DiskFault, FailureKind, NoSpaceError, ReadError, SourceError


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    level, ours = root.level, logging.getLogger("weightfs").level
    yield
    for handler in [handler for handler in root.handlers if handler.get_name() == logs.HANDLER_NAME]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.getLogger("weightfs").setLevel(ours)


def record(message: str, *args: object, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("weightfs.x", level, "x.py", 1, message, args, None)


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://h/f?X-Amz-Signature=abc#sha256=ff", "https://h/f?…#sha256=ff"),
        ("GET http://me:secret@h:8000/a/b failed", "GET http://h:8000/a/b failed"),
        ("file:///dir/m.gguf is there", "file:///dir/m.gguf is there"),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ("{'authorization': 'Basic dXNlcg=='}", "{'authorization': '***'}"),
        ("(b'Authorization', b'Bearer abcdef')", "(b'Authorization', b'***')"),
        ("sent Bearer abcdef123", "sent Bearer ***"),
        ("X-Api-Key=12345, next", "X-Api-Key=***, next"),
        ("cookie: a=b; c=d", "cookie: ***; c=d"),
        ("see https://h/a?b and https://h/c?d.", "see https://h/a?… and https://h/c?…"),
        ("GET https://h/f?sig=it's-secret failed", "GET https://h/f?… failed"),
        ("GET http://me:it's@h/f failed", "GET http://h/f failed"),
        ("['https://h/a?b','https://h/c?d']", "['https://h/a?…','https://h/c?…']"),
        ('["https://h/a?it\'s", "c"]', '["https://h/a?…", "c"]'),
        (
            "http://me:se/cr@h:80 or http://me:s?@h or http://h:80/a@b",
            "http://… or http://… or http://h:80/a@b",
        ),
        ("a proxy is written http://host:port", "a proxy is written http://host:port"),
        ("https://h/f#sha256=ff: gone", "https://h/f#sha256=ff: gone"),
        ("`weightfs add https://h/f#sha256=ff` does it", "`weightfs add https://h/f#sha256=ff` does it"),
        ("to https://h/f#access_token=abc", "to https://h/f#…"),
        ("{'hf_token': 'abc'}, client_secret=abc", "{'hf_token': '***'}, client_secret=***"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_redaction(text: str, redacted: str) -> None:
    assert logs.redact(text) == redacted


# What `core.ref` leaves as it is in a query.
@given(
    st.from_regex(r"[a-z0-9!$&'()*+,;=:@/?]{8,40}", fullmatch=True),
    st.sampled_from(["?token=%s", "?a=b&sig=%s&c=d", "?it's=%s"]),
)
def test_no_query_survives(secret: str, query: str) -> None:
    text = f"fetching https://models.example.com/m.gguf{query % ('Z' + secret)} failed"
    assert "Z" + secret not in logs.redact(text)


@given(st.text(max_size=200))
def test_redaction_takes_any_text(text: str) -> None:
    line = logs.one_line(logs.redact(text))
    assert "\n" not in line
    assert "\r" not in line


def test_a_record_is_one_line_without_secrets() -> None:
    formatter = logs.LineFormatter(with_time=False, tracebacks=False)
    line = formatter.format(record("cannot get %s\nbecause", "https://u:p@h/f?s=1"))
    assert line == "WARNING weightfs.x: cannot get https://h/f?…\\nbecause"


def test_an_exception_is_a_clause_unless_one_asks_for_more() -> None:
    try:
        raise RuntimeError("https://h/f?s=hunter2")
    except RuntimeError:
        failed = record("oops")
        failed.exc_info = sys.exc_info()
    short = logs.LineFormatter(with_time=False, tracebacks=False).format(failed)
    assert short == "WARNING weightfs.x: oops [RuntimeError: https://h/f?…"
    long = logs.LineFormatter(with_time=False, tracebacks=True).format(failed)
    assert "Traceback" in long
    assert "hunter2" not in long
    assert "\n" not in long


def test_json_lines() -> None:
    fields = json.loads(logs.JsonFormatter(with_time=True, tracebacks=False).format(record("é %s", "x?y")))
    assert fields["message"] == "é x?y"
    assert fields["level"] == "warning"
    assert fields["time"].endswith("Z")


def test_a_line_is_bounded() -> None:
    assert len(logs.one_line("x" * 10**6)) == logs.MAX_LINE


def test_a_flood_is_counted_and_told() -> None:
    now = 100.0
    limit = logs.RateLimit(lambda: now)
    passed = sum(limit.filter(record("mirror %s is slow", number)) for number in range(1000))
    assert passed == logs.BURST
    assert limit.filter(record("something else"))
    now += logs.WINDOW
    later = record("mirror %s is slow", "h")
    assert limit.filter(later)
    assert later.getMessage() == f"mirror h is slow ({1000 - logs.BURST} more like this were left out)"


def test_the_rate_limit_remembers_so_many_messages() -> None:
    limit = logs.RateLimit(lambda: 0.0)
    for number in range(3 * logs.MAX_KEYS):
        assert limit.filter(record(f"message {number}"))
    assert len(limit._seen) == logs.MAX_KEYS


def test_set_up_replaces_itself_and_writes_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_up("info")
    file = tmp_path / "log"
    logs.set_up("warning", file=file, as_json=True)
    logging.getLogger("weightfs.engine").warning("told")
    logging.getLogger("weightfs.engine").info("not told")
    logging.getLogger("httpx").info("not told")
    assert [json.loads(line)["message"] for line in file.read_text().splitlines()] == ["told"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("as_json", [False, True])
def test_a_line_that_the_journal_reads_from_stderr_has_a_priority_and_no_time(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], as_json: bool
) -> None:
    stderr = os.fstat(2)
    monkeypatch.setattr("sys.stderr", open(2, "w", closefd=False))  # noqa: SIM115 - of the process, not pytest's
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
    monkeypatch.setattr(journal, "SOCKET", Path("/nobody/is/there"))
    logs.set_up("info", as_json=as_json)
    logging.getLogger("weightfs.engine").info("told")
    logging.getLogger("weightfs.engine").error("told")
    lines = capfd.readouterr().err.splitlines()
    if as_json:
        assert [json.loads(line[3:])["message"] for line in lines] == ["told", "told"]
        assert [line[:3] for line in lines] == ["<6>", "<3>"]
    else:
        assert lines == ["<6>INFO weightfs.engine: told", "<3>ERROR weightfs.engine: told"]


def test_a_terminal_in_a_session_of_systemd_is_no_journal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    logs.set_up("info")
    logging.getLogger("weightfs.engine").info("told")
    assert re.fullmatch(r"\d{4}-\S+Z INFO weightfs.engine: told\n", capsys.readouterr().err)


# ---- the journal's own protocol

REF = "https://models.example.com/m.gguf"
BLOB = BlobId(bytes(16))


class FakeJournal:
    """A socket in the place of systemd's, and what came there."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(5)

    def entry(self) -> dict[str, str]:
        """The next one. Its form: one KEY=value a line."""
        data = self._socket.recv(1 << 20).decode()
        assert data.endswith("\n")
        return dict(line.split("=", 1) for line in data.splitlines())

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def to_journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeJournal]:
    stderr = os.fstat(2)
    monkeypatch.setattr("sys.stderr", open(2, "w", closefd=False))  # noqa: SIM115 - of the process, not pytest's
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
    monkeypatch.setattr(journal, "SOCKET", tmp_path / "socket")
    fake = FakeJournal(tmp_path / "socket")
    logs.set_up("info")
    yield fake
    fake.close()


def test_an_entry_has_fields(to_journal: FakeJournal, capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("weightfs.engine").warning(
        "chunk %d of %s\nis\x1b[1m wrong", 7, REF + "?sig=hunter2",
        extra=logs.about(
            ref=REF + "?sig=hunter2", blob=BLOB, chunk=7, mirror="https://u:hunter2@h/m", failure=FailureKind.MISMATCH
        ),
    )  # fmt: skip
    entry = to_journal.entry()
    assert entry.pop("CODE_FILE") == __file__
    assert int(entry.pop("CODE_LINE")) > 0
    assert entry == {
        "MESSAGE": f"chunk 7 of {REF}?…\\nis\\x1b[1m wrong",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "weightfs",
        "LOGGER": "weightfs.engine",
        "CODE_FUNC": "test_an_entry_has_fields",
        "WEIGHTFS_REF": f"{REF}?…",
        "WEIGHTFS_BLOB": str(BLOB),
        "WEIGHTFS_CHUNK": "7",
        "WEIGHTFS_MIRROR": "https://h/m",
        "WEIGHTFS_FAILURE": "mismatch",
    }
    assert capfd.readouterr().err == "", "it is not told twice"


def _full() -> NoSpaceError:
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise NoSpaceError("the disk is full") from error
    except NoSpaceError as error:
        return error


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (
            ReadError("it failed", kind=FailureKind.TIMEOUT, ref=REF, chunk=0, mirror="https://h/m"),
            {"ref": REF, "chunk": 0, "mirror": "https://h/m", "failure": "timeout"},
        ),
        (ReadError("it failed", kind=FailureKind.DISK), {"failure": "disk"}),
        (
            SourceError("it failed", kind=FailureKind.AUTH, mirror="https://h/m?token=hunter2"),
            {"mirror": "https://h/m?…", "failure": "auth"},
        ),
        (DiskFault("it failed", blob="00ff"), {"blob": "00ff"}),
        (OSError(5, "Input/output error"), {"errno": 5}),
        (_full(), {"errno": 28}),
        (ValueError("it failed"), {}),
    ],
)
def test_an_error_says_itself_what_it_is_about(error: Exception, fields: dict[str, object]) -> None:
    assert logs.subject_of(record("oh: %s", error)) == fields


def test_what_the_caller_says_goes_before_what_the_error_says() -> None:
    told = record("oh: %s", ReadError("it failed", kind=FailureKind.TIMEOUT, ref="inner", chunk=1))
    told.__dict__.update(logs.about(ref="outer", errno=5))
    assert logs.subject_of(told) == {"ref": "outer", "chunk": 1, "failure": "timeout", "errno": 5}
    fields = json.loads(logs.JsonFormatter(with_time=True, tracebacks=False).format(told))
    assert fields["ref"] == "outer"
    assert fields["chunk"] == 1


def test_an_entry_is_one_datagram_whatever_is_in_it(to_journal: FakeJournal) -> None:
    nasty = "\U0001f600\nPRIORITY=0\0" * 10_000
    logging.getLogger("weightfs.engine").error("%s", nasty, extra=logs.about(ref=nasty, mirror=nasty))
    entry = to_journal.entry()
    assert entry["PRIORITY"] == "3"
    assert len(entry["MESSAGE"]) == logs.MAX_LINE
    assert len(entry["WEIGHTFS_REF"]) == journal.MAX_VALUE


def test_a_journal_that_does_not_read_blocks_nobody(
    to_journal: FakeJournal, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(2000):  # net.unix.max_dgram_qlen is 512 at most, as a rule
        logging.getLogger("weightfs.engine").info(f"entry {number}")  # noqa: G004 - each its own for the rate limit
    lines = capfd.readouterr().err.splitlines()
    assert lines, "what did not fit went to stderr"
    assert lines[-1] == "<6>INFO weightfs.engine: entry 1999"
    assert to_journal.entry()["MESSAGE"] == "entry 0"


def test_a_flood_of_one_error_does_not_hide_another() -> None:
    now = 100.0
    limit = logs.RateLimit(lambda: now)
    assert sum(limit.filter(record("%s", OSError("one"))) for _ in range(100)) == logs.BURST
    assert limit.filter(record("%s", OSError("another")))
    now += logs.WINDOW
    later = record("%s", OSError("one"))
    assert limit.filter(later)
    assert later.getMessage() == f"one ({100 - logs.BURST} more like this were left out)"
