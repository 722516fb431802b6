"""Long work behind short requests: a job runs in the daemon, is polled, and can be cancelled.

Rules: at most `MAX_RUNNING` run and `MAX_KEPT` that have ended are remembered; a job's failure is recorded in
its document and never reaches the nursery it runs in.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from weightfs.control.documents import error_to_json
from weightfs.control.ports import Document
from weightfs.errors import DaemonError, UsageError, WeightfsError

MAX_RUNNING: Final = 16
MAX_KEPT: Final = 64
MAX_WAIT: Final = 30.0  # seconds that one poll may take

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Job:
    """One piece of long work; `state` is running, done, failed or cancelled."""

    id: str
    kind: str
    refs: tuple[str, ...]
    progress: Callable[[], Document]
    state: str = "running"
    result: Document | None = None
    error: Document | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)

    def document(self) -> Document:
        """As in docs/configuration.md, "Control socket"."""
        return {
            "job": self.id,
            "kind": self.kind,
            "refs": list(self.refs),
            "state": self.state,
            "progress": self.progress(),
            "result": self.result,
            "error": self.error,
        }


class Jobs:
    """All jobs of one process. They run in `nursery`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def start(
        self,
        kind: str,
        refs: tuple[str, ...],
        work: Callable[[], Awaitable[Document]],
        progress: Callable[[], Document],
    ) -> Job:
        """Begin `work`. DaemonError if too much runs already."""
        running = sum(job.state == "running" for job in self._jobs.values())
        if running >= MAX_RUNNING:
            raise DaemonError(f"{running} jobs are running already; wait for one of them to end")
        job = Job(secrets.token_hex(8), kind, refs, progress)
        self._jobs[job.id] = job
        self._nursery.start_soon(self._run, job, work, name=f"{kind} {job.id}")
        return job

    def get(self, job_id: str) -> Job:
        """UsageError if there is none, or no longer."""
        try:
            return self._jobs[job_id]
        except KeyError:
            raise UsageError(f"there is no job {job_id[:32]!r}; it may have ended long ago") from None

    async def wait(self, job_id: str, seconds: float) -> Job:
        """The job: at once if it has ended, else after at most `seconds`."""
        job = self.get(job_id)
        with trio.move_on_after(min(max(seconds, 0.0), MAX_WAIT)):
            await job.ended.wait()
        return job

    def cancel(self, job_id: str) -> Job:
        """Ask a job to stop."""
        job = self.get(job_id)
        job.scope.cancel()
        return job

    async def _run(self, job: Job, work: Callable[[], Awaitable[Document]]) -> None:
        try:
            with job.scope:
                job.result = await work()
                job.state = "done"
            if job.state == "running":
                job.state = "cancelled"
        except WeightfsError as error:
            job.state, job.error = "failed", error_to_json(error)
        except Exception as error:  # whatever a job does, the daemon goes on serving readers
            log.exception("the job %s %s ended by a fault of weightfs itself", job.kind, job.id)
            text = (
                f"the daemon failed in a way it should not ({type(error).__name__}); its log has the details"
            )
            job.state, job.error = (
                "failed",
                {"error": text, "kind": "DaemonError", "exit_code": DaemonError.exit_code},
            )
        finally:
            job.ended.set()
            self._forget_old()

    def _forget_old(self) -> None:
        ended = [job.id for job in self._jobs.values() if job.state != "running"]
        for job_id in ended[: max(0, len(ended) - MAX_KEPT)]:
            del self._jobs[job_id]
