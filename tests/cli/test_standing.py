"""What the service manager is told: pings only for what answers, and one line that says what is going on."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing

from weightfs.app import standing
from weightfs.engine.status import EngineStatus, FileStatus, RefStatus
from weightfs.errors import CacheError
from weightfs.testing.engines import running_engine

MIB = 1 << 20


BLANK = {"int": 0, "float": 0.0, "str": "", "bool": False}
T = TypeVar("T")


def blank(kind: type[T], **given: object) -> T:
    """A status in which everything is zero or empty but what is given: new fields are no matter here."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # every T here is a dataclass
    return kind(**{field.name: given.get(field.name, BLANK.get(str(field.type), ())) for field in fields})


def file(
    blob: str, *, size: int = 10 * MIB, present: int = 0, waiting: int = 0, error: str = ""
) -> FileStatus:
    return blank(
        FileStatus, blob=blob, size=size, present_bytes=present, waiting_readers=waiting, error=error
    )


def status(*refs: tuple[FileStatus, ...], **more: object) -> EngineStatus:
    shown = tuple(blank(RefStatus, ref=f"ref{number}", files=files) for number, files in enumerate(refs))
    return blank(EngineStatus, refs=shown, **more)


@pytest.mark.parametrize(
    ("given", "rate", "text"),
    [
        (status(), 0, "no models"),
        (status((file("a", present=10 * MIB),)), 0, "1 model, 100% of 10.0 MiB here"),
        (status((file("a", size=0),)), 0, "1 model, 100% of 0 B here"),
        (status((file("a", present=10 * MIB - 1),)), 0, "1 model, 99% of 10.0 MiB here"),
        (
            status((file("a", present=10 * MIB),), (file("a", present=10 * MIB),)),
            0,
            "2 models, 100% of 10.0 MiB here",
        ),
        (
            status((file("a"), file("b", waiting=1))),
            2.5 * MIB,
            "1 model, 0% of 20.0 MiB here; 1 reader waiting; fetching 2.5 MiB/s",
        ),
        (
            status((file("a", waiting=2), file("b", waiting=3))),
            0,
            "1 model, 0% of 20.0 MiB here; 5 readers waiting",
        ),
        (status(trouble="no room"), 0, "no models; trouble: no room"),
        (status(mismatched_chunks=1), 0, "no models; 1 chunk came damaged and was refused"),
        (
            status(mismatched_chunks=2, disk_faults=1),
            0,
            "no models; 2 chunks came damaged and were refused; 1 chunk that the disk did not keep",
        ),
        (
            status((file("a", error="it says 404"),)),
            0,
            "1 model, 0% of 10.0 MiB here; 1 file cannot be fetched (it says 404)",
        ),
    ],
)
def test_one_line(given: EngineStatus, rate: float, text: str) -> None:
    assert standing.status_text(given, rate) == text


def test_no_secrets_and_no_second_line() -> None:
    text = standing.status_text(status((file("a", error="https://u:p@h/m?sig=s3cret\nREADY=1 is late"),)), 0)
    assert "s3cret" not in text
    assert "u:p" not in text
    assert "\n" not in text
    assert len(standing.status_text(status(trouble="x" * 5000), 0)) == standing.MAX_TEXT


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def messages(manager: socket.socket) -> list[str]:
    got = []
    while True:
        try:
            got.append(manager.recv(4096).decode())
        except BlockingIOError:
            return got


class Mount:
    """Answers at once, or never."""

    answers = True

    async def probe(self, timeout: float, /) -> bool:
        if not self.answers:
            await trio.sleep(timeout)
        return self.answers


class Engine:
    """Answers at once, with an error, or never."""

    def __init__(self) -> None:
        self.now = status()
        self.error: CacheError | None = None
        self.silent = False

    async def survey(self) -> EngineStatus:
        return self.now

    async def probe(self) -> None:
        if self.silent:
            await trio.sleep_forever()
        if self.error:
            raise self.error


async def pings(manager: socket.socket, mount: Mount, engine: Engine, seconds: float) -> int:
    with trio.move_on_after(seconds):
        await standing.keep_alive(mount, engine, 10)
    return messages(manager).count("WATCHDOG=1")


async def test_a_ping_needs_both_answers(
    manager: socket.socket, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    mount, engine = Mount(), Engine()
    assert await pings(manager, mount, engine, 21) == 5, "at 0, 5, 10, 15 and 20: twice as often as asked for"
    mount.answers = False
    assert await pings(manager, mount, engine, 60) == 0
    mount.answers, engine.silent = True, True
    assert await pings(manager, mount, engine, 60) == 0
    assert "did not answer" in caplog.text
    engine.silent = False
    assert await pings(manager, mount, engine, 1) == 1


async def test_an_index_with_an_error_is_an_answer(
    manager: socket.socket, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    engine.error = CacheError("a page is damaged")
    assert await pings(manager, Mount(), engine, 1) == 1, "a restart would not mend it, and costs the readers"
    assert "a page is damaged" in caplog.text


async def test_the_status_is_told_when_it_changes(
    manager: socket.socket, autojump_clock: trio.testing.MockClock
) -> None:
    engine = Engine()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(standing.tell_status, engine)
        await trio.sleep(standing.STATUS_SECONDS * 3.5)
        assert messages(manager) == ["STATUS=no models"]
        engine.now = status((file("a", present=5 * MIB),), fetched_bytes=5 * MIB)
        await trio.sleep(standing.STATUS_SECONDS * 2)
        assert messages(manager) == [
            "STATUS=1 model, 50% of 10.0 MiB here; fetching 1.0 MiB/s",
            "STATUS=1 model, 50% of 10.0 MiB here",
        ]
        nursery.cancel_scope.cancel()


async def test_an_engine_that_takes_long_to_ask_is_asked_seldom(
    manager: socket.socket, autojump_clock: trio.testing.MockClock
) -> None:
    """Regression: 100,000 files take two seconds of the loop, and every five seconds all readers stood still."""
    engine = Engine()
    spent = iter(range(0, 2000, 2))  # two seconds pass from each look at the clock to the next
    async with trio.open_nursery() as nursery:
        nursery.start_soon(standing.tell_status, engine, lambda: float(next(spent)))
        await trio.sleep(1)
        assert messages(manager) == ["STATUS=no models"]
        engine.now = status((file("a", present=5 * MIB),))
        await trio.sleep(2 * standing.PAUSE_PER_SECOND - 2)
        assert messages(manager) == []
        await trio.sleep(2)
        assert messages(manager) == ["STATUS=1 model, 50% of 10.0 MiB here"]
        nursery.cancel_scope.cancel()


async def test_a_real_engine_answers(tmp_path: Path) -> None:
    async with running_engine(tmp_path) as engine:
        with trio.fail_after(30):
            await engine.probe()
        assert standing.status_text(engine.status(), 0) == "no models"
