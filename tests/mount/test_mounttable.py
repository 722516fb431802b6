from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from weightfs.errors import MountError
from weightfs.mount import mounttable
from weightfs.mount.mounttable import Health, Mount, bounded, canonical, parse_mountinfo, probe
from weightfs.mount.serve import Mounted
from weightfs.mount.stats import MountStats

TEXT = """\
22 28 0:21 / /proc rw,nosuid,nodev,noexec,relatime shared:12 - proc proc rw
36 35 98:0 /mnt1 /mnt\\0402/with\\134back rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue
47 27 0:41 / /mnt/models ro,nosuid,nodev,relatime - fuse.weightfs weightfs ro,user_id=0,group_id=0

rubbish
"""


def test_mountinfo_is_parsed_with_its_escapes_and_optional_fields() -> None:
    assert parse_mountinfo(TEXT) == [
        Mount(22, "0:21", "/proc", "proc", "proc"),
        Mount(36, "98:0", "/mnt 2/with\\back", "ext3", "/dev/root"),
        Mount(47, "0:41", "/mnt/models", "fuse.weightfs", "weightfs"),
    ]


def test_canonical_resolves_links_and_dots(tmp_path: Path) -> None:
    (tmp_path / "real" / "mnt").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "direct").symlink_to("real/mnt")
    real = tmp_path.resolve() / "real" / "mnt"
    assert canonical(tmp_path / "link" / ".." / "link" / "mnt") == real
    assert canonical(tmp_path / "direct") == real
    assert canonical(tmp_path / "real" / "nowhere") == tmp_path.resolve() / "real" / "nowhere"


def test_a_probe_of_a_plain_directory_finds_it_alive(tmp_path: Path) -> None:
    assert probe(tmp_path) is Health.ALIVE


@pytest.fixture
def no_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An interpreter that nobody may run, in the place of ours."""
    python = tmp_path / "python"
    python.write_text("")
    monkeypatch.setattr(sys, "executable", str(python))
    return python


def test_a_probe_that_cannot_be_started_is_said(no_python: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MountError, match=rf"{no_python} cannot be started \(Permission denied\): make it exec"
    ):
        probe(tmp_path)


@pytest.mark.usefixtures("no_python")
async def test_a_mount_that_cannot_be_asked_has_not_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not await Mounted(tmp_path, "0:1", MountStats()).probe()
    assert "cannot be started" in caplog.text


def test_bounded_work_gives_its_result_its_error_or_up() -> None:
    assert bounded(lambda: 5, 30, "it") == 5
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 // 0, 30, "it")
    release = threading.Event()
    with pytest.raises(MountError, match="did not answer within"):
        bounded(release.wait, 0.01, "it")
    release.set()


def test_a_stale_mount_that_cannot_be_detached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path, *, lazy: bool) -> None:
        raise PermissionError(1, f"fusermount3 says no, {lazy=}")

    monkeypatch.setattr(
        mounttable, "mounts_at", lambda _path: [Mount(1, "0:9", "/m", mounttable.FSTYPE, "weightfs")]
    )
    monkeypatch.setattr(mounttable, "probe", lambda _path: Health.STALE)
    monkeypatch.setattr(mounttable, "take_away", refuse)
    with pytest.raises(
        MountError, match=r"could not be detached \(fusermount3 says no, lazy=True\); try: umount"
    ):
        mounttable.detach_stale(Path("/m"))
