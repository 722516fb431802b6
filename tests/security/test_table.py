"""The threat table of docs/security.md cannot rot: each line names tests that exist, and defaults are as it says."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from weightfs.config import Config
from weightfs.mount.session import MountOptions

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "security.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def lines() -> list[str]:
    section = DOCUMENT.read_text().partition("## Threats")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][2:]


@cache
def _tests_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def test_every_threat_names_tests_that_exist() -> None:
    assert len(lines()) > 20
    for line in lines():
        named = TEST.findall(line.split(" | ")[-1])
        assert named, f"no test: {line}"
        assert line.count("tests/") == len(named), f"not written as a test: {line}"
        for path, name in named:
            assert name.startswith("test_"), name
            assert name in _tests_in(path), f"{path}::{name} is not there"


def test_what_lets_others_in_is_off_unless_it_is_asked_for() -> None:
    fields = Config.model_fields
    assert fields["allow_other"].default is False
    assert fields["browse"].default is False
    assert not MountOptions().allow_other
    assert not MountOptions().browse
