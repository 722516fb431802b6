from __future__ import annotations

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from weightfs.core.merkle import check_proof, proof, root

digest_lists = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=40)


def digests_of(count: int) -> list[bytes]:
    return [hashlib.sha256(str(n).encode()).digest() for n in range(count)]


def their_tree(digests: list[bytes]) -> InmemoryTree:
    # pymerkle puts RFC 9162's 0x00 before each entry itself: the entry is the bare chunk digest.
    tree = InmemoryTree(algorithm="sha256")
    for digest in digests:
        tree.append_entry(digest)
    return tree


def rfc_root(digests: list[bytes]) -> bytes:
    """RFC 9162 section 2.1.1 as it is written there, recursively."""
    if not digests:
        return hashlib.sha256().digest()
    if len(digests) == 1:
        return hashlib.sha256(b"\0" + digests[0]).digest()
    split = 1 << (len(digests) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + rfc_root(digests[:split]) + rfc_root(digests[split:])).digest()


def test_an_empty_list_has_the_hash_of_nothing() -> None:
    assert root([]) == root(b"") == hashlib.sha256(b"").digest()


@pytest.mark.parametrize("count", [*range(1, 35), 63, 64, 65, 100])
def test_roots_and_proofs_equal_pymerkles(count: int) -> None:
    digests = digests_of(count)
    tree = their_tree(digests)
    assert root(digests) == tree.get_root()
    for index in {0, count // 2, count - 1}:
        # theirs counts from one, and begins with the leaf's own hash
        assert proof(digests, index) == tree.prove_inclusion(index + 1).path[1:]


@given(digest_lists)
def test_the_root_is_the_rfcs(digests: list[bytes]) -> None:
    assert root(digests) == root(b"".join(digests)) == rfc_root(digests)


@given(digest_lists, st.data())
def test_every_proof_checks_and_is_short(digests: list[bytes], data: st.DataObject) -> None:
    count, index = len(digests), data.draw(st.integers(0, len(digests) - 1))
    made = proof(b"".join(digests), index)
    assert len(made) <= math.ceil(math.log2(count)) if count > 1 else not made
    assert check_proof(digests[index], index, count, made, root(digests))


@given(st.sets(st.binary(min_size=32, max_size=32), min_size=2, max_size=20), st.data())
def test_nothing_else_checks(distinct: set[bytes], data: st.DataObject) -> None:
    digests = sorted(distinct)
    count, index = len(digests), data.draw(st.integers(0, len(distinct) - 1))
    made, top = proof(digests, index), root(digests)
    other = (index + data.draw(st.integers(1, count - 1))) % count
    assert not check_proof(digests[other], index, count, made, top)
    assert not check_proof(digests[index], other, count, made, top)
    assert not check_proof(digests[index], index, count, made[:-1], top)
    assert not check_proof(digests[index], index, count, [*made, made[0]], top)
    assert not check_proof(digests[index], index, count, made, bytes(32))
    bad = data.draw(st.integers(0, len(made) - 1))
    flipped = bytes([made[bad][0] ^ 1]) + made[bad][1:]
    assert not check_proof(digests[index], index, count, [*made[:bad], flipped, *made[bad + 1 :]], top)


def test_a_node_never_passes_for_a_leaf() -> None:
    digests = digests_of(4)
    left = root(digests[:2])
    assert root([left, root(digests[2:])]) != root(digests)


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0), (0, -1)])
def test_indices_outside_never_check(index: int, count: int) -> None:
    digests = digests_of(2)
    assert not check_proof(digests[0], index, count, proof(digests, 0), root(digests))


def test_lengths_other_than_32_never_check() -> None:
    digests = digests_of(2)
    made, top = proof(digests, 0), root(digests)
    assert check_proof(digests[0], 0, 2, made, top)
    assert not check_proof(digests[0] + b"x", 0, 2, made, top)
    assert not check_proof(digests[0], 0, 2, made, top[:-1])
    assert not check_proof(digests[0], 0, 2, [made[0] + b"x"], top)


@pytest.mark.parametrize("digests", [b"x" * 33, [b"x" * 31], [b"x" * 32, b""]])
def test_other_digests_are_refused(digests: bytes | list[bytes]) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        root(digests)
    with pytest.raises(ValueError, match="32 bytes"):
        proof(digests, 0)


@pytest.mark.parametrize("index", [-1, 3])
def test_there_is_no_proof_for_a_chunk_that_is_not(index: int) -> None:
    with pytest.raises(IndexError, match="of 3"):
        proof(digests_of(3), index)
