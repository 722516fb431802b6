from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.browse import Between, target_of
from weightfs.core.hub import HubName
from weightfs.core.oci import OciName
from weightfs.core.ollama import OllamaName
from weightfs.core.ref import Ref, parse_ref

SHA = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("path", "ref"),
    [
        ("hf/Qwen/Qwen3-8B-GGUF/main", "hf://Qwen/Qwen3-8B-GGUF@main"),
        ("hf/org/name/refs%2Fpr%2F1", "hf://org/name@refs%2Fpr%2F1"),
        ("hf/datasets/org/name/v1.0", "hf://datasets/org/name@v1.0"),
        ("hf/spaces/org/name/main", "hf://spaces/org/name@main"),
        ("ollama/library/aya/8b", "ollama://aya:8b"),
        ("ollama/user/model/latest", "ollama://user/model:latest"),
        ("ollama/hf.co/Org/Name-GGUF/Q4_K_M", "ollama://hf.co/Org/Name-GGUF:Q4_K_M"),
        ("ollama/localhost:5000/library/aya/8b", "ollama://localhost:5000/library/aya:8b"),
        ("ollama/localhost/library/aya/8b", "ollama://localhost/library/aya:8b"),
        ("oci/docker.io/ai/smollm2/latest", "oci://docker.io/ai/smollm2:latest"),
        ("oci/localhost:5000/a/b/1.0", "oci://localhost:5000/a/b:1.0"),
        (f"oci/ghcr.io/a/b/sha256-{SHA}", f"oci://ghcr.io/a/b@sha256:{SHA}"),
    ],
)
def test_a_ref_is_where_its_tree_is(path: str, ref: str) -> None:
    assert target_of(path) == parse_ref(ref)
    parts = path.split("/")
    for depth in range(1, len(parts)):
        assert target_of("/".join(parts[:depth])) is Between.DIRECTORY
    assert target_of(f"{path}/config.json") is None


@pytest.mark.parametrize(
    "path",
    [
        "https/host/m.gguf",  # a file has no directory that could be asked for
        "file",
        "frob/a/b/c",
        "hf/.git",
        "hf/org/.hidden/main",
        "hf/org/name/.git",
        "hf/models/org/name/main",  # models have no prefix
        "hf/-org",
        "hf/or g",
        "hf/org/a--b",
        "hf/org/na@me",
        "hf/org/name/ma..in",
        "hf/org/name/refs%2fpr%2f1",  # canonical is %2F
        "hf/org/name#",
        "hf/org/\udcff",
        "ollama/registry.ollama.ai/library/aya/8b",  # shown without its host
        "ollama/Host.Example/ns/model/tag",
        "ollama/library/a:b/8b",
        "ollama/x" + "y" * 300,
        "oci/nohost/a/b/c",
        "oci/index.docker.io/a/b/c",
        "oci/docker.io/Upper/b/c",
        "oci/docker.io/a/b/-tag",
        "oci/docker.io/a/b/c/d",
        "oci/docker.io/a/b/c/d/e",
        "",
    ],
)
def test_whatever_else_is_nothing(path: str) -> None:
    assert target_of(path) is None


part = st.from_regex(r"[A-Za-z0-9_]{1,8}", fullmatch=True)
kinds = st.sampled_from(["models", "datasets", "spaces"])
revisions = st.sampled_from(["main", "refs/pr/1", "v1.0"])
hosts = st.sampled_from(["registry.ollama.ai", "hf.co", "localhost:5000"])
names = st.one_of(
    st.builds(
        lambda kind, org, name, rev: HubName(kind, f"{org}/{name}", rev).tree, kinds, part, part, revisions
    ),
    st.builds(lambda host, ns, model, tag: OllamaName(host, ns, model, tag).tree, hosts, part, part, part),
    st.builds(lambda a, b, tag: OciName("docker.io", f"{a}/{b}", tag).tree, part, part, part).map(
        lambda tree: tree.lower().replace("_", "0")
    ),
).filter(lambda tree: not {"models", "datasets", "spaces", "localhost"} & set(tree.split("/")[1:-2]))


@given(names)
def test_every_tree_of_two_parts_leads_back_to_its_ref(tree: str) -> None:
    found = target_of(tree)
    assert isinstance(found, Ref)
    assert target_of(tree.rpartition("/")[0]) is Between.DIRECTORY


odd = ["hf", "ollama", "oci", "datasets", "a", "b.c", "x:1", "main", ".git", "é", "%", "@", "#?", "~"]
any_name = st.sampled_from(odd) | st.text(st.characters(exclude_characters="/"), min_size=1)


@given(st.lists(any_name, max_size=7))
def test_no_path_is_too_odd_to_be_nothing(parts: list[str]) -> None:
    found = target_of("/".join(parts))
    assert found is None or found is Between.DIRECTORY or isinstance(found, Ref)
