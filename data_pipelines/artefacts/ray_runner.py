"""Runs a stage's shards as tasks of a Ray cluster, whose nodes all see the directories written to.

A task whose worker or node dies is run again elsewhere by Ray; one that raises is not. Tasks are spread
over the nodes, so that each loads only the models and indexes that its share of the shards needs.
"""

import dataclasses
import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from data_pipelines.artefacts.runner import WANTS_ACCELERATOR
from retro_jax.config import require
from retro_jax.errors import UserError

_AHEAD, _LEAST_AHEAD = 4, 16  # tasks in flight for each core, and at least
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class RayCluster:
    """A Ray cluster.

    Attributes:
      address: of its head ("auto" for the one this machine is part of, "ray://HOST:10001"); None
        for the one that RAY_ADDRESS names, or else a new one of this machine alone. A process joins one
        cluster, and stays in it.
      cpus: cores that a task asks for, and threads that it uses.
      accelerators: what a task that embeds or compares keys asks for beside them: "GPU", "TPU:4" or
        another resource of the cluster with its number; empty for none.
      retries: how often a task whose worker or node died is run again.
    """

    address: str | None = None
    cpus: int = 1
    accelerators: str = ""
    retries: int = 10

    def __post_init__(self) -> None:
        require(self.cpus > 0, self, "cpus", "a positive number of cores")
        require(self.retries >= 0, self, "retries", "a number")
        name, _, count = self.accelerators.partition(":")
        valid = not self.accelerators or (name.isidentifier() and (count or "1").isdecimal())
        require(valid, self, "accelerators", "a resource's name, or NAME:COUNT")

    @property
    def threads(self) -> int:
        """The cores of a task."""
        return self.cpus

    @property
    def in_process(self) -> bool:
        """No."""
        return False

    def run(
        self, work: Callable[[Item], Result], shards: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """As `runner.Runner.run`."""
        if not shards:
            return
        ray = _import_ray()
        if not ray.is_initialized():
            self._join(ray)
        task = ray.remote(**self._options(work))(_call)
        # In a list the reference is passed on as it is: a worker fetches the work once, not for each task.
        shared, name = [ray.put(work)], uuid.uuid4().hex
        rest, pending = iter(shards), dict[Any, Item]()
        most = max(_LEAST_AHEAD, _AHEAD * int(ray.cluster_resources().get("CPU", 1)))
        try:
            while True:
                for shard in itertools.islice(rest, most - len(pending)):
                    pending[task.remote(name, shared, shard)] = shard
                if not pending:
                    return
                ray.wait(list(pending), num_returns=1)
                done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
                for reference in done:
                    yield pending.pop(reference), self._result(ray, reference)
        finally:  # of an error, or of a driver that stopped reading
            _cancel(ray, list(pending))

    def _join(self, ray: Any) -> None:
        """Joins the cluster until this process ends: its workers keep what they have loaded."""
        try:
            ray.init(self.address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"no Ray cluster at {self.address!r} ({reason}): expected the address of its head"
            ) from error

    def _options(self, work: Any) -> dict[str, Any]:
        """What a task asks the cluster for."""
        options: dict[str, Any] = {
            "num_cpus": self.cpus,
            "max_retries": self.retries,
            "scheduling_strategy": "SPREAD",
        }
        if self.accelerators and getattr(work, WANTS_ACCELERATOR, False):
            name, _, count = self.accelerators.partition(":")
            if name == "GPU":
                options["num_gpus"] = int(count or 1)
            else:
                options["resources"] = {name: int(count or 1)}
        return options

    def _result(self, ray: Any, reference: Any) -> Any:
        """What a task returned; its own error as it was raised."""
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ray.exceptions.RaySystemError):
                reason = str(error.cause).split("\n")[0]
                raise UserError(
                    f"a Ray worker cannot open its work ({reason}): expected the packages and files of"
                    " this process on every node"
                ) from None
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except ray.exceptions.RayError as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"a Ray task was lost {self.retries + 1} times ({reason}): run again to make the"
                " missing shards"
            ) from error


def _cancel(ray: Any, references: list[Any]) -> None:
    """Ends the tasks that run or wait.

    Not those that are done: Ray shows a result a moment before it counts the task as ended, and ends
    the whole process if the task is cancelled between the two (2.60).
    """
    if references:
        _, running = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in running:
            ray.cancel(reference, force=True)


_work: dict[str, Any] = {}  # of this worker: what the newest run shares


def _call(name: str, shared: list[Any], shard: Item) -> Any:
    """The body of every task; what the work of a run opens stays open for its next shards."""
    if name not in _work:
        _work.clear()
        _work[name] = _import_ray().get(shared[0])
    return _work[name](shard)


def _import_ray() -> Any:
    """Ray, which only this runner needs."""
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"Ray cannot be imported ({error}): expected the extra retro-jax[cluster]"
        ) from None
    return ray
