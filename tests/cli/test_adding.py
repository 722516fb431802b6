"""`add`, `update`, `pin`, `unpin`: in this process, on files; the program itself is in test_whole.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from weightfs.cli.adding import Outcome, update_line
from weightfs.cli.looking import long_lines
from weightfs.core.ref import parse_ref
from weightfs.testing.commands import run
from weightfs.testing.repositories import MemoryRepository

DATA = bytes(range(256)) * 4096


def put(tmp_path: Path, name: str, data: bytes = DATA, *, at: int = 1_700_000_000) -> str:
    path = tmp_path / name
    path.write_bytes(data)
    os.utime(path, (at, at))
    return f"file://{path}"


def test_what_was_added_is_there_and_costs_its_header(tmp_path: Path) -> None:
    one, two = put(tmp_path, "one.gguf", DATA * 3), put(tmp_path, "two.gguf", DATA[:1000])
    done = run(tmp_path, "add", two, one)
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == [one, two]
    assert "3.0 MiB in 1 file, " in done.stdout
    assert run(tmp_path, "ls").stdout == f"{one}\n{two}\n"
    (document, _) = json.loads(run(tmp_path, "ls", "--json").stdout)["refs"]
    assert (document["present_bytes"], document["pinned"]) == (len(DATA), False)
    Path(tmp_path / "one.gguf").unlink()
    assert one in run(tmp_path, "add", one).stdout  # nobody was asked


def test_one_that_cannot_be_added_does_not_stop_the_others(tmp_path: Path) -> None:
    one, none = put(tmp_path, "one.gguf"), f"file://{tmp_path}/none.gguf"
    done = run(tmp_path, "add", none, one, code=3)
    assert done.stdout.startswith(f"{one}: ")
    assert done.stderr.count("\n") == 1
    assert "none.gguf" in done.stderr
    document = json.loads(run(tmp_path, "add", "--json", none, one, code=3).stdout)
    assert [ref["ref"] for ref in document["refs"]] == [one]
    assert [(error["ref"], error["exit_code"]) for error in document["errors"]] == [(none, 3)]


def test_update_says_old_and_new_and_that_it_went_back(tmp_path: Path) -> None:
    ref = put(tmp_path, "one.gguf")
    run(tmp_path, "add", ref)
    assert f"{ref}: unchanged, " in run(tmp_path, "update").stdout
    put(tmp_path, "one.gguf", DATA[:1000], at=1_700_000_009)
    (update,) = json.loads(run(tmp_path, "update", "--json", ref).stdout)["updates"]
    assert (update["outcome"], update["rolled_back"]) == ("updated", False)
    assert update["old_revision"] != update["new_revision"]
    put(tmp_path, "one.gguf")
    done = run(tmp_path, "update")
    back = f"{ref}: warning: went back to an older digest, from {update['new_revision']} to {update['old_revision']}"
    assert done.stdout == f"{back}\n"
    put(tmp_path, "one.gguf", DATA[:1000], at=1_700_000_009)
    (update,) = json.loads(run(tmp_path, "update", "--json").stdout)["updates"]
    assert (update["outcome"], update["rolled_back"]) == ("rolled back", True)


def test_update_goes_on_after_an_error_and_ends_with_the_worst(tmp_path: Path) -> None:
    refs = [put(tmp_path, name) for name in ("a.gguf", "b.gguf", "c.gguf")]
    run(tmp_path, "add", *refs)
    (tmp_path / "b.gguf").unlink()
    done = run(tmp_path, "update", code=3)
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == [refs[0], refs[2]]
    assert "b.gguf" in done.stderr
    done = run(tmp_path, "update", refs[0], f"file://{tmp_path}/x.gguf", code=2)
    assert "is not in the cache" in done.stderr
    assert done.stdout.startswith(refs[0])


def test_update_asks_only_for_what_may_move(tmp_path: Path) -> None:
    import hashlib

    ref = put(tmp_path, "one.gguf") + "#sha256=" + hashlib.sha256(DATA).hexdigest()
    run(tmp_path, "add", ref)
    (tmp_path / "one.gguf").unlink()
    assert run(tmp_path, "update").output == ""
    assert json.loads(run(tmp_path, "update", "--json").stdout) == {"updates": [], "errors": []}


def test_pin_and_unpin(tmp_path: Path) -> None:
    one, two = put(tmp_path, "one.gguf", DATA * 2), put(tmp_path, "two.gguf")
    run(tmp_path, "add", one)
    assert (
        run(tmp_path, "pin", one).stdout
        == f"{one}: pinned; a mount will fetch its rest, or `weightfs pull`\n"
    )
    assert run(tmp_path, "add", "--pin", two).stdout.endswith(", pinned\n")
    pinned = [ref["pinned"] for ref in json.loads(run(tmp_path, "ls", "--json").stdout)["refs"]]
    assert pinned == [True, True]
    assert f"{one} (pinned)" in run(tmp_path, "status").stdout
    assert [ref["pinned"] for ref in json.loads(run(tmp_path, "status", "--json").stdout)["refs"]] == pinned
    run(tmp_path, "pull", "-q", "--allow-unverifiable", one)
    assert run(tmp_path, "pin", one).stdout == f"{one}: pinned\n"
    assert run(tmp_path, "unpin", one).stdout == f"{one}: no longer pinned\n"
    assert run(tmp_path, "ls").stdout == f"{one}\n{two}\n"
    none = f"file://{tmp_path}/none.gguf"
    assert "is not in the cache" in run(tmp_path, "pin", none, code=2).stderr
    run(tmp_path, "rm", two)


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> MemoryRepository:
    made = MemoryRepository()
    for module in ("parts", "worker"):
        monkeypatch.setattr(f"weightfs.engine.{module}.open_source", made.open_source)
    return made


def test_a_repository_of_small_files_is_pulled_and_verified(
    tmp_path: Path, repository: MemoryRepository
) -> None:
    """What has git's SHA-1 alone is proven by it: the command ends with 0."""
    ref = parse_ref("hf://org/name")
    repository.push(ref, {f"dir/{number}.json": b"%d" % number for number in range(40)} | {"empty": b""})
    done = run(tmp_path, "pull", "-q", "--workers", "0", "hf://org/name")
    assert (done.stdout, done.stderr) == (f"{ref}: 70 B, verified\n", "")
    blobs = json.loads(run(tmp_path, "ls", "--json").stdout)["refs"][0]["blobs"]
    assert {(blob["sha256"], blob["digest"][:9], blob["trust"]) for blob in blobs} == {
        ("", "git-sha1:", "verified")
    }
    repository.contents.clear()
    run(tmp_path, "pull", "-q", "--workers", "0", "hf://org/name")
    run(tmp_path, "verify")


