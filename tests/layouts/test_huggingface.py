from __future__ import annotations

import json
from dataclasses import replace

import pytest

from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import Entry
from weightfs.layouts.base import Dir, File, Inline, Item, Layout, Link
from weightfs.layouts.huggingface import CACHEDIR_TAG, OPTIONAL_FILES, HuggingFaceLayout
from weightfs.testing.layouts import (
    LayoutTests,
    git_blob,
    hub_manifest,
    made_up_blob,
    ollama_manifest,
    tree_of,
)

ONE, TWO = "1" * 40, "2" * 40
CONFIG, WEIGHTS = git_blob("c"), made_up_blob("w")
FILES = {"config.json": CONFIG, "sub/deep/model.safetensors": WEIGHTS}
HUB = "huggingface/hub"
REPO = f"{HUB}/models--org--name"


class TestHuggingFaceLayout(LayoutTests):
    scheme = "hf"

    def layout(self) -> Layout:
        return HuggingFaceLayout()


def etag(name: str) -> str:
    return git_blob(name).digest.split(":")[1] if name == "c" else made_up_blob(name).digest.split(":")[1]


def without_absent(tree: dict[str, Item]) -> dict[str, Item]:
    return {path: item for path, item in tree.items() if "/.no_exist/" not in path}


def test_the_golden_tree() -> None:
    manifest = hub_manifest("org/name", ONE, FILES)
    tree = tree_of(HuggingFaceLayout(), ollama_manifest("aya", {"config.json": WEIGHTS}), manifest)
    listed = json.dumps(
        {"format_version": 1, "files": json.loads(manifest.raw)["files"]}, separators=(",", ":")
    )
    assert without_absent(tree) == {
        HUB: Dir(),
        f"{HUB}/CACHEDIR.TAG": Inline(CACHEDIR_TAG),
        f"{REPO}/refs/main": Inline(ONE.encode()),
        f"{REPO}/blobs/{etag('c')}": File(CONFIG),
        f"{REPO}/blobs/{etag('w')}": File(WEIGHTS),
        f"{REPO}/snapshots/{ONE}/config.json": Link(f"../../blobs/{etag('c')}"),
        f"{REPO}/snapshots/{ONE}/sub/deep/model.safetensors": Link(f"../../../../blobs/{etag('w')}"),
        f"{REPO}/trees/{ONE}.json": Inline(listed.encode()),
    }
    absent = {path.split(f"/.no_exist/{ONE}/")[1] for path in tree if "/.no_exist/" in path}
    assert absent == set(OPTIONAL_FILES) - {"config.json"}
    assert all(tree[f"{REPO}/.no_exist/{ONE}/{path}"] == Inline(b"") for path in absent)


def test_without_models_the_hub_is_there() -> None:
    assert tree_of(HuggingFaceLayout()) == {HUB: Dir(), f"{HUB}/CACHEDIR.TAG": Inline(CACHEDIR_TAG)}


@pytest.mark.parametrize(
    ("name", "place", "ref"),
    [
        ("datasets/org/name@v1.0", "datasets--org--name", "v1.0"),
        ("spaces/org/name", "spaces--org--name", "main"),
        ("org/name@refs%2Fpr%2F1", "models--org--name", "refs/pr/1"),
        (f"org/name@{ONE}", "models--org--name", None),
    ],
)
def test_kinds_and_revisions(name: str, place: str, ref: str | None) -> None:
    tree = tree_of(HuggingFaceLayout(), hub_manifest(name, ONE, FILES))
    refs = {path: item for path, item in tree.items() if "/refs/" in path}
    assert refs == ({} if ref is None else {f"{HUB}/{place}/refs/{ref}": Inline(ONE.encode())})
    assert f"{HUB}/{place}/snapshots/{ONE}/config.json" in tree


def test_refs_of_one_repository_make_one_tree() -> None:
    """Two commits, one of them under two names and in two selections."""
    tree = tree_of(
        HuggingFaceLayout(),
        hub_manifest("org/name/*.safetensors", ONE, FILES),
        hub_manifest("org/name/config.json", ONE, FILES),
        hub_manifest("org/name@v1/config.json", ONE, FILES),
        hub_manifest("org/name@dev", TWO, {"config.json": CONFIG}),
    )
    assert [path for path in tree if "/refs/" in path] == [
        f"{REPO}/refs/{ref}" for ref in ("dev", "main", "v1")
    ]
    assert [path for path in tree if "/snapshots/" in path] == [
        f"{REPO}/snapshots/{ONE}/config.json",
        f"{REPO}/snapshots/{ONE}/sub/deep/model.safetensors",
        f"{REPO}/snapshots/{TWO}/config.json",
    ]
    assert len([path for path in tree if "/blobs/" in path]) == 2


def test_a_selection_shows_only_what_it_selects_and_lists_everything() -> None:
    """The list is how the client knows that the snapshot is partial; what is only not selected is not absent."""
    tree = tree_of(HuggingFaceLayout(), hub_manifest("org/name/*.safetensors", ONE, FILES))
    assert f"{REPO}/snapshots/{ONE}/config.json" not in tree
    assert f"{REPO}/blobs/{etag('c')}" not in tree
    assert f"{REPO}/.no_exist/{ONE}/config.json" not in tree
    listed = tree[f"{REPO}/trees/{ONE}.json"]
    assert isinstance(listed, Inline)
    assert set(json.loads(listed.data)["files"]) == set(FILES)


@pytest.mark.parametrize("whole_first", [True, False])
def test_where_two_refs_saw_a_branch_at_two_commits_the_whole_one_decides(whole_first: bool) -> None:
    pair = [hub_manifest("org/name", TWO, FILES), hub_manifest("org/name/*.safetensors", ONE, FILES)]
    tree = tree_of(HuggingFaceLayout(), *(pair if whole_first else reversed(pair)))
    assert tree[f"{REPO}/refs/main"] == Inline(TWO.encode())


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"sha":"1","files":{}}'])
def test_without_a_list_nothing_is_said_about_other_files(raw: bytes) -> None:
    bare = replace(hub_manifest("org/name", ONE, FILES), raw=raw)
    tree = tree_of(HuggingFaceLayout(), bare)
    assert f"{REPO}/snapshots/{ONE}/config.json" in tree
    assert not [path for path in tree if "/trees/" in path or "/.no_exist/" in path]


def test_what_has_no_commit_or_is_part_of_a_blob_is_not_in_a_snapshot() -> None:
    manifest = hub_manifest("org/name", ONE, FILES)
    assert tree_of(HuggingFaceLayout(), replace(manifest, raw=b"", revision="main")) == tree_of(
        HuggingFaceLayout()
    )
    part = replace(manifest, entries=(Entry("a", WEIGHTS, ByteSpan(1, 2)), *manifest.entries))
    assert tree_of(HuggingFaceLayout(), part) == tree_of(HuggingFaceLayout(), manifest)
