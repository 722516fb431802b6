from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from defusedxml.ElementTree import fromstring
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.geometry import KIB, MAX_BLOB_SIZE, MIB
from weightfs.core.manifest import MAX_MIRRORS, Mirror
from weightfs.core.metalink import (
    MAX_METALINK_BYTES,
    MAX_PIECE_LENGTH,
    MAX_PIECES,
    MAX_PRIORITY,
    MIN_PIECE_LENGTH,
    Metalink,
    read_metalink,
    write_metalink,
)
from weightfs.errors import ChunkListError

WHOLE = hashlib.sha256(b"whole").digest()
PIECE = hashlib.sha256(b"piece").hexdigest()
URL = "https://h/m.gguf"
GOOD = Metalink(
    "m.gguf", 3 * MIB - 1, WHOLE, MIB, bytes(range(96)), (Mirror(URL, 1), Mirror("http://i/m", 2))
)


def document(**parts: str) -> str:
    """A good document, with parts of it replaced."""
    given_parts = {
        "root": '<metalink xmlns="urn:ietf:params:xml:ns:metalink">',
        "name": 'name="m.gguf"',
        "size": f"<size>{2 * MIB}</size>",
        "hash": f'<hash type="sha-256">{WHOLE.hex()}</hash>',
        "pieces": f'<pieces length="{MIB}" type="sha-256"><hash>{PIECE}</hash><hash>{PIECE}</hash></pieces>',
        "url": f'<url priority="3">{URL}</url>',
        "more": "",
    } | parts
    file = "<file {name}>{size}{hash}{pieces}{url}</file>".format(**given_parts)
    return f"{given_parts['root']}{file}{given_parts['more']}</metalink>"


def read(text: str) -> Metalink:
    return read_metalink(fromstring(text))


def pieces(*, length: object = MIB, kind: str = "sha-256", count: int = 2, inside: str = "") -> str:
    return f'<pieces length="{length}" type="{kind}">{f"<hash>{PIECE}</hash>" * count}{inside}</pieces>'


def test_a_good_document() -> None:
    assert read(document()) == Metalink(
        "m.gguf", 2 * MIB, WHOLE, MIB, bytes.fromhex(PIECE) * 2, (Mirror(URL, 3),)
    )


def test_what_is_written_is_read_back_and_is_stable() -> None:
    data = write_metalink(GOOD)
    assert read_metalink(fromstring(data)) == GOOD
    assert write_metalink(GOOD) == data
    assert data.startswith(b"<?xml")


def test_the_written_form_is_what_aria2_reads() -> None:
    one = replace(GOOD, size=MIB, digests=bytes(32), mirrors=(Mirror("https://h/m?a=1&b=2", 7),))
    assert write_metalink(one).decode().splitlines()[1:] == [
        '<metalink xmlns="urn:ietf:params:xml:ns:metalink">',
        ' <file name="m.gguf">',
        "  <size>1048576</size>",
        f'  <hash type="sha-256">{WHOLE.hex()}</hash>',
        '  <pieces length="1048576" type="sha-256">',
        f"   <hash>{bytes(32).hex()}</hash>",
        "  </pieces>",
        '  <url priority="7">https://h/m?a=1&amp;b=2</url>',
        " </file>",
        "</metalink>",
    ]


@st.composite
def metalinks(draw: st.DrawFn) -> Metalink:
    length = draw(st.none() | st.sampled_from([MIN_PIECE_LENGTH, MIB, MAX_PIECE_LENGTH]))
    size = draw(st.integers(0, 6 * (length or MIB)))
    count = -(-size // length) if length else 0
    whole = draw(st.binary(min_size=32, max_size=32)) if length is None else draw(st.none() | st.just(WHOLE))
    characters = st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="/\\\ufffe\uffff")
    name = draw(st.text(characters, min_size=1, max_size=40).filter(lambda name: name not in (".", "..")))
    urls = draw(st.lists(st.integers(0, 99), unique=True, max_size=MAX_MIRRORS))
    mirrors = tuple(Mirror(f"https://h/{n}?a&b='<", draw(st.integers(1, MAX_PRIORITY))) for n in urls)
    mirrors = tuple(replace(mirror, url=mirror.url.replace("<", "%3C")) for mirror in mirrors)
    digests = draw(st.binary(min_size=32 * count, max_size=32 * count))
    return Metalink(name, size, whole, length, digests, mirrors)


@given(metalinks())
def test_round_trip(made: Metalink) -> None:
    assert read_metalink(fromstring(write_metalink(made))) == made


