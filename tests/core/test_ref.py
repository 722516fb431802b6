from __future__ import annotations

import re
import string
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.manifest import check_path
from weightfs.core.ref import MAX_REF_CHARS, Ref, canonical_url, parse_ref, tree_of, without_secrets
from weightfs.errors import RefError

HEX = "ab" * 32


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("https://host/m.gguf", "https://host/m.gguf"),
        ("HTTPS://Host.Example/M.gguf", "https://host.example/M.gguf"),
        ("https://h:443/m", "https://h/m"),
        ("http://h:80/m", "http://h/m"),
        ("https://h:80/m", "https://h:80/m"),
        ("https://h:08080/m", "https://h:8080/m"),
        ("https://h:/m", "https://h/m"),
        ("http://[::1]:8000/m", "http://[::1]:8000/m"),
        ("http://[2001:DB8:0:0:0:0:0:1]/m", "http://[2001:db8::1]/m"),
        ("http://127.0.0.1/m", "http://127.0.0.1/m"),
        ("https://h/a b/ü.gguf", "https://h/a%20b/%C3%BC.gguf"),
        ("https://h/%7euser/%4d%2egguf", "https://h/~user/M.gguf"),
        ("https://h/a%2bb+c", "https://h/a%2Bb+c"),
        ("https://h/m?x=1&y=%2f ü", "https://h/m?x=1&y=%2F%20%C3%BC"),
        ("https://h/m?", "https://h/m"),
        ("https://h/m#", "https://h/m"),
        (f"https://h/m#sha256={HEX.upper()}", f"https://h/m#sha256={HEX}"),
        ("file:///srv/m.gguf", "file:///srv/m.gguf"),
        ("FILE://LocalHost/srv/m.gguf", "file:///srv/m.gguf"),
        ("file:///a%20b/m", "file:///a%20b/m"),
        ("/srv/models/m.gguf", "file:///srv/models/m.gguf"),
        ("//srv///m.gguf", "file:///srv/m.gguf"),
        ("/srv/100%/what?#1.gguf", "file:///srv/100%25/what%3F%231.gguf"),
        (f"/srv/m#sha256={HEX}", f"file:///srv/m#sha256={HEX}"),
    ],
)
def test_the_canonical_form(text: str, canonical: str) -> None:
    ref = parse_ref(text)
    assert str(ref) == ref.text == canonical
    assert ref.url == canonical.partition("#")[0]
    assert parse_ref(str(ref)) == ref


