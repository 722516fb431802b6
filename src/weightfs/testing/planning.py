"""A driver of the planner without I/O: carries out commands in a model, and holds the planner to its invariants.

`PlanDriver` knows what is present, in a job and awaited by its own book-keeping, and raises AssertionError as soon as a
command breaks a rule of `weightfs.core.planner`. A test says what jobs do; `finish` lets one mirror of each blob be
honest from now on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from weightfs.core import plan
from weightfs.core.chunkset import ChunkSet
from weightfs.core.geometry import BlobShape, ChunkSpan
from weightfs.core.manifest import BlobId, Mirror
from weightfs.core.plan import Failure, Limits, Priority
from weightfs.core.planner import Planner
from weightfs.core.retry import blames_mirror
from weightfs.errors import FailureKind

FINISH_STEPS = 5_000


def blob_id(number: int) -> BlobId:
    """A blob id that is easy to tell in a failing example."""
    return BlobId(number.to_bytes(16, "big"))


def mirrors(*names: str) -> tuple[Mirror, ...]:
    """Mirrors of equal priority."""
    return tuple(Mirror(f"http://{name}/x", 1) for name in names)


@dataclass(slots=True, eq=False)
class ModelBlob:
    """What is true of one blob, whatever the planner thinks."""

    id: BlobId
    shape: BlobShape
    mirror_count: int
    present: ChunkSet  # a copy: the planner owns its own
    fill: bool = False
    paused: bool = False
    undurable: int = 0
    punching: set[int] = field(default_factory=set)
    kept: set[int] = field(default_factory=set)  # not present, and their room was not given back
    gone: bool = False


@dataclass(slots=True, eq=False)
class ModelJob:
    """One fetch: `todo` are the chunks that it may still write, in order."""

    fetch: plan.Fetch
    blob: ModelBlob
    todo: list[int]
    trim: int | None = None
    stopped: bool = False


class PlanDriver:
    """Feed it with the methods named after events; look at `jobs`, `waiting`, `woken`, `commands`."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.planner = Planner(limits)
        self.limits = self.planner.limits
        self.now = 0.0
        self.alarm = float("inf")
        self.blobs: dict[BlobId, ModelBlob] = {}
        self.jobs: dict[int, ModelJob] = {}
        self.waiting: dict[int, tuple[ModelBlob, ChunkSpan]] = {}
        self.woken: dict[int, Failure | None] = {}
        self.busy_until: dict[tuple[BlobId, int], float] = {}  # (blob, mirror) → the end of its Retry-After
        self.fetched: list[tuple[BlobId, int]] = []  # chunks in the order in which they landed
        self.commands: list[plan.Command] = []
        self.capacity: tuple[int | None, int | None] = (None, None)  # demand's, background's
        self.background = True
        self._next_waiter = 1

    # ---- events

    def feed(self, event: plan.Event) -> list[plan.Command]:
        """Feed one event, carry out and check the answer."""
        commands = self.planner.feed(event, self.now)
        self.commands += commands
        for command in commands:
            self._carry_out(command)
        assert self.planner.check() == []
        assert self.planner.held_bytes == self.held()
        self._check_waiters()
        self._check_wake_up()
        return commands

    def add(
        self,
        blob: BlobId,
        shape: BlobShape,
        places: tuple[Mirror, ...],
        present: Iterable[int] = (),
        kept: Iterable[int] = (),
    ) -> ModelBlob:
        """A blob."""
        have = ChunkSet(shape.chunk_count, present)
        kept = set(kept)
        state = self.blobs[blob] = ModelBlob(blob, shape, len(places), have.copy(), kept=kept - set(have))
        self.feed(plan.Added(blob, shape, places, have, sorted(kept)))
        return state

    def remove(self, blob: BlobId) -> None:
        """Forget it."""
        state = self.blobs.pop(blob)
        state.gone = True
        state.kept.clear()
        self.busy_until = {key: until for key, until in self.busy_until.items() if key[0] != blob}
        self.feed(plan.Removed(blob))
        assert not any(where is state for where, _ in self.waiting.values())

    def remirror(self, blob: BlobId, places: tuple[Mirror, ...]) -> None:
        """More mirrors; `places` are new ones."""
        self.blobs[blob].mirror_count += len(places)
        self.busy_until = {key: until for key, until in self.busy_until.items() if key[0] != blob}
        self.feed(plan.Remirrored(blob, places))

    def refute(self, blob: BlobId, sources: dict[int, int]) -> None:
        """The whole is wrong, of which these mirrors gave these chunks."""
        self.feed(plan.Refuted(blob, sources))

    def need(self, blob: BlobId, start: int, stop: int) -> int:
        """A reader; its number."""
        number, self._next_waiter = self._next_waiter, self._next_waiter + 1
        self.waiting[number] = (self.blobs[blob], ChunkSpan(start, stop))
        self.feed(plan.Need(number, blob, ChunkSpan(start, stop)))
        return number

    def withdraw(self, waiter: int) -> None:
        """The reader has gone away."""
        self.waiting.pop(waiter, None)
        self.feed(plan.Withdrawn(waiter))

    def want(self, blob: BlobId, start: int, stop: int) -> None:
        """Read-ahead."""
        self.feed(plan.Want(blob, ChunkSpan(start, stop)))

    def fill(self, blob: BlobId, *, on: bool = True) -> None:
        """Background fill."""
        self.blobs[blob].fill = on
        self.feed(plan.Fill(blob, on))

    def pause(self, blob: BlobId, *, on: bool = True) -> None:
        """Hold background fill back."""
        self.blobs[blob].paused = on
        self.feed(plan.Pause(blob, on))

    def land(self, job: int, *, durable: bool = False) -> int:
        """The next chunk of the job lands; its number."""
        model = self.jobs[job]
        chunk = model.todo.pop(0)
        if not model.blob.gone:
            model.blob.present.add(chunk)
            model.blob.kept.discard(chunk)
            model.blob.undurable += len(model.blob.shape.span_of(chunk))
            self.fetched.append((model.blob.id, chunk))
        self.feed(plan.Landed(job, chunk))
        if durable and not model.blob.gone:
            self.durable(model.blob.id)
        return chunk

    def durable(self, blob: BlobId, nbytes: int | None = None) -> None:
        """Bytes (default: all) that landed are on disk."""
        state = self.blobs[blob]
        nbytes = state.undurable if nbytes is None else min(nbytes, state.undurable)
        state.undurable -= nbytes
        self.feed(plan.Durable(blob, nbytes))

    def undone(self, blob: BlobId, nbytes: int, kind: FailureKind | None = None) -> None:
        """Bytes that landed are dropped before they were durable or, with a `kind`, refused by the cache."""
        self.blobs[blob].undurable -= nbytes
        self.feed(plan.Undone(blob, nbytes, Failure(kind, f"it is {kind}") if kind else None))

    def mismatch(self, job: int) -> int:
        """The next chunk of the job is wrong; its number."""
        model = self.jobs[job]
        chunk = model.todo.pop(0)
        failure = Failure(FailureKind.MISMATCH, "wrong bytes", "", None, chunk)
        self.feed(plan.Mismatched(job, chunk, failure))
        return chunk

    def trimmed(self, job: int, *, late: int = 0) -> None:
        """The job answers its Trim: at the place asked for, or `late` chunks behind it."""
        model = self.jobs[job]
        assert model.trim is not None
        stop, model.trim = model.trim + late, None
        model.todo = [chunk for chunk in model.todo if chunk < stop]
        self.feed(plan.Trimmed(job, stop))

    def done(self, job: int) -> None:
        """The job ends well."""
        del self.jobs[job]
        self.feed(plan.Done(job))

    def fail(
        self, job: int, kind: FailureKind, *, retry_after: float | None = None, jitter: float = 0.5
    ) -> None:
        """The job ends badly."""
        model = self.jobs.pop(job)
        if retry_after is not None and blames_mirror(kind) and not model.blob.gone:
            key = (model.blob.id, model.fetch.mirror)
            self.busy_until[key] = max(self.busy_until.get(key, 0.0), self.now + min(retry_after, 300.0))
        self.feed(plan.Failed(job, Failure(kind, f"it is {kind}", "", retry_after), jitter))

    def drop(self, blob: BlobId, chunks: Iterable[int]) -> None:
        """Evicted, or found bad on disk."""
        state, gone = self.blobs[blob], [chunk for chunk in chunks if chunk in self.blobs[blob].present]
        for chunk in gone:
            state.present.discard(chunk)
            state.punching.add(chunk)
            state.kept.add(chunk)
        self.feed(plan.Dropped(blob, gone))

    def punch(self, blob: BlobId, *, freed: bool = False) -> None:
        """Index and file have forgotten all that was dropped; `freed`: and its room, and all that was kept, is free."""
        state = self.blobs[blob]
        chunks, state.punching = sorted(state.kept if freed else state.punching), set()
        if freed:
            state.kept.clear()
        self.feed(plan.Punched(blob, chunks, freed))

    def limit(self, demand: int | None, background: int | None) -> None:
        """So much may be held."""
        self.capacity = (demand, background)
        self.feed(plan.Capacity(demand, background))

    def set_background(self, *, on: bool) -> None:
        """Whether read-ahead and fill may begin anything."""
        self.background = on
        self.feed(plan.Background(on))

    def no_room(self) -> None:
        """No more can be had: whoever waits for what does not fit is told, and only they."""
        before = dict(self.waiting)
        demanded = self.planner.demanded_bytes()
        failure = Failure(FailureKind.NO_SPACE, "the cache is full")
        self.feed(plan.NoRoom(failure))
        told = [number for number in before if self.woken.get(number) is failure]
        assert bool(told) is bool(demanded)
        assert plan.Priority.DEMAND not in self.planner.short().values() or not told

    def held(self) -> int:
        """What chunks take: present, kept, and in flight."""
        total = 0
        for blob in self.blobs.values():
            total += sum(len(blob.shape.span_of(chunk)) for chunk in {*blob.present, *blob.kept})
        for job in self.jobs.values():
            blob = job.blob
            total += sum(len(blob.shape.span_of(chunk)) for chunk in job.todo if chunk not in blob.kept)
        return total

    def sleep(self, seconds: float) -> None:
        """Time passes; the planner hears of it as it asked to."""
        self.now += seconds
        if self.now >= self.alarm:
            self.alarm = float("inf")
            self.feed(plan.Tick())

    def sleep_until_alarm(self) -> None:
        """As long as the planner asked for."""
        assert self.alarm < float("inf"), "nothing is in flight and no alarm is set"
        self.sleep(max(0.0, self.alarm - self.now))

    # ---- commands

    def _carry_out(self, command: plan.Command) -> None:
        match command:
            case plan.Fetch():
                self._fetch(command)
            case plan.Trim(job, at):
                assert self.jobs[job].trim is None, "trimmed again before the answer"
                self.jobs[job].trim = at
            case plan.Stop(job):
                model = self.jobs[job]
                assert model.blob.gone or (model.blob.paused and model.fetch.whole)
                self.jobs[job].stopped = True
            case plan.Wake(waiter, failure):
                blob, span = self.waiting.pop(waiter)  # KeyError: woken twice, or after it withdrew
                assert failure or blob.present.covers(span), f"waiter {waiter} was woken too early"
                self.woken[waiter] = failure
            case plan.SleepUntil(time):
                self.alarm = time

    def _fetch(self, fetch: plan.Fetch) -> None:
        blob = self.blobs[fetch.blob]
        todo = sorted(fetch.wanted) if fetch.whole else list(fetch.span)
        assert todo, "a fetch of nothing"
        assert not fetch.whole or fetch.span == blob.shape.chunks
        assert 0 <= fetch.mirror < blob.mirror_count
        assert self.background or fetch.priority is Priority.DEMAND, "background was switched off"
        assert self.busy_until.get((fetch.blob, fetch.mirror), 0.0) <= self.now, (
            "asked before its Retry-After"
        )
        flying = {
            chunk for job in self.jobs.values() if job.blob.id == fetch.blob for chunk in job.todo
        }  # of a former blob with that id too: it writes the same file
        assert not flying & set(todo), "two writers of one chunk"
        assert not any(chunk in blob.present or chunk in blob.punching for chunk in todo)
        assert not (fetch.priority is Priority.FILL and blob.paused), "fill of what is paused"
        self._check_bounds(fetch, blob, sum(len(blob.shape.span_of(chunk)) for chunk in todo))
        room = sum(len(blob.shape.span_of(chunk)) for chunk in todo if chunk not in blob.kept)
        most = self.capacity[0 if fetch.priority is Priority.DEMAND else 1]
        assert most is None or not room or self.held() + room <= most, "more than the cache may hold"
        self.jobs[fetch.job] = ModelJob(fetch, blob, todo)

    def _check_bounds(self, fetch: plan.Fetch, blob: ModelBlob, nbytes: int) -> None:
        limits = self.limits
        background = [job for job in self.jobs.values() if job.fetch.priority is not Priority.DEMAND]
        assert len(self.jobs) < limits.max_jobs
        if fetch.priority is not Priority.DEMAND:
            assert len(background) < limits.background_jobs, "demand's own slot"
        if fetch.priority is Priority.FILL and self.planner.waiting():
            fills = sum(1 for job in background if job.fetch.priority is Priority.FILL)
            assert fills < limits.fill_jobs_under_demand
        if fetch.whole:
            assert not any(job.blob is blob and job.todo for job in self.jobs.values()), (
                "a whole stream goes alone"
            )
            return
        assert len(fetch.span) == 1 or nbytes <= limits.job_bytes
        unsettled = blob.undurable + self._flying(blob)
        demand = fetch.priority is Priority.DEMAND
        most = limits.unsettled_bytes if demand else limits.background_unsettled_bytes
        single = len(fetch.span) == 1
        assert (single and not unsettled) or unsettled + nbytes <= most
        flying = self._flying(None)
        assert demand or (single and not flying) or flying + nbytes <= limits.budget_bytes

    def _flying(self, blob: ModelBlob | None) -> int:
        return sum(
            len(job.blob.shape.span_of(chunk))
            for job in self.jobs.values()
            if not job.fetch.whole and (blob is None or job.blob is blob)
            for chunk in job.todo
        )

    # ---- what must hold after every event

    def _check_waiters(self) -> None:
        assert self.planner.waiting() == len(self.waiting)
        for number, (blob, span) in self.waiting.items():
            assert not blob.present.covers(span), f"waiter {number} is asleep though its chunks are there"

    def _check_wake_up(self) -> None:
        if self.jobs or self.alarm < float("inf"):
            return
        for blob in self.blobs.values():
            spans = [span for where, span in self.waiting.values() if where is blob]
            spans += [blob.shape.chunks] if blob.fill and not blob.paused and self.background else []
            absent = {chunk for span in spans for hole in blob.present.holes(span) for chunk in hole}
            short = self.planner.short()  # somebody was asked for room
            assert short or blob.undurable or absent <= blob.punching, f"nothing will ever wake {blob.id}"

    # ---- one mirror is honest from now on

    def finish(self, honest: dict[BlobId, int], *, ranges: bool = True, others: FailureKind) -> None:
        """Fill every blob, with one honest mirror each; the others fail. AssertionError if it takes too long.

        Readers that were told a failure ask again, as readers do. `ranges`: whether honest mirrors have ranges.
        """
        self.limit(None, None)
        self.set_background(on=True)
        for blob in self.blobs.values():
            self.punch(blob.id)
            self.fill(blob.id)
            self.pause(blob.id, on=False)
        spans = dict(self.waiting)
        for _ in range(FINISH_STEPS):
            failed = [number for number in spans if self.woken.get(number)]
            if not self.jobs and not self.waiting and not failed and self._full():
                return
            if self.jobs:
                self._step(next(iter(self.jobs)), honest, ranges=ranges, others=others)
                continue
            for blob in self.blobs.values():
                self.durable(blob.id)
            if not self.jobs and (self.waiting or failed or not self._full()):
                self.sleep_until_alarm()
                for number in failed:
                    blob, span = spans.pop(number)
                    assert not blob.gone
                    spans[self.need(blob.id, span.start, span.stop)] = (blob, span)
        raise AssertionError(f"one mirror is honest, and there is no end: {self.commands[-20:]}")

    def _full(self) -> bool:
        return all(blob.present.full for blob in self.blobs.values())

    def _step(self, job: int, honest: dict[BlobId, int], *, ranges: bool, others: FailureKind) -> None:
        model = self.jobs[job]
        good = not model.blob.gone and model.fetch.mirror == honest[model.blob.id]
        if model.trim is not None:
            self.trimmed(job)
        elif model.stopped:
            self.fail(job, FailureKind.CANCELLED)
        elif good and not ranges and not model.fetch.whole:
            self.fail(job, FailureKind.NO_RANGES)
        elif good and model.todo:
            self.land(job, durable=True)
        elif good:
            self.done(job)
        else:
            self.fail(job, others)
