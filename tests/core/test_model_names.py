"""Names in registries: what is taken prints back to itself and has a safe place; hostile text is a RefError."""

from __future__ import annotations

import re
import string
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.hub import HubName, parse_hub
from weightfs.core.manifest import check_path
from weightfs.core.oci import OciName, parse_oci
from weightfs.core.ollama import OllamaName, parse_ollama
from weightfs.core.ref import parse_ref
from weightfs.errors import RefError

DIGEST = "sha256:" + "ab" * 32
WORD = string.ascii_letters + string.digits + "_"
PARSERS: dict[str, Callable[[str], OllamaName | HubName | OciName]] = {
    "ollama": parse_ollama,
    "hf": parse_hub,
    "oci": parse_oci,
}


@pytest.mark.parametrize(
    ("text", "name", "canonical", "tree"),
    [
        (
            "aya",
            OllamaName("registry.ollama.ai", "library", "aya", "latest"),
            "aya:latest",
            "library/aya/latest",
        ),
        ("aya:8b", OllamaName("registry.ollama.ai", "library", "aya", "8b"), "aya:8b", "library/aya/8b"),
        ("me/aya", OllamaName("registry.ollama.ai", "me", "aya", "latest"), "me/aya:latest", "me/aya/latest"),
        (
            "registry.ollama.ai/library/aya:8b",
            OllamaName("registry.ollama.ai", "library", "aya", "8b"),
            "aya:8b",
            None,
        ),
        (
            "HF.co/Qwen/Qwen3:Q4_K_M",
            OllamaName("hf.co", "Qwen", "Qwen3", "Q4_K_M"),
            "hf.co/Qwen/Qwen3:Q4_K_M",
            None,
        ),
        (
            "localhost:5000/a/b",
            OllamaName("localhost:5000", "a", "b", "latest"),
            None,
            "localhost:5000/a/b/latest",
        ),
    ],
)
def test_ollama(text: str, name: OllamaName, canonical: str | None, tree: str | None) -> None:
    assert parse_ollama(text) == name
    assert str(parse_ref(f"ollama://{text}")) == f"ollama://{name}"
    assert str(name) == (canonical or str(name))
    assert name.tree == f"ollama/{tree}" if tree else name.tree.startswith("ollama/")
    assert name.path == f"{name.host}/{name.namespace}/{name.model}/{name.tag}"


@pytest.mark.parametrize(
    ("text", "name", "canonical", "tree"),
    [
        ("org/name", HubName("models", "org/name", "main"), "org/name@main", "org/name/main"),
        ("models/org/name", HubName("models", "org/name", "main"), "org/name@main", "org/name/main"),
        ("org/name@v1/", HubName("models", "org/name", "v1"), "org/name@v1", "org/name/v1"),
        (
            "datasets/o/n@refs%2fpr%2F1/d/*.parquet",
            HubName("datasets", "o/n", "refs/pr/1", "d/*.parquet"),
            "datasets/o/n@refs%2Fpr%2F1/d/*.parquet",
            "datasets/o/n/refs%2Fpr%2F1",
        ),
        (
            "spaces/o/n/a b?.py",
            HubName("spaces", "o/n", "main", "a b?.py"),
            "spaces/o/n@main/a b?.py",
            "spaces/o/n/main",
        ),
        ("o/n/dir@x/y", HubName("models", "o/n", "main", "dir@x/y"), "o/n@main/dir@x/y", "o/n/main"),
    ],
)
def test_hub(text: str, name: HubName, canonical: str, tree: str) -> None:
    assert parse_hub(text) == name
    assert str(name) == canonical
    assert str(parse_ref(f"hf://{text}")) == f"hf://{canonical}"
    assert name.tree == f"hf/{tree}"


