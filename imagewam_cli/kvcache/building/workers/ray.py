"""Run workers as actors of a Ray cluster: a running cluster, or a local one that is stopped after the build.

Every node needs imagewam installed, and the dataset and the cache's folder at the same paths.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from imagewam_cli.errors import CacheError, UsageError, install_hint
from imagewam_cli.kvcache.building.workers.pool import Event, ShardFinished, WorkerDied, WorkerIdle, WorkerReady
from imagewam_cli.kvcache.building.workers.worker import Job, Worker, WorkerIdentity
from imagewam_cli.kvcache.format.manifest import ShardEntry

if TYPE_CHECKING:
    from ray import ObjectRef, ObjectRefGenerator

_OBJECT_STORE_BYTES = 100 * 2**20
"""Size of a local cluster's object store. It only transfers shard entries."""
_CONNECT_SECONDS = 5.0
"""Timeout for connecting to a cluster."""
_STOP_SECONDS = 10.0
"""Timeout for killed actors to end."""


class RayWorkers:
    """Workers as Ray actors; see `pool.Workers`."""

    def __init__(
        self,
        job: Job,
        *,
        address: str | None = None,
        gpus: bool = False,
        count: int | None = None,
        threads: int | None = None,
    ) -> None:
        """
        Args:
            address: address of the cluster, in the format of RAY_ADDRESS; None: start one on this machine.
            gpus: if True, the editor runs on GPUs.
            count: number of workers. Default: one per GPU of the cluster, or one worker without `gpus`.
            threads: number of torch's threads per worker. Default: the cluster's cores (on this machine, torch's
                default) divided by `count`.

        Raises:
            UsageError: Ray is not installed, or `gpus` is True and the cluster has no GPU.
            CacheError: no cluster answers at the address.
        """
        self._ray = _installed()
        self._job = job
        self._actors: dict[int, Any] = {}
        """Ray's actor handles. Their type does not declare the actor's methods."""
        self._pending: dict[ObjectRef[WorkerIdentity] | ObjectRefGenerator, int] = {}
        """Slot of each running call: a reference while loading, a generator while building."""
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _connect(self._ray, address)
        try:
            resources = self._ray.cluster_resources()
            self.count, self._options = _options(resources, count, gpus=gpus, alone=self._ours and not address)
            cores = int(resources.get("CPU", 1)) if address else torch.get_num_threads()
            self._threads = threads or max(1, cores // self.count)
        except BaseException:
            self.stop()
            raise

    def start(self, slot: int) -> None:
        if slot in self._actors:
            self._ray.kill(self._actors[slot])
        actor = self._actors[slot] = self._ray.remote(_Actor).options(**self._options).remote()
        self._pending[actor.load.remote(self._job, slot, self._threads)] = slot

    def give(self, slot: int, names: Sequence[str]) -> None:
        made = self._actors[slot].make.options(num_returns="streaming").remote(names)
        self._pending[made] = slot

    def wait(self) -> Event:
        exceptions = self._ray.exceptions
        (ready,), _ = self._ray.wait(list(self._pending), num_returns=1)
        slot = self._pending[ready]
        try:
            if isinstance(ready, self._ray.ObjectRef):
                facts: WorkerIdentity = self._ray.get(ready)
                del self._pending[ready]
                return WorkerReady(slot, facts)
            entry: ShardEntry = self._ray.get(next(ready))
            return ShardFinished(slot, entry)
        except StopIteration:  # the worker has yielded all its entries
            del self._pending[ready]
            return WorkerIdle(slot)
        except exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except exceptions.RayError as error:
            del self._pending[ready]
            return WorkerDied(slot, f"was lost ({type(error).__name__})")

    def stop(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._pending and self._ray.is_initialized():
            self._ray.wait(list(self._pending), num_returns=len(self._pending), timeout=_STOP_SECONDS)
        self._actors.clear()
        self._pending.clear()
        if self._ours:
            self._ray.shutdown()


class _Actor:
    """Wraps a `Worker` in a Ray actor."""

    def load(self, job: Job, slot: int, threads: int) -> WorkerIdentity:
        self._worker = Worker(job, slot, threads)
        return self._worker.facts

    def make(self, names: Sequence[str]) -> Iterator[ShardEntry]:
        """Build the shards; yield the entry of each as soon as it is durable."""
        # `Worker.make` reports by callback, Ray streams a generator: a thread and a queue turn one into the other
        finished: SimpleQueue[ShardEntry | None] = SimpleQueue()
        with ThreadPoolExecutor(max_workers=1) as thread:
            made = thread.submit(self._worker.make, names, finished.put)
            made.add_done_callback(lambda _: finished.put(None))
            while (entry := finished.get()) is not None:
                yield entry
            made.result()


def _installed() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs ray, which is not installed", install_hint("ray")) from None
    return ray


def _connect(ray: ModuleType, address: str | None) -> None:
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
        return
    try:
        _require_listening(address)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CacheError(
            f"cannot connect to a Ray cluster at {address}: {reason}",
            "set RAY_ADDRESS to the address of the head node, and RAY_AUTH_TOKEN if the cluster requires a token; "
            "without RAY_ADDRESS the workers run on this machine",
        ) from None


def _require_listening(address: str) -> None:
    """Check that a server listens at the address, because Ray itself retries for minutes.

    Addresses without a port, such as `auto`, are not checked.

    Raises:
        OSError: nothing listens there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


def _options(
    resources: dict[str, float], count: int | None, *, gpus: bool, alone: bool
) -> tuple[int, dict[str, object]]:
    """Return the number of actors, and the Ray options of each. alone: the cluster was started for this build."""
    found = int(resources.get("GPU", 0))
    if gpus and not found:
        raise UsageError("--device cuda: Ray reports no GPUs", "use --device cpu, or add nodes with GPUs")
    chosen = count or (found if gpus else 1)
    share = 1 / math.ceil(chosen / found) if gpus else 0  # several workers may share a GPU
    cores = 0 if alone else 1  # reserve cores only on a shared cluster
    return chosen, {"num_cpus": cores, "num_gpus": share, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
