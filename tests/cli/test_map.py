"""`weightfs map` and `weightfs ls -l REF`: pictures, sentences, and the real program, on a mount and an idle cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from weightfs.cli.adding import headers_of
from weightfs.cli.looking import chosen, details_lines, printable
from weightfs.cli.mapping import (
    COLOURED,
    PLAIN,
    check,
    choose_palette,
    draw,
    percent,
    picture,
    shortened,
    show,
)
from weightfs.control.ports import Operations
from weightfs.core.ref import parse_ref
from weightfs.engine.settings import EngineSettings, FillMode
from weightfs.errors import IntegrityError, RefError, SourceError, UsageError
from weightfs.testing.commands import invoke
from weightfs.testing.daemon import Daemon
from weightfs.testing.engines import running_engine
from weightfs.testing.models import ModelShape, make_gguf
from weightfs.testing.mounts import can_mount
from weightfs.testing.waiting import until

REF = "https://models.example.com/m.gguf"
MIB = 1 << 20
ROW = {"name": "blk.0.w", "dtype": "Q4_K", "shape": [256, 4], "offset": 64, "size_bytes": 100}


def file_of(
    *rows: dict[str, Any], header: str = "read", problem: str = "", by: str = "tensors"
) -> dict[str, Any]:
    sums = {"size_bytes": 1000, "cached_bytes": 300, "verified_bytes": 100}
    return {"path": "models/https/h/m.gguf", "header": header, "problem": problem, **sums, by: list(rows)}


def row_of(cached: int, verified: int, **more: Any) -> dict[str, Any]:
    return {**ROW, "cached_bytes": cached, "verified_bytes": verified, **more}


def document_of(*files: dict[str, Any]) -> dict[str, Any]:
    return {"ref": REF, "by": "tensor", "files": list(files)}


# ---- bars


@given(st.integers(0, 10**12), st.data(), st.integers(8, 40))
def test_a_bar_is_full_or_empty_only_where_that_is_true(size: int, draws: st.DataObject, width: int) -> None:
    cached = draws.draw(st.integers(0, size))
    verified = draws.draw(st.integers(0, cached))
    bar = draw(size, cached, verified, width, PLAIN)
    assert len(bar) == width
    assert (bar == "#" * width) == (verified == size)
    assert ("." not in bar) == (cached == size)
    assert ("#" in bar) == (verified > 0 or size == 0)
    assert bar == "".join(sorted(bar, key="#=.".index)), "what is proven comes first"


def test_shares() -> None:
    assert [percent(part, 1000) for part in (0, 1, 500, 999, 1000)] == [0, 1, 50, 99, 100]
    assert draw(100, 50, 20, 10, PLAIN) == "##===....."


@given(st.text(max_size=60), st.integers(4, 40))
def test_names_are_shortened_in_the_middle(name: str, width: int) -> None:
    short = shortened(name, width)
    assert len(short) == min(len(name), width)
    assert short == name if len(name) <= width else short[: width // 2] == name[: width // 2]


@given(st.integers(60, 200), st.lists(st.integers(1, 80), min_size=1, max_size=5))
def test_a_picture_keeps_to_the_width(width: int, lengths: list[int]) -> None:
    rows = [row_of(50, 10, name="x" * length) for length in lengths]
    lines = picture(document_of(file_of(*rows)), width, PLAIN)
    assert max(map(len, lines[2:])) <= max(width, 80)
    if width >= 80:
        assert max(map(len, lines)) <= width


def test_a_picture() -> None:
    lines = picture(document_of(file_of(row_of(50, 25), row_of(0, 0, name="o\x1b[2J", shape=[]))), 200, PLAIN)
    assert lines == [
        "# verified  = cached  . not cached",
        "",
        "models/https/h/m.gguf  300 B of 1000 B cached, 100 B verified",
        "TENSOR   TYPE  SHAPE  OFFSET   SIZE  CACHED",
        "blk.0.w  Q4_K  256x4      64  100 B     50%  " + "#" * 10 + "=" * 10 + "." * 20,
        "o\N{REPLACEMENT CHARACTER}[2J    Q4_K  1          64  100 B      0%  " + "." * 40,
    ]
    layer = {**row_of(100, 100, name="blk.0"), "tensor_count": 9}
    lines = picture(document_of(file_of(layer, by="layers")), 80, COLOURED)
    assert lines[3].startswith("LAYER  TYPE  TENSORS")
    assert lines[4].endswith("100%  " + "█" * 35)


def test_colours_are_for_terminals_that_have_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert choose_palette() is PLAIN, "pytest has taken standard output away"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert choose_palette() is COLOURED
    monkeypatch.setenv("FORCE_COLOR", "1")
    show(document_of(file_of(row_of(50, 25))))
    assert "\x1b[32m" in capsys.readouterr().out
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
        assert choose_palette() is PLAIN
        monkeypatch.delenv(name)


# ---- sentences


def test_what_cannot_be_mapped_says_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"no GGUF or safetensors file.*`weightfs ls -l"):
        check(document_of(), fetched=False)
    missing = document_of(file_of(header="missing", problem="header not cached yet"))
    with pytest.raises(UsageError, match=f"header not cached yet; `weightfs map --fetch {REF}`"):
        check(missing, fetched=False)
    with pytest.raises(SourceError, match="cannot be mapped: header"):
        check(missing, fetched=True)
    with pytest.raises(IntegrityError, match="look where it comes from"):
        check(document_of(file_of(header="malformed", problem="it is of GGUF version 1")), fetched=False)
    with pytest.raises(UsageError, match="`weightfs pull"):
        check(document_of(file_of(header="withheld", problem="the policy is hold")), fetched=False)
    check(document_of(file_of(header="malformed", problem="x"), file_of()), fetched=False)


MODEL = {
    "name": "m.gguf",
    "format": "gguf",
    "architecture": "llama",
    "quantisation": "Q4_K_M",
    "context_length": 8192,
    "parameter_count": 8_030_261_312,
    "tensor_count": 291,
    "tensor_bytes": 4_912_898_304,
    "files": ["models/https/h/m.gguf"],
    "unread": 0,
}
FILE = {
    "path": "models/https/h/m.gguf",
    "size_bytes": 4_920_734_272,
    "cached_bytes": 8 * MIB,
    "verified_bytes": 0,
    "trust": "attested",
    "header": "read",
    "problem": "",
}


def test_a_ref_in_detail() -> None:
    document = {"ref": REF, "models": [MODEL], "files": [FILE]}
    assert details_lines(document) == [
        REF,
        "  m.gguf",
        "    format        gguf",
        "    architecture  llama",
        "    quantisation  Q4_K_M",
        "    context       8192 tokens",
        "    parameters    8.03 B",
        "    tensors       291 (4.6 GiB)",
        "     SIZE   CACHED  TRUST     FILE",
        "  4.6 GiB  8.0 MiB  attested  models/https/h/m.gguf",
    ]


def test_a_ref_of_which_not_everything_is_known() -> None:
    vague = {**MODEL, "architecture": "", "context_length": None, "files": ["a", "b"], "unread": 1}
    unread = {**MODEL, "unread": 1}
    missing = {**FILE, "header": "missing", "problem": "header not cached yet"}
    lines = details_lines({"ref": REF, "models": [vague, unread], "files": [missing]})
    assert "    architecture  not said" in lines
    assert "    context       not said" in lines
    assert "    note          1 of 2 files are not counted: no header" in lines
    assert lines[-2:] == [
        "  models/https/h/m.gguf: header not cached yet",
        f"  `weightfs ls -l --fetch {REF}` fetches headers that are missing",
    ]
    lines = details_lines({"ref": REF, "models": [], "files": [{**FILE, "header": "none"}]})
    assert lines[-1] == "  no GGUF or safetensors file: nothing is known of a model"
    assert printable("a\x1b[31m\n") == "a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}"


def test_refs_that_are_named() -> None:
    refs = [{"ref": "ollama://aya:8b"}, {"ref": REF}]
    assert chosen(refs, []) == refs
    assert chosen(refs, [REF, "ollama://Aya:8b"]) == [refs[1], refs[0]]
    with pytest.raises(RefError, match="`weightfs ls` lists"):
        chosen(refs, ["https://h/n"])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["map"], 2, "Missing argument 'REF'"),
        (["map", "ftp://h/m.gguf"], 2, "ftp"),
        (["map", REF, "--by", "colour"], 2, "'colour' is not one of 'layer', 'tensor'"),
        (["map", REF], 5, "there is no cache at"),
        (["ls", "-l", REF], 5, "there is no cache at"),
        (["ls", "-l", "nonsense"], 2, "nonsense"),
        (["ls", "--fetch"], 2, "`weightfs ls -l --fetch REF`"),
        (["ls", "--fetch", REF], 2, "`weightfs ls -l --fetch REF`"),
    ],
)
def test_what_is_typed_wrong(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    result = invoke(tmp_path, *arguments)
    assert result.exit_code == code, result.stderr
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "cache").exists()


async def test_headers_that_do_not_come_are_an_error_only_for_who_waits_for_them() -> None:
    class Slow:
        async def headers(self, ref: str, *, wait: float) -> dict[str, Any]:
            await trio.lowlevel.checkpoint()
            return {"ref": ref, "ready": wait > 1000}

    operations = cast("Operations", Slow())
    await headers_of(operations, {"ref": REF}, asked=False)
    with pytest.raises(SourceError, match=f"`weightfs ls -l --fetch {REF}`"):
        await headers_of(operations, {"ref": REF}, asked=True)


# ---- the program


class Model:
    """A GGUF file on this machine as origin, and two refs to it: with its digest, and something that is no model."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "m.gguf"
        make_gguf(self.path, ModelShape(dim=192, layers=4, ff=384))  # 6 MiB
        self.data = self.path.read_bytes()
        self.ref = f"file://{self.path}#sha256={hashlib.sha256(self.data).hexdigest()}"
        (folder / "notes.txt").write_text("x" * 1000)
        self.notes = f"file://{folder}/notes.txt"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    folder = (tmp_path / "origin").resolve()
    folder.mkdir()
    return Model(folder)


