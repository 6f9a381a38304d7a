"""Requests to stop: Ctrl-C, or SIGTERM (Slurm's preemption and time limit, a container's end).

A signal raises KeyboardInterrupt where the program is, and is remembered: Nipype takes whatever
an interface raises for a fault of that interface, and goes on with the next one.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

_received: list[int] = []


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Take SIGINT and SIGTERM as a wish to stop, unless they are ignored here (as by nohup)."""

    def stop(number: int, _: FrameType | None) -> None:
        _received.append(number)
        raise KeyboardInterrupt

    _received.clear()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    heard = [number for number in numbers if before[number] is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def check() -> None:
    """Raise KeyboardInterrupt if a signal came."""
    if _received:
        raise KeyboardInterrupt


def exit_code() -> int:
    """Exit code of a process that was stopped: as a shell reports it, 130 or 143."""
    return 128 + (_received or [signal.SIGINT])[0]
