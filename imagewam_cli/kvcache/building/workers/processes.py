"""Workers as processes of this machine.

Spawned, not forked: CUDA does not survive a fork, nor do torch's threads. Ctrl-C is for the parent alone, which then
ends them; a parent that dies takes them along, so that none writes into a cache whose lock is gone.
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

from imagewam_cli.kvcache.building.workers.pool import Died, Event, Finished, Free, Ready
from imagewam_cli.kvcache.building.workers.worker import Recipe, Worker


@dataclass(frozen=True)
class _Hired:
    process: SpawnProcess
    connection: Connection


class ProcessWorkers:
    """The engine `processes`: see `crew.Workers`."""

    def __init__(self, recipe: Recipe, count: int, threads: int) -> None:
        """threads: torch's, of each process."""
        self.count = count
        self._recipe, self._threads = recipe, threads
        self._context = multiprocessing.get_context("spawn")
        self._hired: dict[int, _Hired] = {}

    def start(self, place: int) -> None:
        resource_tracker.ensure_running()  # else it starts with the first worker, and lifts the signals' mask for it
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self._recipe, place, self._threads), name=f"worker {place}", daemon=True
        )
        with _without_interrupts():
            process.start()
            self._hired[place] = _Hired(process, ours)
        theirs.close()

    def give(self, place: int, names: Sequence[str]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead: `wait` tells
            self._hired[place].connection.send(names)

    def wait(self) -> Event:
        places = {hired.connection: place for place, hired in self._hired.items()}
        sentinels = {hired.process.sentinel: place for place, hired in self._hired.items()}
        found = wait([*places, *sentinels])
        place = next((places[ready] for ready in found if ready in places), None)
        if place is None:
            place = next(sentinels[ready] for ready in found if ready in sentinels)
        return self._event_of(place)

    def stop(self) -> None:
        with _without_interrupts():
            for hired in self._hired.values():
                hired.process.kill()
            for hired in self._hired.values():
                hired.process.join()
                hired.connection.close()
            self._hired.clear()

    def _event_of(self, place: int) -> Event:
        hired = self._hired[place]
        try:
            # a process that has ended may have said something before
            said = hired.connection.recv() if hired.process.is_alive() or hired.connection.poll() else None
        except (EOFError, OSError):
            said = None
        if isinstance(said, BaseException):
            raise said
        if said is not None:
            event: Event = said
            return event
        hired.process.kill()
        hired.process.join()
        hired.connection.close()
        del self._hired[place]
        return Died(place, _how(hired.process.exitcode or 0))


def _how(exit_code: int) -> str:
    return f"was killed ({signal.Signals(-exit_code).name})" if exit_code < 0 else f"ended with exit code {exit_code}"


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C comes afterwards. Processes that are started meanwhile never see it: they inherit the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, recipe: Recipe, place: int, threads: int) -> None:
    """The life of a worker."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        worker = Worker(recipe, place, threads)
        connection.send(Ready(place, worker.facts))
        while True:
            names = connection.recv()
            worker.make(names, lambda entry: connection.send(Finished(place, entry)))
            connection.send(Free(place))
    except Exception as error:  # noqa: BLE001 - a process's boundary: the parent raises it
        connection.send(_portable(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """What can be sent of it, with the traceback as a note."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))  # tried here, as the parent could only fail at it
    except Exception:  # noqa: BLE001 - foreign exceptions fail at this in their own ways
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
