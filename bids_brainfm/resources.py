"""Fetched files: where they are kept, how they get there, and their checksums."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bids_brainfm.errors import BrainfmError

BLOCK = 1 << 20
TIMEOUT_S = 30


def home() -> Path:
    """Folder of fetched weights and atlases: ``$BIDS_BRAINFM_HOME`` or the user's cache."""
    if chosen := os.environ.get('BIDS_BRAINFM_HOME'):
        return Path(chosen)
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(cache) / 'bids_brainfm'


@dataclass(frozen=True)
class Resource:
    """A file to be had: its place, and what is known of it.

    Attributes
    ----------
    name : str
        File name by which it is known at its source.
    target : Path
        Where it shall lie.
    url : str or None
        Public address; None for files that can only be supplied.
    sha256 : str or None
        Checksum of its content; where unknown, that of the first copy is recorded in
        ``TARGET.sha256`` and holds from then on.
    optional : bool
        A file that may stay absent.
    """

    name: str
    target: Path
    url: str | None = None
    sha256: str | None = None
    optional: bool = False


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with Path(path).open('rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def recorded_sha256(target: Path) -> str | None:
    """The checksum recorded when the file was fetched, None where there is none."""
    record = _beside(target, '.sha256')
    return next(iter(record.read_text().split()), None) if record.is_file() else None


def inside(folder: Path, name: str) -> Path:
    """Path of a file that a card names, in the folder where the card's files lie.

    Raises
    ------
    BrainfmError
        It would lie elsewhere.
    """
    path = folder / name
    if Path(os.path.normpath(folder)) not in Path(os.path.normpath(path)).parents:
        raise BrainfmError(
            f'{name!r} in a card leads out of {folder}: a card may name files below it only.'
        )
    return path


def is_present(resource: Resource) -> bool:
    """Whether the file is in its place with the content it should have."""
    if not resource.target.is_file():
        return False
    expected = resource.sha256 or recorded_sha256(resource.target)
    return expected is None or sha256_of(resource.target) == expected


def fetch(
    resources: Iterable[Resource],
    source_dir: Path | None = None,
    command: str = 'bids_brainfm_models fetch NAME',
) -> None:
    """Bring every resource to its place; what is there and right is left alone.

    Parameters
    ----------
    resources : iterable of Resource
    source_dir : Path, optional
        Take the files from this folder (searched with its subfolders) instead of the internet:
        by sha256 whatever their names, by name where no sha256 is known.
    command : str
        The command the user gave, repeated in the sentence that says what to do.

    Raises
    ------
    BrainfmError
        Something cannot be reached, found or written, or has other content than it should. What
        was brought before stays; a wrong file never gets its final name.
    """
    wanted = []
    for resource in resources:
        if is_present(resource):
            _record(resource.target)
        else:
            wanted.append(resource)
    try:
        for resource in wanted:
            resource.target.parent.mkdir(parents=True, exist_ok=True)
        if source_dir is not None:
            _take_from(Path(source_dir), wanted)
            return
        for resource in wanted:
            if resource.url:
                _download(resource, command)
            elif not resource.optional:
                raise BrainfmError(
                    f'{resource.name} has no public address: copy it here and run '
                    f'`{command} --from DIR`.'
                )
    except OSError as error:
        raise BrainfmError(
            f'{error.filename} cannot be read or written ({error.strerror}): mend that, or set '
            'BIDS_BRAINFM_HOME to another folder.'
        ) from None


def forget(resource: Resource) -> None:
    """Remove a file that turned out to be a wrong one, and the record of its checksum."""
    resource.target.unlink(missing_ok=True)
    _beside(resource.target, '.sha256').unlink(missing_ok=True)


def _beside(target, suffix):
    return target.with_name(target.name + suffix)


def _record(target, sha256=None):
    """Write ``TARGET.sha256`` in the form that ``sha256sum -c`` reads, unless it is there."""
    record = _beside(target, '.sha256')
    sha256 = sha256 or recorded_sha256(target) or sha256_of(target)
    line = f'{sha256}  {target.name}\n'
    if not record.is_file() or record.read_text() != line:
        # A shared home may be read-only for those who only use it.
        with contextlib.suppress(PermissionError):
            record.write_text(line)


def _settle(part, resource, source):
    """Give a complete file its final name, if its content is right."""
    found = sha256_of(part)
    if resource.sha256 and found != resource.sha256:
        part.unlink()
        raise BrainfmError(
            f'{resource.name} from {source} has sha256 {found} where {resource.sha256} was '
            'expected; it was not kept: fetch it again or get it from its publisher.'
        )
    part.replace(resource.target)
    _record(resource.target, found)


def _take_from(folder, wanted):
    """Copy resources out of a folder; name all that it does not hold."""
    if not folder.is_dir():
        raise BrainfmError(f'--from {folder} is not a folder.')
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    hashes = {}
    lacking = []
    for resource in wanted:
        if resource.sha256:
            match = _by_sha256(resource, files, hashes)
        else:
            match = _by_name(resource, files, folder)
        if match is not None:
            copy = _beside(resource.target, '.copy')
            shutil.copyfile(match, copy)
            _settle(copy, resource, match)
        elif not resource.optional:
            known = f' (sha256 {resource.sha256})' if resource.sha256 else ''
            lacking.append(resource.name + known)
    if lacking:
        raise BrainfmError(f'{folder} does not hold {", ".join(lacking)}: add and try again.')


def _by_sha256(resource, files, hashes):
    """The file with the right content; `hashes` remembers what has been read."""
    # Hashing a large folder takes minutes, so files of the right name are tried first.
    for path in sorted(files, key=lambda path: path.name != resource.name):
        if path not in hashes:
            hashes[path] = sha256_of(path)
        if hashes[path] == resource.sha256:
            return path
    for path in files:
        if path.name == resource.name:
            raise BrainfmError(
                f'{path} has sha256 {hashes[path]} where {resource.sha256} was expected, and no '
                f'other file beside it has that: get {resource.name} from its publisher again.'
            )
    return None


def _by_name(resource, files, folder):
    """The file of the right name: the folder's own, else the only one in its subfolders."""
    named = [path for path in files if path.name == resource.name]
    if folder / resource.name in named:
        return folder / resource.name
    if len(named) > 1:
        raise BrainfmError(
            f'{folder} holds {len(named)} files called {resource.name} '
            f'({", ".join(str(path.relative_to(folder)) for path in named)}): give the subfolder '
            'that is meant.'
        )
    return named[0] if named else None


def _download(resource, command):
    """Download to ``TARGET.part``, going on where an earlier attempt stopped.

    RFC 9110: ``Range`` asks for the rest, ``If-Range`` for the whole if the file has changed.
    """
    import http.client
    import urllib.error
    import urllib.request

    part, tag = _beside(resource.target, '.part'), _beside(resource.target, '.part.version')
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(resource.url, headers={'User-Agent': 'bids_brainfm'})
    if start and tag.is_file():
        request.add_header('Range', f'bytes={start}-')
        request.add_header('If-Range', tag.read_text())
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            resumed = answer.status == 206
            start = start if resumed else 0
            length = answer.headers.get('Content-Length')
            total = start + int(length) if length else None
            tag.unlink(missing_ok=True)
            if version := answer.headers.get('ETag') or answer.headers.get('Last-Modified'):
                tag.write_text(version)
            received = _receive(answer, part, resource.name, start, total)
        if total is not None and received != total:
            raise http.client.IncompleteRead(b'', total - received)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        if getattr(e, 'code', None) == 416:  # the part is as long as the file, or longer
            part.unlink()
            return _download(resource, command)
        kept = ' (the part received is kept, the next attempt goes on from there)'
        raise BrainfmError(
            f'{resource.url} could not be fetched ({getattr(e, "reason", None) or e})'
            f'{kept if part.is_file() else ""}: try again, or run `{command}` on a machine with '
            f'internet, copy the file here and run `{command} --from DIR`.'
        ) from None
    tag.unlink(missing_ok=True)
    _settle(part, resource, resource.url)


def _receive(answer, part, name, start, total):
    """Append (or write anew) what the server sends; the size of the part then."""
    from tqdm import tqdm

    bar = tqdm(
        total=total, initial=start, desc=name, unit='B', unit_scale=True, disable=None, leave=False
    )
    with part.open('ab' if start else 'wb') as stream, bar:
        while block := answer.read(BLOCK):
            stream.write(block)
            bar.update(len(block))
        return stream.tell()
