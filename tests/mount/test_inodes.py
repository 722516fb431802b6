from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.manifest import Blob, BlobId
from weightfs.layouts.base import Dir, File, Inline, Item, Link
from weightfs.mount.inodes import (
    ROOT,
    DirNode,
    FileNode,
    InlineNode,
    LinkNode,
    Namespace,
    SliceNode,
    number_of,
)

Entry = tuple[str, Item]


def file(name: str) -> File:
    digest = hashlib.sha256(name.encode()).digest()
    return File(Blob(BlobId.of_digest(digest), BlobShape.of(10), digest, ()))


def part(name: str, start: int, stop: int) -> File:
    return File(file(name).blob, ByteSpan(start, stop))


def said(entry: Item) -> str:
    """What `tree` says of it."""
    match entry:
        case File(blob, None):
            return str(blob.id)
        case File(blob, ByteSpan(start, stop)):
            return f"{blob.id}[{start}:{stop}]"
        case Inline(data):
            return repr(data)
        case Link(target):
            return f"-> {target}"
        case _:
            return "dir"


def tree(namespace: Namespace) -> dict[str, str]:
    """Every path by walking down from the root, with what is there."""
    found: dict[str, str] = {}

    def walk(node: DirNode, prefix: str) -> None:
        for offset, name, child in namespace.listing(node, 0):
            assert offset > 0
            if name in (".", ".."):
                continue
            assert namespace.lookup(node.ino, name) is child
            path = f"{prefix}{name}"
            match child:
                case FileNode(blob=blob):
                    found[path] = str(blob.id)
                case SliceNode(blob=blob, span=span):
                    found[path] = f"{blob.id}[{span.start}:{span.stop}]"
                case InlineNode(data=data):
                    found[path] = repr(data)
                case LinkNode(target=target):
                    found[path] = f"-> {target}"
                case DirNode():
                    found[path] = "dir"
                    assert child.parent == node.ino
                    walk(child, path + "/")

    root = namespace.node(ROOT)
    assert isinstance(root, DirNode)
    walk(root, "")
    return found


def test_slices_and_inline_files_have_inodes_of_their_own_by_their_content() -> None:
    """A span that is everything is the blob itself; what ends beyond the blob is left out."""
    namespace = Namespace.build(
        [
            ("whole", file("1")),
            ("also", part("1", 0, 10)),
            ("some", part("1", 1, 5)),
            ("same", part("1", 1, 5)),
            ("other", part("1", 1, 6)),
            ("beyond", part("1", 1, 11)),
            ("text", Inline(b"text")),
            ("twin", Inline(b"text")),
        ]
    )
    nodes = {name: namespace.lookup(ROOT, name) for name in ("whole", "also", "some", "same", "other")}
    assert nodes["whole"] is nodes["also"]
    assert nodes["some"] is nodes["same"]
    assert nodes["some"] != nodes["other"]
    assert isinstance(nodes["whole"], FileNode)
    some, text = nodes["some"], namespace.lookup(ROOT, "text")
    assert isinstance(some, SliceNode)
    assert (some.size, some.links) == (4, 2)
    assert isinstance(text, InlineNode)
    assert (text.size, text.links) == (4, 2)
    assert namespace.lookup(ROOT, "twin") is text
    assert namespace.lookup(ROOT, "beyond") is None
    assert len(namespace.conflicts) == 1
    assert namespace.node(some.ino + 1) is namespace.node(text.ino + 1) is None


def test_a_tree_with_all_there_is() -> None:
    namespace = Namespace.build(
        [("m", Dir()), ("m/a/b", file("1")), ("m/c", file("1")), ("m/d", Link("a/b")), ("e/f/g", Dir())]
    )
    one = str(file("1").blob.id)
    assert tree(namespace) == {
        "m": "dir",
        "m/a": "dir",
        "m/a/b": one,
        "m/c": one,
        "m/d": "-> a/b",
        "e": "dir",
        "e/f": "dir",
        "e/f/g": "dir",
    }
    assert not namespace.conflicts
    root = namespace.node(ROOT)
    assert isinstance(root, DirNode)
    assert (root.ino, root.parent, root.subdirectories) == (1, 1, 2)
    m = namespace.lookup(ROOT, "m")
    assert isinstance(m, DirNode)
    assert m.subdirectories == 1
    assert namespace.lookup(m.ino, "..") is root
    assert namespace.lookup(m.ino, ".") is m
    b = namespace.lookup(m.ino, "c")
    assert isinstance(b, FileNode)
    assert b.links == 2
    assert namespace.lookup(b.ino, "x") is None
    assert namespace.lookup(m.ino, "x") is None