def told(daemon: Daemon, *arguments: str, code: int = 0) -> str:
    done = daemon.cli(*arguments)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr


def spoken(daemon: Daemon, *arguments: str) -> Any:
    return json.loads(told(daemon, *arguments, "--json"))


@pytest.mark.mount
@pytest.mark.timeout(180)
@pytest.mark.skipif(not can_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN")
def test_a_mount_and_then_the_idle_cache_tell_what_is_there(tmp_path: Path, model: Model) -> None:
    with Daemon(tmp_path / "daemon", model.ref, model.notes, options=["--fill", "never"]) as daemon:
        daemon.start()

        def known() -> Any:
            ref = daemon.ask(lambda client: client.details(model.ref))
            return ref if ref["files"][0]["header"] == "read" else None

        assert until(known, "the header was fetched")
        (ref,) = spoken(daemon, "ls", "-l", model.ref)["refs"]
        (found,) = ref["models"]
        assert (found["architecture"], found["quantisation"], found["context_length"]) == (
            "llama",
            "F32",
            512,
        )
        assert ref["files"][0]["cached_bytes"] == MIB
        (file,) = spoken(daemon, "map", model.ref)["files"]
        assert [layer["name"] for layer in file["layers"]][1:5] == ["blk.0", "blk.1", "blk.2", "blk.3"]
        daemon.run("os.pread(cold(), 10, 3 << 20)", model.ref)
        (file,) = spoken(daemon, "map", model.ref, "--by", "tensor")["files"]
        assert file["cached_bytes"] >= 2 * MIB
        assert {tensor["verified_bytes"] for tensor in file["tensors"]} == {0}
        for tensor in file["tensors"]:
            if tensor["offset"] <= 3 * MIB < tensor["offset"] + tensor["size_bytes"]:
                assert tensor["cached_bytes"] > 0
        assert "llama" in told(daemon, "ls", "-l", model.ref)
        assert "`weightfs ls -l" in told(daemon, "map", model.notes, code=2)
        assert "not in the cache" in told(daemon, "map", "file:///no/such.gguf", code=2)
        told(daemon, "pull", model.ref)
        assert daemon.stop() == 0
        model.path.unlink()  # nobody is asked
        (file,) = spoken(daemon, "map", model.ref)["files"]
        for layer in file["layers"]:
            assert layer["verified_bytes"] == layer["size_bytes"]
        picture_ = told(daemon, "map", model.ref)
        assert "blk.3" in picture_
        assert "." * 8 not in picture_.split("\n", 1)[1], "every bar is full"
        assert "\x1b" not in picture_
        assert "verified" in told(daemon, "ls", "-l", model.ref)


@pytest.mark.timeout(180)
def test_a_header_that_is_not_there_is_fetched_when_that_is_wanted(tmp_path: Path, model: Model) -> None:
    settings = EngineSettings(workers=0, fill=FillMode.NEVER)  # headers last

    async def add() -> None:
        async with running_engine(tmp_path / "daemon" / "cache", settings) as engine:
            await engine.add(parse_ref(model.ref), headers=False)

    (tmp_path / "daemon" / "cache").mkdir(parents=True)
    trio.run(add)
    with Daemon(tmp_path / "daemon") as daemon:
        assert f"`weightfs map --fetch {model.ref}` fetches it" in told(daemon, "map", model.ref, code=2)
        assert "header not cached yet" in told(daemon, "ls", "-l", model.ref)
        (file,) = spoken(daemon, "map", "--fetch", model.ref)["files"]
        assert file["cached_bytes"] == MIB
        assert "header not cached yet" not in told(daemon, "ls", "-l", model.ref)


@pytest.mark.timeout(180)
def test_what_was_added_without_a_mount_has_its_header(tmp_path: Path, model: Model) -> None:
    with Daemon(tmp_path / "daemon") as daemon:
        told(daemon, "add", "--wait", model.ref)
        (ref,) = spoken(daemon, "ls", "-l", model.ref)["refs"]
        assert [file["header"] for file in ref["files"]] == ["read"]
        assert ref["files"][0]["cached_bytes"] == MIB
