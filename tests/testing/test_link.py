from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from weightfs.testing.link import CATCH_UP, Link, _Wire
from weightfs.testing.nginx import Nginx

BODY = bytes(range(256)) * 4096  # 1 MiB


@pytest.mark.nginx
def test_bytes_go_through_to_each_of_several_targets(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(name.encode() + BODY)
    with (
        Nginx(tmp_path / "a") as a,
        Nginx(tmp_path / "b") as b,
        Link(a.port, b.port, rate=200e6, latency=0.002) as link,
    ):
        for port, name in zip(link.ports, ("a", "b"), strict=True):
            assert httpx.get(f"http://127.0.0.1:{port}/file").content == name.encode() + BODY


@pytest.mark.nginx
def test_when_it_stops_connections_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BODY)
    with Nginx(tmp_path) as nginx, Link(nginx.port) as link:
        url = f"http://127.0.0.1:{link.ports[0]}/file"
        assert httpx.get(url).status_code == 200
        link.stop()
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


def test_the_rate_is_shared_and_a_pause_is_not_saved_up() -> None:
    wire = _Wire(rate=1000.0, delay=0.0)
    assert wire.reserve(500, 10.0) == pytest.approx(10.5 - CATCH_UP)
    assert wire.reserve(500, 10.1) == pytest.approx(11.0 - CATCH_UP)  # another connection, right behind
    assert wire.reserve(1000, 100.0) == pytest.approx(101.0 - CATCH_UP)