def test_the_longest_document_is_within_the_bound() -> None:
    size = MAX_PIECES * MAX_PIECE_LENGTH
    mirrors = tuple(Mirror(f"https://h/{n}?" + "&" * 4000, MAX_PRIORITY) for n in range(MAX_MIRRORS))
    made = Metalink("&" * 255, size, WHOLE, MAX_PIECE_LENGTH, bytes(32) * MAX_PIECES, mirrors)
    assert len(write_metalink(made)) <= MAX_METALINK_BYTES


@pytest.mark.parametrize(
    "text",
    [
        document(hash=f'<hash type="md5">junk</hash><hash type="sha-256">{WHOLE.hex().upper()}</hash>'),
        document(hash=f'<hash type="sha-1">x</hash><hash>y</hash><hash type="SHA-256">{WHOLE.hex()}</hash>'),
        document(pieces=pieces(kind="sha-1", length=3, count=1) + pieces()),
        document(url=f'<metaurl mediatype="torrent">ftp://x</metaurl><url priority="3">{URL}</url>'),
        document(more='<generator>x</generator><file xmlns="urn:other"/>'),
        document(url=f'<identity>x</identity><url location="de" priority="3">{URL}</url>'),
        document(
            url=f'<url priority="9">{URL}</url><url priority="3">{URL}</url><url priority="4">{URL}</url>'
        ),
        document(url='<url priority="3">HTTPS://H:443/%6d.gguf</url>'),
    ],
)
def test_what_may_be_ignored_or_normalised_is(text: str) -> None:
    assert read(text) == read(document())


def test_optional_parts() -> None:
    assert read(document(hash="")).sha256 is None
    without = read(document(pieces=""))
    assert (without.chunk_length, without.digests) == (None, b"")
    assert read(document(url="")).mirrors == ()
    assert read(document(url=f"<url>{URL}</url>")).mirrors == (Mirror(URL, MAX_PRIORITY),)
    empty = read(document(size="<size>0</size>", pieces=pieces(count=0)))
    assert (empty.size, empty.chunk_length, empty.digests) == (0, MIB, b"")


@pytest.mark.parametrize("length", [MIN_PIECE_LENGTH, MAX_PIECE_LENGTH])
def test_piece_lengths_at_the_bounds(length: int) -> None:
    text = document(size=f"<size>{length + 1}</size>", pieces=pieces(length=length))
    assert read(text).chunk_length == length


