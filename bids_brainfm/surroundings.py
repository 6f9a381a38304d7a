"""Standard streams, text encoding and temporary folders, which must not stop a run."""

import contextlib
import errno
import io
import locale
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bids_brainfm.errors import BrainfmError

# Paths of sockets have at most 104 bytes (macOS) or 108; multiprocessing adds 32 to the folder
LONGEST_FOLDER = 70
FOLDERS = ('/tmp', '/var/tmp', '/dev/shm')


def prepare() -> None:
    """Make a process that was started as a command independent of what it was started from.

    The standard streams may be closed, or close later. Text is UTF-8, in file names and files,
    whatever the locale. Raises BrainfmError where a path cannot be used.
    """
    _use_utf8()
    forgive_streams()
    try:
        here = str(Path.cwd())
    except FileNotFoundError:
        raise BrainfmError(
            'The current folder does not exist any more: change to another one (cd).'
        ) from None
    if '\n' in here:  # Nipype cannot be imported there
        raise BrainfmError('The path of the current folder has a line break: change to another.')
    for text in (*sys.argv[1:], here, os.environ.get('BIDS_BRAINFM_HOME', '')):
        try:
            text.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(text).decode(errors='backslashreplace')
            raise BrainfmError(
                f'{shown} is not encoded in UTF-8, as paths must be: rename the file or folder.'
            ) from None


def _use_utf8() -> None:
    """Start the command again in Python's UTF-8 mode, if its locale has another encoding."""
    encodings = {locale.getpreferredencoding(False).lower(), sys.getfilesystemencoding().lower()}
    if encodings != {'utf-8'} and os.environ.get('PYTHONUTF8') != '1':
        os.environ['PYTHONUTF8'] = '1'  # worker processes inherit it
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def forgive_streams() -> None:
    """Let nothing that happens to the standard streams stop this process.

    Closed ones are opened to nowhere, or the next file would take their number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # the lowest number that is free; programs that are started have it as well
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        stream = getattr(sys, name)
        setattr(sys, name, io.TextIOWrapper(
            io.BufferedWriter(_Forgiving(number, 'w', closefd=False)),
            encoding=stream.encoding if stream else 'utf-8', errors='backslashreplace',
            line_buffering=True,
        ))  # fmt: skip


class _Forgiving(io.FileIO):
    """A stream whose reader may end (``| head -1``), or whose disk may be full."""

    reported = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError as error:
            if not self.reported and error.errno != errno.EPIPE and self.fileno() == 1:
                self.reported = True
                print(f'Standard output cannot be written ({error.strerror}).', file=sys.stderr)
            return len(data)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raise what the file system refuses as BrainfmError, one sentence."""
    try:
        yield
    except RuntimeError as error:  # of pathlib
        if 'Symlink loop' not in str(error):
            raise
        raise BrainfmError(f'{error}: a link leads to itself.') from error
    except OSError as error:
        where = f'{error.filename} cannot be used' if error.filename else 'The system refused'
        raise BrainfmError(
            f'{where} ({error.strerror or error}): check the path, its permissions and the free '
            f'space.'
        ) from error


def short_folder() -> str | None:
    """Return a folder for temporary files whose path is short; None where there is none."""
    found = (tempfile.gettempdir(), *FOLDERS)
    short = (folder for folder in found if len(os.fsencode(folder)) <= LONGEST_FOLDER)
    return next((folder for folder in short if os.access(folder, os.W_OK | os.X_OK)), None)


def place_sockets() -> bool:
    """Choose a folder for the sockets of worker processes; returns whether there is one.

    Their paths must be short, and a cluster's TMPDIR may be long.
    """
    from multiprocessing import util

    if (folder := short_folder()) is None:
        return False
    chosen, tempfile.tempdir = tempfile.tempdir, folder
    try:
        util.get_temp_dir()  # makes it once; workers inherit it
    finally:
        tempfile.tempdir = chosen
    return True