def test_an_empty_tree_has_a_root() -> None:
    assert tree(Namespace.build([])) == {}


def test_numbers_follow_from_content_and_path_alone() -> None:
    one = Namespace.build([("a/x", file("1")), ("b", file("2"))])
    other = Namespace.build([("b", file("3")), ("z/y", file("1")), ("a/q", file("2"))])

    def ino(namespace: Namespace, *names: str) -> int:
        node = namespace.node(ROOT)
        for name in names:
            assert node is not None
            node = namespace.lookup(node.ino, name)
        assert node is not None
        return node.ino

    assert ino(one, "a", "x") == ino(other, "z", "y")
    assert ino(one, "b") == ino(other, "a", "q")
    assert ino(one, "a") == ino(other, "a")
    assert ino(one, "b") != ino(other, "b")


def crowded(key: bytes, attempt: int) -> int:
    """Nearly everything collides."""
    return number_of(key, 0) % 3 + attempt


entries = st.lists(
    st.tuples(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join),
        st.one_of(
            st.sampled_from("123456").map(file),
            st.tuples(st.sampled_from("12"), st.integers(0, 3), st.integers(3, 5)).map(lambda s: part(*s)),
            st.just(Dir()),
            st.sampled_from("xy").map(Link),
            st.binary(max_size=1).map(Inline),
        ),
    ),
    max_size=20,
)


@given(entries, st.booleans())
def test_whatever_the_layouts_say_there_is_a_tree_and_every_blob_is_in_it(
    wanted: list[Entry], collide: bool
) -> None:
    number = crowded if collide else number_of
    namespace = Namespace.build(wanted, number=number)
    found = tree(namespace)
    files = {said(entry) for _, entry in wanted if isinstance(entry, File)}
    assert files == {what for what in found.values() if len(what) >= 32}
    for path, entry in wanted:
        if isinstance(entry, Dir):
            assert found[path] == "dir"
        elif found[path] != said(entry):
            assert any(repr(path) in conflict for conflict in namespace.conflicts)


@given(entries)
def test_numbers_do_not_depend_on_the_order_of_entries_even_where_they_collide(wanted: list[Entry]) -> None:
    files = {path + "/f": entry for path, entry in wanted if isinstance(entry, File)}
    one = Namespace.build(list(files.items()), number=crowded)
    other = Namespace.build(list(reversed(files.items())), number=crowded)
    assert tree(one) == tree(other)
    for path in files:
        a = b = ROOT
        for name in path.split("/"):
            x, y = one.lookup(a, name), other.lookup(b, name)
            assert x is not None
            assert y is not None
            assert x.ino == y.ino
            a, b = x.ino, y.ino


def seldom(key: bytes, attempt: int) -> int:
    """Some collide."""
    return 4 * (number_of(key, 0) % 60 + 1 + attempt)


ITEMS = st.one_of(
    st.sampled_from("12").map(file),
    st.integers(3, 4).map(lambda stop: part("1", 0, stop)),
    st.just(Dir()),
    st.sampled_from("x").map(Link),
    st.binary(max_size=1).map(Inline),
)
# Seldom is one a part of another, so that a group is seldom in its own way.
PATHS = st.sampled_from([*(f"{a}/{b}" for a in "abc" for b in "abc"), "a", "a/a/a", "b/b/b"])


@given(
    st.lists(st.tuples(st.booleans(), st.dictionaries(PATHS, ITEMS, max_size=5)), min_size=1, max_size=4),
    st.sampled_from([number_of, seldom]),
)
def test_a_tree_joined_from_parts_is_the_tree_of_all_their_entries(
    drawn: list[tuple[bool, dict[str, Item]]], number: Callable[[bytes, int], int]
) -> None:
    groups = [
        [(f"{k}/{path}" if own else path, entry) for path, entry in some.items()]
        for k, (own, some) in enumerate(drawn)
    ]
    parts = [Namespace.build(group, number=number) for group in groups]
    joined = Namespace.join(parts, number=number)
    whole = Namespace.build([entry for group in groups for entry in group], number=number)
    if joined is None:  # parts are in one another's way, or numbers are
        event("not joined")
        return
    event(f"joined of {len(groups)}, {len(joined) - 1} nodes")
    assert not whole.conflicts
    assert joined._nodes.keys() == whole._nodes.keys()
    for ino, node in whole._nodes.items():
        other = joined._nodes[ino]
        if isinstance(other, FileNode | SliceNode):
            assert replace(other, blob=node.blob) == node  # type: ignore[union-attr]  # else that is unequal, too
        else:
            assert other == node
    assert tree(joined) == tree(whole)


