"""File lists of the Hub: what is read is what was said, or a ValueError; canonical bytes read back as they were."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core import hubtree
from weightfs.core.geometry import MAX_BLOB_SIZE
from weightfs.core.hubtree import HubFile, HubTree, TreeReader, git_oid, is_commit, load_json, read_raw
from weightfs.core.manifest import BlobId, check_path

SHA = "0123456789abcdef0123456789abcdef01234567"
OID, SHA256, XET = "ab" * 20, "cd" * 32, "ef" * 32
PLAIN = {"type": "file", "path": "config.json", "size": 5, "oid": OID}
IN_LFS = {
    "type": "file",
    "path": "model.gguf",
    "size": 7,
    "oid": OID,
    "lfs": {"oid": SHA256, "size": 7, "pointerSize": 134},
    "xetHash": XET,
}

names = st.text(st.characters(codec="utf-8", exclude_characters="/", exclude_categories=["Cc"]), max_size=8)
paths = st.lists(names.filter(lambda name: name not in ("", ".", "..")), min_size=1, max_size=4).map("/".join)
oids, digests = (st.text("0123456789abcdef", min_size=n, max_size=n) for n in (40, 64))
sizes = st.integers(0, MAX_BLOB_SIZE)
files = st.builds(HubFile, paths, sizes, oids, xet_hash=st.just("") | digests) | st.builds(
    HubFile, paths, sizes, oids, digests, sizes, st.just("") | digests
)


@st.composite
def trees(draw: st.DrawFn) -> HubTree:
    kept: dict[str, HubFile] = {}
    size_of: dict[str, int] = {}
    for file in draw(st.lists(files, max_size=12)):
        if size_of.setdefault(file.etag, file.content_size) != file.content_size:
            continue
        below = any(
            a.startswith(f"{b}/") for other in kept for a, b in ((other, file.path), (file.path, other))
        )
        if not below and file.path not in kept:
            kept[file.path] = file
    return HubTree(draw(oids), tuple(kept[path] for path in sorted(kept)))


def shown(file: HubFile) -> dict[str, Any]:
    """As the API says it."""
    entry: dict[str, Any] = {"type": "file", "path": file.path, "size": file.size, "oid": file.blob_id}
    if file.lfs_sha256:
        entry["lfs"] = {"oid": file.lfs_sha256, "size": file.lfs_size, "pointerSize": 134}
    if file.xet_hash:
        entry["xetHash"] = file.xet_hash
    return entry


def read(*pages: object, sha: str = SHA) -> HubTree:
    reader = TreeReader(sha)
    for page in pages:
        reader.add(page if isinstance(page, bytes) else json.dumps(page).encode())
    return reader.tree()


@given(trees(), st.randoms(use_true_random=False), st.integers(1, 5))
def test_pages_in_any_order_and_number_make_the_tree(tree: HubTree, random: Any, length: int) -> None:
    entries = [shown(file) for file in tree.files]
    random.shuffle(entries)
    pages = [entries[at : at + length] for at in range(0, len(entries), length)]
    assert read(*pages, sha=tree.sha) == tree


@given(trees())
def test_raw_reads_back_and_is_canonical(tree: HubTree) -> None:
    assert read_raw(tree.raw) == tree
    assert read_raw(tree.raw).raw == tree.raw
    document = json.loads(tree.raw)
    assert json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() == tree.raw
    assert list(document["files"]) == sorted(document["files"])


def test_the_exact_bytes() -> None:
    tree = read([IN_LFS, PLAIN, {"type": "directory", "path": "x", "oid": OID, "size": 0}])
    assert tree.raw.decode() == (
        f'{{"sha":"{SHA}","files":{{"config.json":{{"size":5,"blob_id":"{OID}"}},'
        f'"model.gguf":{{"size":7,"blob_id":"{OID}","lfs_sha256":"{SHA256}","lfs_size":7,"xet_hash":"{XET}"}}}}}}'
    )
    config, model = tree.files
    assert (config.etag, config.content_size) == (OID, 5)
    assert (model.etag, model.content_size) == (SHA256, 7)


def test_what_is_no_file_is_left_out() -> None:
    extra = {"lastCommit": {"id": OID}, "securityFileStatus": None}
    others: list[object] = [{"type": "directory", "path": "../x"}, {"type": "submodule"}, {}]
    assert read([{**PLAIN, **extra}, *others]).files == (HubFile("config.json", 5, OID),)
    assert read([{**PLAIN, "lfs": None, "xetHash": None}]).files == (HubFile("config.json", 5, OID),)
    assert read().files == ()


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({**PLAIN, "path": 7}, "path is missing, or no text"),
        ({**PLAIN, "path": "../x"}, "'../x' cannot be a file: the path has the component '..'"),
        ({**PLAIN, "path": "/etc/passwd"}, "''"),
        ({**PLAIN, "path": "a\0b"}, "control"),
        ({**PLAIN, "path": "\ud800"}, "UTF-8"),
        ({**PLAIN, "path": "x" * 5000}, "1024"),
        ({**PLAIN, "path": ""}, "empty|in order"),
        ({**PLAIN, "size": -1}, "size is not a number"),
        ({**PLAIN, "size": True}, "size is not a number"),
        ({**PLAIN, "size": 5.0}, "size is not a number"),
        ({**PLAIN, "size": "5"}, "size is not a number"),
        ({**PLAIN, "size": MAX_BLOB_SIZE + 1}, "size is not a number"),
        ({**PLAIN, "size": None}, "size is not a number"),
        ({**PLAIN, "oid": OID.upper()}, "oid is not lower-case hex"),
        ({**PLAIN, "oid": SHA256}, "oid is not lower-case hex"),
        ({**PLAIN, "oid": OID + "\n"}, "oid is not lower-case hex"),
        ({**PLAIN, "oid": None}, "oid is not lower-case hex"),
        ({**PLAIN, "xetHash": "sha256:" + XET}, "xetHash is not"),
        ({**IN_LFS, "lfs": []}, "something else where an object"),
        ({**IN_LFS, "lfs": {"size": 7}}, "oid is not lower-case hex"),
        ({**IN_LFS, "lfs": {"oid": OID, "size": 7}}, "oid is not lower-case hex"),
        ({**IN_LFS, "lfs": {"oid": SHA256, "size": -7}}, "size is not a number"),
        (7, "something else where an object"),
    ],
)
def test_entries_that_are_wrong(entry: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read([entry])


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (b"", "not JSON"),
        (b'[{"type": "file", "pa', "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 10_000, "not JSON"),
        ({}, "not an array"),
        (None, "not an array"),
    ],
)
def test_pages_that_are_none(page: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read(page)


def test_contradictions() -> None:
    with pytest.raises(ValueError, match=r"'config.json' is there twice"):
        read([PLAIN], [PLAIN])
    with pytest.raises(ValueError, match="'a' is a file and a directory"):
        read([{**PLAIN, "path": "a/b/c"}, {**PLAIN, "path": "a"}, {**PLAIN, "path": "a.b"}])
    with pytest.raises(ValueError, match="two sizes"):
        read([PLAIN, {**PLAIN, "path": "other", "size": 6}])
    two = [IN_LFS, {**IN_LFS, "path": "other", "lfs": {"oid": SHA256, "size": 8}}]
    with pytest.raises(ValueError, match="two sizes"):
        read(two)
    with pytest.raises(ValueError, match="not the name of a commit"):
        read([PLAIN], sha="main")
    tree = read([PLAIN, IN_LFS])
    with pytest.raises(ValueError, match="in order"):
        replace(tree, files=tree.files[::-1])


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{**PLAIN, "path": f"{number}"} for number in range(4)]
    monkeypatch.setattr(hubtree, "MAX_ENTRIES", 3)
    with pytest.raises(ValueError, match="more than 3 files and directories"):
        read(many[:2], [{}, {}])
    with pytest.raises(ValueError, match="more than 3 files"):
        HubTree(SHA, tuple(HubFile(f"{number}", 1, OID) for number in range(4)))
    monkeypatch.setattr(hubtree, "MAX_PAGE_VALUES", 10)
    assert read([PLAIN]).files
    with pytest.raises(ValueError, match="more than 10 values"):
        read([*many, *many])
    monkeypatch.setattr(hubtree, "MAX_PAGES", 2)
    with pytest.raises(ValueError, match="more than 2 pages"):
        read([], [], [])
    monkeypatch.setattr(hubtree, "MAX_PAGE_BYTES", 10)
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read(b"[" + b" " * 10 + b"]")
    monkeypatch.setattr(hubtree, "MAX_TREE_BYTES", 10)
    with pytest.raises(ValueError, match="or 10 bytes"):
        read(b"[      ]", b"[ ]")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'{"sha":"main","files":{}}',
        b'{"files":{}}',
        f'{{"sha":"{SHA}"}}'.encode(),
        f'{{"sha":"{SHA}","files":[]}}'.encode(),
        f'{{"sha":"{SHA}","files":{{"a":7}}}}'.encode(),
        f'{{"sha":"{SHA}","files":{{"a":{{"size":1}}}}}}'.encode(),
        f'{{"sha":"{SHA}","files":{{"../a":{{"size":1,"blob_id":"{OID}"}}}}}}'.encode(),
        f'{{"sha":"{SHA}","files":{{"b":{{"size":1,"blob_id":"{OID}"}},"a":{{"size":1,"blob_id":"{OID}"}}}}}}'.encode(),
        f'{{"sha":"{SHA}","files":{{"a":{{"size":1,"blob_id":"{OID}","lfs_sha256":"{SHA256}"}}}}}}'.encode(),
    ],
)
def test_raw_that_is_damaged(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_raw(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {"type": st.just("file")},
    optional={
        "path": st.sampled_from(["a", "a/b", "b", "../x", "a//b"]) | json_values,
        "size": st.integers(-1, 3) | json_values,
        "oid": st.sampled_from([OID, OID.upper()]) | json_values,
        "lfs": st.fixed_dictionaries({"oid": st.just(SHA256), "size": st.integers(0, 1)}) | json_values,
        "xetHash": st.just(XET) | json_values,
    },
)


@given(st.lists(st.lists(entries, max_size=3) | json_values, max_size=3))
def test_any_pages_make_a_sound_tree_or_a_value_error(pages: list[object]) -> None:
    try:
        tree = read(*pages)
    except ValueError:
        return
    for file in tree.files:
        check_path(file.path)
        assert 0 <= file.content_size <= MAX_BLOB_SIZE
        assert len(bytes.fromhex(file.etag)) in (20, 32)
    assert read_raw(tree.raw) == tree


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for reads in (load_json, read_raw):
        with contextlib.suppress(ValueError):
            reads(data)


def test_names_of_git() -> None:
    assert git_oid(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git hash-object /dev/null
    assert (
        git_oid(b"what is up, doc?") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    )  # Pro Git, "Git Objects"
    of = BlobId.of_git(bytes(20), 1)
    assert (
        len({of, BlobId.of_git(bytes(20), 2), BlobId.of_git(b"x" * 20, 1), BlobId.of_digest(bytes(32))}) == 4
    )
    assert is_commit(SHA)
    assert not any(is_commit(text) for text in ("main", SHA.upper(), SHA[:-1], f"{SHA}\n", 7, None))
