"""Settings records: which settings the outputs of one kind in a folder were made with."""

import contextlib
import functools
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_brainfm.bids import claims
from bids_brainfm.bids.files import as_plain, create, write_text
from bids_brainfm.bids.freshness import read_sidecar
from bids_brainfm.documents import text_checksum
from bids_brainfm.errors import BrainfmError

if TYPE_CHECKING:
    from bids_brainfm.bids.dataset import Record

VERSION = 'results_version'  # key of the settings records
SETTINGS = 'SettingsChecksums'  # entry of sidecars: those of the recorded settings
PATIENCE = 2.0  # seconds to wait for what others do in milliseconds


def claim_settings(
    output: Path, name: str, settings: Mapping[str, Any], records: 'Iterable[Record]',
    recompute: bool = False,
) -> None:  # fmt: skip
    """Record the settings behind one kind of output, or check that they are the recorded ones.

    The first process to write the record wins; all others must agree with it, as long as it runs
    or there are outputs of this kind, the `records`, read only where settings differ. The `name`
    says what the settings are for, e.g. ``atlas-A424`` or ``desc-brainlm111m``. Their
    ``results_version`` says which version of the results the outputs are of; with `recompute`, a
    record of another version is replaced.

    Raises
    ------
    BrainfmError
        There are outputs made with other settings, or a command that is about to make them; the
        sentence gives both settings.
    """
    path = record_path(output, name)
    text = json.dumps(settings, indent=2, default=as_plain) + '\n'
    wanted, digest = json.loads(text), text_checksum(text)
    claims.announce(output, name, digest)
    first = functools.cache(lambda: next(iter(records), None))
    try:
        if not path.is_file() and (made := first()) is not None:
            found = (made.sidecar or {}).get(SETTINGS, {}).get(name)
            if found not in (None, settings_digest(wanted)):
                raise BrainfmError(
                    f'{made.path} was made with other settings, and their record {path} is '
                    f'missing: use another output folder.'
                )
        create(path, text)
        patience = time.monotonic() + PATIENCE
        while not (differences := _differences(known := _read_record(path), wanted)):
            # others may have seen that a record was abandoned, and be about to replace it
            late = time.monotonic() > patience
            if late or not claims.rivals(output, name, digest, grace=0):
                return
            time.sleep(0.02)
        outdated = known is not None and known.get(VERSION) != wanted.get(VERSION)
        if not (outdated and recompute) and first() is not None:
            raise BrainfmError(_refusal(path, known, wanted, differences))
        if rivals := claims.rivals(output, name, digest):
            raise BrainfmError(
                f'{output}: another command with other settings is about to write outputs of '
                f'{name} ({"; ".join(differences)}; {", ".join(rivals)}): use the same settings, '
                f'or another output folder. If it was killed, try again in a minute, or, if on '
                f'another machine, remove its logs/claim-{name}_*.txt.'
            )
        write_text(path, text)
    except BaseException:
        claims.withdraw(output, name)
        raise


def record_path(output: Path, name: str) -> Path:
    """File of the settings behind one kind of output."""
    return output / 'logs' / 'settings' / f'{name}.json'


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Checksum of settings without the version of the results, which sidecars have themselves."""
    others = {key: value for key, value in settings.items() if key != VERSION}
    text = json.dumps(others, sort_keys=True, default=as_plain)
    return text_checksum(text)


def recorded_digest(output: Path, name: str) -> str | None:
    """Checksum of the recorded settings of one kind of output, None where there is no record."""
    path = record_path(output, name)
    try:
        state = path.stat()
    except OSError:
        return None
    return _digest_of(path, state.st_mtime_ns, state.st_ino)


def other_settings(output: Path, sidecar: Mapping[str, Any]) -> list[str]:
    """Names of the records whose settings are not those that an output was made with."""
    made = sidecar.get(SETTINGS, {})
    return [n for n, digest in made.items() if recorded_digest(output, n) not in (None, digest)]


@functools.lru_cache(maxsize=256)
def _digest_of(path: Path, *_: int) -> str | None:
    """As long as the file is the same one, it is read once."""
    known = read_sidecar(path)
    return None if known is None else settings_digest(known)


def _read_record(path: Path) -> dict[str, Any] | None:
    """Content of a settings record, None where it is damaged."""
    patience = time.monotonic() + PATIENCE
    while (known := read_sidecar(path)) is None and time.monotonic() < patience:
        # without hard links, another process may not have written all of it yet
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > PATIENCE:
                break
        time.sleep(0.02)
    return known


def _differences(known: dict[str, Any] | None, wanted: dict[str, Any]) -> list[str]:
    """Settings that differ from the recorded ones, in words."""
    recorded = known or {}
    return [
        f'{key} was {recorded.get(key)!r:.60} and is now {wanted.get(key)!r:.60}'
        for key in {**recorded, **wanted}
        if recorded.get(key) != wanted.get(key)
    ]


def _refusal(
    path: Path, known: dict[str, Any] | None, wanted: dict[str, Any], differences: list[str]
) -> str:
    """Why settings cannot be used while there are outputs of others."""
    output, name = path.parents[2], path.stem
    if known is None:
        return (
            f'{path} is damaged, so the settings of the outputs of {name} are not known: if they '
            f'are the present ones, remove this file; if not, use another output folder.'
        )
    if known.get(VERSION) != wanted.get(VERSION):
        return (
            f'{output} holds outputs of {name} by another version of bids_brainfm, whose '
            f'numbers differ (results version {known.get(VERSION, 1)}, now '
            f'{wanted.get(VERSION)}): add --recompute to make them again, or use another '
            f'output folder.'
        )
    return (
        f'{output} holds outputs of {name} made with other settings '
        f'({"; ".join(differences)}): use the same settings, or another output folder.'
    )
