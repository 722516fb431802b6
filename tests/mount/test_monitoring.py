"""Alert rules, dashboard and the list of metrics, held against what a real mount serves; promtool judges."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from weightfs.control.address import usable_address
from weightfs.testing.daemon import Daemon
from weightfs.testing.nginx import Nginx, free_port
from weightfs.testing.waiting import until

pytestmark = [pytest.mark.mount, pytest.mark.nginx]

DOCS = Path(__file__).parents[2] / "docs"
MONITORING = DOCS / "monitoring"
RULES_TEST = Path(__file__).with_name("alerts_test.yaml")
NAME = re.compile(r"\b(?:weightfs|process)_[a-z_]+")
SIZE = 3 << 20


def promtool(*arguments: str, text: bytes = b"") -> str:
    done = subprocess.run(["promtool", *arguments], input=text, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return (done.stdout + done.stderr).decode()


def expressions() -> dict[str, str]:
    """Of the rules and of the dashboard, by where they are."""
    rules = (MONITORING / "alerts.yaml").read_text()
    found = {
        f"rule {number}": one for number, one in enumerate(re.findall(r"^ +expr: (.+)$", rules, re.MULTILINE))
    }
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    return found


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return document


def get(connection: http.client.HTTPConnection) -> tuple[int, bytes]:
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    try:
        return answer.status, answer.read()
    finally:
        connection.close()


class ControlConnection(http.client.HTTPConnection):
    """To a daemon's control socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("weightfs")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        with usable_address(self._path) as address:
            self.sock.connect(address)


@pytest.fixture(scope="module")
def scrape(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a mount that has read something: from its port, and the same names from its socket."""
    root = tmp_path_factory.mktemp("origin")
    (root / "m.bin").write_bytes(b"m" * SIZE)
    port = free_port()
    listen = ("--metrics-listen", f"127.0.0.1:{port}")
    home = tmp_path_factory.mktemp("daemon")
    with Nginx(root) as origin, Daemon(home, origin.url("m.bin"), options=listen) as daemon:
        daemon.start()
        assert daemon.run("print(len(open(path, 'rb').read()))", origin.url("m.bin")) == str(SIZE)
        status, body = get(http.client.HTTPConnection("127.0.0.1", port, timeout=30))
        assert status == 200
        status, also = get(ControlConnection(daemon.cache / "control.sock"))
        assert status == 200
        assert names(also.decode()) == names(body.decode())
        assert daemon.stop() == 0, daemon.log
    return body.decode()


def names(text: str) -> set[str]:
    """Of samples, as they stand in expressions."""
    return {sample.name for family in parse_text(text) for sample in family.samples}


def test_promtool_takes_a_real_scrape(scrape: str) -> None:
    assert promtool("check", "metrics", text=scrape.encode()) == ""


def test_the_scrape_tells_what_was_done(scrape: str) -> None:
    found = {
        sample.name: sample.value
        for family in parse_text(scrape)
        for sample in family.samples
        if not sample.labels
    }
    assert found["weightfs_mount_read_bytes_total"] == SIZE
    assert found["weightfs_fetched_bytes_total"] == SIZE
    assert found["weightfs_mount_failed_reads_total"] == 0
    assert found["weightfs_chunk_wait_seconds_count"] >= 1
    assert found["weightfs_fetch_workers"] == found["weightfs_fetch_workers_wanted"] >= 1
    assert found["process_open_fds"] > 0


def test_no_ref_and_no_path_is_a_label(scrape: str) -> None:
    labels = {
        (name, value)
        for family in parse_text(scrape)
        for sample in family.samples
        for name, value in sample.labels.items()
    }
    assert {name for name, _ in labels} == {"version", "trust", "kind", "priority", "host", "le"}
    assert not [value for _, value in labels if "/" in value or "m.bin" in value]


def test_every_metric_is_described_and_no_other(scrape: str) -> None:
    page = (MONITORING / "README.md").read_text()
    described = set(re.findall(r"^\| `((?:weightfs|process)_\w+)`", page, re.MULTILINE))
    served = {
        f"{family.name}_total" if family.type == "counter" else family.name for family in parse_text(scrape)
    }
    assert described == served


def test_rules_and_dashboard_name_what_is_served(scrape: str) -> None:
    served = names(scrape)
    used = {where: set(NAME.findall(text)) for where, text in expressions().items()}
    assert {where: found - served for where, found in used.items() if found - served} == {}
    assert sum(map(len, used.values())) > 30, "the names were found"


def test_promtool_takes_the_rules() -> None:
    assert "SUCCESS" in promtool("check", "rules", str(MONITORING / "alerts.yaml"))


def test_every_rule_fires_when_it_should_and_not_before() -> None:
    promtool("test", "rules", str(RULES_TEST))
    alerts = set(re.findall(r"- alert: (\w+)", (MONITORING / "alerts.yaml").read_text()))
    fired = set(re.findall(r"alertname: (\w+)\n +exp_alerts:\n", RULES_TEST.read_text()))
    assert fired == alerts


def test_every_expression_of_the_dashboard_is_one(tmp_path: Path) -> None:
    rules = [
        {
            "record": f"panel:{number}",
            "expr": text.replace("$__rate_interval", "5m").replace("$instance", ".*"),
        }
        for number, text in enumerate(expressions().values())
    ]
    file = tmp_path / "rules.json"  # YAML, too
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(file))


def test_panels_do_not_overlap_and_have_their_own_numbers() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_a_port_in_use_costs_the_metrics_and_not_the_models(tmp_path: Path) -> None:
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "m.bin").write_bytes(b"m" * 1000)
    with socket.socket() as other, Nginx(tmp_path / "origin") as origin:
        other.bind(("127.0.0.1", 0))
        other.listen()
        listen = ("--metrics-listen", f"127.0.0.1:{other.getsockname()[1]}")
        with Daemon(tmp_path, origin.url("m.bin"), options=listen) as daemon:
            daemon.start()
            until(lambda: "metrics cannot be served at 127.0.0.1:" in daemon.log, "the log says so")
            assert "Address already in use; end who has the port, or set another metrics-listen" in daemon.log
            assert daemon.run("print(len(open(path, 'rb').read()))", origin.url("m.bin")) == "1000"
            status, body = get(ControlConnection(daemon.cache / "control.sock"))
            assert status == 200
            assert b"weightfs_refs 1.0" in body
            assert daemon.stop() == 0, daemon.log
