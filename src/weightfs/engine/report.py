"""From the engine's memory to the frozen snapshots of `status`."""

from __future__ import annotations

from weightfs.core.attribution import FaultCounts
from weightfs.core.planner import Planner
from weightfs.core.ref import without_secrets
from weightfs.engine.blobs import BlobState
from weightfs.engine.catalog import Catalog
from weightfs.engine.status import FileStatus, JobStatus, MirrorStatus, RefStatus


def describe_refs(catalog: Catalog, planner: Planner, now: float) -> tuple[RefStatus, ...]:
    """Every ref with its files."""
    return tuple(
        RefStatus(
            ref=stored.manifest.ref,
            revision=stored.manifest.revision,
            added_at=stored.added_at,
            pinned=stored.pinned,
            paused=stored.paused,
            fill=stored.fill,
            files=tuple(
                _describe(f"models/{path}", state, planner, now)
                for path, state in catalog.files(stored.manifest.ref)
            ),
            wrong=sum(
                (
                    state.faults.counts
                    for state in {state.id: state for _, state in catalog.files(stored.manifest.ref)}.values()
                ),
                FaultCounts(),
            ),
        )
        for stored in catalog.refs()
    )


def _describe(path: str, state: BlobState, planner: Planner, now: float) -> FileStatus:
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
