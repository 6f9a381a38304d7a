"""How far long work is: a bar on a terminal, and lines with counts and time left in the log."""

import logging
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any, Self, TypeVar

LOGGER = logging.getLogger('bids_brainfm')
FIRST, EVERY = 1.0, 60.0  # seconds until the first line, and between lines
TICK = 0.5  # seconds between two looks whether a line is due
T = TypeVar('T')


class Progress:
    """Count what is done of `total`; bar and lines begin with `what`.

    As a context manager it also writes lines while nothing is finished for a long time.
    """

    def __init__(self, total: int, what: str, unit: str = 'run') -> None:
        from tqdm import tqdm

        self.total, self.what, self.unit, self.done = total, what, unit, 0
        self.started = time.monotonic()
        self.next = self.started + FIRST
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.bar: Any = tqdm(total=total, desc=what, unit=unit, disable=None)

    def update(self, n: int = 1) -> None:
        """Add what has been done since; with 0 only write the line that is due."""
        with self.lock:
            self.done += n
            self.bar.update(n)
            now = time.monotonic()
            if now < self.next:
                return
            self.next = now + EVERY
        LOGGER.info('%s: %d of %d %ss%s', self.what, self.done, self.total, self.unit,
                    self._left(now - self.started))  # fmt: skip

    def _left(self, seconds: float) -> str:
        if self.done in (0, self.total):
            return ''
        left = seconds / self.done * (self.total - self.done)
        return f', about {duration(left)} left'

    def _tick(self) -> None:
        while self.done < self.total and not self.ended.wait(TICK):
            self.update(0)

    def __enter__(self) -> Self:
        """Begin to write the lines that are due."""
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        self.ended.set()
        self.bar.close()


def track(items: Collection[T], what: str, unit: str = 'run') -> Iterator[T]:
    """Yield the items and count them."""
    with Progress(len(items), what, unit) as progress:
        for item in items:
            yield item
            progress.update()


def duration(seconds: float) -> str:
    """Words for a time of which only the magnitude is known.

    >>> duration(12.3), duration(100), duration(9000)
    ('12 s', '2 min', '2.5 h')
    """
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'
