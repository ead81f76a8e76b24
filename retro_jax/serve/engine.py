"""One thread that continues all texts; requests come from other threads and get what happens to them.

submit   a job waits in a queue, or is refused where that is full
join     as soon as there are rows for all of its samples, in the order of arrival
step     a token of every text; each job's `listen` is called in this thread with what is new
cancel   from any thread: the job's rows are free before the next step
stop     new jobs are refused; those that were accepted are finished
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

from retro_jax.errors import UserError
from retro_jax.generate.running_texts import RunningTexts
from retro_jax.generate.text_progress import Progress, RunningText
from retro_jax.serve.limits import Limits

_log = logging.getLogger(__name__)


class RefusedError(Exception):
    """The server has no room, or is stopping: try again later.

    Attributes:
      status: of HTTP. code: a name for programs.
    """

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclasses.dataclass(eq=False)
class Job:
    """Samples of one prompt.

    Attributes:
      texts: the samples, of equal prompt and retrieval.
      listen: called in the engine's thread with each Progress of these texts; it must not wait.
      deadline: time.monotonic() after which they end with "timeout".
      began: when it was submitted.
    """

    texts: Sequence[RunningText]
    listen: Callable[[Progress], object]
    deadline: float = float("inf")
    began: float = dataclasses.field(default_factory=time.monotonic)


class Watcher:
    """What wants to know of the engine's work (metrics.py); this one does nothing."""

    def stepped(self, progress: Sequence[Progress], seconds: float) -> None:
        """A step was made."""

    def began(self, job: Job, seconds: float) -> None:
        """A job got rows after so many seconds in the queue."""

    def ended(self, reason: str) -> None:
        """A text ended."""


class Engine:
    """Runs jobs in a thread of its own.

    Attributes:
      running: the texts under way. limits: rows, queue.
    """

    def __init__(self, running: RunningTexts, limits: Limits, watcher: Watcher = Watcher()) -> None:
        """Takes the texts' batch; `start` begins."""
        self.running, self.limits, self._watcher = running, limits, watcher
        self._jobs: dict[int, Job] = {}  # of texts under way, by the text's id
        self._queue: collections.deque[Job] = collections.deque()
        self._cancelled: list[Job] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        """Whether new jobs are refused for good."""
        return self._stopping

    @property
    def under_way(self) -> int:
        """Texts that have been admitted and have not ended."""
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        """Samples in the queue."""
        with self._wake:
            return sum(len(job.texts) for job in self._queue)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues the jobs of one request: all of them, or none.

        Raises:
          RefusedError: the queue is full, or the engine stops.
          UserError: more samples of a prompt than there are rows.
        """
        count = sum(len(job.texts) for job in jobs)
        for job in jobs:
            if len(job.texts) > self.running.most:
                raise UserError(
                    f"{len(job.texts)} samples of a prompt: expected {self.running.most} at most"
                )
        with self._wake:
            if self._stopping or not self.alive:
                raise RefusedError("the server is stopping", 503, "stopping")
            waiting = sum(len(job.texts) for job in self._queue)
            if waiting + count > self.limits.queue:
                raise RefusedError(
                    f"{waiting} texts wait, and this request has {count}: expected"
                    f" {self.limits.queue} in the queue at most; try again later",
                    429,
                    "queue_full",
                )
            self._queue.extend(jobs)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Ends what is left of a job; its listener hears "cancelled" of each text."""
        with self._wake:
            self._cancelled.append(job)
            self._wake.notify()

    def stop(self, seconds: float | None = None) -> bool:
        """Refuses new jobs and waits for the others to end; whether all did in so many seconds."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(seconds)
        if not self._thread.is_alive():
            return True
        with self._wake:
            self._cancelled += [*self._queue, *list(self._jobs.values())]
        self._thread.join()
        return False

    def _run(self) -> None:
        """The thread: until it is asked to stop and nothing is left."""
        while True:
            with self._wake:
                while not (self._queue or self._cancelled or self._jobs):
                    if self._stopping:
                        return
                    self._wake.wait()
            try:
                self._turn()
            except Exception as error:  # a defect: these texts are lost, the next ones are not
                _log.exception("a step failed; %d texts are lost", len(self._jobs))
                for text in self.running.clear():
                    text.ended, text.error = "error", error
                    self._tell(Progress(text, "", None, None, (), "error"))

    def _turn(self) -> None:
        """What happens between two steps, and a step."""
        self._end_some()
        self._admit()
        if not self._jobs:
            return
        start = time.perf_counter()
        progress = self.running.step()
        self._watcher.stepped(progress, time.perf_counter() - start)
        for each in progress:
            self._tell(each)

    def _end_some(self) -> None:
        """Ends cancelled texts, and those whose time is over."""
        now = time.monotonic()
        with self._wake:
            cancelled, self._cancelled = self._cancelled, []
            late = [job for job in [*self._queue, *self._jobs.values()] if job.deadline < now]
            gone = {id(job) for job in [*cancelled, *late]}
            self._queue = collections.deque(job for job in self._queue if id(job) not in gone)
        reasons = [(job, "cancelled") for job in cancelled] + [(job, "timeout") for job in late]
        for job, reason in reasons:
            for text in job.texts:
                progress = self.running.end(text, reason)
                if progress is not None:
                    self._tell(progress, job)

    def _admit(self) -> None:
        """Gives rows to the jobs that have waited longest."""
        while True:
            with self._wake:
                if not self._queue or len(self._queue[0].texts) > self.running.room:
                    return
                job = self._queue.popleft()
            for text in job.texts:
                self._jobs[id(text)] = job
            self._watcher.began(job, time.monotonic() - job.began)
            try:
                self.running.join(job.texts)
            except Exception as error:  # of this request alone: its retrieval failed
                if not isinstance(error, UserError):
                    _log.exception("a request failed")
                for text in job.texts:
                    text.ended, text.error = "error", error
                    self._tell(Progress(text, "", None, None, (), "error"))

    def _tell(self, progress: Progress, job: Job | None = None) -> None:
        """Passes on what happened to a text."""
        job = job or self._jobs[id(progress.text)]
        if progress.ended:
            self._jobs.pop(id(progress.text), None)
            self._watcher.ended(progress.ended)
        try:
            job.listen(progress)
        except Exception:  # a listener that is gone is no concern of the others
            _log.debug("a listener failed", exc_info=True)
