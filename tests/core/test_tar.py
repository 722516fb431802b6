"""The walk over a tar's headers, beside what Python's tarfile says of the same archive."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core import tar
from weightfs.core.geometry import ByteSpan
from weightfs.core.tar import BLOCK, WINDOW_BYTES, TarFiles, TarMember, walk_tar
from weightfs.errors import IntegrityError

BIG = random.Random(1).randbytes(70_000)
FORMATS = (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)


def walk(raw: bytes, size: int | None = None) -> tuple[TarFiles, list[ByteSpan]]:
    steps = walk_tar(len(raw) if size is None else size, "T")
    spans = []
    try:
        span = next(steps)
        while True:
            spans.append(span)
            assert span.stop <= len(raw)
            span = steps.send(raw[span.start : span.stop])
    except StopIteration as done:
        files: TarFiles = done.value
        return files, spans


def make(
    members: dict[str, bytes], fmt: int = tarfile.PAX_FORMAT, extra: list[tarfile.TarInfo] | None = None
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as archive:
        for info in extra or []:
            archive.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def contents(raw: bytes) -> dict[str, bytes]:
    return {member.path: raw[member.span.start : member.span.stop] for member in walk(raw)[0].members}


def special(kind: bytes, name: str = "s", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", size
    return info


def rechecked(block: bytes) -> bytes:
    total = sum(block) - sum(block[148:156]) + 8 * 32
    return block[:148] + b"%06o\0 " % total + block[156:]


@pytest.mark.parametrize("fmt", FORMATS)
def test_files_of_every_format_are_found(fmt: int) -> None:
    files = {
        "m.gguf": BIG,
        "empty": b"",
        "d/" * 40 + "n" * 90: b"long",
        "exact": b"x" * BLOCK,
    }
    assert contents(make(files, fmt)) == files


@pytest.mark.parametrize("fmt", FORMATS[1:])
def test_long_names_beyond_ustar(fmt: int) -> None:
    files = {"d/" * 100 + "ü" * 100: b"long", "after": b"short"}
    assert contents(make(files, fmt)) == files


@pytest.mark.parametrize("fmt", ["gnu", "pax", "ustar", "v7", "oldgnu"])
def test_archives_of_the_real_tar(fmt: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(b"a" * 1000)
    (tmp_path / "d" / "link").symlink_to("a")
    (tmp_path / "d" / "hard").hardlink_to(tmp_path / "d" / "a")
    subprocess.run(["tar", f"--format={fmt}", "-cf", "t.tar", "./d"], cwd=tmp_path, check=True)
    raw = (tmp_path / "t.tar").read_bytes()
    files, _ = walk(raw)
    assert [member.path for member in files.members] in (["d/a"], ["d/hard"])
    assert files.skipped == 2
    assert len(files.members[0].span) == 1000


@pytest.mark.parametrize(
    "options", [["--format=oldgnu"], ["--format=pax"], ["--format=pax", "--sparse-version=0.1"]]
)
def test_sparse_files_are_skipped_and_what_follows_is_found(options: list[str], tmp_path: Path) -> None:
    with (tmp_path / "holes").open("wb") as file:
        for number in range(60):  # more extents than the first header of the old format holds
            file.seek(number * 65536)
            file.write(b"x" * 4096)
        file.truncate(1 << 24)
    (tmp_path / "z").write_bytes(b"after")
    subprocess.run(["tar", "-S", *options, "-cf", "t.tar", "holes", "z"], cwd=tmp_path, check=True)
    raw = (tmp_path / "t.tar").read_bytes()
    files, _ = walk(raw)
    assert [(member.path, raw[member.span.start : member.span.stop]) for member in files.members] == [
        ("z", b"after")
    ]
    assert files.skipped == 1


def test_links_devices_and_folders_have_no_bytes() -> None:
    extra = [special(tarfile.SYMTYPE, "l"), special(tarfile.LNKTYPE, "h"), special(tarfile.DIRTYPE, "../d"),
             special(tarfile.CHRTYPE, "c"), special(tarfile.FIFOTYPE, "f")]  # fmt: skip
    files, _ = walk(make({"a": b"1"}, extra=extra))
    assert [member.path for member in files.members] == ["a"]
    assert files.skipped == 2


def test_headers_of_small_files_come_together_and_bodies_are_not_read() -> None:
    small = {f"f{number}": b"x" for number in range(15)}
    raw = make(small)
    assert len(walk(raw)[1]) == 1
    raw = make({"big": bytes(1 << 20), "other": bytes(1 << 20)})
    _, spans = walk(raw)
    assert len(spans) == 3
    assert sum(len(span) for span in spans) <= 3 * WINDOW_BYTES


def test_sizes_beyond_octal_digits() -> None:
    size = 9 << 30
    for fmt in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        info = tarfile.TarInfo("huge")
        info.size = size
        header = info.tobuf(fmt)
        steps = walk_tar(len(header) + size + 2 * BLOCK, "T")
        span = next(steps)
        span = steps.send(header + bytes(len(span) - len(header)))
        with pytest.raises(StopIteration) as done:
            steps.send(bytes(len(span)))
        assert done.value.value.members == (TarMember("huge", ByteSpan(len(header), len(header) + size)),)


def test_global_headers_and_long_links_are_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "evil"}
    ) as archive:
        archive.addfile(tarfile.TarInfo("a"))
    assert contents(buffer.getvalue()) == {"a": b""}
    link = special(tarfile.SYMTYPE)
    link.linkname = "x" * 200
    assert contents(make({"a": b"1"}, tarfile.GNU_FORMAT, [link])) == {"a": b"1"}


def test_an_archive_may_end_without_blocks_of_zeros() -> None:
    assert contents(make({"a": b"1"})[: 2 * BLOCK]) == {"a": b"1"}
    assert walk(b"") == (TarFiles((), 0), [])


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "a//b", "a\nb"])
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(IntegrityError, match="which is refused"):
        walk(make({name: b"1"}))


def test_names_that_are_not_utf8_are_refused() -> None:
    block = make({"a": b""})[:BLOCK]
    with pytest.raises(IntegrityError, match="not UTF-8"):
        walk(rechecked(b"\xff" + block[1:]))


HEADER = make({"a": b"1"})[:BLOCK]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"PK\x03\x04" + bytes(508), "no tar"),
        (HEADER[:100], "amid a header"),
        (HEADER, "amid a member"),
        (rechecked(HEADER[:124] + b"not octal!!\0" + HEADER[136:]), "malformed size"),
        (rechecked(HEADER[:124] + b"\x80" + b"\xff" * 11 + HEADER[136:]), "amid a member"),
        (HEADER[:148] + b"zz" + HEADER[150:], "wrong checksum"),
        (
            rechecked(HEADER[:124] + b"00000400000\0" + HEADER[136:156] + b"x" + HEADER[157:]),
            "extended header of",
        ),
    ],
)
def test_what_is_no_tar_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(IntegrityError, match=words):
        walk(raw)


@pytest.mark.parametrize(
    "records", [b"x", b"0 a=b\n", b"99 a=b\n", b"6 a=b ", b"3 a=b\n", b"12 size=1x1\n", b"11 size=-1\n"]
)
def test_malformed_extended_headers_are_refused(records: bytes) -> None:
    pax = rechecked(HEADER[:124] + b"%011o\0" % len(records) + HEADER[136:156] + b"x" + HEADER[157:])
    with pytest.raises(IntegrityError, match="malformed"):
        walk(pax + records.ljust(BLOCK, b"\0") + make({"a": b"1"}))


def test_the_walk_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = make({f"f{number}": b"" for number in range(100)})
    monkeypatch.setattr(tar, "MAX_MEMBERS", 50)
    with pytest.raises(IntegrityError, match="over 50 files"):
        walk(raw)
    monkeypatch.undo()
    monkeypatch.setattr(tar, "MAX_WINDOWS", 2)
    with pytest.raises(IntegrityError, match="in over 2 places"):
        walk(raw)


@given(st.binary(max_size=3000), st.integers(0, 3))
def test_any_bytes_are_read_or_refused(noise: bytes, headers: int) -> None:
    raw = HEADER * headers + noise
    try:
        files, _ = walk(raw)
    except IntegrityError:
        return
    assert all(member.span.stop <= len(raw) for member in files.members)


@given(st.integers(0, BLOCK * 6), st.binary(min_size=1, max_size=8))
def test_any_damage_is_read_or_refused(at: int, damage: bytes) -> None:
    raw = make({"d/" * 60 + "n" * 90: b"1", "b": b"22"})
    raw = raw[:at] + damage + raw[at + len(damage) :]
    try:
        files, _ = walk(raw)
    except IntegrityError:
        return
    assert all(member.span.stop <= len(raw) for member in files.members)
