"""Heads that are right in everything but one thing: without a wrong length beside it, that thing alone decides."""

from __future__ import annotations

import httpx
import pytest

from weightfs.core.geometry import ByteSpan
from weightfs.errors import FailureKind, SourceError
from weightfs.sources._rules import check_partial

URL = "http://127.0.0.1/m.gguf"
GOOD = {"Content-Range": "bytes 10-19/100", "Content-Length": "10", "ETag": '"one"'}


def check(**changed: str) -> None:
    headers = {**GOOD, **{name.replace("_", "-"): value for name, value in changed.items()}}
    check_partial(206, httpx.Headers(headers), ByteSpan(10, 20), 100, '"one"', URL)


def test_the_head_itself_is_right() -> None:
    check()
    check(Content_Encoding="identity", Content_Type="application/octet-stream")


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip", "x-unheard-of"])
def test_an_encoded_body_is_refused_though_its_head_is_right(coding: str) -> None:
    with pytest.raises(SourceError, match="encoded") as caught:
        check(Content_Encoding=coding)
    assert caught.value.kind is FailureKind.PROTOCOL


@pytest.mark.parametrize("kind", ["multipart/byteranges; boundary=X", " Multipart/Mixed"])
def test_a_multipart_body_is_refused_though_its_head_is_right(kind: str) -> None:
    with pytest.raises(SourceError, match="multipart") as caught:
        check(Content_Type=kind)
    assert caught.value.kind is FailureKind.PROTOCOL
