"""Where libraries put what they write on the side, on a machine that has no place for it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def keep_in(folder: Path) -> None:
    """Send temporary files and Matplotlib's cache to a folder if they have no place of their own.

    A container may give neither: its root is read-only, its user unknown, ``/tmp`` not there.
    Processes that are started later do the same.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        os.environ['TMPDIR'] = str(folder)
    if not os.access(os.environ.get('HOME', ''), os.W_OK):
        os.environ.setdefault('MPLCONFIGDIR', str(folder))


@contextmanager
def passing(parent: Path) -> Iterator[None]:
    """Do so with a folder in `parent` that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        keep_in(Path(folder))
        yield
