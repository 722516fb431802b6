"""What `status REF` and `top` draw, from made-up documents: it fits, and says what is so."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfs.cli.picturing import MAX_FILES, PLAIN, chunk_lines
from weightfs.cli.topping import Rates, top_lines

MIB = 1 << 20


def chunks(**changed: Any) -> dict[str, Any]:
    file = {
        "path": "models/x/m.gguf",
        "size_bytes": 20 * MIB,
        "cached_bytes": 8 * MIB,
        "trust": "attested",
        "header_bytes": 3 * MIB,
        "chunk_length": MIB,
        "first_chunk": 0,
        "chunk_count": 20,
        "runs": {"present": [[0, 8]], "quarantined": [], "in_flight": [[10, 12]]},
    }
    return {"ref": "https://h/m.gguf", "files": [{**file, **changed}]}


def test_a_file_is_drawn_with_what_is_here_in_flight_and_absent() -> None:
    assert chunk_lines(chunks(), 80, PLAIN) == [
        "# here  = part of it  > in flight  ! quarantined  . absent  h header",
        "",
        "models/x/m.gguf",
        "  8.0 MiB of 20.0 MiB, attested, 20 × 1.0 MiB",
        "  ########..>>........",
        "  hhh",
    ]


def test_a_line_is_scaled_to_the_width() -> None:
    lines = chunk_lines(
        chunks(runs={"present": [[0, 7]], "quarantined": [[18, 19]], "in_flight": []}), 12, PLAIN
    )
    assert lines[4:] == ["  ###=.....!", "  hh"]


def test_a_member_of_a_tar_is_drawn_from_its_first_chunk_on() -> None:
    runs = {"present": [[101, 103]], "quarantined": [], "in_flight": []}
    lines = chunk_lines(chunks(first_chunk=100, chunk_count=4, header_bytes=None, runs=runs), 80, PLAIN)
    assert lines[4:] == ["  .##."]


def test_what_is_too_much_is_counted() -> None:
    document = chunks(runs=None)
    document["files"] *= MAX_FILES + 5
    lines = chunk_lines(document, 80, PLAIN)
    assert lines[-1] == "… and 5 more files: --json has all"
    assert lines[4] == "  it has too many runs of chunks to be drawn beside the others"
    assert chunk_lines(chunks(chunk_count=0, size_bytes=0), 80, PLAIN)[4:] == []


def ref(name: str, **changed: Any) -> dict[str, Any]:
    mirror = {"url": "https://h/m", "faults": 0, "mismatches": 0, "rate": None, "benched_for": 0.0}
    file = {"blob": name, "fetched_bytes": 0, "waiting_readers": 0, "error": "", "mirrors": [mirror]}
    document = {"ref": name, "trust": "attested", "size_bytes": 100 * MIB, "present_bytes": 50 * MIB}
    document |= {"complete": False, "pinned": False, "paused": False, "files": [{**file, **changed}]}
    return document


def status(*refs: dict[str, Any], **changed: Any) -> dict[str, Any]:
    document = {
        "role": "mount", "mountpoint": "/mnt", "pid": 7, "uptime": 90.0, "held_bytes": MIB, "limit_bytes": None,
        "free_bytes": MIB, "fetched_bytes": 0, "jobs": [], "paused": False, "mismatched_chunks": 0, "disk_faults": 0,
        "trouble": "", "refs": list(refs),
    }  # fmt: skip
    return {**document, **changed}


def test_top_shows_the_busy_first_with_rate_time_left_and_faults() -> None:
    rates = Rates()
    rates.note(status(ref("https://h/a"), ref("https://h/b")), 10.0)
    mirror = {"url": "https://h/m?t=1", "faults": 3, "mismatches": 1, "rate": 1.0 * MIB, "benched_for": 4.0}
    after = status(
        ref("https://h/a"),
        ref("https://h/b", fetched_bytes=20 * MIB, waiting_readers=2, mirrors=[mirror]),
        fetched_bytes=20 * MIB,
        mismatched_chunks=1,
    )
    rates.note(after, 12.0)
    assert [line.rstrip() for line in top_lines(after, rates, 100, 30)] == [
        "serving /mnt (pid 7, for 1m30s)",
        "cache 1.0 MiB, 1.0 MiB free, 10.0 MiB/s, 0 requests in flight",
        "  ! 1 chunk came damaged",
        "",
        "MODEL                        TRUST              SIZE  HERE                     RATE       LEFT  WAIT",
        "https://h/b                  attested        100 MiB   50%  #####.....   10.0 MiB/s       5.0s     2",
        "    ! 3 faults, 1 wrong chunk, 1.0 MiB/s, left alone for 4s: https://h/m?…",
        "https://h/a                  attested        100 MiB   50%  #####.....            -          -     -",
    ]


def test_a_counter_that_began_anew_has_no_rate() -> None:
    rates = Rates()
    rates.note(status(ref("a", fetched_bytes=MIB), fetched_bytes=MIB), 1.0)
    rates.note(status(ref("a"), ref("new", fetched_bytes=MIB)), 2.0)
    assert rates.total == 0
    assert rates.by_ref == {"a": 0.0}


@given(st.integers(0, 200), st.integers(1, 60), st.integers(1, 200), st.booleans())
def test_top_fits_any_terminal(count: int, height: int, width: int, trouble: bool) -> None:
    refs = [ref(f"https://h/{'x' * (n % 90)}{n}", error="it is away" if n % 3 else "") for n in range(count)]
    lines = top_lines(status(*refs, trouble="full\x1b[2J" if trouble else ""), Rates(), width, height)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert "\x1b" not in "".join(lines)
    if count > height > 6 and width > 30:
        shown = sum(line.startswith("http") for line in lines)
        assert lines[-1] == f"… and {count - shown} more model{'' if count - shown == 1 else 's'}"


@pytest.mark.parametrize("width", [*range(53, 130), 200])
def test_no_column_of_top_is_cut(width: int) -> None:
    """At 80 columns the readers that wait were."""
    one = ref("https://models.example.com/a-long-name.gguf", waiting_readers=17) | {"pinned": True}
    *_, header, row = top_lines(status(one), Rates(), width, 30)
    assert (header[-4:], row[-4:]) == ("WAIT", "  17")
    assert " (pinned) " in row
    assert len(row.split()[0]) >= (19 - len(" (pinned)") if width >= 80 else 8)
