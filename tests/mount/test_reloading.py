"""What reading the configuration again may meet while the mount serves."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NoReturn, cast

import pytest

from weightfs.app.reloading import Order, Reloader
from weightfs.engine.engine import Engine
from weightfs.errors import DaemonError


async def test_a_start_directory_that_is_gone_does_not_end_the_mount(tmp_path: Path) -> None:
    """Regression: SIGHUP ended the daemon with an OSError, and with it the mount."""

    def reread() -> NoReturn:
        with contextlib.chdir(tmp_path / "gone"):  # as `weightfs mount` does
            raise AssertionError

    reloader = Reloader(cast("Order", None), reread)
    reloader.serve(cast("Engine", object()), lambda _refs: None)
    with pytest.raises(DaemonError, match="gone"):
        await reloader.reload()