def test_every_spelling_of_an_ollama_name_is_one_model(tmp_path: Path, repository: MemoryRepository) -> None:
    ref = parse_ref("ollama://aya:8b")
    repository.push(ref, {"model.gguf": DATA}, digest="sha256")
    run(tmp_path, "add", "ollama://aya:8b")
    assert run(tmp_path, "add", "ollama://AYA:8B", "ollama://library/aya:8b").stdout.startswith(f"{ref}: ")
    assert run(tmp_path, "pin", "ollama://Aya:8b").stdout.startswith(f"{ref}: pinned")
    assert (
        run(tmp_path, "pull", "-q", "--workers", "0", "ollama://Aya:8B").stdout
        == f"{ref}: 1.0 MiB, verified\n"
    )
    assert run(tmp_path, "update", "ollama://Aya:8B").stdout.startswith(f"{ref}: unchanged, sha256:")
    assert run(tmp_path, "rm", "ollama://Aya:8B").stdout.startswith(f"{ref}: ")
    assert run(tmp_path, "ls").stdout == ""


@pytest.mark.parametrize("command", ["update", "pin", "unpin"])
def test_no_cache_is_made_for_a_question(tmp_path: Path, command: str) -> None:
    assert "there is no cache" in run(tmp_path, command, put(tmp_path, "one.gguf"), code=5).stderr


def test_what_is_typed_wrong(tmp_path: Path) -> None:
    assert "Missing argument" in run(tmp_path, "add", code=2).stderr
    assert "one by one" in run(tmp_path, "add", "--chunks", "c", "/a", "/b", code=2).stderr
    assert "one by one" in run(tmp_path, "update", "--chunks", "c", code=2).stderr
    assert "HF_ENDPOINT" in run(tmp_path, "add", "hf://o/m", code=2, HF_ENDPOINT="hub.lan").stderr
    assert not (tmp_path / "cache").exists()


def test_the_highest_code_counts(capsys: pytest.CaptureFixture[str]) -> None:
    failed = {name: {"error": f"{name} failed", "exit_code": code} for name, code in (("a", 5), ("b", 3))}
    assert Outcome({}, failed).tell("refs", update_line, as_json=False) == 5
    assert capsys.readouterr().err == "weightfs: a failed\nweightfs: b failed\n"


def test_a_pin_is_shown_to_people() -> None:
    document = {"ref": "hf://o/m@main", "trust": "verified", "size_bytes": 1, "complete": True, "blobs": []}
    assert long_lines([document | {"pinned": True}])[0].endswith("hf://o/m@main (pinned)")
    assert long_lines([document | {"pinned": False}])[0].endswith("hf://o/m@main")
