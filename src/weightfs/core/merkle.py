"""The Merkle tree of RFC 9162 section 2.1 over a blob's chunk digests.

An entry of the tree is the 32-byte SHA-256 of a chunk, so a leaf is `H(0x00 || digest)` and a node `H(0x01 ||
left || right)`: the prefixes keep a leaf from ever passing for a node. The root names a chunk list in 32
bytes; a proof that a digest is entry `index` of `count` has at most ceil(log2 count) hashes.

The RFC splits `n` entries at the largest power of two below `n`. Hashing level by level from the leaves, with
an odd last node carried up as it is, builds the same tree without recursion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

DIGEST_LENGTH = 32  # bytes of SHA-256


def root(digests: Sequence[bytes] | bytes) -> bytes:
    """The tree's root, 32 bytes; of an empty list the SHA-256 of nothing (RFC 9162 section 2.1.1).

    Args:
        digests: 32 bytes per chunk in order, as a sequence or joined.

    Raises:
        ValueError: a digest is not 32 bytes long.
    """
    level = _leaves(digests)
    if not level:
        return hashlib.sha256().digest()
    while len(level) > 1:
        level = _parents(level)
    return level[0]


def proof(digests: Sequence[bytes] | bytes, index: int) -> list[bytes]:
    """The inclusion proof for one chunk, from the leaf upwards (RFC 9162 section 2.1.3.1).

    Raises:
        ValueError: a digest is not 32 bytes long.
        IndexError: there is no such chunk.
    """
    level = _leaves(digests)
    if not 0 <= index < len(level):
        raise IndexError(f"chunk {index} of {len(level)}")
    path = []
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):  # an odd last node has none and is carried up
            path.append(level[sibling])
        level = _parents(level)
        index //= 2
    return path


def check_proof(digest: bytes, index: int, count: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether `proof` shows that `digest` is entry `index` of the `count` under `root`.

    RFC 9162 section 2.1.3.2. False for anything malformed: a proof comes from somebody else.
    """
    if not 0 <= index < count or any(len(item) != DIGEST_LENGTH for item in (digest, root, *proof)):
        return False
    node, last = _leaf(digest), count - 1
    rest = iter(proof)
    while last > 0:
        if index % 2 or index != last:
            sibling = next(rest, None)
            if sibling is None:
                return False
            node = _node(sibling, node) if index % 2 else _node(node, sibling)
        index //= 2
        last //= 2
    return next(rest, None) is None and node == root


def _leaf(digest: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + digest).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _leaves(digests: Sequence[bytes] | bytes) -> list[bytes]:
    if isinstance(digests, bytes):
        digests = [digests[at : at + DIGEST_LENGTH] for at in range(0, len(digests), DIGEST_LENGTH)]
    if any(len(digest) != DIGEST_LENGTH for digest in digests):
        raise ValueError(f"a chunk digest has {DIGEST_LENGTH} bytes")
    return [_leaf(digest) for digest in digests]


def _parents(level: list[bytes]) -> list[bytes]:
    pairs = [_node(left, right) for left, right in zip(level[::2], level[1::2], strict=False)]
    return pairs + level[2 * len(pairs) :]
