"""Values and errors as JSON, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import weightfs.errors
from weightfs.control.documents import error_from_json, error_to_json, exit_code_of, render, to_json
from weightfs.core.manifest import BlobId, Trust
from weightfs.errors import DaemonError, FailureKind, ReadError, SourceError, WeightfsError


@dataclass(frozen=True)
class Inner:
    url: str
    ref: str


def test_values() -> None:
    value = {
        "a": (1, 2.5, None, True),
        "b": Trust.VERIFIED,
        "c": b"\x01",
        "d": BlobId(bytes(16)),
        "e": Path("/x"),
    }
    assert json.loads(json.dumps(to_json(value))) == {
        "a": [1, 2.5, None, True],
        "b": "verified",
        "c": "01",
        "d": "0" * 32,
        "e": "/x",
    }


def test_urls_lose_their_secrets_and_refs_keep_theirs() -> None:
    document = to_json(Inner("https://u:p@h/f?sig=1", "https://h/f?sig=1"))
    assert document == {"url": "https://h/f?…", "ref": "https://h/f?sig=1"}


def test_no_error_tells_a_secret() -> None:
    """Regression: it went out as it was, with the query of the ref that it is about."""
    error = SourceError(
        "https://h/f?sig=sesame: sent Authorization: Bearer sesame", kind=FailureKind.PROTOCOL
    )
    assert "sesame" not in json.dumps(error_to_json(error))


@pytest.mark.parametrize("value", [object(), {1, 2}, Inner])
def test_what_json_cannot_say(value: object) -> None:
    with pytest.raises(TypeError):
        to_json(value)


def test_a_value_that_holds_itself() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="deeply"):
        to_json(loop)


def every_error() -> list[WeightfsError]:
    found: list[WeightfsError] = []
    for cls in vars(weightfs.errors).values():
        if isinstance(cls, type) and issubclass(cls, WeightfsError):
            if issubclass(cls, SourceError | ReadError):
                found.append(cls("text", kind=FailureKind.RESET))
            else:
                found.append(cls("text"))
    return found


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_errors_come_back_as_they_were(error: WeightfsError) -> None:
    back = error_from_json(json.loads(json.dumps(error_to_json(error))))
    assert type(back) is type(error)
    assert str(back) == "text"
    assert exit_code_of(back) == exit_code_of(error)


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"error": 7},
        {"error": "x", "kind": "os"},
        {"error": "x", "kind": "FailureKind"},
        {"error": "x", "kind": "SourceError", "failure": "no such"},
        {"error": "x", "kind": "SourceError"},
    ],
)
def test_other_answers_are_a_daemon_error(document: object) -> None:
    assert type(error_from_json(document)) is DaemonError


@pytest.mark.parametrize(
    ("kind", "code"),
    [(FailureKind.MISMATCH, 4), (FailureKind.NO_SPACE, 5), (FailureKind.DISK, 5), (FailureKind.STALL, 3)],
)
def test_a_read_error_ends_with_the_code_of_its_cause(kind: FailureKind, code: int) -> None:
    assert exit_code_of(ReadError("x", kind=kind)) == code


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(VALUES, st.integers(0, 5))
def test_json_in_pieces_is_the_same_json(value: object, depth: int) -> None:
    pieces = list(render(value, depth))
    assert "".join(pieces) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert depth == 0 or not value or not isinstance(value, dict | list) or len(pieces) > 1


def test_json_has_no_infinity() -> None:
    with pytest.raises(ValueError, match="JSON"):
        list(render({"a": [float("inf")]}))
