"""Hypothesis profiles: `quick` for every run, `soak` for `make soak` (`--hypothesis-profile=soak`).

No deadlines: how long an example takes says how busy the machine is.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("quick", deadline=None, print_blob=True)
settings.register_profile("soak", deadline=None, print_blob=True, max_examples=5_000, stateful_step_count=200)
settings.load_profile("quick")
