"""Stop on SIGTERM, as batch systems send it, and on SIGHUP, as a closed terminal does, exactly as on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
_NAMES = ("SIGTERM", "SIGHUP")


class Stopped(KeyboardInterrupt):
    """The process was told to stop; all code that handles Ctrl-C handles it too."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM and SIGHUP; a signal that is ignored, as by nohup, stays ignored."""
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    former = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        former = {}

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    for number in former:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def exit_code(error: BaseException | None) -> int:
    """Return 128 plus the number of the signal that stopped the command."""
    while error is not None:
        if isinstance(error, Stopped):
            return error.exit_code
        error = error.__cause__ or error.__context__
    return INTERRUPTED
