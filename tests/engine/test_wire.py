"""What the engine and its workers say to each other survives the way, and nothing else is understood."""

from __future__ import annotations

import dataclasses
import json
import traceback
import typing
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.manifest import Policy
from weightfs.core.metalink import MAX_PIECES
from weightfs.engine import wire
from weightfs.sources.base import FetchSettings

ALL = [*typing.get_args(wire.ToWorker), *typing.get_args(wire.FromWorker)]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@st.composite
def messages(draw: st.DrawFn) -> wire.Message:
    cls = draw(st.sampled_from(ALL))
    hints = typing.get_type_hints(cls)
    values: dict[object, st.SearchStrategy[object]] = {
        int: st.integers(-(2**63), 2**64),
        str: TEXT,
        bool: st.booleans(),
        float: st.floats(0, 1e9),
        list[int]: st.lists(st.integers(0, 2**64), max_size=5),
        int | None: st.none() | st.integers(-(2**63), 2**64),
        float | None: st.none() | st.floats(0, 1e9),
        dict[str, typing.Any]: st.dictionaries(TEXT, TEXT, max_size=3),
    }
    message = cls(**{field.name: draw(values[hints[field.name]]) for field in dataclasses.fields(cls)})
    return typing.cast("wire.Message", message)


@given(messages())
def test_every_message_is_one_line_and_comes_back(message: wire.Message) -> None:
    line = wire.encode(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert wire.decode(line) == message


@given(st.lists(messages(), max_size=6), st.lists(st.integers(1, 700), max_size=40))
def test_a_stream_may_be_cut_anywhere(sent: list[wire.Message], cuts: list[int]) -> None:
    data = b"".join(wire.encode(message) for message in sent)

    async def main() -> list[wire.Message]:
        ours, theirs = trio.testing.memory_stream_one_way_pair()

        async def write() -> None:
            at = 0
            for cut in cuts:
                await ours.send_all(data[at : at + cut])
                at += cut
            await ours.send_all(data[at:])
            await ours.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            return [message async for message in wire.read_messages(theirs)]
        raise AssertionError

    assert trio.run(main) == sent


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"7",
        b"null",
        b"[]",
        b'"Alive"',
        b'["Alive"]',
        b'["Alive", {}, 1]',
        b'["Message", {}]',
        b'["Alive", {"extra": 1}]',
        b'["Alive", 7]',
        b'[["Alive"], {}]',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_what_is_not_ours_is_refused(line: bytes) -> None:
    with pytest.raises(wire.BadMessageError):
        wire.decode(line)


def test_no_error_quotes_what_may_hold_a_secret() -> None:
    secret = "%x" % 2**64  # not in the source, which a traceback shows
    with pytest.raises(wire.BadMessageError) as caught:
        wire.decode(b'["Hello", {"%s": 1}]' % secret.encode())
    assert secret not in "".join(traceback.format_exception(caught.value))


class Endless(trio.abc.ReceiveStream):
    """Gives pieces of `byte` for ever, and counts them."""

    def __init__(self, piece: bytes) -> None:
        self.piece = piece
        self.given = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        self.given += len(self.piece)
        return self.piece

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def drain(stream: AsyncIterator[wire.Message]) -> None:
    async for _ in stream:
        pass


async def test_a_line_without_end_is_bounded() -> None:
    stream = Endless(b"x" * 65_536)
    with pytest.raises(wire.BadMessageError, match="exceeds"):
        await drain(wire.read_messages(stream))
    assert stream.given <= wire.MAX_LINE + 2 * 65_536


async def test_a_line_that_is_too_long_is_refused_though_it_ends() -> None:
    stream = Endless(b"x" * (wire.MAX_LINE + 1) + b"\n")
    with pytest.raises(wire.BadMessageError, match="exceeds"):
        await drain(wire.read_messages(stream))


async def test_the_longest_job_fits() -> None:
    digests = "ab" * 32 * MAX_PIECES
    job = wire.FetchJob(
        1, "/" + "p" * 4000, 2**50, 2**26, 0, MAX_PIECES, "https://" + "u" * 4096, '"tag"', digests
    )
    hashing = wire.HashJob(2, "/p", 2**50, 2**26, 0, MAX_PIECES, digests, True, "ab" * 32)
    whole = dataclasses.replace(job, whole=True, wanted=list(range(MAX_PIECES)))
    ours, theirs = trio.testing.memory_stream_one_way_pair()
    async with trio.open_nursery() as nursery:
        data = b"".join(wire.encode(message) for message in (job, hashing, whole))
        nursery.start_soon(ours.send_all, data)
        reader = wire.read_messages(theirs)
        assert [await anext(reader) for _ in range(3)] == [job, hashing, whole]
        await ours.aclose()
        assert [message async for message in reader] == []


def test_fetch_settings_survive_the_way() -> None:
    settings = FetchSettings(
        headers=(("Authorization", "secret"),),
        private_hosts=("10.0.0.1",),
        trusted_keys=("RWQ",),
        policy=Policy.HOLD,
        header_origins=("https://host:8443",),
        proxy="http://proxy",
    )
    fields = json.loads(json.dumps(wire.fetch_settings_to_wire(settings)))
    assert wire.fetch_settings_from_wire(fields) == settings
