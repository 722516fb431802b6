"""What is in flight and where the process is, over a real socket; requests as a mount registers them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import trio
import trio.testing

from weightfs.control import debugging
from weightfs.control.client import find_daemon
from weightfs.control.server import serve
from weightfs.core.geometry import ByteSpan
from weightfs.core.manifest import BlobId
from weightfs.mount.requests import Requests
from weightfs.testing.fake_control import fake_operations

BOUND = 20.0


async def hang(requests: Requests, op: str, args: tuple[object, ...], blob: BlobId | None = None) -> None:
    request = requests.begin(op, args)
    try:
        if blob is not None:
            request.blob, request.span = blob, ByteSpan(4096, 8192)
        await requests.wait(trio.sleep_forever)
    finally:
        requests.end(request)


async def test_requests_with_what_they_wait_for_and_fetches(tmp_path: Path) -> None:
    blob, requests = BlobId(bytes(15) + b"\x01"), Requests()
    with trio.fail_after(BOUND):
        async with fake_operations(tmp_path) as (_, operations), trio.open_nursery() as nursery:
            await nursery.start(partial(serve, operations, tmp_path))
            async with find_daemon(tmp_path) as client:
                assert client is not None
                without = await client.inflight()
                assert without["requests"] == []
                assert len(without["fetches"]) == 1
                operations.requests = requests
                nursery.start_soon(hang, requests, "read", (7, 4096, 4096), blob)
                nursery.start_soon(hang, requests, "lookup", (1, b"a name", None))
                while len(requests) < 2:
                    await trio.lowlevel.checkpoint()
                document = await client.inflight()
            nursery.cancel_scope.cancel()
    by_op = {one["op"]: one for one in document["requests"]}
    read, lookup = by_op["read"], by_op["lookup"]
    assert (read["inode"], read["offset"], read["size"], read["blob"]) == (7, 4096, 4096, str(blob))
    assert read["wait"] == {"blob": str(blob), "start": 4096, "why": "https://h/m?… is slow"}
    assert (lookup["name"], lookup["wait"], lookup["offset"]) == ("a name", None, None)
    assert read["age"] >= read["waits"] >= 0
    assert document["fetches"] == [{"job": 1, "mirror": "https://h/m?…", "age": 2.5}]
    assert (document["requests_left_out"], document["left_behind"], document["overdue"]) == (0, 0, 0)


async def test_two_thousand_requests_are_told_in_part_and_counted() -> None:
    requests = Requests()

    class Engine:
        def explain(self, blob: BlobId, span: ByteSpan) -> None:
            return None

        def fetches(self) -> list[object]:
            return []

    async with trio.open_nursery() as nursery:
        for number in range(2000):
            nursery.start_soon(hang, requests, "read", (number + 1, 0, 1))
        await trio.testing.wait_all_tasks_blocked()
        document = debugging.inflight_document(Engine(), requests)
        nursery.cancel_scope.cancel()
    told = document["requests"]
    assert len(told) == debugging.REQUESTS_AT_MOST
    assert document["requests_left_out"] == 2000 - len(told)
    assert [one["number"] for one in told] == list(range(1, len(told) + 1))  # the oldest


async def test_stacks_over_the_socket(tmp_path: Path) -> None:
    requests = Requests()
    with trio.fail_after(BOUND):
        async with fake_operations(tmp_path) as (_, operations), trio.open_nursery() as nursery:
            await nursery.start(partial(serve, operations, tmp_path))
            nursery.start_soon(hang, requests, "read", (1, 0, 1))
            nursery.start_soon(hang, requests, "read", (2, 0, 1))
            await trio.testing.wait_all_tasks_blocked()
            async with find_daemon(tmp_path) as client:
                assert client is not None
                document = await client.stacks()
            nursery.cancel_scope.cancel()
    works = [one for one in document["tasks"] if "read request 1" in one["names"]]
    assert [(one["names"], one["count"]) for one in works] == [(["read request 1", "read request 2"], 2)]
    assert any("sleep_forever" in frame for frame in works[0]["frames"])
    assert any("stacks_document" in frame for one in document["threads"] for frame in one["frames"])
    assert (document["tasks_left_out"], document["threads_left_out"]) == (0, 0)
