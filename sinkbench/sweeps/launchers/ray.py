"""Cells as tasks of a Ray cluster; results come back to this machine and are verified before they count.

A task runs its cell in a folder of its own and answers with the files, so workers need no disk in common. A worker that
is lost takes nothing with it but time: Ray runs the task again elsewhere.
"""

import math
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sinkbench.config import ModelSource, RunConfig
from sinkbench.errors import UserError
from sinkbench.models import embedded
from sinkbench.models.loading import Checkpoint, locate
from sinkbench.models.sizes import read_sizes
from sinkbench.runs.account import failure
from sinkbench.runs.record import device_name
from sinkbench.runs.result import RunResult
from sinkbench.signals import kept, signals, undisturbed
from sinkbench.strategies.registry import source_of
from sinkbench.sweeps.device import Device
from sinkbench.sweeps.estimate import estimate
from sinkbench.sweeps.launchers.transfer import Transfer, place, work

LOST = 3  # workers that a cell may lose beyond the retries asked for
MOMENT = 0.5  # seconds until it is seen that the sweep is asked to end
GRACE = 5.0  # seconds that cells have to end when they are interrupted


def launch(
    cells: Sequence[RunConfig],
    retries: int,
    started: Callable[[int], None],
    finished: Callable[[int, RunResult], None],
    find: Callable[[ModelSource], Checkpoint] = locate,
) -> None:
    """Carry out ``cells`` on the cluster that ``RAY_ADDRESS`` names, or one that runs here, or one made for this.

    A cell counts as started when it is handed to Ray, which may let it wait. An interruption (SIGINT, SIGTERM) ends
    all cells; what is finished by then counts.

    Raises:
        UserError: Ray is not installed, the cluster does not answer, or its GPUs cannot be used.
    """
    ray = _ray()
    with connected():
        tasks = _Tasks(ray, cells, retries, finished, find)
        with signals() as watch:  # noted only: an exception out of a handler is lost in Ray's compiled code
            for index in range(len(cells)):
                if watch.came is None:
                    tasks.submit(index)
                    started(index)
            while tasks.pending and watch.came is None:
                tasks.collect()
            if watch.interruption is not None:
                tasks.stop(watch.interruption.reason)
                watch.answered = True


@dataclass
class _Tasks:
    """The tasks under way, and the cells that are not through."""

    ray: Any
    cells: Sequence[RunConfig]
    retries: int
    finished: Callable[[int, RunResult], None]
    find: Callable[[ModelSource], Checkpoint]
    pending: dict[Any, int] = field(default_factory=dict)
    tries: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.open = set(range(len(self.cells)))
        self.node = largest(self.ray.nodes())
        self.gpu_memory = _gpu_memory(self.ray) if self.node.get("GPU") else 0

    def submit(self, index: int) -> None:
        options = self.cells[index]
        # What a task raises is counted here; a worker that is lost, by Ray.
        limits = {"max_retries": self.retries + LOST, "retry_exceptions": False}
        task = self.ray.remote(**limits, **needs(options, self.gpu_memory, self.node, self.find))(_task)
        self.pending[task.remote(_anywhere(options), source_of(options.experiment))] = index
        self.tries[index] += 1

    def collect(self) -> None:
        """Wait a moment for a task, and finish its cell, or try it again."""
        for reference in self.ray.wait(list(self.pending), timeout=MOMENT)[0]:
            index = self.pending.pop(reference)
            result, again = self.outcome(reference, self.cells[index])
            if again and self.tries[index] <= self.retries:
                self.submit(index)
            else:
                self.finish(index, result)

    def outcome(self, reference: Any, options: RunConfig) -> tuple[RunResult, bool]:
        """How a task ended, its files put in place, and whether another try may mend it."""
        errors = self.ray.exceptions
        try:
            transfer = self.ray.get(reference)
            place(transfer, options)
            return transfer.result, False
        except errors.RayTaskError as error:
            reason, again = failure(error.cause or error), True
        except UserError as error:
            reason, again = failure(error), True
        except errors.RayError as error:  # Ray has done what it could
            reason, again = failure(error), False
        return RunResult(options.experiment, options.csv, exit_reason=reason), again

    def finish(self, index: int, result: RunResult) -> None:
        self.open.remove(index)
        self.finished(index, result)

    def stop(self, reason: str) -> None:
        """Keep what is finished, and end the others."""
        tasks = list(self.pending)
        done, running = self.ray.wait(tasks, num_returns=len(tasks), timeout=0) if tasks else ([], [])
        for reference in running:
            self.ray.cancel(reference)
        for reference in done:
            index = self.pending[reference]
            self.finish(index, self.outcome(reference, self.cells[index])[0])
        if running:  # so that they leave no folder behind
            _, running = self.ray.wait(running, num_returns=len(running), timeout=GRACE)
        for reference in running:
            self.ray.cancel(reference, force=True)
        for index in sorted(self.open):
            options = self.cells[index]
            self.finish(index, RunResult(options.experiment, options.csv, exit_reason=reason))


