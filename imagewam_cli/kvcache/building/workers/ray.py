"""Workers as actors of a Ray cluster: of one that runs, or of one on this machine that ends with the build.

Every node needs imagewam, and sees the dataset and the cache's folder under the same paths.
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
from typing import Any

import torch

from imagewam_cli.errors import CacheError, UsageError, install_hint
from imagewam_cli.kvcache.building.workers.pool import Died, Event, Finished, Free, Ready
from imagewam_cli.kvcache.building.workers.worker import Job, Worker, WorkerFacts
from imagewam_cli.kvcache.format.manifest import ShardEntry

_OBJECTS = 100 * 2**20
"""Bytes of a local cluster's object store: entries of shards are all that passes through it."""
_ANSWERING = 5.0
"""Seconds that a cluster may take to accept a connection."""
_STOPPING = 10.0
"""Seconds that a stopped actor of a cluster may take to be gone."""


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
            address: of the cluster, as RAY_ADDRESS has it; None: start one on this machine.
            gpus: whether the editor runs on them.
            count: by default as many as the cluster has GPUs, or one without `gpus`.
            threads: torch's, of each actor; by default the cluster's cores, or on this machine torch's own number,
                divided by `count`.

        Raises:
            UsageError: Ray is not installed, or there is no GPU.
            CacheError: there is no cluster at the address.
        """
        self._ray = _installed()
        self._job = job
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}
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
                facts: WorkerFacts = self._ray.get(ready)
                del self._pending[ready]
                return Ready(slot, facts)
            entry: ShardEntry = self._ray.get(next(ready))
            return Finished(slot, entry)
        except StopIteration:
            del self._pending[ready]
            return Free(slot)
        except exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except exceptions.RayError as error:
            del self._pending[ready]
            return Died(slot, f"was lost ({type(error).__name__})")

    def stop(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._pending and self._ray.is_initialized():
            self._ray.wait(list(self._pending), num_returns=len(self._pending), timeout=_STOPPING)
        self._actors.clear()
        self._pending.clear()
        if self._ours:
            self._ray.shutdown()


class _Actor:
    """A worker in an actor."""

    def load(self, job: Job, slot: int, threads: int) -> WorkerFacts:
        self._worker = Worker(job, slot, threads)
        return self._worker.facts

    def make(self, names: Sequence[str]) -> Iterator[ShardEntry]:
        """The entry of each shard, as soon as it is durable."""
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
        ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECTS, **quiet)
        return
    try:
        _require_listening(address)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CacheError(
            f"no Ray cluster lets us in at {address}: {reason}",
            "RAY_ADDRESS is its head's address, RAY_AUTH_TOKEN its token if it asks for one; without RAY_ADDRESS the "
            "actors run on this machine",
        ) from None


def _require_listening(address: str) -> None:
    """Ray itself would knock for minutes. An address may also be a word, like auto.

    Raises:
        OSError: nobody answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=_ANSWERING).close()


def _options(resources: dict[str, float], count: int | None, *, gpus: bool, alone: bool) -> tuple[int, dict[str, Any]]:
    """How many actors, and what each asks for. alone: on a cluster of this build's own, where nobody else asks."""
    found = int(resources.get("GPU", 0))
    if gpus and not found:
        raise UsageError("--device cuda: no GPU is known to Ray", "use --device cpu, or give the cluster GPUs")
    chosen = count or (found if gpus else 1)
    share = 1 / math.ceil(chosen / found) if gpus else 0
    cores = 0 if alone else 1
    return chosen, {"num_cpus": cores, "num_gpus": share, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
