"""The PyBIDS index of an input dataset: made once, kept whole, used by many processes."""

import contextlib
import hashlib
import json
import re
import shutil
import sqlite3
import uuid
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bids_brainfm.errors import BrainfmError

if TYPE_CHECKING:
    from bids.layout import BIDSLayout


def index(root: Path, participants: Collection[str], database_dir: Path) -> 'BIDSLayout':
    """Index a dataset with PyBIDS, without metadata, other participants or anatomy.

    The index is kept in `database_dir`, never in the dataset, and apart from those of other
    datasets and participants: PyBIDS takes both from an index that it finds. Raises BrainfmError
    where it cannot be made or read.
    """
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    of = json.dumps([str(root.resolve()), sorted(participants)])
    folder = database_dir / hashlib.sha256(of.encode()).hexdigest()[:12]
    kept = folder / 'layout_index.sqlite'

    ignore: list[str | re.Pattern[str]] = ['code', 'logs', 'sourcedata', 'derivatives']
    ignore.append(re.compile(r'/(anat|dwi|figures|fmap|log)/'))
    if participants:
        wanted = '|'.join(map(re.escape, participants))
        ignore.append(re.compile(rf'^/sub-(?!({wanted})(/|$))'))
    indexer = BIDSLayoutIndexer(validate=False, index_metadata=False, ignore=ignore)
    config = ['bids', 'derivatives']
    layout = partial(BIDSLayout, root, validate=False, config=config, indexer=indexer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_index(kept):
            # under another name, or a process that runs at the same time would find half of it
            part = folder / uuid.uuid4().hex
            layout(database_path=part)
            (part / kept.name).replace(kept)
            shutil.rmtree(part)
        return layout(database_path=folder)
    except Exception as error:  # of the database and of the file system below it
        reason = str(error).partition('\n')[0]
        raise BrainfmError(
            f'The PyBIDS index in {database_dir} cannot be used ({reason}): remove it, make space '
            f'there, or name another place with --bids-database-dir.'
        ) from error


def _is_index(path: Path) -> bool:
    """Whether a file is a whole index: no damaged database, and one with files in it."""
    if not path.is_file():
        return False
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            (state,) = database.execute('PRAGMA quick_check(1)').fetchone()
            return state == 'ok' and bool(database.execute('SELECT 1 FROM files').fetchone())
    except sqlite3.DatabaseError:
        return False
