from __future__ import annotations

import hashlib
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.geometry import MIB, BlobShape
from weightfs.core.manifest import (
    MAX_NAME_BYTES,
    MAX_PATH_BYTES,
    Blob,
    BlobId,
    ChunkList,
    Mirror,
    Policy,
    Trust,
    check_path,
    weakest,
)

DIGEST = hashlib.sha256(b"content").digest()


def blob(*, sha256: bytes | None = DIGEST, trusted: bool | None = None) -> Blob:
    chunk_list = None if trusted is None else ChunkList(MIB, DIGEST * 2, trusted)
    return Blob(
        BlobId.of_digest(DIGEST), BlobShape(2 * MIB, MIB), sha256, (Mirror("https://h/m"),), chunk_list
    )


def test_policies_allow_what_the_semantics_say() -> None:
    allowed = {policy: {trust for trust in Trust if policy.allows(trust)} for policy in Policy}
    assert allowed == {
        Policy.STRICT: {Trust.ATTESTED, Trust.VERIFIED},
        Policy.HOLD: {Trust.VERIFIED},
        Policy.PROVISIONAL: set(Trust) - {Trust.QUARANTINED},
    }


@given(st.binary(min_size=16, max_size=16))
def test_blob_ids_survive_their_text(raw: bytes) -> None:
    assert BlobId.from_hex(str(BlobId(raw))) == BlobId(raw)


@pytest.mark.parametrize("raw", [b"", b"x" * 15, b"x" * 17])
def test_blob_ids_have_sixteen_bytes(raw: bytes) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        BlobId(raw)


def test_a_version_is_named_by_url_size_and_validator_together() -> None:
    same = BlobId.of_version("https://h/m", 5, '"a"')
    assert same == BlobId.of_version("https://h/m", 5, '"a"')
    others = [
        BlobId.of_version("https://h/n", 5, '"a"'),
        BlobId.of_version("https://h/m", 6, '"a"'),
        BlobId.of_version("https://h/m", 5, '"b"'),
        BlobId.of_digest(DIGEST),
    ]
    assert len({same, *others}) == 5


def test_chunk_lists_give_digests_by_chunk_and_nothing_outside() -> None:
    other = hashlib.sha256(b"other").digest()
    chunks = ChunkList(MIB, DIGEST + other, trusted=False)
    assert [chunks.digest_of(chunk) for chunk in range(len(chunks))] == [DIGEST, other]
    for outside in (-1, 2):
        with pytest.raises(IndexError):
            chunks.digest_of(outside)


@pytest.mark.parametrize(
    ("given_blob", "trust"),
    [
        (blob(trusted=True), Trust.ATTESTED),
        (blob(sha256=None, trusted=True), Trust.ATTESTED),
        (blob(trusted=False), Trust.PROVISIONAL),
        (blob(), Trust.PROVISIONAL),
        (blob(sha256=None), Trust.UNVERIFIABLE),
        (blob(sha256=None, trusted=False), Trust.UNVERIFIABLE),
    ],
)
def test_initial_trust(given_blob: Blob, trust: Trust) -> None:
    assert given_blob.initial_trust is trust


def test_other_mirrors_make_another_blob_value_of_the_same_content() -> None:
    first = blob()
    second = first.with_mirrors((Mirror("https://other/m", 1),))
    assert (second.id, second.size, second.sha256) == (first.id, 2 * MIB, first.sha256)
    assert [mirror.url for mirror in second.mirrors] == ["https://other/m"]
    with pytest.raises(FrozenInstanceError):
        first.mirrors = ()  # type: ignore[misc]  # that it is refused is what is tested


@pytest.mark.parametrize("path", ["m.gguf", "a/b/c", "…/ü", "a" * MAX_NAME_BYTES, "...", "a b", ".hidden"])
def test_safe_paths_pass_as_they_are(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "empty"),
        ("/a", "component ''"),
        ("a/", "component ''"),
        ("a//b", "component ''"),
        ("../a", r"component '\.\.'"),
        ("a/..", r"component '\.\.'"),
        ("a/./b", r"component '\.'"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("a\x7fb", "control"),
        ("a\udc80", "UTF-8"),
        ("ü" * 128, "255 bytes"),
        ("a" * (MAX_NAME_BYTES + 1), "255 bytes"),
        ("a/" * (MAX_PATH_BYTES // 2) + "a", "1025 bytes"),
        ("x" * 5_000, "5000 bytes"),
    ],
)
def test_unsafe_paths_are_refused_with_the_reason(path: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_path(path)


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("/.\0"), max_size=40))
def test_what_passes_stays_below_its_directory(path: str) -> None:
    try:
        check_path(path)
    except ValueError:
        return
    depth = 0
    for name in path.split("/"):
        depth += -1 if name == ".." else 1
        assert depth > 0
        assert name not in ("", ".")
        assert "\0" not in name


def test_the_weakest_is_what_can_be_said_of_all() -> None:
    order = [Trust.QUARANTINED, Trust.UNVERIFIABLE, Trust.PROVISIONAL, Trust.ATTESTED, Trust.VERIFIED]
    for number, trust in enumerate(order):
        assert weakest(reversed(order[number:])) is trust
    assert weakest([]) is Trust.VERIFIED