@pytest.mark.parametrize("kind", [b"link", b"dir\0d"])
def test_parts_with_one_number_for_two_things_are_not_joined(kind: bytes) -> None:
    def number(key: bytes, attempt: int) -> int:
        return 8 + 2 * attempt if key.startswith(kind) else number_of(key, attempt)

    one, other = ([(f"d{name}/{name}", Link("t"))] for name in "ab")
    parts = [Namespace.build(entries, number=number) for entries in (one, other)]
    assert Namespace.join(parts, number=number) is None
    assert len(tree(Namespace.build([*one, *other], number=number))) == 4


def test_parts_without_anything_in_common_but_directories_are_joined() -> None:
    entries: list[list[Entry]] = [
        [("models/a/x", file("x")), ("hub/blobs/x", file("x")), ("hub/tag", Inline(b"t"))],
        [("models/b/y", file("y")), ("models/b/x", file("x")), ("hub/tag", Inline(b"t")), ("models", Dir())],
        [("models", Dir()), ("hub/l", Link("blobs/x"))],
    ]
    joined = Namespace.join(map(Namespace.build, entries))
    assert joined is not None
    assert tree(joined) == tree(Namespace.build([one for group in entries for one in group]))


def test_a_file_in_the_way_of_a_directory_is_renamed_and_a_bad_path_left_out() -> None:
    namespace = Namespace.build([("a", file("1")), ("a/b", file("2")), ("../x", file("3")), ("a", file("1"))])
    one, two = (str(file(name).blob.id) for name in "12")
    assert tree(namespace) == {"a": "dir", "a/b": two, f"a~{one[:8]}": one}
    assert len(namespace.conflicts) == 3
    assert "'..'" in namespace.conflicts[0]


def test_two_slices_of_one_blob_that_want_one_path_are_both_there() -> None:
    namespace = Namespace.build(
        [("a", file("2")), ("a", part("1", 0, 3)), ("a", file("1")), ("a", part("1", 3, 5))]
    )
    one, two = (str(file(name).blob.id) for name in "12")
    assert tree(namespace) == {
        "a": two,
        f"a~{one[:8]}": one,
        f"a~{one[:8]}-0-3": f"{one}[0:3]",
        f"a~{one[:8]}-3-5": f"{one}[3:5]",
    }
    assert len(namespace.conflicts) == 3


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)), st.integers(0, 20))
def test_a_listing_goes_on_in_a_newer_tree_without_repeating_or_skipping(
    before: set[int], after: set[int], taken: int
) -> None:
    old = Namespace.build([("d", Dir()), *((f"d/{n}", file(str(n))) for n in before)])
    new = Namespace.build([("d", Dir()), *((f"d/{n}", file(str(n))) for n in after)])
    d_old, d_new = old.lookup(ROOT, "d"), new.lookup(ROOT, "d")
    assert isinstance(d_old, DirNode)
    assert isinstance(d_new, DirNode)
    first = list(old.listing(d_old, 0))[:taken]
    rest = list(new.listing(d_new, first[-1][0] if first else 0))
    seen = [name for _, name, _ in [*first, *rest]]
    assert len(seen) == len(set(seen))
    assert {str(n) for n in before & after} <= set(seen)


def test_a_file_has_two_numbers_and_nothing_else_has() -> None:
    namespace = Namespace.build(
        [("d", Dir()), ("l", Link("f")), *((f"f{n}", file(str(n))) for n in range(50))],
        number=lambda key, attempt: number_of(key, attempt) % 128,  # crowded: neighbours would be given out
    )
    assert not namespace.conflicts
    root = namespace.node(ROOT)
    assert isinstance(root, DirNode)
    for name in root.children:
        node = namespace.lookup(ROOT, name)
        assert node is not None
        assert node.ino % 2 == 0
        assert namespace.node(node.ino + 1) is (node if isinstance(node, FileNode) else None)
    assert namespace.node(ROOT) is root
    assert namespace.node(0) is None
