"""Progress of nodes, item by item, reported to the process that started them.

A node works on many runs, in a worker process or on another machine. It writes a line into a file
of the work folder for each of them, and for what it logs; a thread of the command reads these.
"""

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from bids_brainfm.progress import Progress

LOGGER = logging.getLogger('bids_brainfm')
POLL = 0.2  # seconds


class Journal(logging.Handler):
    """The file of one node; `what` is made of its items, each of which is a `unit`."""

    def __init__(self, folder: Path, what: str = '', unit: str = '') -> None:
        super().__init__()
        # read in the order in which nodes began
        path = folder / f'{time.time_ns()}-{uuid.uuid4().hex}.jsonl'
        self.file = path.open('w', encoding='utf-8')
        self.what, self.unit = what, unit
        self.forwards = not LOGGER.handlers  # in a worker process

    def write(self, name: str, error: str | None, seconds: float) -> None:
        """Report that an item is done, or why it failed."""
        self._append(what=self.what, unit=self.unit, name=name, error=error, seconds=seconds)

    def emit(self, record: logging.LogRecord) -> None:
        """Forward what was logged."""
        self._append(level=record.levelno, message=record.getMessage())

    def _append(self, **entry: Any) -> None:
        self.file.write(json.dumps(entry) + '\n')
        self.file.flush()

    def __enter__(self) -> Self:
        """Report that the node begins; collect its log where there is no other handler."""
        if self.what:
            self._append(what=self.what, unit=self.unit)
        if self.forwards:
            LOGGER.addHandler(self)
            LOGGER.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        LOGGER.removeHandler(self)
        self.file.close()


class Follower:
    """Logs what is written in the journals of a folder; `totals` are items, by what is made."""

    def __init__(self, folder: Path, totals: Mapping[str, int]) -> None:
        self.folder, self.totals = folder, totals
        self.read: dict[str, int] = {}  # bytes of each file
        self.progress: dict[str, Progress] = {}
        self.stack = contextlib.ExitStack()  # of these
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        """Begin to follow."""
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Report what is left, and end."""
        self.ended.set()
        self.thread.join()
        self.stack.close()

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self.ended.wait(POLL)
            with contextlib.suppress(OSError):  # the work folder was emptied
                for path in sorted(self.folder.glob('*.jsonl')):
                    self._read(path)

    def _read(self, path: Path) -> None:
        begin = self.read.get(path.name, 0)
        if path.stat().st_size == begin:
            return
        with path.open('rb') as file:
            file.seek(begin)
            whole, newline, _ = file.read().rpartition(b'\n')  # the last line may be half written
        self.read[path.name] = begin + len(whole + newline)
        for line in whole.splitlines():
            self._report(json.loads(line))

    def _report(self, entry: dict[str, Any]) -> None:
        if 'message' in entry:
            LOGGER.log(entry['level'], '%s', entry['message'])
            return
        what, total = entry['what'], self.totals[entry['what']]
        if what not in self.progress:
            progress = Progress(total, what.capitalize(), entry['unit'])
            self.progress[what] = self.stack.enter_context(progress)
        if 'name' not in entry:  # a node begins
            return
        progress, name, error = self.progress[what], entry['name'], entry['error']
        head = f'[{progress.done + 1}/{total}]'
        if error:
            sentence = error if error.startswith(name) else f'{name}: {error}'
            LOGGER.error('%s %s', head, sentence)
        else:
            LOGGER.info('%s %s: %s written (%.1f s)', head, name, what, entry['seconds'])
        progress.update()
        if progress.done == total:
            progress.bar.close()