@pytest.mark.parametrize(
    ("text", "name", "tree"),
    [
        ("docker.io/ai/smollm2", OciName("docker.io", "ai/smollm2", "latest"), "docker.io/ai/smollm2/latest"),
        (
            "index.docker.io/ai/smollm2:v1",
            OciName("docker.io", "ai/smollm2", "v1"),
            "docker.io/ai/smollm2/v1",
        ),
        ("registry-1.docker.io/busybox", OciName("docker.io", "library/busybox", "latest"), None),
        ("localhost/a", OciName("localhost", "a", "latest"), "localhost/a/latest"),
        ("[::1]:5000/a/b:T", OciName("[::1]:5000", "a/b", "T"), "[::1]:5000/a/b/T"),
        (f"GHCR.io/o/n@{DIGEST}", OciName("ghcr.io", "o/n", DIGEST), f"ghcr.io/o/n/sha256-{'ab' * 32}"),
    ],
)
def test_oci(text: str, name: OciName, tree: str | None) -> None:
    assert parse_oci(text) == name
    assert parse_oci(str(name)) == name
    assert parse_ref(f"oci://{text}").text == f"oci://{name}"
    assert name.tree == (f"oci/{tree}" if tree else name.tree)
    assert name.by_digest == (name.reference == DIGEST)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ollama://", "model"),
        ("ollama://a/b/c/d", "no name"),
        ("ollama://aya:", "no name"),
        ("ollama:///aya", "namespace"),
        ("ollama://h o/a/b", "character"),
        ("ollama://-h/a/b", "host"),
        ("ollama://h:0/a/b", "host"),
        ("ollama://h:65536/a/b", "host"),
        ("ollama://a/../b", "namespace"),
        ("ollama://a/.b", "model"),
        ("ollama://a:b:c", "tag"),
        ("ollama://a:" + "t" * 81, "tag"),
        ("ollama://aya#sha256=" + "ab" * 32, "character"),
        ("ollama://" + "h" * 253 + ":65535/a/b", "255 bytes"),
        ("hf://", "no name"),
        ("hf://gpt2", "no name"),
        ("hf://datasets/name", "part of a repository"),
        ("hf://datasets/models/name", "part of a repository"),
        ("hf://org/name:Q4_K_M", "glob"),
        ("hf://org/na--me", "part of a repository"),
        ("hf://org/.name", "part of a repository"),
        ("hf://org/name-", "part of a repository"),
        ("hf://org/" + "n" * 97, "part of a repository"),
        ("hf://../name", "part of a repository"),
        ("hf://org/name@", "%2F"),
        ("hf://org/name@a..b", "%2F"),
        ("hf://org/name@-x", "%2F"),
        ("hf://org/name@a%2F", "%2F"),
        ("hf://org/name@a%20b", "%2F"),
        ("hf://org/name@a.lock", "%2F"),
        ("hf://org/name@a%2F%2Fb", "%2F"),
        ("hf://org/name@a%2F.b", "%2F"),
        ("hf://org/name@\ud800", "UTF-8"),
        ("hf://org/name@" + "ü" * 200, "255 bytes"),
        ("hf://org/name@" + "%2F".join("a" * 100), "255 bytes"),
        ("hf://org/name/../x", "cannot be in a repository"),
        ("hf://org/name//x", "cannot be in a repository"),
        ("hf://org/name/" + "x" * 300, "255 bytes"),
        ("hf://org/name/x#y", "character"),
        ("oci://", "which registry"),
        ("oci://ai/smollm2", "which registry"),
        ("oci://host.test", "which registry"),
        ("oci://h_o.st/a", "host of a registry"),
        ("oci://h.st:99999/a", "host of a registry"),
        ("oci://[1:2]/a", "host of a registry"),
        ("oci://[:::::]:80/a", "host of a registry"),
        ("oci://host.test/A", "repository"),
        ("oci://host.test/a//b", "repository"),
        ("oci://host.test/a/../b", "repository"),
        ("oci://host.test/", "repository"),
        ("oci://host.test/a:", "tag"),
        ("oci://host.test/a:-", "tag"),
        (f"oci://host.test/a:t@{DIGEST}", "keep one"),
        ("oci://host.test/a@sha512:00", "digest"),
        ("oci://host.test/a@" + DIGEST.upper(), "digest"),
        ("oci://" + "a" * 126 + "." + "b" * 126 + ":65535/a", "255 bytes"),
        ("oci://host.test/a b", "character"),
    ],
)
def test_refused(text: str, why: str) -> None:
    with pytest.raises(RefError, match=re.escape(why)):
        parse_ref(text)


