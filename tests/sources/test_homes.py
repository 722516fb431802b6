from __future__ import annotations

import pytest

from weightfs.core.ref import parse_ref
from weightfs.sources._homes import home_of
from weightfs.sources.base import FetchSettings

PLAIN = FetchSettings()
PLACED = FetchSettings(
    hf_endpoint="https://hub.lan",
    endpoints=(
        ("registry.ollama.ai", "http://mirror.lan:5000/ollama"),
        ("docker.io", "https://docker.lan"),
        ("h.example:5000", "https://other.lan"),
    ),
)


@pytest.mark.parametrize(
    ("text", "plain", "placed"),
    [
        ("https://h/m.gguf?a=b", "https://h/m.gguf?a=b", "https://h/m.gguf?a=b"),
        ("http://h/m.gguf", "http://h/m.gguf", "http://h/m.gguf"),
        ("file:///m.gguf", None, None),
        # Who did not name them did not mean them, and they have tokens of their own.
        ("hf://o/m", None, "https://hub.lan"),
        ("ollama://aya", None, "http://mirror.lan:5000/ollama"),
        ("oci://docker.io/ai/smollm2", None, "https://docker.lan"),
        ("ollama://h.example/o/aya", "https://h.example", "https://h.example"),
        ("oci://h.example:5000/m", "https://h.example:5000", "https://other.lan"),
        ("oci://localhost/m", "http://localhost", "http://localhost"),
        ("oci://127.0.0.2:5000/m", "http://127.0.0.2:5000", "http://127.0.0.2:5000"),
        ("oci://[::1]:5000/m", "http://[::1]:5000", "http://[::1]:5000"),
    ],
)
def test_headers_go_to_the_host_that_was_named(text: str, plain: str | None, placed: str | None) -> None:
    assert home_of(parse_ref(text), PLAIN) == plain
    assert home_of(parse_ref(text), PLACED) == placed


def test_a_plugins_refs_have_none() -> None:
    assert home_of(parse_ref("swift://h/m", ("swift",)), PLAIN) is None
