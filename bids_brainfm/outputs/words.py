"""Columns, numbers and scores in the words of sidecars and report."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bids_brainfm.analyses.scores import Score
from bids_brainfm.signals.series import Windows


def described(columns: Mapping[str, str] | None = None, /, **more: str) -> dict[str, Any]:
    """Columns of a table as its sidecar describes them."""
    return {name: {'Description': text} for name, text in {**(columns or {}), **more}.items()}


# First columns of tables with one row per window
WINDOW_COLUMNS = {
    'window': {'Description': 'Number of the window, from 0'},
    'onset': {'Description': 'Start of the window, on the time axis of StartTime', 'Units': 's'},
    'duration': {'Description': 'Recorded signal in the window', 'Units': 's'},
    'real': {'Description': 'Proportion of samples that were recorded'},
    'flagged': {'Description': 'Proportion of recorded samples from flagged volumes'},
    'excluded': {
        'Description': 'Whether the window has more flagged volumes than allowed (1) or not (0)'
    },
}


def window_rows(*columns: Iterable[float]) -> list[str]:
    """Values of `WINDOW_COLUMNS`, from onset on, as the first columns of a table.

    >>> window_rows([0.0], [147.0], [1.0], [0.05], [False])
    ['0\\t0\\t147\\t1\\t0.05\\t0']
    """
    text = lambda value: 'n/a' if np.isnan(value) else f'{value:.7g}'
    rows = enumerate(zip(*columns, strict=True))
    return ['\t'.join([str(i), *map(text, row)]) for i, row in rows]


def rows_of(windows: Windows, source: dict[str, Any]) -> list[str]:
    """First columns for windows; flagged is n/a where the run's sidecar does not assess it."""
    assessed = 'NumberOfVolumesFlagged' in source
    flagged = windows.flagged if assessed else np.full(len(windows.data), np.nan)
    times = windows.onset, windows.duration, windows.real
    return window_rows(*times, flagged, windows.excluded)


def dimension_names(size: int) -> list[str]:
    """Columns of an embedding, of equal width: dim00, dim01, ..."""
    return [f'dim{i:0{len(str(size))}d}' for i in range(size)]


def score_metadata(pooled: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    """Pooled scores by the name of the method, as sidecars have them."""
    return {
        n: {'R2': float(s.r2), 'r': float(s.r), 'MSE': float(s.mse)} for n, s in pooled.items()
    }


def pooled_scores(sidecar: dict[str, Any]) -> str:
    """R2 of the model and of each baseline, from a sidecar."""
    return ', '.join(f'{as_number(s.get("R2"))} ({n})' for n, s in sidecar['Pooled'].items())


def as_number(value: float | None) -> str:
    """Two digits, or that there is none.

    >>> as_number(0.123), as_number(None), as_number(float('nan'))
    ('0.12', 'n/a', 'n/a')
    """
    return 'n/a' if value is None or value != value else f'{value:.2f}'


def as_words(content: Any) -> str:
    """What a card says in any form; scores may be in units of any size.

    >>> as_words({'mse': 0.001234, 'n': 40, 'by': {'site A': None}})
    'mse 0.00123, n 40, by (site A n/a)'
    """
    if isinstance(content, dict):
        form = lambda value: f'({as_words(value)})' if isinstance(value, dict) else as_words(value)
        return ', '.join(f'{key} {form(value)}' for key, value in content.items())
    if content is None or content != content:
        return 'n/a'
    return f'{content:.3g}' if isinstance(content, float) else str(content)
