"""A list made by `describe` is one that aria2c follows, and by which it refuses a flipped byte."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from weightfs.core.manifest import Mirror
from weightfs.core.metalink import Metalink, read_metalink, write_metalink
from weightfs.errors import ChunkListError, UsageError
from weightfs.sources import publish
from weightfs.sources._xml import parse_xml
from weightfs.sources.publish import describe
from weightfs.testing.nginx import Nginx

DATA = hashlib.shake_128(b"y").digest(5_000_003)
MIB = 1 << 20


def test_one_pass_gives_both_kinds_of_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(DATA)
    monkeypatch.setattr(publish, "READ_BYTES", 300_000)  # several reads per chunk
    seen: list[tuple[int, int]] = []
    urls = ["https://a.test/m.gguf", "http://b.test/m.gguf"]
    described = describe(path, urls, lambda done, size: seen.append((done, size)))
    pieces = b"".join(hashlib.sha256(DATA[at : at + MIB]).digest() for at in range(0, len(DATA), MIB))
    mirrors = (Mirror(urls[0], 1), Mirror(urls[1], 2))
    assert described == Metalink("m.gguf", len(DATA), hashlib.sha256(DATA).digest(), MIB, pieces, mirrors)
    assert seen[-1] == (len(DATA), len(DATA))
    assert read_metalink(parse_xml(write_metalink(described))) == described


def test_what_cannot_be_published(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError):
            describe(path)
    (tmp_path / "empty").write_bytes(b"")
    assert describe(tmp_path / "empty").sha256 == hashlib.sha256().digest()
    with pytest.raises(ChunkListError):
        describe(tmp_path / "empty", ["ftp://h/m"])


def test_change_while_reading_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(DATA)

    def grow(_done: int, _size: int) -> None:
        path.write_bytes(DATA + b"x")

    with pytest.raises(UsageError, match="changed"):
        describe(path, (), grow)


@pytest.mark.nginx
@pytest.mark.skipif(shutil.which("aria2c") is None, reason="aria2c is not installed")
def test_aria2c_follows_the_list_and_refuses_a_flipped_byte(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    served = root / "m.gguf"
    served.write_bytes(DATA)

    def download(name: str) -> tuple[int, bytes]:
        target = tmp_path / name
        target.mkdir()
        command = [
            "aria2c",
            "--no-conf",
            "--check-integrity=true",
            "--realtime-chunk-checksum=true",
            "--max-tries=1",
            "--allow-overwrite=true",
            "--file-allocation=none",
            f"--dir={target}",
            f"--metalink-file={tmp_path / 'l.meta4'}",
        ]
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
        file = target / "m.gguf"
        return done.returncode, file.read_bytes() if file.exists() else b""

    with Nginx(root) as nginx:
        (tmp_path / "l.meta4").write_bytes(write_metalink(describe(served, [nginx.url("m.gguf")])))
        assert download("honest") == (0, DATA)
        served.write_bytes(DATA[:2_500_000] + bytes([DATA[2_500_000] ^ 1]) + DATA[2_500_001:])
        code, got = download("flipped")
        assert code != 0
        assert got != served.read_bytes()
