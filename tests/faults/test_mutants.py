"""The table of mutants does not rot: what each takes out is still there, once, and so are the tests that notice."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    spec = importlib.util.spec_from_file_location("weightfs_mutants", Path(__file__).with_name("mutants.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_text_is_there_once_and_every_test_exists(mutants: ModuleType) -> None:
    assert mutants.faults_of_table() == []


def test_every_numbered_line_has_one(mutants: ModuleType) -> None:
    assert {str(number) for number in range(1, 13)} <= {mutant.line for mutant in mutants.MUTANTS}


def test_a_table_that_has_rotted_is_noticed(mutants: ModuleType) -> None:
    good = mutants.Mutant(
        "1",
        "-",
        "core/retry.py",
        "RETRY_AFTER_CAP = 300.0",
        "",
        ("core/test_retry.py::test_junk_is_no_time",),
    )
    wrong = {
        "text": ("nowhere",),
        "often": ("FailureKind",),
        "test": ("RETRY_AFTER_CAP = 300.0", "core/test_retry.py::test_none"),
    }
    assert mutants.faults_of_table((good,)) == []
    for text, *tests in wrong.values():
        rotten = mutants.Mutant("1", "-", "core/retry.py", text, "", tuple(tests) or good.tests)
        assert len(mutants.faults_of_table((rotten,))) == 1


def test_only_a_test_that_fails_by_itself_counts(mutants: ModuleType) -> None:
    mutant = mutants.MUTANTS[0]
    (node,) = mutant.node_ids
    assert mutants.verdict(mutant, 1, [f"FAILED {node} - assert 1 == 2"]) == "killed"
    assert mutants.verdict(mutant, 0, []) == "survived"
    assert mutants.verdict(mutant, 1, ["FAILED tests/other.py::test - assert 1 == 2"]).startswith("survived")
    for line in (
        f"FAILED {node} - ImportError: no",
        f"FAILED {node} - Failed: Timeout (>100.0s) from pytest-timeout.",
    ):
        assert mutants.verdict(mutant, 1, [line]).startswith("broken")
    assert "ended with 4" in mutants.verdict(mutant, 4, ["ERROR: not found"])