def test_a_digest_in_the_fragment() -> None:
    ref = parse_ref(f"https://h/m#sha256={HEX}")
    assert ref.sha256 == bytes.fromhex(HEX)
    assert ref.url == "https://h/m"
    assert parse_ref("https://h/m").sha256 is None


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("https://host:8000/dir/m.gguf", ("https/host:8000/dir", "m.gguf")),
        ("https://h/m", ("https/h", "m")),
        ("http://[::1]/d/m", ("http/[::1]/d", "m")),
        ("https://h/a%20b/%C3%BC?token=x", ("https/h/a b", "ü")),
        ("/srv/models/100%.gguf", ("file/srv/models", "100%.gguf")),
        ("/m", ("file", "m")),
    ],
)
def test_where_a_ref_appears(text: str, tree: tuple[str, str]) -> None:
    assert tree_of(parse_ref(text)) == tree


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a ref"),
        ("m.gguf", "absolute path"),
        ("./m.gguf", "absolute path"),
        ("://h/m", "not a ref"),
        ("https:/h/m", "not a ref"),
        ("htps://h/m", r"did you mean https://\?"),
        ("fil:///m", r"did you mean file://\?"),
        ("gopher://h/m", "known ones are file://, hf://, http://, https://, oci://, ollama://"),
        ("https://h/m\n", "control"),
        ("https://h/\0", "control"),
        ("https://h/\x85", "control"),
        ("https://h/" + "x" * MAX_REF_CHARS, "4096 are allowed"),
        ("https://h/m?" + "ü" * 1000, "once it is escaped"),
        ("https://h", "names no file"),
        ("https://h/", "names no file"),
        ("https://h/d/", "names no file"),
        ("https://h?x=m", "names no file"),
        ("https://h/../m", r"component '\.\.'"),
        ("https://h/a/%2E%2e/m", r"component '\.\.'"),
        ("https://h/./m", r"component '\.'"),
        ("https://h/..", r"component '\.\.'"),
        ("https://../m", r"component '\.\.'"),
        ("https://h//m", "component ''"),
        ("https://h/a%2Fb", "escaped slash"),
        ("https://h/a%00b", "control character"),
        ("https://h/%ff", "not UTF-8"),
        ("https://h/\ud800", "not valid UTF-8"),
        ("https://h/%zz", "%25"),
        ("https://h/m%", "%25"),
        ("https://h/m%4", "%25"),
        ("https://h/m?%4", "%25"),
        ("https://h/" + "x" * 256, "255 bytes"),
        ("https:///m", "names no host"),
        ("https://:80/m", "names no host"),
        ("https://a b/m", "names no host"),
        ("https://h:1:2/m", "names no host"),
        ("https://h:x/m", "names no host"),
        ("https://h:123456/m", "names no host"),
        ("https://a%41/m", "names no host"),
        ("https://a\\b/m", "names no host"),
        ("https://[::1]x/m", "names no host"),
        ("https://bücher/m", "xn--"),
        ("https://h:١/m", "xn--"),
        ("https://[::1/m", "names no host"),
        ("https://[v1.x]/m", "names no host"),
        ("https://[1:2]/m", "IPv6"),
        ("https://[fe80::1%25eth0]/m", "names no host"),
        ("https://h:0/m", "1 to 65535"),
        ("https://h:65536/m", "1 to 65535"),
        ("https://user:hunter2@h/m", "config"),
        ("https://user@h/m", "config"),
        ("https://h/m#frag", "sha256"),
        ("https://h/m#sha256=" + HEX[1:], "sha256"),
        ("https://h/m#sha256=" + HEX + "0", "sha256"),
        ("https://h/m#md5=" + HEX, "sha256"),
        ("file://server/m", "names the host 'server'"),
        ("file:///m?x", "%3F"),
        ("file:///d/", "names no file"),
        ("file://", "names no file"),
        ("file:///../m", r"component '\.\.'"),
        ("/srv/../m", r"component '\.\.'"),
        ("/", "names no file"),
        ("/srv/\udc80", "not valid UTF-8"),
    ],
)
def test_what_is_refused_and_why(text: str, why: str) -> None:
    with pytest.raises(RefError, match=why) as caught:
        parse_ref(text)
    message = str(caught.value)
    assert len(message) < 500
    assert not re.search(r"[\x00-\x1f]", message)


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@h/m",
        "https://h/m?token=hunter2#x",
        "https://user:hunter2@h:99999/m",
        "https://user:hunter2@[::1/m",
        "https://user:hunter2@\u2100/m",  # urlsplit's own message repeats such a host
        "https://h/%zz?token=hunter2",
        "htps://user:hunter2@h/m?token=hunter2",
        "user:hunter2@h/m?token=hunter2",
        "https://h/\n?token=hunter2",
        "https://user:hunter2@h/m?token=" + "hunter2" * 1000,
    ],
)
def test_no_error_repeats_a_secret(text: str) -> None:
    with pytest.raises(RefError) as caught:
        parse_ref(text)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_other_schemes_are_left_to_their_source() -> None:
    schemes = ("https", "swift", "ollama")
    ref = parse_ref("SWIFT://Qwen/Qwen3-8B-GGUF@main/a b", schemes)
    text = "swift://Qwen/Qwen3-8B-GGUF@main/a b"
    assert ref == Ref("swift", text, text, None)
    assert parse_ref(str(ref), schemes) == ref
    with pytest.raises(RefError, match="nothing after swift://"):
        parse_ref("swift://", schemes)
    with pytest.raises(RefError, match="did you mean ollama"):
        parse_ref("olama://aya", schemes)
    with pytest.raises(RefError, match="unknown"):
        parse_ref("http://h/m", ("swift",))
    with pytest.raises(RefError, match="unknown"):
        parse_ref("/srv/m", ("swift",))


def test_a_tree_of_another_scheme_that_names_no_file() -> None:
    with pytest.raises(RefError, match="names no file"):
        tree_of(parse_ref("swift://Qwen[", ("swift",)))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://h/m", "neither http nor https"),
        ("//h/m", "neither http nor https"),
        ("http\u017f://h/m", "neither http nor https"),  # a long s, which is an s to a case-blind match
        ("https://h/m#x", "fragment"),
        ("https://h/m\t", "control"),
        ("https://h/" + "x" * MAX_REF_CHARS, "too long"),
    ],
)
def test_urls_that_are_no_refs_are_checked_too(url: str, why: str) -> None:
    with pytest.raises(RefError, match=why):
        canonical_url(url)


def test_a_url_without_a_path_gets_one() -> None:
    assert canonical_url("https://h?x") == "https://h/?x"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h:1/d/m?sig=x#y", "https://h:1/d/m"),
        ("https://h?sig=x", "https://h"),
        ("https://h/m#sha256=ab", "https://h/m"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("https://u:p/@h/m", "https://u:p/@h/m"),
        ("u:p@h/m?sig", "h/m"),
        ("", ""),
    ],
)
def test_without_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


segments = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="/"), min_size=1, max_size=20
).filter(lambda name: name not in (".", ".."))


@given(st.lists(segments, min_size=1, max_size=5))
def test_any_absolute_path_comes_back_as_its_tree(names: list[str]) -> None:
    ref = parse_ref("/" + "/".join(names))
    assert parse_ref(str(ref)) == ref
    tree, name = tree_of(ref)
    assert [*tree.split("/"), name] == ["file", *names]
    assert unquote(ref.url.removeprefix("file://")) == "/" + "/".join(names)


@given(
    st.sampled_from(["https://", "HTTP://", "file://", "/", ""]),
    st.text(st.characters() | st.sampled_from(string.punctuation + "%2eFf"), max_size=60),
)
def test_whatever_is_accepted_is_canonical_and_stays_in_the_tree(start: str, rest: str) -> None:
    try:
        ref = parse_ref(start + rest)
    except RefError:
        return
    assert parse_ref(str(ref)) == ref
    assert str(ref).isascii()
    tree, name = tree_of(ref)
    assert check_path(f"{tree}/{name}").startswith(f"{ref.scheme}/")
