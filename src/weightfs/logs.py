"""Logging to stderr: one record is one line, no record holds a secret, and no message floods.

Rules: every record passes `redact` after formatting, so that a secret in an argument or a traceback is caught
too. A message repeated more than `BURST` times within `WINDOW` seconds is counted instead of written, and the
count is told with the next one that passes. Where stderr is systemd's journal (JOURNAL_STREAM), a line has no time, and
begins with its priority, which the journal takes off.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final, Literal, TextIO

LogLevel = Literal["debug", "info", "warning", "error"]

BURST: Final = 5
WINDOW: Final = 60.0  # seconds
MAX_KEYS: Final = 1024  # distinct messages remembered by the rate limit
MAX_LINE: Final = 8192  # characters; a longer record is cut
# sd-daemon(3): what `journalctl -p` selects by; the numbers are those of syslog(3).
PRIORITIES: Final = {"DEBUG": "<7>", "INFO": "<6>", "WARNING": "<4>", "ERROR": "<3>", "CRITICAL": "<2>"}
HANDLER_NAME: Final = "weightfs"
LOG_FILE_BYTES: Final = 10 * 1024 * 1024  # of each of the two files that a detached daemon keeps

_URL = re.compile(r"\b(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]{1,15})://(?P<rest>[^\s'\"<>]+)")
_NAMED = re.compile(
    r"(?i)(?P<name>\b(?:proxy-)?authorization|\bx-api-key|\bapi[-_]key|\bset-cookie|\bcookie|\bpassword|\bsecret|\btoken)"
    r"(?P<sep>['\"]?\s*[:=,]\s*(?-i:b(?=['\"]))?['\"]?)(?P<value>[^'\",;\r\n)\]}]+)"
)
_SCHEME_TOKEN = re.compile(r"(?i)\b(?P<kind>bearer|basic)\s+[a-z0-9._~+/=-]{6,}")


def redact_url(url: str) -> str:
    """The same URL without userinfo and query: both may hold secrets. A fragment (a digest) stays."""
    return _URL.sub(_redact_match, url)


def _redact_match(match: re.Match[str]) -> str:
    rest = match["rest"]
    before, hash_mark, fragment = rest.partition("#")
    path, question, _ = before.partition("?")
    authority, slash, tail = path.partition("/")
    host = authority.rpartition("@")[2]
    return f"{match['scheme']}://{host}{slash}{tail}{'?…' if question else ''}{hash_mark}{fragment}"


def redact(text: str) -> str:
    """`text` without URL queries, userinfo, and the values of headers that usually hold secrets."""
    text = _URL.sub(_redact_match, text)
    text = _SCHEME_TOKEN.sub(lambda match: f"{match['kind']} ***", text)
    return _NAMED.sub(lambda match: f"{match['name']}{match['sep']}***", text)


def one_line(text: str) -> str:
    """`text` with line ends and other control characters escaped, and cut to `MAX_LINE` characters."""
    text = "".join(char if char.isprintable() or char == " " else ascii(char)[1:-1] for char in text)
    return text if len(text) <= MAX_LINE else text[: MAX_LINE - 1] + "…"


class RateLimit(logging.Filter):
    """Lets `BURST` records of one message template through per `WINDOW` seconds, whatever its level."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        # message → (start of its window, records seen in it); oldest first, at most MAX_KEYS
        self._seen: OrderedDict[tuple[str, int, str], tuple[float, int]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write `record`; adds the number of those left out since the last one written."""
        key = (record.name, record.levelno, str(record.msg))
        now = self._clock()
        start, count = self._seen.pop(key, (now, 0))
        if now - start >= WINDOW:
            if count > BURST:
                record.msg = f"{record.msg} ({count - BURST} more like this were left out)"
            start, count = now, 0
        self._seen[key] = (start, count + 1)
        if len(self._seen) > MAX_KEYS:
            self._seen.popitem(last=False)
        return count < BURST


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00Z WARNING weightfs.engine: text`, redacted, on one line."""

    def __init__(self, *, with_time: bool, tracebacks: bool, to_journal: bool = False) -> None:
        super().__init__()
        self._with_time = with_time
        self._to_journal = to_journal
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        head = f"{record.levelname} {record.name}: "
        if self._with_time:
            head = f"{_timestamp(record)} {head}"
        return self._priority(record) + head + one_line(redact(self._text(record)))

    def _priority(self, record: logging.LogRecord) -> str:
        return PRIORITIES.get(record.levelname, "") if self._to_journal else ""

    def _text(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            detail = (
                self.formatException(record.exc_info)
                if self._tracebacks
                else f"{type(error).__name__}: {error}"
            )
            text = f"{text} [{detail}]"
        return text


class JsonFormatter(LineFormatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": one_line(redact(self._text(record))),
        }
        return self._priority(record) + json.dumps(fields, ensure_ascii=False)


def _timestamp(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))


def _is_journal(stream: TextIO) -> bool:
    """Whether JOURNAL_STREAM (systemd.exec(5)) is about this stream: it may be inherited from a terminal's session."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def set_up(level: LogLevel, *, as_json: bool = False, file: Path | None = None) -> None:
    """Send the records of `weightfs` and of the libraries below it (warnings) to stderr or to `file`.

    Calling it again replaces what the last call set up. OSError if `file` cannot be opened.
    """
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        handler = RotatingFileHandler(file, maxBytes=LOG_FILE_BYTES, backupCount=1, encoding="utf-8")
    tracebacks = level == "debug"
    to_journal = file is None and _is_journal(sys.stderr)
    kind = JsonFormatter if as_json else LineFormatter
    handler.setFormatter(kind(with_time=not to_journal, tracebacks=tracebacks, to_journal=to_journal))
    if level != "debug":
        handler.addFilter(RateLimit())
    handler.set_name(HANDLER_NAME)
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == HANDLER_NAME]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("weightfs").setLevel(level.upper())
