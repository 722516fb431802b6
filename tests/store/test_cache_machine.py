"""The cache against a model made of a set and a bytearray, through crashes, restarts and damage."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import ByteSpan, ChunkSpan
from weightfs.core.manifest import Trust
from weightfs.store.cache import Cache, RunState
from weightfs.testing.caches import Sample

K = 4096
COUNT = 9
MEMORY = Path("/dev/shm")  # a step is a handful of syncs; what is tested here does not need a disk
SIZE = COUNT * K - 100
SAMPLE = Sample.random(SIZE)
CHUNKS = st.sets(st.integers(0, COUNT - 1), min_size=1)
SPANS = st.tuples(st.integers(0, COUNT), st.integers(0, COUNT)).map(
    lambda ends: ChunkSpan(min(ends), max(ends))
)


class CacheMachine(RuleBasedStateMachine):
    """One blob. `content` is what the file holds, `present` and `suspect` what the records should say."""

    def __init__(self) -> None:
        super().__init__()
        self.log = logging.getLogger("weightfs.store")
        self.log.setLevel(logging.ERROR)  # lost chunks are warned of, as they should be
        self.home = Path(
            tempfile.mkdtemp(prefix="weightfs-machine-", dir=MEMORY if MEMORY.is_dir() else None)
        )
        self.generation = 0
        self.cache = Cache.open(self.root, now=1)
        self.cache.put_ref(SAMPLE.manifest(), now=1)
        self.content = bytearray(SIZE)
        self.present: set[int] = set()
        self.suspect: set[int] = set()
        self.digests: set[int] = set()
        self.run: RunState | None = None
        self.epoch = 1
        self.verified = False
        self.prepared = False

    @property
    def root(self) -> Path:
        return self.home / str(self.generation)

    @property
    def sound(self) -> set[int]:
        """Present chunks whose bytes are still those that landed."""
        return {chunk for chunk in self.present if self.bytes_of(chunk) == SAMPLE.chunk(chunk)}

    def bytes_of(self, chunk: int) -> bytes:
        span = SAMPLE.blob.shape.span_of(chunk)
        return bytes(self.content[span.start : span.stop])

    def forget(self, chunks: set[int]) -> None:
        self.present -= chunks
        self.suspect -= chunks
        if self.run is not None and any(chunk < self.run.frontier for chunk in chunks):
            self.run = None

    def write(self, chunks: set[int]) -> None:
        if not self.prepared and not self.present:
            self.content = bytearray(SIZE)  # what nobody recorded is thrown away at the first touch
        self.prepared = True
        for chunk in chunks:
            span = SAMPLE.blob.shape.span_of(chunk)
            self.content[span.start : span.stop] = SAMPLE.chunk(chunk)

    @rule(chunks=CHUNKS)
    def land(self, chunks: set[int]) -> None:
        self.write(chunks)
        SAMPLE.land(self.cache, sorted(chunks))
        self.present |= chunks
        self.digests |= chunks
        self.suspect -= chunks

    @rule(chunks=CHUNKS)
    def land_without_commit(self, chunks: set[int]) -> None:
        self.write(chunks)
        SAMPLE.write(self.cache, sorted(chunks))

    @rule(span=SPANS)
    def drop(self, span: ChunkSpan) -> None:
        gone = self.present & set(span)
        freed = self.cache.drop(SAMPLE.id, span)
        assert freed == sum(len(SAMPLE.chunk(chunk)) for chunk in gone)
        self.forget(gone)
        for chunk in span:
            where = SAMPLE.blob.shape.span_of(chunk)
            self.content[where.start : where.stop] = bytes(len(where))

    @rule()
    def rehash(self) -> None:
        good = self.suspect & self.sound
        self.cache.commit([], rehashed={SAMPLE.id: ChunkSet(COUNT, good)}, now=1)
        self.suspect -= good
        bad = self.suspect - self.sound
        self.cache.drop(SAMPLE.id, ChunkSet(COUNT, bad), punch=False)
        self.forget(bad)

    @rule(frontier=st.integers(0, COUNT), state=st.binary(min_size=32, max_size=32))
    def save_run(self, frontier: int, state: bytes) -> None:
        run = RunState(frontier, state)
        self.cache.commit([], runs={SAMPLE.id: run}, now=1)
        if set(range(frontier)) <= self.present:
            self.run = run

    @precondition(lambda self: len(self.digests) == COUNT)
    @rule()
    def verify(self) -> None:
        self.cache.commit([], trusts={SAMPLE.id: Trust.VERIFIED}, now=1)
        self.verified = True

    @rule()
    def add_again(self) -> None:
        assert self.cache.put_ref(SAMPLE.manifest(), now=9) == ()

    @rule()
    def reopen_clean(self) -> None:
        self.cache.close()
        self.cache = Cache.open(self.root, now=1)
        assert self.cache.was_clean
        self.prepared = False

    @rule()
    def reopen_after_a_crash(self) -> None:
        before = self.root
        self.generation += 1
        shutil.copytree(before, self.root)
        self.cache.close()
        shutil.rmtree(before)
        self.cache = Cache.open(self.root, now=1)
        assert not self.cache.was_clean
        self.epoch += 1
        self.suspect = set(self.present)
        self.prepared = False

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def flip_a_bit_while_closed(self, data: st.DataObject) -> None:
        chunk = data.draw(st.sampled_from(sorted(self.present)))
        span = SAMPLE.blob.shape.span_of(chunk)
        at = data.draw(st.integers(span.start, span.stop - 1))
        self.cache.close()
        self.content[at] ^= 0x10
        with self.cache.path(SAMPLE.id).open("r+b") as file:
            file.seek(at)
            file.write(self.content[at : at + 1])
        self.cache = Cache.open(self.root, now=1)
        self.suspect = set(self.present)
        self.prepared = False

    @precondition(lambda self: self.present)
    @rule(length=st.integers(0, SIZE - 1))
    def truncate_while_closed(self, length: int) -> None:
        self.cache.close()
        os.truncate(self.cache.path(SAMPLE.id), length)
        self.cache = Cache.open(self.root, now=1)
        self.forget({chunk for chunk in self.present if SAMPLE.blob.shape.span_of(chunk).stop > length})
        self.suspect = set(self.present)
        self.content[length:] = bytes(SIZE - length)
        # The way back to a whole file: what is left is dropped, as the engine does after the DiskFault.
        self.cache.drop(SAMPLE.id, ChunkSpan(0, COUNT))
        self.forget(set(self.present))
        self.content = bytearray(SIZE)
        self.prepared = False

    @invariant()
    def records_agree(self) -> None:
        progress = self.cache.progress(SAMPLE.id)
        assert set(progress.present) == self.present
        assert set(progress.suspect) == self.suspect
        assert progress.run == self.run
        assert (progress.trust is Trust.VERIFIED) is self.verified
        assert set(self.cache.digests(SAMPLE.id, ChunkSpan(0, COUNT))) == self.digests
        assert self.cache.epoch == self.epoch
        assert self.cache.usage()[0] == sum(len(SAMPLE.chunk(chunk)) for chunk in self.present)

    @invariant()
    def bytes_agree(self) -> None:
        for chunk in self.present:
            span = SAMPLE.blob.shape.span_of(chunk)
            data = self.cache.read(SAMPLE.id, span)
            assert data == self.bytes_of(chunk)
            assert self.cache.read_nowait(SAMPLE.id, ByteSpan(span.start, span.stop)) in (None, data)
            if chunk not in self.suspect:
                assert hashlib.sha256(data).digest() == SAMPLE.landing(chunk).digest

    @invariant()
    def the_check_finds_exactly_the_damage(self) -> None:
        assert len(self.cache.check(deep=True)) == len(
            self.present - self.sound
        )  # and nothing of another kind

    def teardown(self) -> None:
        self.cache.close()
        self.log.setLevel(logging.NOTSET)
        shutil.rmtree(self.home)


TestCacheMachine = CacheMachine.TestCase
# A sixth of the profile's examples: every step waits for the disk.
TestCacheMachine.settings = settings(
    max_examples=settings().max_examples // 6, stateful_step_count=settings().stateful_step_count // 2
)
