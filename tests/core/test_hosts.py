from __future__ import annotations

import pytest

from weightfs.core.hosts import is_authority


@pytest.mark.parametrize(
    ("text", "can_be"),
    [
        ("host", True),
        ("host:1", True),
        ("host:65535", True),
        ("[::1]", True),
        ("[::1]:443", True),
        ("host:0", False),
        ("host:65536", False),
        ("host:٣", False),
        ("[1:2]", False),
        ("[:::::]:80", False),
        ("[::1]:0", False),
    ],
)
def test_ports_and_addresses_that_can_be(text: str, can_be: bool) -> None:
    assert is_authority(text) is can_be