SPACED = f" {WHOLE.hex()}"
BAD_DOCUMENTS = {
    "metalink 3": (document(root='<metalink xmlns="http://www.metalinker.org/">'), "no Metalink 4"),
    "no namespace": (document(root="<metalink>"), "no Metalink 4"),
    "no file": ('<metalink xmlns="urn:ietf:params:xml:ns:metalink"/>', "0 file elements"),
    "two files": (document(more='<file name="b"/>'), "2 file elements"),
    "no name": (document(name=""), "path is empty"),
    "empty name": (document(name='name=""'), "path is empty"),
    "path as name": (document(name='name="a/b"'), "plain name"),
    "backslash path": (document(name='name="a\\b"'), "plain name"),
    "absolute name": (document(name='name="/etc/passwd"'), "refused"),
    "dot-dot name": (document(name='name="../m"'), "refused"),
    "dots": (document(name='name=".."'), "refused"),
    "newline name": (document(name='name="a&#10;b"'), "control"),
    "long name": (document(name=f'name="{"x" * 256}"'), "255 bytes"),
    "no size": (document(size=""), "0 size elements"),
    "two sizes": (document(size="<size>2097152</size><size>2097152</size>"), "2 size elements"),
    "empty size": (document(size="<size/>"), "not a number"),
    "negative size": (document(size="<size>-1</size>"), "not a number"),
    "spaced size": (document(size="<size> 2097152</size>"), "not a number"),
    "exponent": (document(size="<size>2e6</size>"), "not a number"),
    "arabic digits": (document(size="<size>٢</size>"), "not a number"),
    "endless size": (document(size=f"<size>{'9' * 5000}</size>"), "not a number"),
    "huge size": (document(size=f"<size>{MAX_BLOB_SIZE + 1}</size>", pieces=""), "can be"),
    "nested size": (document(size="<size>2097152<b/></size>"), "where text belongs"),
    "nothing to prove with": (document(hash="", pieces=""), "proves nothing"),
    "only other hashes": (
        document(hash='<hash type="md5">x</hash>', pieces=pieces(kind="md5")),
        "proves nothing",
    ),
    "two hashes": (document(hash=f'<hash type="sha-256">{WHOLE.hex()}</hash>' * 2), "2 hash of type"),
    "short hash": (document(hash=f'<hash type="sha-256">{WHOLE.hex()[1:]}</hash>'), "64 hex"),
    "long hash": (document(hash=f'<hash type="sha-256">{WHOLE.hex()}0</hash>'), "64 hex"),
    "not hex": (document(hash=f'<hash type="sha-256">{"g" * 64}</hash>'), "64 hex"),
    "spaced hash": (document(hash=f'<hash type="sha-256">{SPACED}</hash>'), "64 hex"),
    "spaced inside": (document(hash=f'<hash type="sha-256">{"ab " * 21}a</hash>'), "64 hex"),
    "empty hash": (document(hash='<hash type="sha-256"/>'), "64 hex"),
    "two piece lists": (document(pieces=pieces() + pieces()), "2 pieces of type"),
    "no piece length": (
        document(pieces=f'<pieces type="sha-256"><hash>{PIECE}</hash></pieces>'),
        "not a number",
    ),
    "piece length zero": (document(pieces=pieces(length=0)), "power of two"),
    "negative piece length": (document(pieces=pieces(length=-MIB)), "not a number"),
    "piece too short": (document(pieces=pieces(length=32 * KIB, count=64)), "power of two"),
    "piece too long": (document(pieces=pieces(length=128 * MIB, count=1)), "power of two"),
    "odd piece length": (document(pieces=pieces(length=MIB + 1)), "power of two"),
    "a piece missing": (document(pieces=pieces(count=1)), "1 piece hashes where 2 belong"),
    "a piece too many": (document(pieces=pieces(count=3)), "3 piece hashes where 2 belong"),
    "no pieces": (document(pieces=pieces(count=0)), "0 piece hashes where 2 belong"),
    "pieces of nothing": (document(size="<size>0</size>", pieces=pieces(count=1)), "1 piece hashes where 0"),
    "bad piece": (document(pieces=pieces(count=1, inside=f"<hash>{PIECE[1:]}</hash>")), "64 hex"),
    "foreign piece": (document(pieces=pieces(count=1, inside=f"<hush>{PIECE}</hush>")), "else than hashes"),
    "ftp": (document(url="<url>ftp://h/m</url>"), "neither http nor https"),
    "file url": (document(url="<url>file:///etc/passwd</url>"), "neither http nor https"),
    "relative url": (document(url="<url>m.gguf</url>"), "neither http nor https"),
    "empty url": (document(url="<url/>"), "neither http nor https"),
    "userinfo": (document(url="<url>https://u:p@h/m</url>"), "password"),
    "spaced url": (document(url=f"<url>\n{URL}\n</url>"), "white space"),
    "url with a fragment": (document(url=f"<url>{URL}#x</url>"), "fragment"),
    "long url": (document(url=f"<url>{URL}{'x' * 5000}</url>"), "too long"),
    "too many urls": (document(url=f"<url>{URL}</url>" * (MAX_MIRRORS + 1)), "65 mirrors"),
    "priority zero": (document(url=f'<url priority="0">{URL}</url>'), "priority of 0"),
    "priority too high": (document(url=f'<url priority="{MAX_PRIORITY + 1}">{URL}</url>'), "1 to 999999"),
    "priority no number": (document(url=f'<url priority="-1">{URL}</url>'), "not a number"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_bad_documents_are_refused_with_the_reason(case: str) -> None:
    text, why = BAD_DOCUMENTS[case]
    with pytest.raises(ChunkListError, match=why) as caught:
        read(text)
    assert len(str(caught.value)) < 400
    assert "u:p" not in str(caught.value)


def test_too_many_pieces_are_refused_before_they_are_read() -> None:
    text = document(pieces=pieces(count=0, inside="<x/>" * (MAX_PIECES + 1)))
    with pytest.raises(ChunkListError, match=f"{MAX_PIECES + 1} pieces"):
        read(text)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"name": "a\ufffe"}, "plain name"),
        ({"name": "a\udc80"}, "UTF-8"),
        ({"size": -1}, "size of -1"),
        ({"sha256": b"x"}, "not a SHA-256"),
        ({"chunk_length": None}, "3 piece hashes where 0 belong"),
        ({"digests": bytes(95)}, "belong"),
        ({"chunk_length": -MIB}, "power of two"),
        ({"size": MAX_BLOB_SIZE}, f"{MAX_PIECES} are allowed"),
        ({"mirrors": (Mirror("ftp://h/m"),)}, "neither http nor https"),
        ({"mirrors": (Mirror(URL, 0),)}, "priority of 0"),
        ({"mirrors": (Mirror(URL),) * (MAX_MIRRORS + 1)}, "65 mirrors"),
    ],
)
def test_no_invalid_metalink_can_be_made_and_so_none_written(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ChunkListError, match=why):
        replace(GOOD, **changes)
