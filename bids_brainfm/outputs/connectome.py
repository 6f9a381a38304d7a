"""Functional connectivity of a run: the baseline that every embedding is compared with."""

from pathlib import Path
from typing import Any

import numpy as np

from bids_brainfm.bids.files import write_matrix
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.outputs.products import display_order, save_figure
from bids_brainfm.outputs.series_context import SeriesContext
from bids_brainfm.outputs.tasks import Place, SeriesTask
from bids_brainfm.outputs.words import WINDOW_COLUMNS, dimension_names, window_rows
from bids_brainfm.reports.report import Figure
from bids_brainfm.signals.connectome import LABEL, connectome_vector

FIGURES = {'connectivity': Figure('Functional connectivity',
    'Pearson correlation of the denoised parcel series over the volumes that are not flagged, the '
    'baseline that every embedding is to be compared with. The dashed line in the histogram is '
    'the median over pairs of parcels.')
}  # fmt: skip


def companions(run: BoldRun, place: Place, task: SeriesTask | None = None) -> list[Path]:
    """The same values as an embedding of the run."""
    return [Place(place.output, place.atlas, LABEL).path(run, 'embedding')]


def compute(context: SeriesContext) -> np.ndarray:
    """Pearson correlations between parcels, (P, P) float32; NaN for parcels that are n/a."""
    return context.relmat


def write(context: SeriesContext, result: np.ndarray) -> None:
    """Write matrix and vector, figure and sidecars."""
    from bids_brainfm.reports.figures import connectome as figures

    run, place, atlas, series = context.run, context.task.place, context.atlas, context.series
    table, (embedding,) = place.table(run, 'connectome'), companions(run, place)
    names, vector = list(atlas.names), connectome_vector(result)
    write_matrix(table, result, ['Node', *names], names)
    flagged = series.flagged.mean() if context.assessed else np.nan
    length = len(series.data) * series.tr
    rows = window_rows([series.start], [length], [1.0], [flagged], [context.excluded])
    header = [*WINDOW_COLUMNS, *dimension_names(len(vector))]
    write_matrix(embedding, vector[None], header, rows)
    order, label = display_order(atlas.xyz)
    drawn = figures.connectivity(result, order, order_label=label)
    save_figure(drawn, place.figure(run, 'connectivity'))
    used: dict[str, Any] = {
        'NumberOfSamples': np.count_nonzero(~series.flagged),
        'DegreesOfFreedom': context.degrees_of_freedom,
    }
    content: dict[str, Any] = {
        'Description': 'Functional connectivity as an embedding of the whole run: the '
        'baseline to compare model embeddings with.',
        'Model': {'Name': LABEL, 'Description': 'Pearson correlations of all pairs of parcels'},
        'Pooling': 'upper triangle of the relmat, row by row, without the diagonal',
        'Warnings': context.warnings,
    }
    context.write_sidecar(embedding, content | used)
    content = {
        'Description': 'Functional connectivity between parcels.',
        'RelationshipMeasure': 'Pearson correlation', 'Weighted': True, 'Directed': False,
        'ValidDiagonal': True, 'StorageFormat': 'Full',
    }  # fmt: skip
    context.write_sidecar(table, content | used)
