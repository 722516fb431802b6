"""Mounts for tests: each is gone when its test is, however the test ends."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from weightfs.testing.mounts import FakeMount, can_mount, clear

Start = Callable[..., FakeMount]


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory that other users may enter (tmp_path is closed to them)."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        mountpoint = Path(directory).resolve() / "mnt"
        mountpoint.mkdir()
        yield mountpoint
        clear(mountpoint)


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    """A function that serves files at `place`."""
    if not can_mount():
        pytest.skip("needs /dev/fuse and CAP_SYS_ADMIN")
    with ExitStack() as stack:

        def begin(files: dict[str, int], **kwargs: object) -> FakeMount:
            return stack.enter_context(FakeMount(place, files, **kwargs)).ready()  # type: ignore[arg-type]  # passed on

        yield begin
