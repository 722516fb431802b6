from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.names import identity, moves
from weightfs.core.ref import parse_ref

PARTS = st.text("abcXYZ019._", min_size=1, max_size=8).filter(lambda part: not part.startswith("."))


@given(PARTS, PARTS)
def test_the_case_of_an_ollama_name_does_not_matter(model: str, tag: str) -> None:
    text = f"ollama://{model}:{tag}"
    spellings = {identity(str(parse_ref(one))) for one in (text, f"ollama://{model.upper()}:{tag.lower()}")}
    assert len(spellings) == 1
    assert identity(spellings.pop()) in (identity(text), text.casefold())


def test_nor_that_of_what_is_left_out() -> None:
    spellings = ("aya:8b", "Library/Aya:8B", "registry.ollama.ai/LIBRARY/aya:8b")
    assert {identity(str(parse_ref(f"ollama://{one}"))) for one in spellings} == {"ollama://aya:8b"}
    assert identity("ollama://other/aya:8b") == "ollama://other/aya:8b"


@pytest.mark.parametrize("scheme", ["https://h/", "hf://o/", "oci://h.example/a/"])
def test_everywhere_else_it_does(scheme: str) -> None:
    one, other = f"{scheme}m.gguf", f"{scheme}M.gguf"
    assert identity(one) == one
    assert identity(one) != identity(other)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ollama://aya", True),
        ("ollama://hf.co/o/m:q4", True),
        ("oci://h.example/m", True),
        ("oci://h.example/m:v1", True),
        ("oci://h.example/m@sha256:" + "0" * 64, False),
        ("hf://o/m", True),
        ("hf://o/m@v1.0/x.gguf", True),
        ("hf://datasets/o/m@" + "0a" * 20, False),
        ("hf://o/m@" + "0a" * 20 + "/x/*.gguf", False),
        ("hf://o/m@" + "0a" * 19, True),
        ("https://h/m.gguf", True),
        ("file:///m.gguf", True),
        ("https://h/m.gguf#sha256=" + "0" * 64, False),
        ("/m.gguf#sha256=" + "0" * 64, False),
    ],
)
def test_what_may_move(text: str, expected: bool) -> None:
    assert moves(str(parse_ref(text))) is expected
