"""Metrics over real sockets; only what is measured is made up."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from trio.testing import MockClock

from weightfs.control.address import socket_path
from weightfs.control.listener import BoundedListener
from weightfs.control.metrics import SCRAPE_SECONDS, MountMeasures, Scraper
from weightfs.control.metrics_port import RETRY_SECONDS, serve_metrics
from weightfs.control.server import serve
from weightfs.core.manifest import Trust
from weightfs.core.plan import Priority
from weightfs.engine.measures import BlobMeasures, HostMeasures, Measures
from weightfs.engine.tally import MAX_HOSTS, WAIT_BUCKETS, Histogram, HistogramMeasures
from weightfs.errors import FailureKind
from weightfs.testing.fake_control import fake_operations
from weightfs.testing.nginx import free_port

BOUND = 20.0  # seconds; a hang becomes a failure
MAX_SERIES = 260  # as docs/monitoring/README.md promises
MOUNT = MountMeasures(7, 700, 1, 0, 0, 0, 3, 2, 4, 12.5)


def waits(*seconds: float) -> HistogramMeasures:
    histogram = Histogram(WAIT_BUCKETS)
    for one in seconds:
        histogram.observe(one)
    return histogram.frozen()


def measures() -> Measures:
    return Measures(
        refs=2,
        pinned_refs=1,
        blobs=BlobMeasures(dict.fromkeys((str(trust) for trust in Trust), 1), 1, 0, 0, 0, 1000, 500),
        waiting_readers=0,
        in_flight={priority.name.lower(): 0 for priority in Priority},
        workers=2,
        workers_wanted=2,
        worker_restarts=0,
        held_bytes=500,
        limit_bytes=None,
        free_bytes=10,
        total_bytes=100,
        evicted_bytes=0,
        fetched_bytes=500,
        mismatched_chunks=0,
        disk_faults=0,
        in_trouble=False,
        read_waits=waits(0.001, 0.02, 1000.0),
        read_failures={str(kind): 0 for kind in FailureKind},
        chunk_waits=waits(),
        fetches=waits(0.5),
        fetch_failures={str(kind): 0 for kind in FailureKind} | {"timeout": 3},
        hosts=(HostMeasures("cdn.example.com", 500, 3, 0), HostMeasures('od"d\\host', 0, 1, 0)),
    )


class Measured:
    """`metrics.MeasuredEngine`."""

    def __init__(self, found: Measures) -> None:
        self.found = found
        self.hangs = False

    async def measures(self) -> Measures:
        await trio.lowlevel.checkpoint()
        if self.hangs:
            await trio.sleep_forever()
        return self.found


def samples(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


@contextlib.asynccontextmanager
async def client(cache: Path, engine: Measured) -> AsyncIterator[httpx.AsyncClient]:
    with trio.fail_after(BOUND):
        async with fake_operations(cache) as (_, operations), trio.open_nursery() as nursery:
            scraper = Scraper(engine, lambda: MOUNT)

            async def run(task_status: trio.TaskStatus[None]) -> None:
                await serve(operations, cache, scraper=scraper, task_status=task_status)

            await nursery.start(run)
            transport = httpx.AsyncHTTPTransport(uds=str(socket_path(cache)))
            async with httpx.AsyncClient(transport=transport, base_url="http://weightfs") as http:
                yield http
            nursery.cancel_scope.cancel()


async def test_the_text_format_is_the_default(tmp_path: Path) -> None:
    async with client(tmp_path, Measured(measures())) as http:
        answer = await http.get("/metrics", headers={"accept": "*/*"})
    assert answer.status_code == 200
    assert answer.headers.get_list("content-type") == ["text/plain; version=0.0.4; charset=utf-8"]
    found = samples(answer.text)
    assert found["weightfs_refs",] == 2
    assert found["weightfs_blobs", "quarantined"] == 1
    assert found["weightfs_cache_limit_bytes",] == float("inf")
    assert found["weightfs_fetch_failures_total", "timeout"] == 3
    assert found["weightfs_mirror_fetched_bytes_total", "cdn.example.com"] == 500
    assert found["weightfs_mirror_failures_total", 'od"d\\host'] == 1
    assert found["weightfs_mount_oldest_read_seconds",] == 12.5
    assert found["process_start_time_seconds",] > 0


async def test_a_histogram_is_cumulative_and_its_bounds_are_inclusive(tmp_path: Path) -> None:
    async with client(tmp_path, Measured(measures())) as http:
        found = samples((await http.get("/metrics")).text)
    name = "weightfs_read_wait_seconds"
    assert found[f"{name}_bucket", "0.001"] == 1
    assert found[f"{name}_bucket", "0.005"] == 1
    assert found[f"{name}_bucket", "0.025"] == 2
    assert found[f"{name}_bucket", "600.0"] == 2
    assert found[f"{name}_bucket", "+Inf"] == found[f"{name}_count",] == 3
    assert found[f"{name}_sum",] == pytest.approx(1000.021)


async def test_openmetrics_for_who_names_it(tmp_path: Path) -> None:
    async with client(tmp_path, Measured(measures())) as http:
        accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
        answer = await http.get("/metrics", headers={"accept": accept})
        [content_type] = answer.headers.get_list("content-type")
    assert content_type == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert answer.text.endswith("# EOF\n")
    families = next(map(parse_openmetrics, [answer.text]))  # untyped: it can be passed on, not called
    assert "weightfs_fetched_bytes" in {family.name for family in families}


async def test_a_command_without_a_mount_has_no_metrics_of_one() -> None:
    text = (await Scraper(Measured(measures()), None).scrape("")).body.decode()
    assert "weightfs_refs" in text
    assert "weightfs_mount" not in text


async def test_an_accept_that_is_none_gets_the_text(tmp_path: Path) -> None:
    async with client(tmp_path, Measured(measures())) as http:
        for accept in (";;,=;", "application/openmetrics-text;version=x", "x" * 4000):
            answer = await http.get("/metrics", headers={"accept": accept})
            assert answer.status_code == 200, (accept, answer.text)


async def test_the_number_of_series_is_bounded() -> None:
    hosts = tuple(HostMeasures(f"h{number}.example.com", 1, 1, 1) for number in range(MAX_HOSTS + 1))
    body = (await Scraper(Measured(replace(measures(), hosts=hosts)), lambda: MOUNT).scrape("")).body
    assert len(samples(body.decode())) < MAX_SERIES


async def test_promtool_finds_nothing_to_complain_of() -> None:
    body = (await Scraper(Measured(measures()), lambda: MOUNT).scrape("")).body
    done = await trio.run_process(
        ["promtool", "check", "metrics"], stdin=body, capture_stdout=True, capture_stderr=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


async def test_a_scrape_that_takes_too_long_is_given_up(autojump_clock: MockClock) -> None:
    engine = Measured(measures())
    engine.hangs = True
    with pytest.raises(trio.TooSlowError):
        await Scraper(engine, None).scrape("")
    assert trio.current_time() == SCRAPE_SECONDS


# ---- the port


@contextlib.asynccontextmanager
async def port_of(host: str, port: int) -> AsyncIterator[None]:
    scraper = Scraper(Measured(measures()), lambda: MOUNT)
    with trio.fail_after(BOUND):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_metrics, scraper, host, port)
            yield
            nursery.cancel_scope.cancel()


async def ask(host: str, port: int, path: str, method: str = "GET") -> httpx.Response:
    """As soon as somebody listens."""
    shown = f"[{host}]" if ":" in host else host
    async with httpx.AsyncClient(trust_env=False) as http:
        while True:
            try:
                return await http.request(method, f"http://{shown}:{port}{path}")
            except httpx.ConnectError:
                await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1"])
async def test_the_port_serves_metrics_and_nothing_else(host: str) -> None:
    port = free_port()
    async with port_of(host, port):
        answer = await ask(host, port, "/metrics")
        assert answer.status_code == 200
        assert samples(answer.text)["weightfs_refs",] == 2
        for path, method in (("/v1/status", "GET"), ("/v1/refs", "POST"), ("/", "GET")):
            assert (await ask(host, port, path, method)).status_code == 404
        assert (await ask(host, port, "/metrics", "POST")).status_code == 405


async def test_a_port_in_use_is_one_sentence_and_tried_again(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    caplog.set_level(logging.INFO, logger="weightfs")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        async with trio.open_nursery() as nursery:
            scraper = Scraper(Measured(measures()), None)
            nursery.start_soon(serve_metrics, scraper, "127.0.0.1", port)
            await trio.sleep(3.5 * RETRY_SECONDS)  # of the mock clock
            told = [record.getMessage() for record in caplog.records]
            [sentence] = told
            assert sentence == (
                f"metrics cannot be served at 127.0.0.1:{port}: Address already in use; end who has the port, "
                "or set another metrics-listen; it is tried again every 30 s"
            )
            other.close()
            await trio.sleep(RETRY_SECONDS)
            assert caplog.records[-1].getMessage() == f"metrics are at http://127.0.0.1:{port}/metrics"
            nursery.cancel_scope.cancel()


async def test_a_listener_that_breaks_is_made_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """An error of accept(2) comes in a group; it must not end the daemon, whose nursery it is."""
    caplog.set_level(logging.INFO, logger="weightfs")

    async def broken(listener: BoundedListener) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        raise OSError(71, "Protocol error")

    port = free_port()
    with monkeypatch.context() as patch:
        patch.setattr(BoundedListener, "accept", broken)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_metrics, Scraper(Measured(measures()), None), "127.0.0.1", port)
            await trio.sleep(1)  # of the mock clock
            assert f"127.0.0.1:{port}: Protocol error;" in caplog.records[-1].getMessage()
            patch.undo()
            await trio.sleep(RETRY_SECONDS)
            assert caplog.records[-1].getMessage() == f"metrics are at http://127.0.0.1:{port}/metrics"
            nursery.cancel_scope.cancel()
