"""Which requests are overdue, and which of them are answered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weightfs.core.overdue import FOREVER, MARGIN, METADATA, Bound, Bounds

seconds = st.floats(min_value=0, max_value=30 * 86_400)


@given(read_timeout=seconds, browse_timeout=seconds)
def test_every_bound_lies_beyond_that_of_the_layer_below(read_timeout: float, browse_timeout: float) -> None:
    bounds = Bounds.of(read_timeout=read_timeout, browse_timeout=browse_timeout)
    assert bounds.of_request("lookup").seconds >= browse_timeout + MARGIN
    assert bounds.of_request("lookup").answered
    assert bounds.of_request("read").seconds >= min(read_timeout, FOREVER) + MARGIN * (read_timeout > 0)
    assert bounds.of_request("read").answered is (read_timeout > 0)
    for op in ("getattr", "open", "readdir", "statfs", "getxattr"):
        assert bounds.of_request(op) == Bound(METADATA)


def test_a_read_without_a_bound_is_told_of_and_never_ended() -> None:
    assert Bounds.of(read_timeout=0).read == Bound(FOREVER, answered=False)
    assert Bounds.of(read_timeout=600).read == Bound(600 + MARGIN)


def test_without_browsing_a_lookup_is_as_any_other() -> None:
    assert Bounds.of(read_timeout=600).lookup == Bound(METADATA)
