"""Logging to stderr: one record is one line, no record holds a secret, and no message floods.

Rules: every record passes `redact` after formatting, so that a secret in an argument or a traceback is caught
too. A message repeated more than `BURST` times within `WINDOW` seconds is counted instead of written, and the
count is told with the next one that passes. Where stderr is systemd's journal (JOURNAL_STREAM), a record is an entry
with fields (`about`); if the journal does not take it, or lines of JSON are wanted, it is a line without a time that
begins with its priority, which the journal takes off.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final, Literal, TextIO

from weightfs import journal
from weightfs.errors import CacheError, DiskFault, FailureKind, ReadError, SourceError
from weightfs.journal import MAX_VALUE, Journal, is_journal

LogLevel = Literal["debug", "info", "warning", "error"]

BURST: Final = 5
WINDOW: Final = 60.0  # seconds
MAX_KEYS: Final = 1024  # distinct messages remembered by the rate limit
MAX_KEY: Final = 200  # characters of one
FIELDS: Final = ("ref", "blob", "chunk", "mirror", "errno", "failure")
MAX_LINE: Final = 8192  # characters; a longer record is cut
# sd-daemon(3): what `journalctl -p` selects by; the numbers are those of syslog(3).
PRIORITIES: Final = {"DEBUG": "<7>", "INFO": "<6>", "WARNING": "<4>", "ERROR": "<3>", "CRITICAL": "<2>"}
HANDLER_NAME: Final = "weightfs"
LOG_FILE_BYTES: Final = 10 * 1024 * 1024  # of each of the two files that a detached daemon keeps

_SCHEME = r"[a-zA-Z][a-zA-Z0-9+.-]{1,15}"
# A URL may hold an apostrophe. Where one stands before it, it is `repr`'s, and the next one ends the URL.
_URL = re.compile(rf"(?:(?<=')({_SCHEME})://([^\s'\"<>]+)|\b({_SCHEME})://([^\s\"<>]+))")
_AUTHORITY = re.compile(r"(?:\[[^]]*\]|[^:]*)(?::\d*)?[.,:;)\]}`']*")
_DIGEST = re.compile(r"sha256=[0-9a-fA-F]+[.,:;)\]}`']*")
_NAMED = re.compile(
    r"(?i)(?P<name>\b(?:proxy-)?authorization|\bx-api-key|\bapi[-_]key|\bset-cookie|\bcookie"
    r"|(?:\b|(?<=_))(?:password|secret|token))"
    r"(?P<sep>['\"]?\s*[:=,]\s*(?-i:b(?=['\"]))?['\"]?)(?P<value>[^'\",;\r\n)\]}]+)"
)
_SCHEME_TOKEN = re.compile(r"(?i)\b(?P<kind>bearer|basic)\s+[a-z0-9._~+/=-]{6,}")


def redact_url(url: str) -> str:
    """The same URL without userinfo and query: both may hold secrets. Of fragments only a digest stays."""
    return _URL.sub(_redact_match, url)


def _redact_match(match: re.Match[str]) -> str:
    scheme, rest = match[1] or match[3], match[2] or match[4]
    before, hash_mark, fragment = rest.partition("#")
    path, question, _ = before.partition("?")
    authority, slash, tail = path.partition("/")
    host = authority.rpartition("@")[2]
    if not _AUTHORITY.fullmatch(host) and "@" in rest[len(authority) :]:
        return f"{scheme}://…"  # a password with one of /?# in it: what follows is no path yet
    digest = _DIGEST.match(fragment)
    shown = digest[0] if digest else "…" if fragment else ""
    return f"{scheme}://{host}{slash}{tail}{'?…' if question else ''}{hash_mark}{shown}"


def redact(text: str) -> str:
    """`text` without URL queries, userinfo, and the values of headers that usually hold secrets."""
    text = _URL.sub(_redact_match, text)
    text = _SCHEME_TOKEN.sub(lambda match: f"{match['kind']} ***", text)
    return _NAMED.sub(lambda match: f"{match['name']}{match['sep']}***", text)


def traceback_of(error: BaseException) -> str:
    """As the interpreter would print it, without secrets: several lines, with an end."""
    return redact("".join(traceback.format_exception(error)))


def one_line(text: str) -> str:
    """`text` with line ends and other control characters escaped, and cut to `MAX_LINE` characters."""
    text = "".join(char if char.isprintable() or char == " " else ascii(char)[1:-1] for char in text)
    return text if len(text) <= MAX_LINE else text[: MAX_LINE - 1] + "…"


def about(
    *,
    ref: str = "",
    blob: object = "",
    chunk: int = -1,
    mirror: str = "",
    errno: int | None = None,
    failure: FailureKind | None = None,
) -> dict[str, object]:
    """`extra=` of a record: what it is about, for the journal's fields and for lines of JSON; left out: unknown."""
    fields = {
        "ref": ref or None,
        "blob": str(blob) or None,
        "chunk": None if chunk < 0 else chunk,
        "mirror": mirror or None,
        "errno": errno or None,
        "failure": failure.value if failure else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def subject_of(record: logging.LogRecord) -> dict[str, str | int]:
    """The fields that `about` gave it, and those of the errors that it tells of. No secrets; each is bounded."""
    found: dict[str, object] = {}
    for error in _errors_of(record):
        if isinstance(error, OSError):
            found = about(errno=error.errno) | found
        elif isinstance(error, ReadError):
            told = about(ref=error.ref, chunk=error.chunk, mirror=error.mirror, failure=error.kind)
            found = told | found
        elif isinstance(error, SourceError):
            found = about(mirror=error.mirror, failure=error.kind) | found
        elif isinstance(error, DiskFault):
            found = about(blob=error.blob) | found
    for name in FIELDS:
        if (value := getattr(record, name, None)) is not None:
            found[name] = value
    return {
        name: value if isinstance(value, int) else one_line(redact(str(value)))[:MAX_VALUE]
        for name, value in found.items()
    }


def _errors_of(record: logging.LogRecord) -> Iterator[BaseException]:
    args = record.args if isinstance(record.args, tuple) else ()
    for error in (*args, record.exc_info[1] if record.exc_info else None):
        if isinstance(error, BaseException):
            yield error
        if isinstance(error, CacheError) and error.__context__ is not None:
            yield error.__context__  # what was translated, for its errno


class RateLimit(logging.Filter):
    """Lets `BURST` records of one message template through per `WINDOW` seconds, whatever its level."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        # message → (start of its window, records seen in it); oldest first, at most MAX_KEYS
        self._seen: OrderedDict[tuple[str, int, str], tuple[float, int]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write `record`; adds the number of those left out since the last one written."""
        # Where the error is the whole message, it is what is repeated.
        what = record.getMessage()[:MAX_KEY] if record.msg == "%s" else str(record.msg)
        key = (record.name, record.levelno, what)
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
        return self._priority(record) + head + self.message(record)

    def message(self, record: logging.LogRecord) -> str:
        """What it says, redacted, on one line."""
        return one_line(redact(self._text(record)))

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
    """One JSON object a line: `time`, `level`, `logger`, `message`, and what `subject_of` knows."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self.message(record),
            **subject_of(record),
        }
        return self._priority(record) + json.dumps(fields, ensure_ascii=False)


def _timestamp(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))


class JournalHandler(logging.StreamHandler[TextIO]):
    """Entries with fields for the journal; what it does not take goes to stderr as a line, which it reads too."""

    def __init__(self, stream: TextIO, *, tracebacks: bool, to: Path) -> None:
        super().__init__(stream)
        self._journal = Journal(to)
        formatter = LineFormatter(with_time=False, tracebacks=tracebacks, to_journal=True)
        self.setFormatter(formatter)
        self._message = formatter.message

    def emit(self, record: logging.LogRecord) -> None:
        """As one entry; see docs/systemd.md for its fields."""
        try:
            self._journal.send(self._entry(record))
        except OSError:
            super().emit(record)
        except Exception:  # noqa: BLE001 - as every handler does: logging.Handler.handleError
            self.handleError(record)

    def _entry(self, record: logging.LogRecord) -> dict[str, str | int]:
        about = {
            "ERRNO" if name == "errno" else f"WEIGHTFS_{name.upper()}": value
            for name, value in subject_of(record).items()
        }
        return {
            "MESSAGE": self._message(record),
            "PRIORITY": PRIORITIES.get(record.levelname, "<6>").strip("<>"),
            "SYSLOG_IDENTIFIER": "weightfs",
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName or "",
            **about,
        }

    def close(self) -> None:
        """The socket too."""
        self._journal.close()
        super().close()


def _handler(file: Path | None, *, as_json: bool, tracebacks: bool) -> logging.Handler:
    to_journal = file is None and is_journal(sys.stderr)
    if to_journal and not as_json:
        return JournalHandler(sys.stderr, tracebacks=tracebacks, to=journal.SOCKET)
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        handler = RotatingFileHandler(file, maxBytes=LOG_FILE_BYTES, backupCount=1, encoding="utf-8")
    kind = JsonFormatter if as_json else LineFormatter
    handler.setFormatter(kind(with_time=not to_journal, tracebacks=tracebacks, to_journal=to_journal))
    return handler


def set_up(level: LogLevel, *, as_json: bool = False, file: Path | None = None) -> None:
    """Send the records of `weightfs` and of the libraries below it (warnings) to stderr or to `file`.

    Calling it again replaces what the last call set up. OSError if `file` cannot be opened.
    """
    handler = _handler(file, as_json=as_json, tracebacks=level == "debug")
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
