"""Records of the settings behind the outputs of a folder, which must not be mixed."""

import contextlib
import json
import os
import uuid
from pathlib import Path

from bids_brainfm.bids.files import _plain, atomic, write_text
from bids_brainfm.bids.freshness import read_sidecar
from bids_brainfm.errors import BrainfmError


def claim_settings(output: Path, name: str, settings: dict, pattern: str) -> None:
    """Record the settings behind one kind of output, or check that they are the recorded ones.

    The first process to write the record wins; all others must agree with it, as long as there
    are outputs of this kind.

    Parameters
    ----------
    output : Path
    name : str
        What the settings are for, e.g. ``atlas-A424`` or ``desc-brainlm111m``.
    settings : dict
        What JSON can hold.
    pattern : str
        Glob of the outputs of this kind below a participant's folder.

    Raises
    ------
    BrainfmError
        There are outputs made with other settings; the sentence gives both.
    """
    path = output / 'logs' / 'settings' / f'{name}.json'
    text = json.dumps(settings, indent=2, default=_plain) + '\n'
    wanted = json.loads(text)
    if not path.is_file():
        with atomic(path.with_name(f'{name}.{uuid.uuid4().hex}')) as temporary:
            temporary.write_text(text)
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(temporary, path)
            temporary.unlink()
    known = read_sidecar(path)
    recorded = known or {}
    differences = [
        f'{key} was {recorded.get(key)!r:.60} and is now {wanted.get(key)!r:.60}'
        for key in {**recorded, **wanted}
        if recorded.get(key) != wanted.get(key)
    ]
    if not differences:
        return
    if next(output.glob(f'sub-*/**/{pattern}'), None) is not None:
        if known is None:
            raise BrainfmError(
                f'{path} is damaged, and says no longer with which settings the outputs of {name} '
                f'were made: if with those of now, remove this file; if not, use another output '
                f'folder.'
            )
        raise BrainfmError(
            f'{output} holds outputs of {name} made with other settings '
            f'({"; ".join(differences)}): use the same settings, or another output folder.'
        )
    write_text(path, text)
