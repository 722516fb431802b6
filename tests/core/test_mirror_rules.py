"""Twins of mirrors, by URL prefix."""

from __future__ import annotations

from weightfs.core.geometry import BlobShape
from weightfs.core.manifest import MAX_MIRRORS, Blob, BlobId, ChunkList, Mirror
from weightfs.core.mirror_rules import PrefixRule, with_twins

DIGEST = bytes(32)
ORIGIN = Mirror("https://models.example.com/a/m.gguf?token=hunter2", 5)
LAN = PrefixRule("https://models.example.com/", "http://mirror.lan/copy/", 2)


def blob(*mirrors: Mirror, sha256: bytes | None = DIGEST, chunk_list: ChunkList | None = None) -> Blob:
    return Blob(BlobId(bytes(16)), BlobShape.of(10), sha256, mirrors, chunk_list)


def test_a_twin_has_the_path_and_not_the_query() -> None:
    assert with_twins(blob(ORIGIN), [LAN]).mirrors == (ORIGIN, Mirror("http://mirror.lan/copy/a/m.gguf", 2))


def test_what_no_rule_matches_stays() -> None:
    one = blob(Mirror("https://other.example.com/m.gguf"))
    assert with_twins(one, [LAN]) is one
    assert with_twins(one, []) is one


def test_without_digests_there_are_no_twins() -> None:
    assert with_twins(blob(ORIGIN, sha256=None), [LAN]).mirrors == (ORIGIN,)
    listed = blob(ORIGIN, sha256=None, chunk_list=ChunkList(1 << 20, DIGEST, trusted=False))
    assert len(with_twins(listed, [LAN]).mirrors) == 2


def test_each_place_once_in_the_order_of_the_rules() -> None:
    rules = [LAN, PrefixRule(LAN.prefix, "http://b.lan/"), LAN]
    urls = [mirror.url for mirror in with_twins(blob(ORIGIN), rules).mirrors]
    assert urls == [ORIGIN.url, "http://mirror.lan/copy/a/m.gguf", "http://b.lan/a/m.gguf"]
    again = with_twins(with_twins(blob(ORIGIN), rules), rules)
    assert [mirror.url for mirror in again.mirrors] == urls


def test_there_is_a_bound() -> None:
    rules = [PrefixRule(LAN.prefix, f"http://mirror-{number}.lan/") for number in range(2 * MAX_MIRRORS)]
    assert len(with_twins(blob(ORIGIN), rules).mirrors) == MAX_MIRRORS
