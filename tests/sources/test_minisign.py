"""Signatures of ours satisfy Debian's minisign, and the other way round."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path

import pytest

from weightfs.errors import SignatureError
from weightfs.sources.minisign import UnknownKeyError, parse_public_key, public_key_of, sign, verify

pytestmark = pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")
DATA = b"a chunk list\n" * 1000


def minisign(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    command = ["minisign", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("minisign")
    for name in ("mine", "other"):
        assert minisign("-G", "-W", "-p", home / f"{name}.pub", "-s", home / f"{name}.key").returncode == 0
    (home / "data").write_bytes(DATA)
    return home


def public(home: Path, name: str = "mine") -> str:
    return (home / f"{name}.pub").read_text()


@pytest.mark.parametrize("legacy", [False, True])
def test_theirs_is_verified(home: Path, legacy: bool) -> None:
    signature = home / f"theirs{legacy}"
    flags = ["-l"] if legacy else []
    done = minisign(
        "-S", *flags, "-s", home / "mine.key", "-m", home / "data", "-x", signature, "-t", "a comment"
    )
    assert done.returncode == 0, done.stderr
    text = signature.read_text()
    key_id = verify(DATA, text, [public(home, "other"), public(home)])
    # minisign's comment leaves leading zeros out, one key in sixteen has one.
    assert int(key_id, 16) == int(public(home).splitlines()[0].split()[-1], 16)
    assert verify(DATA, text, [public(home).splitlines()[1]]) == key_id == str(parse_public_key(public(home)))
    with pytest.raises(SignatureError, match="wrong"):
        verify(DATA[:-1] + b"?", text, [public(home)])
    with pytest.raises(SignatureError, match="wrong"):
        verify(DATA, text.replace("a comment", "b comment"), [public(home)])
    with pytest.raises(UnknownKeyError):
        verify(DATA, text, [public(home, "other")])


def test_ours_is_verified_by_them(home: Path) -> None:
    (home / "ours").write_text(sign(DATA, (home / "mine.key").read_text(), None, "made by weightfs"))
    done = minisign("-V", "-H", "-p", home / "mine.pub", "-m", home / "data", "-x", home / "ours")
    assert done.returncode == 0, done.stderr
    assert "made by weightfs" in done.stdout
    (home / "changed").write_bytes(DATA + b"!")
    assert (
        minisign("-V", "-p", home / "mine.pub", "-m", home / "changed", "-x", home / "ours").returncode != 0
    )
    assert public_key_of((home / "mine.key").read_text(), None).line == public(home).splitlines()[1]


@pytest.mark.slow
def test_encrypted_secret_key(tmp_path: Path) -> None:
    """Costs a GiB and some seconds: minisign's scrypt parameters are fixed."""
    done = minisign("-G", "-p", tmp_path / "k.pub", "-s", tmp_path / "k.key", text="sesame\nsesame\n")
    assert done.returncode == 0, done.stderr
    secret = (tmp_path / "k.key").read_text()
    with pytest.raises(SignatureError, match="password"):
        sign(DATA, secret, None)
    text = sign(DATA, secret, "sesame")
    assert verify(DATA, text, [(tmp_path / "k.pub").read_text()])


def test_wrong_password_and_greedy_key(home: Path) -> None:
    comment, line = (home / "mine.key").read_text().splitlines()
    raw = base64.b64decode(line)

    def encrypted(operations: int, memory: int) -> str:
        limits = operations.to_bytes(8, "little") + memory.to_bytes(8, "little")
        packed = raw[:2] + b"Sc" + raw[4:6] + bytes(32) + limits + raw[54:]
        return f"{comment}\n{base64.b64encode(packed).decode()}\n"

    for limits in ((32_768, 1 << 20), (1 << 20, 1 << 20)):
        with pytest.raises(SignatureError, match="password is wrong"):
            sign(DATA, encrypted(*limits), "open")
    with pytest.raises(SignatureError, match="refused"):
        sign(DATA, encrypted(1 << 40, 1 << 40), "open")


def test_malformed_files(home: Path) -> None:
    good = sign(DATA, (home / "mine.key").read_text(), None)
    lines = good.splitlines()
    packed = base64.b64decode(lines[1])
    bad = [
        "",
        "x",
        good * 2,
        good + "x\n" * 10_000,
        "\n".join(lines[:3]),
        "\n".join([lines[0], "%%%", *lines[2:]]),
        "\n".join([lines[0], base64.b64encode(b"XX" + packed[2:]).decode(), *lines[2:]]),
        "\n".join([lines[0], base64.b64encode(packed[:-1]).decode(), *lines[2:]]),
        "\n".join([*lines[:2], "comment", lines[3]]),
    ]
    for text in bad:
        with pytest.raises(SignatureError):
            verify(DATA, text, [public(home)])
    for key in ("", "RWQ", "not base64!", base64.b64encode(b"Ed" + bytes(39)).decode()):
        with pytest.raises(SignatureError):
            verify(DATA, good, [key])
        with pytest.raises(SignatureError):
            sign(DATA, key, None)
    with pytest.raises(SignatureError, match="one line"):
        sign(DATA, (home / "mine.key").read_text(), None, "two\nlines")
