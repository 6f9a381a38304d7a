"""What is known of participants: the columns of ``participants.tsv``."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from bids_brainfm.bids.description import read_description
from bids_brainfm.errors import BrainfmError


def read_column(dataset: Path, column: str) -> dict[str, str]:
    """What ``participants.tsv`` says of each participant in a column.

    It is looked for in the dataset, in those that it was made from, and in the raw datasets that
    these lie in.

    Returns
    -------
    dict of str to str
        By label (``01``), as it stands there.

    Raises
    ------
    BrainfmError
        No such table has the column.
    """
    import pandas as pd

    links = read_description(dataset).get('DatasetLinks', {}).values()
    sources = [Path(unquote(urlsplit(link).path)) for link in links]
    folders = [
        dataset,
        *sources,
        *(p.parents[1] for p in sources if p.parent.name == 'derivatives'),
    ]
    columns = []
    for folder in folders:
        path = folder / 'participants.tsv'
        if path.is_file():
            frame = pd.read_csv(path, sep='\t', dtype=str, keep_default_na=False)
            if column in frame and 'participant_id' in frame:
                labels = frame['participant_id'].str.removeprefix('sub-')
                return dict(zip(labels, frame[column], strict=True))
            columns += list(frame)
    raise BrainfmError(
        f'no participants.tsv has a column {column} (the columns are '
        f'{", ".join(dict.fromkeys(columns)) or "none"}); looked for it in '
        f'{", ".join(map(str, folders))}.'
    )
