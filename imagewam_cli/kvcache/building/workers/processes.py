"""Workers as processes of this machine.

Spawned, not forked: CUDA does not survive a fork, nor do torch's threads. Only the parent handles Ctrl-C and SIGTERM,
and then ends the workers. If the parent dies, they exit too, so that none writes into a cache whose lock was released.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from imagewam_cli.kvcache.building.workers.pool import Event, ShardFinished, WorkerDied, WorkerIdle, WorkerReady
from imagewam_cli.kvcache.building.workers.worker import Job, Worker


@dataclass(frozen=True)
class _WorkerProcess:
    process: SpawnProcess
    connection: Connection


class ProcessWorkers:
    """Workers in processes of this machine; see `pool.Workers`."""

    def __init__(self, job: Job, count: int, threads: int) -> None:
        """threads: number of torch threads in each process."""
        self.count = count
        self._job, self._threads = job, threads
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[int, _WorkerProcess] = {}

    def start(self, slot: int) -> None:
        resource_tracker.ensure_running()  # otherwise it starts with the first worker and unblocks SIGINT for it
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self._job, slot, self._threads), name=f"worker {slot}", daemon=True
        )
        with _without_interrupts():
            process.start()
            self._processes[slot] = _WorkerProcess(process, ours)
        theirs.close()

    def give(self, slot: int, names: Sequence[str]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the worker is dead; `wait` reports it
            self._processes[slot].connection.send(names)

    def wait(self) -> Event:
        slots = {worker.connection: slot for slot, worker in self._processes.items()}
        sentinels = {worker.process.sentinel: slot for slot, worker in self._processes.items()}
        found = wait([*slots, *sentinels])
        slot = next((slots[ready] for ready in found if ready in slots), None)
        if slot is None:
            slot = next(sentinels[ready] for ready in found if ready in sentinels)
        return self._event_of(slot)

    def stop(self) -> None:
        with _without_interrupts():
            for worker in self._processes.values():
                worker.process.kill()
            for worker in self._processes.values():
                worker.process.join()
                worker.connection.close()
            self._processes.clear()

    def _event_of(self, slot: int) -> Event:
        worker = self._processes[slot]
        try:
            # a process that has ended may have sent an event before
            received = worker.connection.recv() if worker.process.is_alive() or worker.connection.poll() else None
        except (EOFError, OSError):
            received = None
        if isinstance(received, BaseException):
            raise received
        if received is not None:
            event: Event = received
            return event
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        del self._processes[slot]
        return WorkerDied(slot, _how(worker.process.exitcode or 0))


def _how(exit_code: int) -> str:
    return f"was killed ({signal.Signals(-exit_code).name})" if exit_code < 0 else f"ended with exit code {exit_code}"


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Delay Ctrl-C and requests to stop. Processes started meanwhile inherit the signal mask and never receive them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, job: Job, slot: int, threads: int) -> None:
    """Run a worker until the connection closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        worker = Worker(job, slot, threads)
        connection.send(WorkerReady(slot, worker.facts))
        while True:
            names = connection.recv()
            worker.make(names, lambda entry: connection.send(ShardFinished(slot, entry)))
            connection.send(WorkerIdle(slot))
    except Exception as error:  # noqa: BLE001 - a process's boundary: the parent raises it
        connection.send(_portable(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """Return an exception that can be pickled, with the traceback as a note."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))  # checked here: the parent could not handle the failure
    except Exception:  # noqa: BLE001 - third-party exceptions can fail to pickle in any way
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