signs = st.sampled_from(
    ["/", ":", "@", "%2F", "%2f", "..", ".", "-", "--", "#", "?", "*", "[", " ", "\0", "\ud800"]
)
words = st.sampled_from(
    ["main", "sha256:", "datasets", "models", "docker.io", "localhost:5000", "[::1]", "a.lock"]
)
pieces = signs | words | st.sampled_from(["ab" * 32, "x" * 90])
hostile = st.lists(pieces | st.text(max_size=6), max_size=12).map("".join)
part = st.text(WORD, min_size=1, max_size=12)
lower = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=12)
hosts = st.sampled_from(["hf.co", "localhost:5000", "registry.ollama.ai", "10.0.0.1:80"])
ollama_names = st.builds(OllamaName, hosts, part, part, part)
hub_names = st.builds(
    HubName,
    st.sampled_from(["models", "datasets", "spaces"]),
    st.tuples(part.filter(lambda word: word not in ("models", "datasets", "spaces")), part).map("/".join),
    st.lists(part, min_size=1, max_size=3).map("/".join),
    st.lists(st.text(WORD + " *?[]@-é", min_size=1, max_size=8), max_size=3).map("/".join),
)
oci_names = st.builds(
    OciName,
    st.sampled_from(["ghcr.io", "docker.io", "localhost", "[::1]:5000"]),
    st.lists(lower, min_size=2, max_size=3).map("/".join),
    part | st.just(DIGEST),
)


@given(st.one_of(ollama_names, hub_names, oci_names))
def test_names_print_and_read_back(name: OllamaName | HubName | OciName) -> None:
    scheme = {OllamaName: "ollama", HubName: "hf", OciName: "oci"}[type(name)]
    assert PARSERS[scheme](str(name)) == name
    ref = parse_ref(f"{scheme}://{name}")
    assert (ref.text, ref.url, ref.scheme, ref.sha256) == (f"{scheme}://{name}", ref.text, scheme, None)
    check_path(name.tree)


@given(st.sampled_from(sorted(PARSERS)), hostile)
def test_any_text_is_a_ref_that_is_itself_or_a_ref_error(scheme: str, text: str) -> None:
    try:
        ref = parse_ref(f"{scheme}://{text}")
    except RefError:
        return
    assert parse_ref(ref.text) == ref
    name = PARSERS[scheme](ref.text.partition("://")[2])
    assert ref.text == f"{scheme}://{name}"
    assert check_path(name.tree).startswith(f"{scheme}/")


@given(st.sampled_from(sorted(PARSERS)), hostile)
def test_parsers_raise_nothing_else(scheme: str, text: str) -> None:
    try:
        name = PARSERS[scheme](text)
    except RefError:
        return
    assert PARSERS[scheme](str(name)) == name


@given(hub_names, hub_names)
def test_no_two_revisions_share_a_directory(one: HubName, other: HubName) -> None:
    """Two refs of one revision do share it, and two revisions never are within one another."""
    same = (one.kind, one.repo, one.revision) == (other.kind, other.repo, other.revision)
    assert (one.tree == other.tree) == same
    assert not one.tree.startswith(f"{other.tree}/")


@pytest.mark.parametrize(
    ("path", "file", "selected"),
    [
        ("", "any/thing", True),
        ("a", "a", True),
        ("a", "a/b", True),
        ("a", "ab", False),
        ("*.gguf", "sub/m.gguf", True),  # as the Hub's client has it
        ("*.GGUF", "m.gguf", False),
        ("m[12]", "m1", True),
        ("m[12]", "m[12]", True),
        ("m?", "m", False),
    ],
)
def test_what_a_hub_path_selects(path: str, file: str, selected: bool) -> None:
    assert HubName("models", "o/n", "main", path).selects(file) is selected
