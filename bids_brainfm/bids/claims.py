"""Claims of running commands on the settings of one kind of output in a shared folder.

A command announces its settings before it looks whether others differ, so that of two commands
with different settings at least one sees the other. A claim is a small file of its process in
``logs``. It is withdrawn when the command ends; that of a killed process counts for a minute more.
"""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from bids_brainfm.bids.files import first_line, has_ended, owner, write_text

GRACE = 60.0  # seconds for which the claim of a killed process still counts
DAY = 86_400.0  # and one of another machine, where processes cannot be looked up


def announce(output: Path, name: str, digest: str) -> None:
    """Claim `name` for settings with this `digest`, in place of what this process claimed."""
    path = output / 'logs' / f'claim-{name}_{owner()}-{digest}.txt'
    write_text(path, f'process {os.getpid()} on {platform.node()}\n')
    for other, whose, claimed in _claims(output, name):
        # what killed processes were making with these settings, this process makes
        ended = claimed == digest and not _counts(other, whose, grace=0)
        if ended or (whose == owner() and claimed != digest):
            _remove(other)


def rivals(output: Path, name: str, digest: str, grace: float = GRACE) -> list[str]:
    """Processes that claim `name` for other settings, in words."""
    found = [
        path
        for path, whose, other in _claims(output, name)
        if other != digest and whose != owner() and _counts(path, whose, grace)
    ]
    return list(filter(None, map(_words, found)))


def withdraw(output: Path, name: str | None = None) -> None:
    """Remove the claims of this process on `name` or on all, and those that no longer count."""
    for path, whose, _ in _claims(output, name):
        if whose == owner() or not _counts(path, whose, GRACE):
            _remove(path)


def _claims(output: Path, name: str | None) -> Iterator[tuple[Path, str, str]]:
    """Path, owner and digest of all claims on `name`, or on anything."""
    for path in (output / 'logs').glob('claim-*.txt'):
        claimed, _, owned = path.stem.removeprefix('claim-').rpartition('_')
        whose, _, digest = owned.rpartition('-')
        if name in (None, claimed):
            yield path, whose, digest


def _counts(path: Path, whose: str, grace: float) -> bool:
    """Whether the process of a claim runs, or has ended without withdrawing it a moment ago."""
    ended = has_ended(whose)
    with contextlib.suppress(OSError):  # withdrawn meanwhile
        age = time.time() - path.stat().st_mtime
        return ended is False or age < (grace if ended else DAY)
    return False


def _words(path: Path) -> str:
    with contextlib.suppress(OSError):
        return first_line(path).strip() or path.name
    return ''


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # gone, or another user's
        path.unlink()
