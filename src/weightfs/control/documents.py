"""Values and errors as JSON, and errors back again: what the daemon raised is raised alike in the command.

A document holds no secrets: every URL but a ref (which names what the person typed) loses its query.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import weightfs.errors
from weightfs.control.ports import Document
from weightfs.core.manifest import BlobId
from weightfs.errors import DaemonError, FailureKind, ReadError, SourceError, WeightfsError
from weightfs.logs import redact, redact_url

MAX_DEPTH: Final = 16
RENDERED_DEPTH: Final = 4  # refs, one, its files, one: what is below is a small piece

# Read failures by cause: the origin's (3), disagreeing bytes (4), the cache's (5); see docs/configuration.md.
_READ_EXIT_CODES: Final = {
    FailureKind.MISMATCH: 4,
    FailureKind.CHANGED: 4,
    FailureKind.NO_SPACE: 5,
    FailureKind.DISK: 5,
}


def to_json(value: object, *, keep_urls: bool = False, depth: int = 0) -> Any:
    """`value` in terms of JSON: dataclasses as objects, bytes as hex, enums by value; URLs lose their query."""
    if depth > MAX_DEPTH:
        raise ValueError("a document is nested too deeply")
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, list | tuple):
        return [to_json(item, keep_urls=keep_urls, depth=depth + 1) for item in value]
    fields = _fields(value)
    if fields is None:
        return _scalar_to_json(value, keep_urls=keep_urls)
    return {
        name: to_json(item, keep_urls=keep_urls or name == "ref", depth=depth + 1)
        for name, item in fields.items()
    }


def render(document: object, depth: int = RENDERED_DEPTH) -> Iterator[str]:
    """The document's JSON (RFC 8259) in pieces. ValueError: a number that JSON has not.

    The encoder in C holds the interpreter's lock for as long as it works, and an answer may have 50 MB: in a thread,
    and in pieces, it keeps no reader waiting.
    """
    if depth and isinstance(document, dict):
        yield "{"
        for number, (key, value) in enumerate(document.items()):
            yield f"{',' if number else ''}{json.dumps(key, ensure_ascii=False)}:"
            yield from render(value, depth - 1)
        yield "}"
    elif depth and isinstance(document, list):
        yield "["
        for number, value in enumerate(document):
            if number:
                yield ","
            yield from render(value, depth - 1)
        yield "]"
    else:
        yield json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _fields(value: object) -> dict[str, object] | None:
    if isinstance(value, BlobId):
        return None
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _scalar_to_json(value: object, *, keep_urls: bool) -> Any:
    match value:
        case None | bool() | int():
            return value
        case float():
            return (
                value if math.isfinite(value) else None
            )  # JSON has no infinity and no NaN: RFC 8259 section 6
        case str():
            return value if keep_urls or "://" not in value else redact_url(value)
        case bytes():
            return value.hex()
        case BlobId() | Path():
            return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def exit_code_of(error: WeightfsError) -> int:
    """What the command line ends with."""
    if isinstance(error, ReadError):
        return _READ_EXIT_CODES.get(error.kind, SourceError.exit_code)
    return error.exit_code


def error_to_json(error: WeightfsError) -> Document:
    """`{error, kind, exit_code}`, and `failure` for those with a FailureKind. No query is in it, not even a ref's."""
    text = redact(str(error))
    document: Document = {"error": text, "kind": type(error).__name__, "exit_code": exit_code_of(error)}
    if isinstance(error, SourceError | ReadError):
        document["failure"] = error.kind.value
    return document


def error_from_json(document: object) -> WeightfsError:
    """The error again; a DaemonError if this version does not know its kind."""
    if not isinstance(document, dict) or not isinstance(document.get("error"), str):
        return DaemonError("the daemon's answer is not one of weightfs; are both of the same version?")
    text = document["error"]
    cls = getattr(weightfs.errors, str(document.get("kind")), None)
    if not (isinstance(cls, type) and issubclass(cls, WeightfsError)):
        return DaemonError(text)
    if issubclass(cls, SourceError | ReadError):
        try:
            return cls(text, kind=FailureKind(str(document.get("failure"))))
        except ValueError:
            return DaemonError(text)
    return cls(text)