def _task(options: RunConfig, source: bytes | None) -> Transfer:
    transfer = work(options, source)
    if transfer.result.interrupted:  # its machine is going down, or the sweep is: this worker is lost
        os._exit(1)
    return transfer


def _anywhere(options: RunConfig) -> RunConfig:
    """With absolute paths: a worker may stand in another folder."""
    return options.but(
        model_name_or_path=_absolute(options.model_name_or_path), dataset_name=_absolute(options.dataset_name)
    )


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    if name in (embedded.MODEL, embedded.TEXT, embedded.CODE):
        return name
    return str(path.resolve()) if path.exists() else name


def largest(nodes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The most of each resource that one node has: a task is never spread over two."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return {name: max(node.get(name, 0) for node in alive) for name in ("CPU", "GPU", "memory")}


def needs(
    options: RunConfig,
    gpu_memory: int,
    node: dict[str, float],
    find: Callable[[ModelSource], Checkpoint] = locate,
) -> dict[str, float]:
    """What Ray is to keep free for a cell: a core, GPUs where there are any, and host memory where it can be known.

    ``gpu_memory`` are the bytes of one GPU, 0 without; ``node`` is what the largest node has. More than that is not
    asked for: the cell would wait for ever, and out of memory is a result.
    """
    found: dict[str, float] = {"num_cpus": 1}
    on_gpu = bool(gpu_memory) and options.device_map != "cpu"
    device = Device("cuda" if on_gpu else "cpu", gpu_memory, 1.0, 1.0)
    try:
        size = estimate(options, read_sizes(find(options.model)), device).vram_bytes
    except UserError:
        size = 0
    if on_gpu:
        found["num_gpus"] = min(max(1, math.ceil(size / (0.95 * gpu_memory))), int(node["GPU"]))
    if 0 < size <= node["memory"]:
        found["memory"] = size
    return found


def _gpu_memory(ray: Any) -> int:
    """Bytes of one GPU of the cluster."""

    def read() -> int:
        import torch

        return torch.cuda.get_device_properties(0).total_memory

    try:
        return ray.get(ray.remote(num_gpus=1)(read).remote())
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a worker of the Ray cluster cannot use its GPU: {failure(error)}; see docs/cluster.md"
        ) from error


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("--launcher ray needs Ray: pip install 'sinkbench[ray]'") from error
    return ray


def devices() -> set[str]:
    """The devices of the cluster's workers, as records name them; to be asked within :func:`connected`.

    A cell may be given several GPUs of a node.
    """
    ray = _ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def asked(node: dict[str, Any], **more: int) -> Any:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return ray.remote(num_cpus=1, scheduling_strategy=there, **more)(device_name).remote()

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    gpus = [(asked(node, num_gpus=1), int(node["Resources"]["GPU"])) for node in nodes if node["Resources"].get("GPU")]
    try:
        found = set(ray.get([asked(node) for node in nodes]))
        return found | {", ".join([ray.get(name)] * n) for name, most in gpus for n in range(1, most + 1)}
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a worker of the Ray cluster cannot run sinkbench: {failure(error)}; see docs/cluster.md"
        ) from error


@contextmanager
def connected() -> Iterator[None]:
    """Within this context there is a cluster; one that was there before stays."""
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS", "auto")
    _check_answers(address)
    try:
        with undisturbed(), kept():  # half a cluster would stay behind, and Ray's handler exits with status 15
            try:
                ray.init(address=address, **quiet)
            except ConnectionError as error:
                if address != "auto":
                    raise UserError(f"no Ray cluster at RAY_ADDRESS={address}: {error}") from error
                ray.init(include_dashboard=False, **quiet)
        yield
    finally:
        with undisturbed():
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes, and then end this process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error.strerror or error}): "
            "start one with `ray start --head`, or unset RAY_ADDRESS"
        ) from error
