from __future__ import annotations

import pytest

from weightfs.testing.repositories import MemoryRepository


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> MemoryRepository:
    """In the place of every source."""
    made = MemoryRepository()
    for module in ("parts", "worker"):
        monkeypatch.setattr(f"weightfs.engine.{module}.open_source", made.open_source)
    return made
