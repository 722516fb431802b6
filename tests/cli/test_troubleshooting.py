"""docs/troubleshooting.md has every word that a user can meet, each with a paragraph; the words come from the code."""

from __future__ import annotations

import ast
import errno
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightfs import errors
from weightfs.core.manifest import Trust
from weightfs.errors import FailureKind, WeightfsError
from weightfs.mount.errno import errno_of, errno_of_name

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
SOURCE = Path(errors.__file__).parent
ENOTCONN = "ENOTCONN"  # the kernel's own word, when the daemon is gone
LEAST_WORDS = 15  # of a paragraph


def anchor(heading: str) -> str:
    """As GitHub makes them: lower case, without punctuation, blanks as hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def paragraphs() -> dict[str, str]:
    """Each heading's text, by anchor."""
    parts = re.split(r"^##+ (.+)$", PAGE, flags=re.MULTILINE)
    return {anchor(heading): text.strip() for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def table(first_column: str) -> dict[str, str]:
    """The rows below a header that begins with `first_column`: each word of the first cell, with the whole row."""
    block = re.search(rf"^\| {re.escape(first_column)} \|.*\n\|[ \-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert block is not None, first_column
    rows: dict[str, str] = {}
    for row in block[1].splitlines():
        cell = row.split("|")[1]
        for word in re.findall(r"`([^`]+)`", cell) or [cell.strip()]:
            assert word not in rows, f"{word} is there twice"
            rows[word] = row
    return rows


def error_classes() -> set[str]:
    return {
        name
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, WeightfsError) and cls.__module__ == errors.__name__
    }


def exit_codes() -> set[str]:
    """Those of docs/configuration.md but success; they have those of every error among them."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    section = text.partition("## Exit codes")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE)
    found = {code for cell in cells for code in cell.split(", ")} - {"0"}
    assert {str(getattr(errors, name).exit_code) for name in error_classes()} <= found
    return found


def raised_errnos() -> set[str]:
    """What the mount's handlers answer: `FUSEError(errno.X)`, and both tables.

    Not `passthrough`: its file is for weightfs' own eyes.
    """
    found = set()
    for path in (SOURCE / "mount").glob("*.py"):
        if path.name == "passthrough.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("FUSEError") and node.args:
                argument = ast.unparse(node.args[0])
                if match := re.fullmatch(r"(?:errno|pyfuse3)\.(E\w+)", argument):
                    found.add(match[1].replace("ENOATTR", "ENODATA"))
    for kind in FailureKind:
        found.add(errno.errorcode[errno_of(errors.ReadError("", kind=kind))])
        found.add(errno.errorcode[errno_of_name(errors.SourceError("", kind=kind))])
    for error in (errors.NoSpaceError(""), TimeoutError(), ValueError()):
        found.add(errno.errorcode[errno_of_name(error)])
    return found


def doctors_checks() -> set[str]:
    """The first argument of every verdict in `app.doctor`, and the names of its steps that may hang."""
    found: set[str] = set()
    for path in (SOURCE / "app" / "doctor").glob("*.py"):
        module = importlib.import_module(f"weightfs.app.doctor.{path.stem}".removesuffix(".__init__"))
        tree = ast.parse(path.read_text())
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and path.stem != "verdicts":
                found |= set(_named(function, vars(module)))
    return found


def _named(function: ast.AST, names: dict[str, object]) -> Iterator[str]:
    local = {
        node.targets[0].id: node.value.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    for node in ast.walk(function):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called, first = ast.unparse(node.func), node.args[0]
        if called == "partial" and ast.unparse(first) == "_in_thread":
            first = node.args[1]
        elif called not in ("ok", "warning", "problem"):
            continue
        match first:
            case ast.Constant(value=str(text)):
                yield text
            case ast.Name(id=name) if name in local:
                yield local[name]
            case ast.Name(id=name) | ast.Attribute(attr=name):
                value = names.get(name)
                if isinstance(value, str):
                    yield value


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("`failure`", {str(kind) for kind in FailureKind}),
        ("`kind`", error_classes()),
        ("exit code", exit_codes()),
        ("errno of the mount", raised_errnos() | {ENOTCONN}),
        ("trust", {str(trust) for trust in Trust}),
        ("check", doctors_checks()),
    ],
)
def test_every_word_has_a_row_and_no_row_is_left_over(header: str, words: set[str]) -> None:
    rows = table(header)
    assert set(rows) == words
    # What is well, and what says itself what it means, needs no paragraph.
    plain = {"ENOENT", str(Trust.PROVISIONAL)}
    for word, row in rows.items():
        assert word in plain or re.search(r"\]\(", row), f"{word} has no paragraph"


def test_the_words_were_found() -> None:
    assert len(doctors_checks()) >= 17
    assert {"EIO", "ESTALE", "EROFS", "EACCES"} <= raised_errnos()


def test_every_link_of_the_page_leads_to_a_paragraph() -> None:
    known = paragraphs()
    for target in re.findall(r"\]\(#([^)]+)\)", PAGE):
        assert target in known, target
        if not target.startswith("what-the-doctor"):
            assert len(known[target].split()) >= LEAST_WORDS, target


@pytest.mark.parametrize("page", ["docs/monitoring/README.md", "docs/systemd.md", "docs/configuration.md"])
def test_other_pages_link_to_what_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"troubleshooting\.md#([^)\s]+)\)", text):
        assert target in paragraphs(), target


def test_every_alert_names_a_paragraph() -> None:
    text = (ROOT / "docs" / "monitoring" / "alerts.yaml").read_text()
    targets = re.findall(r'runbook: "docs/troubleshooting\.md#([^"]+)"', text)
    assert len(targets) == text.count("- alert:")
    assert set(targets) <= set(paragraphs())


def test_every_paragraph_can_be_found_by_a_word() -> None:
    """A heading below "Errors and the way out" that no row leads to is found by its own first words alone."""
    section = PAGE.partition("## Errors and the way out")[2]
    headings = {anchor(heading) for heading in re.findall(r"^### (.+)$", section, re.MULTILINE)}
    linked = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert headings - linked == {"metrics-cannot-be-served"}
