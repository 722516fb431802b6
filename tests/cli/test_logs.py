"""One line a record, no secrets, no flood."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs import logs


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
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_redaction(text: str, redacted: str) -> None:
    assert logs.redact(text) == redacted


@given(st.from_regex(r"[a-z0-9]{8,40}", fullmatch=True), st.sampled_from(["?token=%s", "?a=b&sig=%s&c=d"]))
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
def test_a_line_for_the_journal_has_a_priority_and_no_time(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], as_json: bool
) -> None:
    stderr = os.fstat(2)
    monkeypatch.setattr("sys.stderr", open(2, "w", closefd=False))  # noqa: SIM115 - of the process, not pytest's
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
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
