"""Every target of `make fuzz` under Hypothesis: any bytes, and good input with a damage."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightfs.testing.fuzz_targets import SEEDS, TARGETS


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_nothing_but_what_is_promised_comes_out(name: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from((b"", *SEEDS[name])))
    start = data.draw(st.integers(0, len(seed)))
    stop = data.draw(st.integers(start, len(seed)))
    TARGETS[name](seed[:start] + data.draw(st.binary(max_size=300)) + seed[stop:])


@pytest.mark.parametrize("name", TARGETS)
def test_its_seeds(name: str) -> None:
    for seed in SEEDS[name]:
        TARGETS[name](seed)
