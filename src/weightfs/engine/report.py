"""From the engine's memory to the frozen snapshots of `status`.

Rule: what is said of refs is made a turn at a time. Whoever lets others come between does so after each
(`Overview.survey`); whoever wants one moment goes on at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from weightfs.core.attribution import FaultCounts
from weightfs.core.manifest import BlobId, Trust, weakest
from weightfs.core.planner import Planner
from weightfs.core.ref import without_secrets
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.status import FileStatus, JobStatus, MirrorStatus, RefStatus
from weightfs.engine.turns import in_turns
from weightfs.store.cache import StoredRef


class RefReport:
    """What there is to tell of every ref; of one with more than `files_at_most` files, first of those with news."""

    def __init__(self, catalog: Catalog, planner: Planner, now: float, files_at_most: int | None) -> None:
        self._catalog = catalog
        self._planner = planner
        self._now = now
        self._most = files_at_most
        self.refs: list[RefStatus] = []

    def turns(self) -> Iterator[None]:
        """Fill `refs`. What is removed meanwhile is left out."""
        for stored in self._catalog.refs():
            yield from self._describe(stored)

    def _describe(self, stored: StoredRef) -> Iterator[None]:
        entries = stored.manifest.entries
        wrong, fetched, waiting = FaultCounts(), 0, 0
        size, present, complete = 0, 0, True
        trusts: set[Trust] = set()
        seen: set[BlobId] = set()
        news: list[int] = []
        others: list[int] = []
        for turn in in_turns(enumerate(entries)):
            for number, entry in turn:
                state = self._state(entry.blob.id)
                if state is None:
                    continue
                readers = self._planner.waiting(state.id)
                (news if readers or self._has_news(state) else others).append(number)
                if state.id not in seen:
                    seen.add(state.id)
                    wrong += state.faults.counts
                    fetched += state.fetched_bytes
                    waiting += readers
                    size += state.shape.size
                    present += state.present_bytes
                    complete = complete and state.complete
                    trusts.add(state.trust)
            yield
        chosen = sorted([*news, *others][: self._most])
        files: list[FileStatus] = []
        for some in in_turns(entries[number] for number in chosen):
            for entry in some:
                if state := self._state(entry.blob.id):
                    path = f"models/{stored.manifest.tree}/{entry.path}"
                    files.append(_describe_file(path, state, self._planner, self._now))
            yield
        self.refs.append(
            RefStatus(
                ref=stored.manifest.ref,
                revision=stored.manifest.revision,
                added_at=stored.added_at,
                pinned=stored.pinned,
                paused=stored.paused,
                fill=stored.fill,
                files=tuple(files),
                wrong=wrong,
                size_bytes=size,
                present_bytes=present,
                complete=complete,
                trust=weakest(trusts),
                files_left_out=len(news) + len(others) - len(chosen),
                fetched_bytes=fetched,
                waiting_readers=waiting,
            )
        )

    def _state(self, blob: BlobId) -> BlobState | None:
        """None if it is being removed."""
        return self._catalog.get(blob) if self._planner.knows(blob) else None

    def _has_news(self, state: BlobState) -> bool:
        partly = 0 < state.present_bytes < state.shape.size
        wrong = state.no_room is not None or self._planner.failure(state.id) is not None
        return bool(partly or wrong or state.handles or state.fetched_bytes or state.faults.counts)


def _describe_file(path: str, state: BlobState, planner: Planner, now: float) -> FileStatus:
    failure = planner.failure(state.id)
    chunk_list = state.blob.chunk_list
    return FileStatus(
        path=path,
        blob=str(state.id),
        size=state.shape.size,
        chunk_length=state.shape.chunk_length,
        chunk_count=state.shape.chunk_count,
        present_chunks=len(state.present),
        present_bytes=state.present_bytes,
        durable_chunks=len(state.durable),
        sealed_chunks=state.frontier,
        fetched_bytes=state.fetched_bytes,
        trust=state.trust.value,
        policy=state.policy.value,
        sha256=state.blob.sha256.hex() if state.blob.sha256 else "",
        digest=state.blob.digest,
        signer=chunk_list.signer if chunk_list else "",
        open_handles=state.handles,
        waiting_readers=planner.waiting(state.id),
        filling=state.filling and not state.complete,
        error=failure.text if failure else str(state.no_room or ""),
        mirrors=tuple(
            MirrorStatus(
                score.url,
                score.faults,
                score.mismatches,
                score.nbytes,
                score.rate,
                max(0.0, score.benched_until - now),
                state.faults.of_mirror(number),
            )
            for number, score in enumerate(planner.scores(state.id))
        ),
        wrong=state.faults.counts,
    )


def describe_jobs(planner: Planner, now: float) -> tuple[JobStatus, ...]:
    """Every fetch in flight."""
    return tuple(
        JobStatus(
            job.job,
            str(job.blob),
            job.chunks.start,
            job.chunks.stop - 1,
            without_secrets(job.mirror) if job.mirror else "",
            job.priority.name.lower(),
            job.age,
            job.nbytes_left,
        )
        for job in planner.jobs(now)
    )
