from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_report() -> ModuleType:
    """The bench's scripts are no package: they find their neighbours when they are run."""
    spec = importlib.util.spec_from_file_location("bench_report", Path(__file__).with_name("report.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


report = load_report()


@pytest.mark.parametrize(
    ("higher", "at_least", "bound", "reached"),
    [
        (True, True, 2.0, True),  # 200 against the better peer, 100
        (True, True, 2.1, False),
        (False, False, 5.0, False),  # 200 against the better peer, 20
        (False, False, 10.0, True),
    ],
)
def test_an_aim_is_held_against_the_better_peer_by_medians(
    higher: bool, at_least: bool, bound: float, reached: bool
) -> None:
    row = report.Measure("k", "title", "MB/s", higher)
    for contender, values in {"weightfs": [1, 200, 300], "a": [100, 100, 900], "b": [20, 20, 20]}.items():
        for value in values:
            row.add(contender, value)
    assert row.reached(report.Aim("aim", bound, at_least, ("a", "b"))) is reached


def test_an_aim_without_peers_is_a_plain_bound() -> None:
    row = report.Measure("k", "title", "ms", higher=False)
    row.add("weightfs", 4.0)
    assert row.reached(report.Aim("<= 5 ms", 5.0, at_least=False))
    assert not row.reached(report.Aim("<= 3 ms", 3.0, at_least=False))


def test_what_was_not_measured_is_neither_reached_nor_missed(tmp_path: Path) -> None:
    row = report.Measure("k", "title", "ms", higher=False, aims=(report.Aim("quick", 1.0, peers=("a",)),))
    assert row.reached(row.aims[0]) is None
    row.add("weightfs", 2.0)
    assert row.reached(row.aims[0]) is None
    text = report.write(tmp_path, [row], {"cores": "2"})
    assert "quick: not measured" in text
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["measures"][0]["contenders"]["weightfs"]["rounds"] == [2.0]
    assert written["measures"][0]["aims"][0]["reached"] is None
    assert (tmp_path / "bench.txt").read_text() == text


def test_more_aims_than_contenders_are_all_shown() -> None:
    aims = tuple(report.Aim(f"aim {number}", 1.0) for number in range(3))
    row = report.Measure("k", "title", "MB/s", higher=True, aims=aims)
    row.add("weightfs", 2.0)
    text = report.text_of([row], {})
    assert all(f"aim {number}: yes" in text for number in range(3))
