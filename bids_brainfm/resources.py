"""Fetched files: where they are kept, how they get there, and their checksums."""

import contextlib
import functools
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
        return Path(chosen).absolute()
    if cache := os.environ.get('XDG_CACHE_HOME'):
        return Path(cache, 'bids_brainfm').absolute()
    try:
        user = Path.home()
    except RuntimeError:  # a container's user without a home folder
        user = Path('/')
    return user / '.cache' / 'bids_brainfm'


@dataclass(frozen=True)
class Resource:
    """A file to fetch: where it goes, and what is known of it."""

    name: str  # file name at its source
    target: Path
    url: str | None = None  # None for files that can only be supplied
    # Where unknown, that of the first copy is recorded in TARGET.sha256 and holds from then on
    sha256: str | None = None
    optional: bool = False  # may stay absent


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with Path(path).open('rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def recorded_sha256(target: Path) -> str | None:
    """The checksum recorded when the file was fetched, None where there is none."""
    record = _add_suffix(target, '.sha256')
    text = record.read_text(errors='replace') if record.is_file() else ''
    return next(iter(text.split()), None)


def inside(folder: Path, name: str) -> Path:
    """Path of a file that a card names, refused where it is not below the folder of the card."""
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
    resources: Iterable[Resource], source_dir: Path | None = None,
    command: str = 'bids_brainfm_models fetch NAME',
) -> None:  # fmt: skip
    """Fetch every resource to its target; what is there and right is left alone.

    With `source_dir` the files are taken from this folder and its subfolders instead of the
    internet: by sha256, or by name where none is known. `command` is what the user gave. Where
    something is refused, what was fetched before stays; a wrong file never gets its final name.
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
                _download(resource, resource.url, command)
            elif not resource.optional:
                raise BrainfmError(
                    f'{resource.name} has no public address: copy it here and run '
                    f'`{command} --from DIR`.'
                )
    except OSError as error:
        raise BrainfmError(
            f'{error.filename} cannot be read or written ({error.strerror}): check its '
            'permissions, or set BIDS_BRAINFM_HOME to another folder.'
        ) from None


def forget(resource: Resource) -> None:
    """Remove a file that turned out to be wrong, and the record of its checksum."""
    resource.target.unlink(missing_ok=True)
    _add_suffix(resource.target, '.sha256').unlink(missing_ok=True)


def _add_suffix(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _record(target: Path, sha256: str | None = None) -> None:
    """Write ``TARGET.sha256`` in the form that ``sha256sum -c`` reads, unless it is there."""
    record = _add_suffix(target, '.sha256')
    sha256 = sha256 or recorded_sha256(target) or sha256_of(target)
    line = f'{sha256}  {target.name}\n'
    if not record.is_file() or record.read_text(errors='replace') != line:
        # A shared home may be read-only for those who only use it.
        with contextlib.suppress(PermissionError):
            record.write_text(line)


def _settle(part: Path, resource: Resource, source: str | Path) -> None:
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


def _take_from(folder: Path, wanted: list[Resource]) -> None:
    """Copy resources out of a folder, rather from itself than below; name all it does not hold."""
    if not folder.is_dir():
        raise BrainfmError(f'--from {folder} is not a folder.')
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    digest = functools.cache(sha256_of)
    lacking = []
    for resource in wanted:
        named = [path for path in files if path.name == resource.name]
        if resource.sha256:
            # Hashing a large folder takes minutes, so files of the right name are tried first.
            tried = sorted(files, key=lambda path: path not in named)
            match = next((path for path in tried if digest(path) == resource.sha256), None)
        else:
            own = [path for path in named if path.parent == folder] or named
            if len(own) > 1:
                raise BrainfmError(
                    f'{folder} holds {len(own)} files called {own[0].name} '
                    f'({", ".join(str(path.relative_to(folder)) for path in own)}): give the '
                    'subfolder that is meant.'
                )
            match = next(iter(own), None)
        if match is not None:
            copy = _add_suffix(resource.target, '.copy')
            shutil.copyfile(match, copy)
            _settle(copy, resource, match)
        elif resource.sha256 and named:
            raise BrainfmError(
                f'{named[0]} has sha256 {digest(named[0])} where {resource.sha256} was expected, '
                f'and no other file beside it has that: get {resource.name} from its publisher '
                'again.'
            )
        elif not resource.optional:
            known = f' (sha256 {resource.sha256})' if resource.sha256 else ''
            lacking.append(resource.name + known)
    if lacking:
        raise BrainfmError(f'{folder} does not hold {", ".join(lacking)}: add and try again.')


def _download(resource: Resource, url: str, command: str) -> None:
    """Download to ``TARGET.part``, going on where an earlier attempt stopped.

    RFC 9110: ``Range`` asks for the rest, ``If-Range`` for the whole if the file has changed.
    """
    import http.client
    import urllib.error
    import urllib.request

    from tqdm import tqdm
    from tqdm.utils import CallbackIOWrapper

    part = _add_suffix(resource.target, '.part')
    tag = _add_suffix(part, '.version')
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={'User-Agent': 'bids_brainfm'})
    if start and tag.is_file():
        request.add_header('Range', f'bytes={start}-')
        request.add_header('If-Range', tag.read_text())
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            start = start if answer.status == 206 else 0
            length = answer.headers.get('Content-Length')
            total = start + int(length) if length else None
            tag.unlink(missing_ok=True)
            if version := answer.headers.get('ETag') or answer.headers.get('Last-Modified'):
                tag.write_text(version)
            style = {'unit': 'B', 'unit_scale': True, 'disable': None, 'leave': False}
            bar = tqdm(desc=resource.name, total=total, initial=start, **style)
            with part.open('ab' if start else 'wb') as stream, bar:
                shutil.copyfileobj(CallbackIOWrapper(bar.update, answer), stream, BLOCK)
                received = stream.tell()
        if total is not None and received != total:
            raise http.client.IncompleteRead(b'', total - received)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        if getattr(e, 'code', None) == 416:  # the part is as long as the file, or longer
            part.unlink()
            return _download(resource, url, command)
        kept = ' (the part received is kept, the next attempt goes on from there)'
        raise BrainfmError(
            f'{url} could not be fetched ({getattr(e, "reason", None) or e})'
            f'{kept if part.is_file() else ""}: try again, or run `{command}` on a machine with '
            f'internet, copy the file here and run `{command} --from DIR`.'
        ) from None
    tag.unlink(missing_ok=True)
    _settle(part, resource, url)
